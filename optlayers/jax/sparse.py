"""Programs with sparse matrices of JAX and SciPy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.experimental.sparse import BCOO, BCSR, JAXSparse

from ..layers import sparse
from ..layers.conic import ConicSolution
from ..ops import jax as ops
from ..solvers.sparse import check_triangles
from .checked import run_checked


def is_sparse(matrix: Any) -> bool:
    return sp.issparse(matrix) or isinstance(matrix, JAXSparse)


def solve(cones, curved, P, A, vectors, warm, like, *choices) -> ConicSolution:
    layer = sparse.sparse_layer(P, vectors[0], A, curved, *choices)
    matrices = _entries(P, like, is_hessian=True), _entries(A, like)
    return run_checked(functools.partial(_solve, cones), layer, (matrices, vectors), warm, like)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve(cones, layer, data, warm, like):
    return sparse.solve_sparse(ops, layer, cones, *data, warm, like)


def _entries(matrix: Any, like: jax.Array, is_hessian: bool = False) -> sparse.Entries:
    if matrix is None:
        matrix = sp.coo_array((0, 0))
    if sp.issparse(matrix):
        matrix = sp.coo_array(matrix)
        _check(np.stack(matrix.coords, -1), is_hessian)
        values, indices = ops.constant(np.asarray(matrix.data, float), like), [matrix.row, matrix.col]
        return sparse.Entries(values, *(ops.constant(i, like) for i in indices))
    if isinstance(matrix, BCSR):
        matrix = matrix.to_bcoo()
    if not isinstance(matrix, JAXSparse):
        rows, columns = (ops.constant(i.ravel(), like) for i in np.indices(matrix.shape))
        return sparse.Entries(matrix.reshape(-1), rows, columns)
    if not isinstance(matrix, BCOO) or matrix.n_batch or matrix.n_dense:
        raise ValueError(f"sparse matrices must be BCOO or BCSR without batch and dense axes, got {matrix!r}")
    # Entries outside the matrix are padding.
    is_inside = lambda indices: (indices < np.array([matrix.shape], indices.dtype)).all(-1)
    if not isinstance(matrix.indices, jax.core.Tracer):
        places = np.asarray(matrix.indices)
        _check(places[is_inside(places)], is_hessian)
    inside = is_inside(matrix.indices)
    rows, columns = jnp.where(inside[:, None], matrix.indices, 0).T
    return sparse.Entries(jnp.where(inside, matrix.data, 0.0), rows, columns)


def _check(places: np.ndarray, is_hessian: bool) -> None:
    """Raise for places (N, 2) that make no matrix: errors of the host's call would come without a message."""
    if (places < 0).any():
        raise ValueError(f"indices of a sparse matrix must not be negative, got {places.min()}")
    if is_hessian:
        check_triangles(*places.T)
