"""Fixed points of maps, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..docstring import continues
from ..layers.adjoint import Adjoint, Exact
from ..layers.fixed_point import FixedPoint, fixed_point_doc
from ..ops import torch as ops
from ..solvers.fixed_point import Anderson, FixedPointSolver
from .calling import in_full_precision, not_traced

WHY_NOT_TRACED = (
    "the steps of a fixed-point solver depend on the data and cannot be traced into a graph; compile the map "
    "instead, as in DEQ(torch.compile(cell)), and the rest of the model without fullgraph=True"
)


@continues(fixed_point_doc)
@not_traced(WHY_NOT_TRACED)
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
    Example:
        >>> import torch
        >>> from optlayers.torch import fixed_point
        >>> x = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
        >>> z = fixed_point(lambda z, x: torch.cos(z) * x, torch.zeros(1, 1, dtype=torch.float64), x)
        >>> z.backward()
        >>> round(z.item(), 4), round(x.grad.item(), 4)
        (0.4502, 0.7395)
    """
    settings = FixedPoint(solver, adjoint, tol, max_iter, order, on_failure, tuple(record))
    z, info = settings(ops, f, z0, *args)
    return (z, info) if return_info else z
