"""The seam for JAX: see `optlayers.ops.Ops` for what each function does."""

from __future__ import annotations

import builtins
import math
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax

where, maximum, minimum, sqrt, exp, log = jnp.where, jnp.maximum, jnp.minimum, jnp.sqrt, jnp.exp, jnp.log
isfinite, any, all, reshape, broadcast_to = jnp.isfinite, jnp.any, jnp.all, jnp.reshape, jnp.broadcast_to
sin, cos, arctan2, moveaxis = jnp.sin, jnp.cos, jnp.arctan2, jnp.moveaxis
stop_gradient = lax.stop_gradient
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


def amax(x, axis, keepdims=False):
    if x.shape[axis] == 0:
        return jnp.sum(x, axis=axis, keepdims=keepdims)
    # XLA's maximum of long rows of a large batch forgets NaN on the CPU.
    is_lost = jnp.any(jnp.isnan(x), axis=axis, keepdims=keepdims)
    return jnp.where(is_lost, jnp.nan, jnp.max(x, axis=axis, keepdims=keepdims))


def concat(arrays, axis):
    return jnp.concatenate(_alike(arrays), axis=axis)


def stack(arrays, axis):
    return jnp.stack(_alike(arrays), axis=axis)


def _alike(arrays):
    """All as differing by device, where `jax.shard_map` keeps account of that, if one of them does."""
    arrays = list(arrays)
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    return [x + _zero(x.dtype, *arrays) for x in arrays]


def put(x, index, value):
    return lax.dynamic_update_index_in_dim(x, value, index, 0)


def take(x, indices, axis=-1):
    return jnp.take(x, indices, axis=axis)


def argsort(x):
    return to_int(jnp.argsort(x, -1))


def scatter_add(values, indices, size):
    zeros = jnp.zeros((*values.shape[:-1], size), dtype=values.dtype)
    return zeros.at[..., indices].add(values)


def diagonal(x):
    return jnp.diagonal(x, axis1=-2, axis2=-1)


def add_diagonal(x, values):
    identity = jnp.eye(x.shape[-1], dtype=x.dtype).reshape((1,) * (x.ndim - 2) + x.shape[-2:])
    return x + jnp.broadcast_to(values, x.shape[:-1]).astype(x.dtype)[..., None] * identity


def cholesky(x):
    factor = lax.linalg.cholesky(x, symmetrize_input=False)
    # NaN need not reach the diagonal's start, nor the other triangle, by itself.
    failed = jnp.isnan(diagonal(factor)).any(-1)
    return jnp.where(failed[..., None, None], jnp.nan, factor)


def cholesky_solve(factor, rhs):
    return jax.scipy.linalg.cho_solve((factor, True), rhs)


def inverse_triangular(factor):
    identity = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    return lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)


def lu_factor(x):
    return jax.scipy.linalg.lu_factor(x)


def lu_solve(factor, rhs, transpose=False):
    return jax.scipy.linalg.lu_solve(factor, rhs, trans=1 if transpose else 0)


def eigh(x):
    # On a matrix that is not finite LAPACK may return numbers.
    finite = jnp.isfinite(x).all((-2, -1))[..., None]
    values, vectors = jnp.linalg.eigh(x, symmetrize_input=False)
    return jnp.where(finite, values, jnp.nan), jnp.where(finite[..., None], vectors, jnp.nan)


def _steady(state):
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, _alike(map(jnp.asarray, leaves)))


def while_loop(condition, body, state):
    return lax.while_loop(condition, body, _steady(state))


def repeat(count, body, state):
    return lax.fori_loop(0, count, lambda _, state: body(state), _steady(state))


def cond(condition, true, false, *operands):
    return lax.cond(condition, true, false, *operands)


def on_host(function, *arrays):
    if not builtins.any(isinstance(x, jax.core.Tracer) for x in arrays):
        function(*(np.asarray(x) for x in arrays))


def call_host(function, shapes, active, *arrays):
    dtype = arrays[0].dtype
    results = [jax.ShapeDtypeStruct(tuple(shape), dtype) for shape in shapes]

    def call(*values):
        return [np.asarray(x, dtype) for x in function(*map(np.asarray, values))]

    return jax.pure_callback(call, results, active, *arrays, vmap_method="broadcast_all")


