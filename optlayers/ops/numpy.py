"""The seam for NumPy arrays on the host.

See `optlayers.ops.Ops` for what each function does. Nothing here is differentiated or mapped, and so what
serves only derivatives is left out.
"""

from __future__ import annotations

import builtins
import math
from functools import partial, reduce
from threading import Lock

import numpy as np

sqrt, exp, log, isfinite = np.sqrt, np.exp, np.log, np.isfinite
where, maximum, minimum, eye = np.where, np.maximum, np.minimum, lambda n, like: np.eye(n, dtype=like.dtype)
sum, any, all, reshape, broadcast_to = np.sum, np.any, np.all, np.reshape, np.broadcast_to
concat, stack = np.concatenate, np.stack
inf, nan = np.inf, np.nan
holds = bool


def constant(values, like):
    return values.astype(like.dtype) if values.dtype.kind == "f" else values


def full(shape, value, like):
    return np.full(tuple(shape), value, like.dtype)


def eps(x):
    return float(np.finfo(x.dtype).eps)


def cast(x, like):
    return x.astype(np.result_type(like.dtype, np.complex64) if np.iscomplexobj(x) else like.dtype)


def to_int(x):
    return x.astype(np.int64)


def amax(x, axis, keepdims=False):
    if axis == -1 and x.size > 1000 and x.shape[-1] <= 8:  # NumPy's own loop takes up to 17 times as long
        largest = reduce(np.maximum, np.moveaxis(x, -1, 0))
        return largest[..., None] if keepdims else largest
    return x.max(axis, keepdims=keepdims) if x.shape[axis] else x.sum(axis, keepdims=keepdims)


def take(x, indices, axis=-1):
    return np.take(x, indices, axis=axis)


def rows_in_use(A, weights):
    most = np.count_nonzero(weights, axis=-1).max(initial=0)
    if 2 * most > weights.shape[-1] or A.shape[-1] < FEW_COLUMNS:
        return A, weights
    rows = np.argsort(weights == 0, axis=-1, kind="stable")[:, :most]
    chosen = A[rows] if A.ndim == 2 else A[np.arange(len(A))[:, None], rows]
    return chosen, np.take_along_axis(weights, rows, -1)


# 64 programs of 50 variables and 400 rows take 130 ms so in place of 160, 256 predictive controls 5 % less.
# With fewer columns, to choose rows takes longer than the products with all of them.
FEW_COLUMNS = 16


def scatter_add(values, indices, size, start=None):
    order = np.argsort(indices, kind="stable")
    indices = indices[order]
    starts = np.flatnonzero(np.diff(indices, prepend=-1))
    total = np.empty((*values.shape[:-1], size), values.dtype)
    total[...] = 0.0 if start is None else start
    total[..., indices[starts]] += np.add.reduceat(values[..., order], starts, -1)
    return total


def diagonal(x):
    return np.diagonal(x, axis1=-2, axis2=-1)


def add_diagonal(x, values):
    diagonals = np.einsum("...ii->...i", x)
    diagonals += values
    return x


def cholesky(x):
    try:
        factor = np.linalg.cholesky(x)
    except np.linalg.LinAlgError:  # one matrix, or more, is not positive definite
        if len(x) == 1:
            return np.full_like(x, np.nan)
        return np.concatenate([cholesky(half) for half in np.array_split(x, 2)])
    failed = np.isnan(diagonal(factor)).any(-1)
    if failed.any():
        factor[failed] = np.nan
    return factor


def eigh(x):
    finite = np.isfinite(x).all((-2, -1))[..., None]
    values, vectors = np.linalg.eigh(np.where(finite[..., None], x, 0.0))
    return np.where(finite, values, np.nan), np.where(finite[..., None], vectors, np.nan)


def while_loop(condition, body, state):
    while condition(state):
        state = body(state)
    return state


def repeat(count, body, state):
    for _ in range(count):
        state = body(state)
    return state


def repeat_while(count, needed, body, state):
    for _ in range(count):
        if not needed(state).any():
            break
        state = body(state)
    return state


def cond(condition, true, false, *operands):
    return true(*operands) if condition else false(*operands)


def cond_or_both(condition, both, false, operand):
    return both(operand) if condition else false(operand)


def on_rows(mask, function, data, ndims, state):
    return on_chosen(np.flatnonzero(mask), len(mask), function, data, ndims, state, _put_rows)


def _put_rows(x, rows, values):
    x = x.copy()
    x[rows] = values
    return x


