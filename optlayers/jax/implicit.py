"""A user's own implicit layer in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import Array

from ..docstring import continues
from ..implicit import Implicit, implicit_doc
from ..ops import jax as ops
from .calling import in_full_precision


class _Layer(Implicit):
    @in_full_precision
    def __call__(self, *theta: Any) -> Array:
        return self.apply(ops, *theta)


@continues(implicit_doc)
def implicit(
    solve: Callable[..., Array],
    residual: Callable[..., Array],
    linear_solve: Callable[[Callable, Array], Array] | None = None,
    order: int = 2,
) -> Callable[..., Array]:
    """
    Example:
        >>> import jax
        >>> from optlayers.jax import implicit
        >>> cube_root = implicit(lambda a: abs(a) ** (1 / 3), lambda z, a: z**3 - a)
        >>> gradient = jax.grad(lambda a: cube_root(a).sum())(jax.numpy.array([[8.0]]))
        >>> round(gradient.item(), 4)  # 1 / (3 * 2**2)
        0.0833
    """
    return _Layer(solve, residual, linear_solve, order)