def call_detached(function, *args):
    return jax.tree.map(lax.stop_gradient, function(*jax.tree.map(lax.stop_gradient, args)))


def frozen_jvp(function, x):
    return lambda dx: jax.jvp(function, (lax.stop_gradient(x),), (dx,))[1]


def _zero(dtype, *arrays):
    """The number zero of this type, under a vectorising map with its axis if one of the arrays has it.

    A rule of differentiation has to return a value and a tangent that are mapped alike.
    """
    first = (x.reshape(-1)[:1].sum().astype(dtype) for x in arrays)
    return builtins.sum((jnp.where(False, x, 0) for x in first), jnp.zeros((), dtype))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _increment(solve, r, frozen):
    return jnp.zeros_like(r) + _zero(r.dtype, r, *frozen)


@_increment.defjvp
def _(solve, primals, tangents):
    r, frozen = primals
    return _increment(solve, r, frozen), solve(tangents[0], False, *map(lax.stop_gradient, frozen))


def increment(solve, r, *frozen):
    return _increment(solve, r, frozen)


def jacobian(function, x):
    size, x = math.prod(x.shape[1:]), lax.stop_gradient(x)

    def column(e):
        direction = jnp.broadcast_to(e.reshape(x.shape[1:]), x.shape)
        return jax.jvp(function, (x,), (direction,))[1].reshape(x.shape[0], size)

    return lax.stop_gradient(jax.vmap(column, out_axes=-1)(jnp.eye(size, dtype=x.dtype)))


def tree_flatten(tree):
    leaves, structure = jax.tree.flatten(tree)
    return leaves, lambda new: jax.tree.unflatten(structure, list(new))


def put_row(rows, index, row):
    return lax.dynamic_update_index_in_dim(rows, row, index, 1)


def leading(rows, count):
    return rows


any_mapped = jnp.any


def frozen(function, x):
    # A new function for JAX's caches: they know functions, not the values that these close over.
    jaxpr = jax.make_jaxpr(lambda z: function(z))(lax.stop_gradient(x))
    constants = [lax.stop_gradient(c) for c in jaxpr.consts]
    return lambda z: jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr.jaxpr, constants))(z)[0]


def tangent_map(function, x):
    return jax.linearize(frozen(function, x), x)[1]


def pullback(function, x):
    back = jax.vjp(function, lax.stop_gradient(x))[1]
    return lambda v: back(v)[0]


def solve_increment(function, x, solve, r, *constants):
    x, constants = lax.stop_gradient(x), lax.stop_gradient(constants)
    inverse = lambda J, r: solve(J, r, *constants)
    return lax.custom_linear_solve(
        tangent_map(function, x), r - lax.stop_gradient(r), inverse, transpose_solve=inverse
    )


def take_rows(x, rows):
    return jnp.take_along_axis(x, rows.reshape(rows.shape + (1,) * (x.ndim - 2)), 1)


def put_rows(x, rows, values):
    return x.at[jnp.arange(x.shape[0])[:, None], rows].set(values)


def rows(like, limit):
    return jnp.zeros((like.shape[0], limit, *like.shape[1:]), like.dtype)


def grown(x, k):
    return x


def weighted_sum(weights, arrays):
    terms = [w * x for w, x in zip(weights, arrays, strict=True) if w != 0]
    return builtins.sum(terms[1:], terms[0])


largest = jnp.max


def is_constant(x):
    return not isinstance(x, jax.core.Tracer)


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


def explicit(functions, examples):
    converted, theta = [], []
    for function, arguments in zip(functions, examples, strict=True):
        pure, constants = jax.closure_convert(function, *_steady(arguments))
        place = slice(len(theta), len(theta) + len(constants))
        converted.append(lambda *args, pure=pure, place=place: pure(*_steady(args[:-1]), *args[-1][place]))
        theta += [jnp.asarray(c) for c in constants]
    return converted, theta


def vjp(function, x, live):
    return jax.vjp(function, x, list(live))


