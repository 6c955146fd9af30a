"""Whether arrays may be the arguments of a layer, and the type of its results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array


def common(values: Sequence[Any], label: Callable[[int], str], is_complex: Callable[[int], bool]) -> Array:
    """A real scalar with the dtype of the results.

    Args:
        label: what the value of a number is called in messages.
        is_complex: whether it may be complex.

    Raises:
        ValueError: a value that may not be complex.
    """
    for i, value in enumerate(values):
        if jnp.issubdtype(value.dtype, jnp.complexfloating) and not is_complex(i):
            raise ValueError(f"{label(i)} is real, got a complex array; pass its real part")
    dtypes = [jnp.finfo(value.dtype).dtype for value in values if jnp.issubdtype(value.dtype, jnp.inexact)]
    return jnp.zeros((), functools.reduce(jnp.promote_types, dtypes) if dtypes else jnp.result_type(float))
