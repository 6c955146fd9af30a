"""Deep equilibrium layers, in JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..docstring import continues
from ..layers.adjoint import Adjoint, Exact
from ..layers.deq import Start, equilibrium_doc, solve_equilibrium
from ..layers.fixed_point import FixedPoint, FixedPointInfo
from ..ops import jax as ops
from ..solvers.fixed_point import Anderson, FixedPointSolver
from .calling import in_full_precision


@continues(equilibrium_doc)
class DEQ:
    """
    A cell that is a pytree, as Equinox modules are, makes the layer one; other cells take their parameters as
    further inputs, `deq(x, parameters)` with `DEQ(lambda z, x, parameters: ...)`, or close over them. Random
    numbers of the cell come from keys in its inputs, so that they are the same throughout a solve.

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
        record: Sequence[int] = (),
    ):
        self.cell = cell
        self.start = start if start is None or callable(start) else tuple(start)
        self.settings = FixedPoint(solver, adjoint, tol, max_iter, order, on_failure, tuple(record))

    @in_full_precision
    def solve(self, *x: Any, z0: Any = None, unroll: int | None = None) -> tuple[Any, FixedPointInfo]:
        """The equilibrium, and what became of each sample."""
        return solve_equilibrium(ops, self.settings, self.cell, self.start, z0, unroll, x)

    def __call__(self, *x: Any, z0: Any = None, unroll: int | None = None) -> Any:
        return self.solve(*x, z0=z0, unroll=unroll)[0]


def _flatten(deq: DEQ) -> tuple[tuple[Callable], tuple[Start, FixedPoint]]:
    return (deq.cell,), (deq.start, deq.settings)


def _unflatten(settings: tuple[Start, FixedPoint], cell: tuple[Callable]) -> DEQ:
    deq = object.__new__(DEQ)
    (deq.cell,), (deq.start, deq.settings) = cell, settings
    return deq


jax.tree_util.register_pytree_node(DEQ, _flatten, _unflatten)
