"""Sparse matrices of PyTorch and SciPy, and calls of the host with their derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.autograd import Function

from ..cones import Cones
from ..layers import sparse
from ..layers.conic import ConicSolution
from ..layers.direct import curved_part
from ..ops import torch as ops
from ..ops.torch.context import is_recorded
from .calling import not_traced


def is_sparse(matrix: Any) -> bool:
    return sp.issparse(matrix) or (isinstance(matrix, Tensor) and matrix.layout != torch.strided)


_WHY_NOT_TRACED = (
    "sparse programs are solved on the host, by calls that cannot be traced into a graph; give P and A as "
    "dense tensors, or a CvxpyLayer solver=ADMM(), or compile the model without fullgraph=True"
)


on_host = not_traced(_WHY_NOT_TRACED)


@on_host
def solve_qp(P, q, A, l, u, warm, like, **options) -> ConicSolution:
    layer = sparse.sparse_layer(P, q, A, Cones(), **options)
    matrices = _entries(P, like), _entries(A, like)
    return sparse.solve_sparse_box(ops, HOST, layer, matrices, (q, l, u), warm, like)


@on_host
def solve_conic(P, q, A, b, cones, warm, like, **options) -> ConicSolution:
    layer = sparse.sparse_layer(P, q, A, curved_part(cones), **options)
    matrices = _entries(P, like), _entries(A, like)
    return sparse.solve_sparse_cone(ops, HOST, layer, cones, matrices, (q, b), warm, like)


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


def _fold(info, dims, arrays) -> list[Tensor]:
    """The mapped axis in front, of length 1 where an array is not mapped."""
    return [x[None] if dim is None else x.movedim(dim, 0) for x, dim in zip(arrays, dims, strict=True)]


class _Call(Function):
    """A function of NumPy arrays, without derivative."""

    @staticmethod
    def forward(function, like, *arrays):
        results = function(*(x.numpy(force=True) for x in arrays))
        return tuple(torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in results)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info, in_dims, function, like, *arrays):
        results = _Call.apply(function, like, *_fold(info, in_dims[2:], arrays))
        return results, (0,) * len(results)


class _Host:
    @staticmethod
    def call(function, shapes, *arrays):
        if is_recorded():
            raise NotImplementedError(_WHY_NOT_TRACED)
        like = next(x for x in arrays if x.is_floating_point()).detach()
        return list(_Call.apply(function, like, *(x.detach() for x in arrays)))


HOST = _Host()