def replayed(values, replay, sweep, inputs):
    # A linear map M with a transpose of its own is what JAX's custom_linear_solve offers: for the solution
    # (M s, s) of out - M in = 0, in = s. It never multiplies by the matrix, whose derivatives are not asked
    # for.
    frozen = [lax.stop_gradient(x) for x in inputs]

    def tangents(changes):
        return jax.jvp(lambda *x: tuple(replay(list(x))), tuple(frozen), tuple(changes))[1]

    def solve(_, rhs):
        outputs, changes = rhs
        add = lambda: tuple(o + d for o, d in zip(outputs, tangents(changes), strict=True))
        # The right-hand side is zero but in derivatives.
        is_derivative = jnp.stack([jnp.any(x != 0) for x in changes]).any()
        return lax.cond(is_derivative, add, lambda: outputs), changes

    def solve_transposed(_, rhs):
        outputs, changes = rhs
        swept = sweep(frozen, outputs)
        return outputs, tuple(c + s for c, s in zip(changes, swept, strict=True))

    zeros = [jnp.where(jnp.isfinite(x), x - lax.stop_gradient(x), 0) for x in inputs]
    # All of the right-hand side is formally a function of all inputs: JAX 0.10 fails if a part is of none.
    anchor = builtins.sum([0 * jnp.sum(x).astype(values[0].dtype) for x in zeros])
    zeros = tuple(x + anchor.astype(x.dtype) for x in zeros)
    none = tuple(jnp.zeros_like(v) + anchor for v in values)
    changes, _ = lax.custom_linear_solve(lambda x: x, (none, zeros), solve, solve_transposed)
    return [lax.stop_gradient(v) + c for v, c in zip(values, changes, strict=True)]


def reported(x, failed, function, *arrays):
    # Not jax.debug.callback, which multiplied the compilation time of second derivatives by six.
    on_host(function, *arrays)
    return jnp.where(failed[:, None], jnp.nan, x)


def on_rows(mask, function, data, ndims, state):
    return lax.cond(jnp.any(mask), function, lambda data, state: state, tuple(data), state)


@jax.custom_batching.custom_vmap
def _in_any_call(condition):
    """`condition`, under a vectorising map whether it holds in any of its calls."""
    return condition


@_in_any_call.def_vmap
def _(axis_size, in_batched, condition):
    return _in_any_call(jnp.any(condition, 0) if in_batched[0] else condition), False


def in_blocks(function, arrays, ndims, size):
    return function(*arrays)


def cond_or_both(condition, both, false, operand):
    # With a condition for each call, JAX would put stop_gradient into what may have to be transposed.
    return lax.cond(_in_any_call(condition), both, false, operand)


def leaf(solve, inputs):
    from . import jax as ops

    return solve(ops, *(lax.stop_gradient(x) for x in inputs))


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _one(x, order, message):
    """The number one, formally a function of x, whose derivatives exist up to `order`."""
    return jnp.ones((), x.dtype) + _zero(x.dtype, x)


@_one.defjvp
def _(order, message, primals, tangents):
    if order == 0:
        raise NotImplementedError(message)
    # Selected, not multiplied by zero: a tangent that is not finite must not reach the rest of the batch.
    zero = jnp.sum(jnp.where(False, tangents[0], 0)) * _one(primals[0], order - 1, message)
    return _one(primals[0], order, message), zero


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def guard(x, order, message):
    return x


@guard.defjvp
def _(order, message, primals, tangents):
    if order == 0:
        raise NotImplementedError(message)
    (x,), (tangent,) = primals, tangents
    return guard(x, order, message), tangent * _one(x, order - 1, message)


def surrogate_gradient(values, inputs, backward):
    @jax.custom_vjp
    def attach(values, inputs):
        return values

    def run_backward(saved, cotangents):
        values, inputs = saved
        results = backward(values, inputs, cotangents)
        message = "this gradient has no derivative of its own; use gradient='exact' or 'smoothed'"
        # Zeros whose derivatives raise: without them that of the result would be wrong in silence.
        stop = builtins.sum(
            jnp.sum(jnp.where(False, guard(x, 0, message), 0)) for x in (*inputs, *cotangents)
        )
        return tuple(map(jnp.zeros_like, values)), tuple(r + stop for r in results)

    attach.defvjp(lambda values, inputs: (values, (values, inputs)), run_backward)
    return attach(tuple(lax.stop_gradient(v) for v in values), tuple(inputs))
