"""Derivatives of functions as linear maps, and solves with them that are differentiated by further solves."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax

from .context import alike, zero


def frozen(function, x):
    # A new function for JAX's caches: they know functions, not the values that these close over.
    jaxpr = jax.make_jaxpr(lambda z: function(z))(lax.stop_gradient(x))
    constants = [lax.stop_gradient(c) for c in jaxpr.consts]
    return lambda z: jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr.jaxpr, constants))(z)[0]


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


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _increment(solve, r, frozen):
    return jnp.zeros_like(r) + zero(r.dtype, r, *frozen)


@_increment.defjvp
def _(solve, primals, tangents):
    r, frozen = primals
    constants = [lax.stop_gradient(x) for x in frozen]
    apply = lambda transposed: lambda _, t: solve(t, transposed, *constants)
    # As one linear map: taken apart, each branch and loop of it would keep copies of the matrices. The first
    # function would be its inverse, which is needed for derivatives in the constants alone.
    tangent = lax.custom_linear_solve(lambda t: t, tangents[0], apply(False), apply(True))
    return _increment(solve, r, frozen), tangent


def increment(solve, r, *frozen):
    r, *frozen = alike([r, *frozen])
    return _increment(solve, r, frozen)


def recorded_at(function, x):
    return function


def solve_increment(function, x, solve, r, *constants):
    x, constants = lax.stop_gradient(x), lax.stop_gradient(constants)
    inverse = lambda J, r: solve(J, r, *constants)
    return lax.custom_linear_solve(
        tangent_map(function, x), r - lax.stop_gradient(r), inverse, transpose_solve=inverse
    )
