"""Differential equations, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..docstring import continues
from ..layers.control_path import (
    ControlPath,
    build_path,
    cdeint_doc,
    control_path_doc,
    controlled_field,
    stopped_at_knots,
)
from ..layers.ode import InitialValueProblem, Jumps, ODEInfo, ode_doc, odeint_doc
from ..layers.ode_adjoint import Adjoint, Discrete
from ..ops import torch as ops
from ..solvers.tableaux import Tableau
from .calling import in_full_precision, not_traced
from .repeatable import snapshot

WHY_NOT_TRACED = (
    "the steps of an ODE solver depend on the data and cannot be traced into a graph; compile the vector "
    "field instead, as in ODE(torch.compile(func)), and the rest of the model without fullgraph=True"
)


@continues(odeint_doc)
@not_traced(WHY_NOT_TRACED)
@in_full_precision
def odeint(
    func: Callable,
    y0: Any,
    t: Tensor,
    *args: Any,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | Tableau = "dopri5",
    adjoint: Adjoint = Discrete(),
    jumps: Jumps | None = None,
    event: Callable | None = None,
    step_size: float | None = None,
    first_step: float | None = None,
    max_steps: int = 1024,
    order: int = 1,
    on_failure: str = "raise",
    return_info: bool = False,
) -> Any:
    """
    As in torchdiffeq, func is called with (t, y, *args); the function of the jumps with (t, y, j), where j
    (B,) numbers the jump of each sample.

    Example:
        >>> import torch
        >>> from optlayers.torch import odeint
        >>> rate = torch.tensor(-1.0, requires_grad=True)
        >>> y = odeint(lambda t, y: rate * y, torch.ones(1), torch.tensor([0.0, 1.0]))
        >>> y[-1].backward()
        >>> round(y[-1].item(), 4), round(rate.grad.item(), 4)
        (0.3679, 0.3679)
    """
    problem = InitialValueProblem(
        method, rtol, atol, adjoint, step_size, first_step, max_steps, order, on_failure
    )
    func = snapshot(func)
    y, info = problem(ops, lambda t, y: func(t, y, *args), y0, t, jumps, event)
    return (y, info) if return_info else y


@continues(ode_doc)
class ODE(nn.Module):
    """
    A func that is a module counts as it is when a solve begins, forward and backward, by a copy of it that
    shares its tensors: what it assigns to attributes of its own is not seen outside; `ODEInfo.evaluations`
    counts its calls.

    Example:
        >>> import torch
        >>> from optlayers.torch import ODE
        >>> linear = torch.nn.Linear(2, 2)
        >>> ode = ODE(lambda t, y: torch.tanh(linear(y)))
        >>> ode(torch.ones(3, 2), torch.linspace(0, 1, 5)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        func: Callable,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        method: str | Tableau = "dopri5",
        adjoint: Adjoint = Discrete(),
        step_size: float | None = None,
        first_step: float | None = None,
        max_steps: int = 1024,
        order: int = 1,
        on_failure: str = "raise",
    ):
        super().__init__()
        self.func = func
        self.settings = InitialValueProblem(
            method, rtol, atol, adjoint, step_size, first_step, max_steps, order, on_failure
        )

    @not_traced(WHY_NOT_TRACED)
    @in_full_precision
    def solve(
        self, y0: Any, t: Tensor, *args: Any, jumps: Jumps | None = None, event: Callable | None = None
    ) -> tuple[Any, ODEInfo]:
        """The solution, and what became of each sample."""
        func = snapshot(self.func)
        return self.settings(ops, lambda t, y: func(t, y, *args), y0, t, jumps, event)

    def forward(
        self, y0: Any, t: Tensor, *args: Any, jumps: Jumps | None = None, event: Callable | None = None
    ) -> Any:
        return self.solve(y0, t, *args, jumps=jumps, event=event)[0]


@continues(control_path_doc)
def control_path(t: Tensor, x: Tensor, interpolation: str = "hermite", with_time: bool = True) -> ControlPath:
    """
    Example:
        >>> import torch
        >>> from optlayers.torch import control_path
        >>> X = control_path(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([[0.0], [float("nan")], [6.0]]))
        >>> X.evaluate(torch.tensor(1.0))
        tensor([1., 2.])
    """
    return build_path(ops, t, x, interpolation, with_time)


@continues(cdeint_doc)
def cdeint(
    f: Callable, z0: Tensor, X: ControlPath, t: Tensor | None = None, *args: Any, **options: Any
) -> Any:
    """
    f is called with (t, z, *args).

    Example:
        >>> import torch
        >>> from optlayers.torch import cdeint, control_path
        >>> X = control_path(torch.linspace(0, 1, 5), torch.randn(3, 5, 2))
        >>> linear = torch.nn.Linear(4, 4 * 3)
        >>> cdeint(lambda t, z: torch.tanh(linear(z)).reshape(3, 4, 3), torch.zeros(3, 4), X).shape
        torch.Size([3, 2, 4])
    """
    options = stopped_at_knots(X, t, lambda t, z, j: z, options)
    field = controlled_field(lambda t, z: f(t, z, *args), X)
    return odeint(field, z0, X.interval if t is None else t, **options)
