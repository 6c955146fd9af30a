"""What calls of layers have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax

F = TypeVar("F", bound=Callable)


def in_full_precision(function: F) -> F:
    """Decorator: matrix products inside have the precision of their operands.

    By default JAX multiplies single precision to three digits on recent GPUs and TPUs, which leaves neither
    the solution of an equation nor its residual.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]
