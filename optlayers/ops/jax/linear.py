"""Derivatives of functions as linear maps, and solves with them that are differentiated by further solves."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax

from .context import alike, zero
from .tangent import with_tangent


def closed(function, x):
    """`function` of arrays like `x` as one of what it closes over and of them, and the values of that."""
    # A new function for JAX's caches: they know functions, not the values that these close over.
    jaxpr = jax.make_jaxpr(lambda z: function(z))(lax.stop_gradient(x))
    close = lambda values: jax.extend.core.ClosedJaxpr(jaxpr.jaxpr, values)
    return lambda values, z: jax.extend.core.jaxpr_as_fun(close(values))(z)[0], jaxpr.consts


def frozen(function, x):
    pure, values = closed(function, x)
    return partial(pure, [lax.stop_gradient(value) for value in values])


def jacobian(function, x):
    size, x = math.prod(x.shape[1:]), lax.stop_gradient(x)

    def column(e):
        direction = jnp.broadcast_to(e.reshape(x.shape[1:]), x.shape)
        return jax.jvp(function, (x,), (direction,))[1].reshape(x.shape[0], size)

    return lax.stop_gradient(jax.vmap(column, out_axes=-1)(jnp.eye(size, dtype=x.dtype)))


def tangent_map(function, x):
    return jax.linearize(frozen(function, x), x)[1]


def pullback(function, x):
    back = jax.vjp(function, lax.stop_gradient(x))[1]
    return lambda v: back(v)[0]


def _incremented(solve, live, increment, inputs, tangents):
    _, *frozen = inputs
    apply = lambda transposed: lambda _, t: solve(t, transposed, *frozen)
    # As one linear map: taken apart, each branch and loop of it would keep copies of the matrices. The first
    # function would be its inverse, which is needed for derivatives in the constants alone.
    return lax.custom_linear_solve(lambda t: t, *tangents, apply(False), apply(True))


def increment(solve, r, *frozen):
    r, *frozen = alike([r, *frozen])
    nothing = jnp.zeros_like(r) + zero(r.dtype, r, *frozen)
    return with_tangent(partial(_incremented, solve), nothing, r, *map(lax.stop_gradient, frozen))


def recorded_at(function, x):
    return function


def solve_increment(function, x, solve, r, *constants):
    x, constants = lax.stop_gradient(x), lax.stop_gradient(constants)
    inverse = lambda J, r: solve(J, r, *constants)
    return lax.custom_linear_solve(
        tangent_map(function, x), r - lax.stop_gradient(r), inverse, transpose_solve=inverse
    )
