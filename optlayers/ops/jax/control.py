"""Loops, branches, parts of a batch, and calls of the host."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..numpy import batch_of, solve_small  # noqa: F401
from .context import alike, steady

# Of the largest array in a block, and the most rows: a small block waits for fewer problems that need long.
# And the fewest rows where matrices are shared, on which each block repeats the work. What is repeated row by
# row goes on in parts of such a block, for the same reason.
BLOCK_BYTES, BLOCK_ROWS, SHARED_ROWS = 2**19, 128, 64
PART_BYTES, PART_ROWS = 2**17, 4


def while_loop(condition, body, state):
    return lax.while_loop(condition, body, steady(state))


def repeat(count, body, state):
    return lax.fori_loop(0, count, lambda _, state: body(state), steady(state))


def repeat_while(count, needed, body, state):
    if jax.default_backend() != "cpu":
        return repeat(count, body, state)
    unfinished = lambda carry: (carry[0] < count) & jnp.any(needed(carry[1]))
    return while_loop(unfinished, lambda carry: (carry[0] + 1, body(carry[1])), (0, state))[1]


def bounded_repeat(count, limit, body, state):
    # In chunks, so that what is behind the count costs about the square root of the limit.
    chunk = math.isqrt(limit) + 1
    step = jax.checkpoint(body)

    def one(carry, _):
        i, state = carry
        return (i + 1, lax.cond(i < count, step, lambda state: state, state)), None

    def many(carry, _):
        i, state = carry
        run = lambda carry: lax.scan(one, carry, None, length=chunk)[0]
        skip = lambda carry: (carry[0] + chunk, carry[1])
        return lax.cond(i < count, run, skip, carry), None

    state = jax.tree.map(jnp.asarray, state)
    (_, state), _ = lax.scan(many, (jnp.zeros_like(count), state), None, length=chunk)
    return state


def cond(condition, true, false, *operands):
    return lax.cond(condition, true, false, *operands)


@jax.custom_batching.custom_vmap
def _in_any_call(condition):
    """`condition`, under a vectorising map whether it holds in any of its calls."""
    return condition


@_in_any_call.def_vmap
def _(axis_size, in_batched, condition):
    return _in_any_call(jnp.any(condition, 0) if in_batched[0] else condition), False


def cond_or_both(condition, both, false, operand):
    # With a condition for each call, JAX would put stop_gradient into what may have to be transposed.
    return lax.cond(_in_any_call(condition), both, false, operand)


def on_rows(mask, function, data, ndims, state):
    return lax.cond(jnp.any(mask), function, lambda data, state: state, tuple(data), state)


def repeat_on_rows(needed, function, data, ndims, state):
    state, tree = jax.tree.flatten(state)

    def repeat(*arrays):
        data, state = arrays[: len(ndims)], tree.unflatten(arrays[len(ndims) :])
        step = lambda carry: (carry[0] + 1, function(carry[0] + 1, data, carry[1]))
        state = while_loop(lambda carry: jnp.any(needed(carry[1])), step, (0, state))[1]
        return jax.tree.leaves(state)

    arrays, own = [*data, *state], [*ndims, *(x.ndim - 1 for x in state)]
    batch, is_batched = batch_of(arrays, own)
    rows = batch
    if not _has_matrices(is_batched, ndims):
        largest = max([1, *(x.nbytes for x, own in zip(data, ndims, strict=True) if own > 1)])
        rows = max(PART_BYTES // largest, PART_ROWS)
    return tree.unflatten(_in_parts(repeat, arrays, batch, is_batched, rows))


def in_blocks(function, arrays, ndims, size):
    batch, is_batched = batch_of(arrays, ndims)
    rows = min(BLOCK_BYTES // max(size * arrays[0].dtype.itemsize, 1), BLOCK_ROWS) or 1
    if not _has_matrices(is_batched, ndims):
        rows = max(rows, SHARED_ROWS)
    return _in_parts(function, arrays, batch, is_batched, rows)


def _has_matrices(is_batched, ndims):
    return any(batched and own > 1 for batched, own in zip(is_batched, ndims, strict=False))


def _in_parts(function, arrays, batch, is_batched, rows):
    # Over several devices the batch may be laid out, block by block or not: only they know. Under shard_map
    # it is what one of them has.
    is_whole = jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().are_all_axes_manual
    if batch <= rows or jax.default_backend() != "cpu" or is_whole:
        return function(*arrays)
    even = (size for size in range(rows, rows // 2, -1) if batch % size == 0)
    rows = next(even, -(-batch // -(-batch // rows)))
    count = -(-batch // rows)

    def work(i):
        start = jnp.minimum(i * rows, batch - rows)  # the last block may begin within the one before
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, rows)
        return function(*(cut(x) if own else x for x, own in zip(arrays, is_batched, strict=True)))

    fresh = batch - (count - 1) * rows
    flat = lambda x: x.reshape(len(x) * rows, *x.shape[2:])
    join = lambda x: flat(x) if fresh == rows else jnp.concatenate([flat(x[:-1]), x[-1, -fresh:]])
    return [join(x) for x in lax.map(work, jnp.arange(count))]


stop_gradient = lax.stop_gradient


def is_constant(x):
    return not isinstance(x, jax.core.Tracer)


def has_tape():
    return False


def holds(condition):
    return not isinstance(condition, jax.core.Tracer) and bool(condition)


def remembered(function, settings, *arrays):
    return function(*settings, *arrays)


any_mapped = jnp.any
largest = jnp.max


def on_host(function, *arrays):
    if not any(isinstance(x, jax.core.Tracer) for x in arrays):
        function(*(np.asarray(x) for x in arrays))


def reported(x, failed, function, *arrays):
    # Not jax.debug.callback, which multiplied the compilation time of second derivatives by six.
    on_host(function, *arrays)
    return jnp.where(failed[:, None], jnp.nan, x)


def _call_back(function, shapes, arrays, vmap_method):
    dtype = next(x.dtype for x in arrays if jnp.issubdtype(x.dtype, jnp.floating))
    results = [jax.ShapeDtypeStruct(tuple(shape), dtype) for shape in shapes]
    run = lambda *values: [np.asarray(x, dtype) for x in function(*map(np.asarray, values))]
    return jax.pure_callback(run, results, *arrays, vmap_method=vmap_method)


def call_host(function, shapes, active, *arrays):
    results = _call_back(function, shapes, (active, *arrays), "broadcast_all")
    return alike([*results, active, *arrays])[: len(results)]


def run_on_host(function, shapes, *arrays):
    return _call_back(function, shapes, [lax.stop_gradient(x) for x in arrays], "expand_dims")


def call_detached(function, *args):
    return jax.tree.map(lax.stop_gradient, function(*jax.tree.map(lax.stop_gradient, args)))
