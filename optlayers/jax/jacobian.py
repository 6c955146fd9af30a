"""What the derivative of a map is like at a point, in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from ..docstring import continues
from ..layers.jacobian import (
    growth_of_powers,
    jacobian_norm_doc,
    mean_square_of_jacobian,
    spectral_radius_doc,
)
from ..ops import jax as ops


def _noise(key):
    return lambda i, z: jax.random.normal(jax.random.fold_in(key, i), z.shape, z.dtype)


@continues(jacobian_norm_doc)
def jacobian_norm(f: Callable, z: Any, *args: Any, probes: int = 1, key: Array) -> Array:
    """
        key: of the random v.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from optlayers.jax import jacobian_norm
        >>> penalty = lambda W: jacobian_norm(
        ...     lambda z: jnp.tanh(z @ W), jnp.zeros((8, 3)), probes=4, key=jax.random.key(0)
        ... ).mean()
        >>> jax.grad(penalty)(0.5 * jnp.eye(3)).shape
        (3, 3)
    """
    return mean_square_of_jacobian(ops, _noise(key), f, z, args, probes)


@continues(spectral_radius_doc)
def spectral_radius(f: Callable, z: Any, *args: Any, iterations: int = 40, key: Array) -> Array:
    """
        key: of the first vector.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from optlayers.jax import spectral_radius
        >>> turn = jnp.array([[0.0, 0.8], [-0.8, 0.0]])
        >>> radius = spectral_radius(lambda z: z @ turn, jnp.ones((2, 2)), key=jax.random.key(0))
        >>> [round(r, 4) for r in radius.tolist()]
        [0.8, 0.8]
    """
    return growth_of_powers(ops, _noise(key), f, z, args, iterations)
