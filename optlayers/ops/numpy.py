"""The part of the seam that cones, bounds and certificates use, for NumPy arrays on the host.

See `optlayers.ops.Ops` for what each function does. Nothing here is differentiated or mapped.
"""

from __future__ import annotations

import numpy as np

sqrt, exp, log, isfinite = np.sqrt, np.exp, np.log, np.isfinite
where, maximum, minimum, eye = np.where, np.maximum, np.minimum, lambda n, like: np.eye(n)
sum, any, all, reshape, broadcast_to = np.sum, np.any, np.all, np.reshape, np.broadcast_to
concat, stack = np.concatenate, np.stack
inf, nan = np.inf, np.nan


def constant(values, like):
    return values


def full(shape, value, like):
    return np.full(tuple(shape), value)


def eps(x):
    return float(np.finfo(x.dtype).eps)


def cast(x, like):
    return x.astype(like.dtype)


def to_int(x):
    return x.astype(np.int64)


def amax(x, axis, keepdims=False):
    return np.max(x, axis=axis, keepdims=keepdims, initial=-np.inf if x.shape[axis] else 0.0)


def take(x, indices, axis=-1):
    return np.take(x, indices, axis=axis)


def eigh(x):
    finite = np.isfinite(x).all((-2, -1))[..., None]
    values, vectors = np.linalg.eigh(np.where(finite[..., None], x, 0.0))
    return np.where(finite, values, np.nan), np.where(finite[..., None], vectors, np.nan)


def repeat(count, body, state):
    for _ in range(count):
        state = body(state)
    return state


def stop_gradient(x):
    return x
