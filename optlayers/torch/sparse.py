"""Programs with sparse matrices of PyTorch and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from ..layers import sparse
from ..layers.conic import ConicSolution
from ..ops import torch as ops
from .calling import not_traced


def is_sparse(matrix: Any) -> bool:
    return sp.issparse(matrix) or (isinstance(matrix, Tensor) and matrix.layout != torch.strided)


on_host = not_traced(ops.HOST_IS_NOT_TRACED)


@on_host
def solve(cones, curved, P, A, vectors, warm, like, *choices) -> ConicSolution:
    layer = sparse.sparse_layer(P, vectors[0], A, curved, *choices)
    matrices = _entries(P, like), _entries(A, like)
    return sparse.solve_sparse(ops, layer, cones, matrices, vectors, warm, like)


def _entries(matrix: Any, like: Tensor) -> sparse.Entries:
    if matrix is None:
        matrix = sp.coo_array((0, 0))
    if sp.issparse(matrix):
        matrix = sp.coo_array(matrix)
        values, indices = ops.constant(np.asarray(matrix.data, float), like), [matrix.row, matrix.col]
        return sparse.Entries(values, *(ops.constant(i.astype(np.int64), like) for i in indices))
    if matrix.layout == torch.strided:
        rows, columns = (ops.constant(i.ravel(), like) for i in np.indices(tuple(matrix.shape)))
        return sparse.Entries(matrix.reshape(-1), rows, columns)
    if matrix.layout in (torch.sparse_coo, torch.sparse_csr) and matrix.dense_dim():
        raise ValueError(
            f"both axes of a sparse tensor must be sparse, got {matrix.dense_dim()} dense; "
            "give matrix.to_dense().to_sparse()"
        )
    if matrix.layout == torch.sparse_coo:
        matrix = matrix.coalesce()
        return sparse.Entries(matrix.values(), *matrix.indices())
    if matrix.layout == torch.sparse_csr:
        counts = matrix.crow_indices().diff()
        rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
        return sparse.Entries(matrix.values(), rows, matrix.col_indices().to(torch.int64))
    raise ValueError(f"sparse tensors must have the COO or CSR layout, got {matrix.layout}")
