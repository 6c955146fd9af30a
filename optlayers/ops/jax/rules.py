"""Solvers as opaque values, and functions with derivatives of their own."""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .. import NO_SECOND_DERIVATIVE
from .context import alike, is_manual, steady, zero
from .linear import closed
from .tangent import with_tangent


def leaf(solve, inputs):
    return solve(sys.modules[__package__], *(lax.stop_gradient(x) for x in inputs))


def deferred(function, order, values, inputs, constants, adjoint=None):
    return function(order, inputs, constants)


def explicit(functions, examples):
    converted, theta = [], []
    for function, arguments in zip(functions, examples, strict=True):
        pure, constants = jax.closure_convert(function, *steady(arguments))
        place = slice(len(theta), len(theta) + len(constants))
        converted.append(lambda *args, pure=pure, place=place: pure(*steady(args[:-1]), *args[-1][place]))
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
    # Selected, not multiplied by zero: see `_one`.
    anchor = sum([jnp.sum(jnp.where(False, x, 0)).astype(values[0].dtype) for x in zeros])
    zeros = tuple(x + anchor.astype(x.dtype) for x in zeros)
    none = tuple(jnp.zeros_like(v) + anchor for v in values)
    changes, _ = lax.custom_linear_solve(lambda x: x, (none, zeros), solve, solve_transposed)
    return [lax.stop_gradient(v) + c for v, c in zip(values, changes, strict=True)]


def implied(residual, solve, root, order):
    # All chord steps would be taken for a first derivative: JAX does not tell that no second one follows. So
    # it is one solve with the live Jacobian, whose derivatives are solves again; but not under `shard_map`,
    # where JAX mistakes what the devices share in the Jacobian for what differs between them.
    if order == 1 or is_manual():
        for _ in range(order):
            root = root - solve(residual(root))
        return root

    residual, theta = closed(residual, root)
    solve, frozen = closed(solve, root)
    rule = partial(_implied, residual, solve, len(theta))
    return with_tangent(rule, root, *theta, *map(lax.stop_gradient, frozen))


def _implied(residual, solve, count, live, root, inputs, tangents):
    theta, frozen = inputs[:count], inputs[count:]

    def moved(*values):
        parts = dict(enumerate(theta)) | dict(zip(live, values, strict=True))
        return residual([*parts.values()], root)

    r = jax.jvp(moved, [theta[i] for i in live], tangents)[1]
    inverse = lambda r: jax.jvp(lambda r: solve(frozen, r), (jnp.zeros_like(r),), (r,))[1]
    transposed = lambda _, r: jax.linear_transpose(inverse, r)(r)[0]
    matrix = jax.linearize(lambda z: residual(theta, z), root)[1]
    return lax.custom_linear_solve(matrix, -r, lambda _, r: inverse(r), transposed)


def _one(x, order, message):
    """The number one, formally a function of x, whose derivatives exist up to `order`."""
    return with_tangent(partial(_none, order, message), jnp.ones((), x.dtype) + zero(x.dtype, x), x)


def _none(order, message, live, one, inputs, tangents):
    if order == 0:
        raise NotImplementedError(message)
    # Selected, not multiplied by zero: a tangent that is not finite must not reach the rest of the batch.
    return jnp.sum(jnp.where(False, tangents[0], 0)) * _one(inputs[0], order - 1, message)


def _guarded(order, message, live, x, inputs, tangents):
    if order == 0:
        raise NotImplementedError(message)
    return tangents[0] * _one(x, order - 1, message)


def guard(x, order, message):
    return with_tangent(partial(_guarded, order, message), x, x)


def surrogate_gradient(values, inputs, backward):
    @jax.custom_vjp
    def attach(values, inputs):
        return values

    def run_backward(saved, cotangents):
        values, inputs = saved
        results = backward(values, inputs, cotangents)
        # Zeros whose derivatives raise: without them that of the result would be wrong in silence.
        final = lambda x: jnp.sum(jnp.where(False, guard(x, 0, NO_SECOND_DERIVATIVE), 0))
        stop = sum(map(final, (*inputs, *cotangents)))
        return tuple(map(jnp.zeros_like, values)), tuple(r + stop for r in results)

    attach.defvjp(lambda values, inputs: (values, (values, inputs)), run_backward)
    values = [lax.stop_gradient(v) for v in values]
    # The cotangents of inputs that devices share would differ between them.
    return attach(tuple(values), tuple(alike([*inputs, *values])[: len(inputs)]))
