"""Arithmetic, linear algebra and rows of arrays."""

from __future__ import annotations

import builtins
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .context import alike

where, maximum, minimum, sqrt, exp, log = jnp.where, jnp.maximum, jnp.minimum, jnp.sqrt, jnp.exp, jnp.log
isfinite, any, all, reshape, broadcast_to = jnp.isfinite, jnp.any, jnp.all, jnp.reshape, jnp.broadcast_to
sin, cos, arctan2, moveaxis = jnp.sin, jnp.cos, jnp.arctan2, jnp.moveaxis
inf, nan = jnp.inf, jnp.nan
real, imag, complex_number = jnp.real, jnp.imag, lax.complex


def constant(values, like):
    return jnp.array(values, dtype=like.dtype if values.dtype.kind == "f" else jnp.int32)


def full(shape, value, like):
    # Unlike jnp.full, under shard_map this counts as differing by device if `like` does.
    return lax.full_like(like, value, shape=tuple(shape))


def eye(n, like):
    return jnp.eye(n, dtype=like.dtype)


def eps(x):
    return float(jnp.finfo(x.dtype).eps)


def widest(x):
    return x.astype(jnp.result_type(complex if jnp.iscomplexobj(x) else float))


def cast(x, like):
    return x.astype(np.result_type(like.dtype, np.complex64) if jnp.iscomplexobj(x) else like.dtype)


def to_int(x):
    return x.astype(jnp.int32)


def sum(x, axis, keepdims=False):
    return jnp.sum(x, axis=axis, keepdims=keepdims)


def norm(x):
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def multiply_add(x, y, z):
    return x + y * z


def weighted_sum(weights, arrays, start=None):
    terms = [w * x for w, x in zip(weights, arrays, strict=True) if w != 0]
    total = builtins.sum(terms[1:], terms[0])
    return total if start is None else start + total


def amax(x, axis, keepdims=False):
    if x.shape[axis] == 0:
        return jnp.sum(x, axis=axis, keepdims=keepdims)
    # XLA's maximum of long rows of a large batch forgets NaN on the CPU.
    is_lost = jnp.any(jnp.isnan(x), axis=axis, keepdims=keepdims)
    return jnp.where(is_lost, jnp.nan, jnp.max(x, axis=axis, keepdims=keepdims))


def concat(arrays, axis):
    return jnp.concatenate(alike(list(arrays)), axis=axis)


def stack(arrays, axis):
    return jnp.stack(alike(list(arrays)), axis=axis)


def put(x, index, value):
    return lax.dynamic_update_index_in_dim(x, value, index, 0)


def take(x, indices, axis=-1):
    return jnp.take(x, indices, axis=axis)


def argsort(x):
    return to_int(jnp.argsort(x, -1))


def rows_in_use(A, weights):
    return A, weights


def scatter_add(values, indices, size, start=None):
    start = jnp.zeros((), dtype=values.dtype) if start is None else start
    return jnp.broadcast_to(start, (*values.shape[:-1], size)).at[..., indices].add(values)


def diagonal(x):
    return jnp.diagonal(x, axis1=-2, axis2=-1)


def add_diagonal(x, values):
    identity = jnp.eye(x.shape[-1], dtype=x.dtype).reshape((1,) * (x.ndim - 2) + x.shape[-2:])
    return x + jnp.broadcast_to(values, x.shape[:-1]).astype(x.dtype)[..., None] * identity


# n n k, for systems with k right-hand sides, summed over the matrices in one call of LAPACK. From some size
# on, jaxlib 0.10 spreads a call over XLA's threads, on one of which it waits for its parts: with as many as
# there are threads, as on several devices of one CPU, all wait for ever. Smaller calls are not spread, and no
# slower on one thread.
FEW = 2**16


def _few_at_a_time(function, *arrays):
    """`function` of batches of matrices, where one matrix may serve the whole batch."""
    lead = np.broadcast_shapes(*(x.shape[:-2] for x in arrays))
    size = arrays[0].shape[-1] ** 2 * arrays[-1].shape[-1]
    batch, rows = math.prod(lead), builtins.max(FEW // builtins.max(size, 1), 1)
    if batch <= rows or jax.default_backend() != "cpu":
        return function(*arrays)
    rows = next(rows for rows in range(rows, 0, -1) if batch % rows == 0)
    is_shared = [math.prod(x.shape[:-2]) == 1 for x in arrays]
    own = [x.shape[-2:] for x in arrays]
    blocks = [
        None if shared else broadcast_to(x, (*lead, *shape)).reshape(-1, rows, *shape)
        for x, shape, shared in zip(arrays, own, is_shared, strict=True)
    ]

    def work(blocks):
        parts = zip(blocks, arrays, own, strict=True)
        return function(*(x.reshape(1, *shape) if part is None else part for part, x, shape in parts))

    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[2:]), lax.map(work, blocks))


def cholesky(x):
    factor = _few_at_a_time(partial(lax.linalg.cholesky, symmetrize_input=False), x)
    # NaN need not reach the diagonal's start, nor the other triangle, by itself.
    failed = jnp.isnan(diagonal(factor)).any(-1)
    return jnp.where(failed[..., None, None], jnp.nan, factor)


def cholesky_solve(factor, rhs):
    return _few_at_a_time(lambda factor, rhs: jax.scipy.linalg.cho_solve((factor, True), rhs), factor, rhs)


def inverse_triangular(factor):
    def invert(factor):
        identity = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
        return lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)

    return _few_at_a_time(invert, factor)


def lu_factor(x):
    return _few_at_a_time(jax.scipy.linalg.lu_factor, x)


def lu_solve(factor, rhs, transpose=False):
    solve = lambda lu, pivots, rhs: jax.scipy.linalg.lu_solve((lu, pivots[..., 0]), rhs, int(transpose))
    return _few_at_a_time(solve, factor[0], factor[1][..., None], rhs)


def eigh(x):
    # On a matrix that is not finite LAPACK may return numbers.
    finite = jnp.isfinite(x).all((-2, -1))[..., None]
    values, vectors = _few_at_a_time(partial(jnp.linalg.eigh, symmetrize_input=False), x)
    return jnp.where(finite, values, jnp.nan), jnp.where(finite[..., None], vectors, jnp.nan)


def tree_flatten(tree):
    leaves, structure = jax.tree.flatten(tree)
    return leaves, lambda new: jax.tree.unflatten(structure, list(new))


def put_row(rows, index, row):
    return lax.dynamic_update_index_in_dim(rows, row, index, 1)


def leading(rows, count):
    return rows


def take_rows(x, rows):
    return jnp.take_along_axis(x, rows.reshape(rows.shape + (1,) * (x.ndim - 2)), 1)


def put_rows(x, rows, values):
    return x.at[jnp.arange(x.shape[0])[:, None], rows].set(values)


def rows(like, limit):
    return jnp.zeros((like.shape[0], limit, *like.shape[1:]), like.dtype)


def grown(x, k):
    return x
