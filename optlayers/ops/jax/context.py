"""Values as a mesh sees them: alike where `jax.shard_map` and vmap ask for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def zero(dtype, *arrays):
    """The number zero of this type, under a vectorising map with its axis if one of the arrays has it.

    A rule of differentiation has to return a value and a tangent that are mapped alike.
    """
    nothing = jnp.zeros((), dtype)
    first = (x.reshape(-1)[:1].sum().astype(dtype) for x in arrays)
    return sum((jnp.where(False, x, nothing) for x in first), nothing)


def is_manual():
    """Whether this is for one of the devices of `jax.shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def alike(arrays):
    """All as differing by device, where `jax.shard_map` keeps account of that, if one of them does."""
    if not is_manual():
        return list(arrays)
    # Not Python's numbers, which have no type yet, and without derivatives, in which zeros would be added.
    own = [lax.stop_gradient(x) for x in arrays if isinstance(x, jax.Array)]
    return [x + zero(x.dtype, *own) if isinstance(x, jax.Array) else x for x in arrays]


def steady(state):
    """The same of a nested state, whose types a loop has to keep."""
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, alike(leaves))
