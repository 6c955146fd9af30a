"""A user's own implicit layer in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import Array

from ..implicit import Implicit
from ..ops import jax as ops
from .calling import in_full_precision


class _Layer(Implicit):
    @in_full_precision
    def __call__(self, *theta: Any) -> Array:
        return self.apply(ops, *theta)


def implicit(
    solve: Callable[..., Array],
    residual: Callable[..., Array],
    linear_solve: Callable[[Callable, Array], Array] | None = None,
    order: int = 2,
) -> Callable[..., Array]:
    """A layer whose value comes from `solve` and whose derivatives from `residual(z, *theta) == 0`.

    Args:
        solve: theta to z (B, ...), by any algorithm; it is never differentiated.
        residual: (z, *theta) to an array of the shape of z that is zero at the solution, written in JAX
            operations; row i may depend on row i of z only. It may close over traced values: their
            gradients arrive.
        linear_solve: (J, r) to J^-1 r, where J(dz) is the derivative of the residual in z, in reverse mode
            the transpose of that; never differentiated. By default the Jacobians (B, k, k) are formed and
            factorised, k entries of z per row.
        order: how many derivatives are right; more raise NotImplementedError.

    Returns:
        The layer, theta to z. Forward and reverse mode, their nestings and `jax.vmap` work.

    Example:
        >>> import jax
        >>> from optlayers.jax import implicit
        >>> cube_root = implicit(lambda a: abs(a) ** (1 / 3), lambda z, a: z**3 - a)
        >>> gradient = jax.grad(lambda a: cube_root(a).sum())(jax.numpy.array([[8.0]]))
        >>> round(gradient.item(), 4)  # 1 / (3 * 2**2)
        0.0833
    """
    return _Layer(solve, residual, linear_solve, order)
