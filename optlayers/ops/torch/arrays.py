"""Arithmetic, linear algebra and rows of tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .context import is_transformed

sqrt, exp, log, isfinite = torch.sqrt, torch.exp, torch.log, torch.isfinite
sin, cos, arctan2, moveaxis = torch.sin, torch.cos, torch.arctan2, torch.movedim
multiply_add = torch.addcmul
inf, nan = torch.inf, torch.nan


def constant(values, like):
    # Copied: torch would share the caller's memory, warn if it is read-only and refuse negative strides.
    tensor = torch.from_numpy(np.array(values))
    return tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else torch.int64)


def full(shape, value, like):
    return torch.full(tuple(shape), value, dtype=like.dtype, device=like.device)


def eye(n, like):
    return torch.eye(n, dtype=like.dtype, device=like.device)


def eps(x):
    return torch.finfo(x.dtype).eps


def widest(x):
    if x.device.type == "mps":
        return x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def real(x):
    return x.real if x.is_complex() else x


imag, complex_number = torch.imag, torch.complex


def cast(x, like):
    return x.to(like.dtype.to_complex() if x.is_complex() else like.dtype)


def to_int(x):
    return x.to(torch.int64)


def where(condition, x, y):
    return torch.where(condition, x, y)


def maximum(x, y):
    return torch.maximum(x, y) if isinstance(y, Tensor) else torch.clamp(x, min=y)


def minimum(x, y):
    return torch.minimum(x, y) if isinstance(y, Tensor) else torch.clamp(x, max=y)


def sum(x, axis, keepdims=False):
    return torch.sum(x, dim=axis, keepdim=keepdims)


def norm(x):
    return torch.linalg.vector_norm(x, dim=-1)


def amax(x, axis, keepdims=False):
    if x.shape[axis] == 0:
        return torch.sum(x, dim=axis, keepdim=keepdims)
    return torch.amax(x, dim=axis, keepdim=keepdims)


def any(x, axis=None):
    return torch.any(x) if axis is None else torch.any(x, dim=axis)


def all(x, axis=None):
    return torch.all(x) if axis is None else torch.all(x, dim=axis)


def concat(arrays, axis):
    return torch.cat(list(arrays), dim=axis)


def stack(arrays, axis):
    return torch.stack(list(arrays), dim=axis)


def reshape(x, shape):
    return torch.reshape(x, tuple(shape))


def broadcast_to(x, shape):
    return torch.broadcast_to(x, tuple(shape))


def put(x, index, value):
    x[index] = value
    return x


def take(x, indices, axis=-1):
    if axis == -1 and x.ndim > 1:  # on the last axis index_select takes two to four times as long
        return torch.gather(x, -1, indices.expand(*x.shape[:-1], len(indices)))
    return torch.index_select(x, axis, indices)


def argsort(x):
    return torch.argsort(x, dim=-1, stable=True)


def rows_in_use(A, weights):
    return A, weights


def scatter_add(values, indices, size, start=None):
    start = torch.zeros((), dtype=values.dtype, device=values.device) if start is None else start
    return torch.index_add(start.expand(*values.shape[:-1], size), -1, indices, values)


def weighted_sum(weights, arrays, start=None):
    for w, x in zip(weights, arrays, strict=True):
        if w != 0:
            start = w * x if start is None else torch.add(start, x, alpha=w)
    return start


def diagonal(x):
    return torch.diagonal(x, dim1=-2, dim2=-1)


def add_diagonal(x, values):
    torch.diagonal(x, dim1=-2, dim2=-1).add_(values)
    return x


def cholesky(x):
    # cholesky_ex reports failure in `info` without a device synchronisation.
    factor, info = torch.linalg.cholesky_ex(x)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


def cholesky_solve(factor, rhs):
    half = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def inverse_triangular(factor):
    return torch.linalg.solve_triangular(factor, eye(factor.shape[-1], factor), upper=False)


def lu_factor(x):
    # .contiguous(): lu_solve is silently wrong on the CPU for some non-contiguous factors (torch 2.13).
    factor, pivots, _ = torch.linalg.lu_factor_ex(x)
    return factor.contiguous(), pivots.contiguous()


def lu_solve(factor, rhs, transpose=False):
    return torch.linalg.lu_solve(*factor, rhs, adjoint=transpose)


def eigh(x):
    # On a matrix that is not finite LAPACK may fail, which raises for the whole batch, or return numbers.
    finite = torch.isfinite(x).flatten(-2).all(-1)[..., None]
    values, vectors = torch.linalg.eigh(torch.where(finite[..., None], x, 0.0))
    return torch.where(finite, values, torch.nan), torch.where(finite[..., None], vectors, torch.nan)


def tree_flatten(tree):
    if isinstance(tree, Tensor):  # torch's walk of it takes as long as some operations
        return [tree], lambda new: new[0]
    leaves, structure = torch.utils._pytree.tree_flatten(tree)
    return leaves, lambda new: torch.utils._pytree.tree_unflatten(list(new), structure)


def put_row(rows, index, row):
    if is_transformed():  # vmap maps the row and perhaps not the rows, which then cannot hold it
        return torch.select_scatter(rows, row, 1, index)
    rows[:, index] = row
    return rows


def leading(rows, count):
    return rows[:, :count]


def take_rows(x, rows):
    rows = rows.reshape(rows.shape + (1,) * (x.ndim - 2))
    return torch.gather(x, 1, rows.expand(*rows.shape[:2], *x.shape[2:]))


def put_rows(x, rows, values):
    place = (torch.arange(x.shape[0], device=x.device)[:, None], rows)
    is_recorded = torch.is_grad_enabled() or is_transformed()
    return torch.index_put(x, place, values) if is_recorded else x.index_put_(place, values)


def rows(like, limit):
    return torch.zeros_like(like)[:, None].repeat_interleave(min(limit, 32), 1)


def grown(x, k):
    return x if k < x.shape[1] else torch.cat([x, torch.zeros_like(x)], 1)