def on_chosen(rows, batch, function, data, ndims, state, put_rows):
    """`on_rows` for the numbers of the rows, in any framework that runs what it is told at once."""
    if not len(rows):
        return state
    if 2 * len(rows) > batch:
        return function(data, state)
    # Arrays of one row are what the batch shares: another row comes along, to be left alone.
    if len(rows) == 1:
        rows = rows[[0, 0]]
        rows[1] = (rows[1] + 1) % batch
    is_batched = [x.ndim > own and len(x) == batch for x, own in zip(data, ndims, strict=True)]
    part = [x[rows] if batched else x for x, batched in zip(data, is_batched, strict=True)]
    result = function(part, tree_map(lambda x: x[rows] if len(x) == batch else x, state))
    return tree_map(lambda old, new: put_rows(old, rows, new) if len(old) == batch else new, state, result)


def repeat_on_rows(needed, function, data, ndims, state, on_rows=on_rows):
    k = 0
    while (mask := needed(state)).any():
        k += 1
        state = on_rows(mask, partial(function, k), data, ndims, state)
    return state


# Of the largest array. With half of it dense problems of 100 variables take 5 % less, but those in curved
# cones 2 to 20 % more, on threads 30 %; with twice as much the dense ones take 10 % more. A thread gets a
# quarter of it at least: on less they wait for one another.
BLOCK_BYTES = 2**22


def batch_of(arrays, ndims):
    """Size of the batch, and which arrays have a row for each of its problems; others are shared."""
    is_batched = [x.ndim > own for x, own in zip(arrays, ndims, strict=False)]
    batch = max([len(x) for x, batched in zip(arrays, is_batched, strict=True) if batched], default=1)
    return batch, [batched and len(x) == batch for x, batched in zip(arrays, is_batched, strict=True)]


def in_blocks(function, arrays, ndims, size, run=map, threads=1):
    batch, is_batched = batch_of(arrays, ndims)
    has_matrices = np.any([batched and own > 1 for batched, own in zip(is_batched, ndims, strict=False)])
    rows = max(BLOCK_BYTES // max(size * arrays[0].itemsize, 1), 1)  # without variables, size is 0
    least = max(rows // 4, 1)
    if not has_matrices:  # every block repeats the work on those that it shares
        least = max(least, 4 * math.isqrt(size))
    count = -(-batch // max(rows, least))
    count = max(count, min(-(-count // threads) * threads, batch // least))
    if count <= 1:
        return function(*arrays)
    parts = [
        np.array_split(x, count) if batched else [x] * count
        for x, batched in zip(arrays, is_batched, strict=True)
    ]
    results = run(lambda part: function(*part), zip(*parts, strict=True))
    return [np.concatenate(outputs) for outputs in zip(*results, strict=True)]


MOST_REMEMBERED, REMEMBERED_BYTES = 32, 2**28
_remembered: dict = {}  # results and their sizes, the latest at the end
_lock = Lock()


class _Values:
    """Arrays as a key, equal to others where all numbers are."""

    def __init__(self, arrays):
        self.arrays = [x.copy() for x in arrays]  # their owner may overwrite them
        self.hash = hash(tuple((x.shape, x.dtype, x.sum().item()) for x in arrays))

    def __hash__(self):
        return self.hash

    def __eq__(self, other):
        pairs = zip(self.arrays, other.arrays, strict=True)
        return builtins.all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def remembered(function, settings, *arrays):
    values = _Values(arrays)
    key = function, settings, values
    found = _remembered.get(key)
    if found is not None:
        return found[0]
    result, kept = function(*settings, *values.arrays), [*values.arrays]
    tree_map(kept.append, result)
    for x in kept:
        x.flags.writeable = False
    with _lock:
        _remembered[key] = result, builtins.sum(x.nbytes for x in kept)
        sizes = lambda: builtins.sum(size for _, size in _remembered.values())
        while len(_remembered) > MOST_REMEMBERED or sizes() > REMEMBERED_BYTES:
            del _remembered[next(iter(_remembered))]
    return result


def solve_small(inputs, settings, counts):
    return None


def on_host(function, *arrays):
    function(*arrays)


def call_host(function, shapes, active, *arrays):
    return [np.asarray(x, arrays[0].dtype) for x in function(active, *arrays)]


def tree_map(function, tree, *others):
    """`function` of the arrays in equal trees of tuples."""
    if not isinstance(tree, tuple):
        return function(tree, *others)
    parts = [tree_map(function, *parts) for parts in zip(tree, *others, strict=True)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def stop_gradient(x):
    return x
