"""Deep equilibrium layers, in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..docstring import continues
from ..layers.deq import Start, equilibrium_doc, solve_equilibrium
from ..layers.fixed_point import Adjoint, Exact, FixedPoint, FixedPointInfo
from ..ops import jax as ops
from ..solvers.fixed_point import Anderson, FixedPointSolver


@continues(equilibrium_doc)
class DEQ:
    """
    Example:
        >>> import jax, jax.numpy as jnp
        >>> from optlayers.jax import DEQ
        >>> deq = DEQ(lambda z, x, W: jnp.tanh(z @ W + x))
        >>> gradient = jax.grad(lambda W: deq(jnp.ones((3, 2)), W).sum())(0.3 * jnp.eye(2))
        >>> gradient.shape
        (2, 2)
    """

    def __init__(
        self,
        cell: Callable,
        start: Start = None,
        *,
        solver: FixedPointSolver = Anderson(),
        adjoint: Adjoint = Exact(),
        tol: float | None = None,
        max_iter: int = 50,
        order: int = 1,
        on_failure: str = "raise",
    ):
        self.cell, self.start = cell, start
        self.settings = FixedPoint(solver, adjoint, tol, max_iter, order, on_failure)

    def solve(self, *x: Any, z0: Any = None) -> tuple[Any, FixedPointInfo]:
        """The equilibrium, and what became of each sample."""
        return solve_equilibrium(ops, self.settings, self.cell, self.start, z0, x)

    def __call__(self, *x: Any, z0: Any = None) -> Any:
        return self.solve(*x, z0=z0)[0]
