"""Sparse matrices of JAX and SciPy, and calls of the host with their derivatives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax import lax
from jax.experimental.sparse import BCOO, BCSR, JAXSparse

from ..cones import Cones
from ..layers import sparse
from ..layers.conic import ConicSolution
from ..layers.direct import curved_part
from ..ops import jax as ops
from .checked import run_checked


def is_sparse(matrix: Any) -> bool:
    return sp.issparse(matrix) or isinstance(matrix, JAXSparse)


def solve_qp(P, q, A, l, u, warm, like, **options) -> ConicSolution:
    layer = sparse.sparse_layer(P, q, A, Cones(), **options)
    matrices = _entries(P, like), _entries(A, like)
    return run_checked(_solve_box, layer, (matrices, (q, l, u)), warm, like)


def solve_conic(P, q, A, b, cones, warm, like, **options) -> ConicSolution:
    layer = sparse.sparse_layer(P, q, A, curved_part(cones), **options)
    matrices = _entries(P, like), _entries(A, like)
    return run_checked(functools.partial(_solve_cone, cones), layer, (matrices, (q, b)), warm, like)


@functools.partial(jax.jit, static_argnums=0)
def _solve_box(layer, data, warm, like):
    return sparse.solve_sparse_box(ops, HOST, layer, *data, warm, like)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve_cone(cones, layer, data, warm, like):
    return sparse.solve_sparse_cone(ops, HOST, layer, cones, *data, warm, like)


def _entries(matrix: Any, like: jax.Array) -> sparse.Entries:
    if matrix is None:
        matrix = sp.coo_array((0, 0))
    if sp.issparse(matrix):
        matrix = sp.coo_array(matrix)
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
    inside = (matrix.indices < np.array([matrix.shape], matrix.indices.dtype)).all(-1)
    rows, columns = jnp.where(inside[:, None], matrix.indices, 0).T
    return sparse.Entries(jnp.where(inside, matrix.data, 0.0), rows, columns)


class _Host:
    @staticmethod
    def call(function, shapes, *arrays):
        arrays = [lax.stop_gradient(x) for x in arrays]
        dtype = next(x.dtype for x in arrays if jnp.issubdtype(x.dtype, jnp.floating))
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        run = lambda *values: [np.asarray(x, dtype) for x in function(*map(np.asarray, values))]
        return jax.pure_callback(run, results, *arrays, vmap_method="expand_dims")


HOST = _Host()
