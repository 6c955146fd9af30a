"""Deep equilibrium layers, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..docstring import continues
from ..layers.adjoint import Adjoint, Exact
from ..layers.deq import Start, equilibrium_doc, solve_equilibrium
from ..layers.fixed_point import FixedPoint, FixedPointInfo
from ..ops import torch as ops
from ..solvers.fixed_point import Anderson, FixedPointSolver
from .calling import in_full_precision, not_traced
from .fixed_point import WHY_NOT_TRACED
from .repeatable import repeatable


@continues(equilibrium_doc)
class DEQ(nn.Module):
    """
    Within one solve, forward and backward, the cell draws the same random numbers at each call, so that a
    dropout mask is drawn once; and the parametrisations of its modules (`torch.nn.utils.parametrizations`,
    such as `spectral_norm`) are evaluated once.

    Example:
        >>> import torch
        >>> from optlayers.torch import DEQ
        >>> linear = torch.nn.Linear(2, 2)
        >>> deq = DEQ(lambda z, x: torch.tanh(0.5 * linear(z) + x))
        >>> x = torch.ones(3, 2)
        >>> z, info = deq.solve(x)
        >>> bool((z - torch.tanh(0.5 * linear(z) + x)).abs().max() < 1e-5)
        True
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
        super().__init__()
        self.cell, self.start = cell, start
        self.settings = FixedPoint(solver, adjoint, tol, max_iter, order, on_failure, tuple(record))

    @not_traced(WHY_NOT_TRACED)
    @in_full_precision
    def solve(self, *x: Any, z0: Any = None, unroll: int | None = None) -> tuple[Any, FixedPointInfo]:
        """The equilibrium, and what became of each sample."""
        cell = repeatable(self.cell)
        return solve_equilibrium(ops, self.settings, cell, self.start, z0, unroll, x)

    def forward(self, *x: Any, z0: Any = None, unroll: int | None = None) -> Any:
        return self.solve(*x, z0=z0, unroll=unroll)[0]
