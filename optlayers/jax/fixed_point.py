"""Fixed points of maps, in JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..docstring import continues
from ..layers.adjoint import Adjoint, Exact
from ..layers.fixed_point import FixedPoint, fixed_point_doc
from ..ops import jax as ops
from ..solvers.fixed_point import Anderson, FixedPointSolver
from .calling import in_full_precision


@continues(fixed_point_doc)
@in_full_precision
def fixed_point(
    f: Callable,
    z0: Any,
    *args: Any,
    solver: FixedPointSolver = Anderson(),
    adjoint: Adjoint = Exact(),
    tol: float | None = None,
    max_iter: int = 50,
    order: int = 1,
    on_failure: str = "raise",
    record: Sequence[int] = (),
    return_info: bool = False,
) -> Any:
    """
    Under a transformation nothing can be raised: there the policy "raise" acts as "nan".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from optlayers.jax import fixed_point
        >>> root = lambda x: fixed_point(lambda z, x: jnp.cos(z) * x, jnp.zeros((1, 1)), x).sum()
        >>> z, x_bar = jax.value_and_grad(root)(jnp.array([[0.5]]))
        >>> round(z.item(), 4), round(x_bar.item(), 4)
        (0.4502, 0.7395)
    """
    settings = FixedPoint(solver, adjoint, tol, max_iter, order, on_failure, tuple(record))
    z, info = settings(ops, f, z0, *args)
    return (z, info) if return_info else z
