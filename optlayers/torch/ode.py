"""Differential equations, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..docstring import continues
from ..layers.ode import InitialValueProblem, Jumps, ODEInfo, ode_doc, odeint_doc
from ..ops import torch as ops
from ..solvers.tableaux import Tableau


@continues(odeint_doc)
def odeint(
    func: Callable,
    y0: Any,
    t: Tensor,
    *args: Any,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | Tableau = "dopri5",
    jumps: Jumps | None = None,
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
    problem = InitialValueProblem(method, rtol, atol, step_size, first_step, max_steps, order, on_failure)
    y, info = problem(ops, lambda t, y: func(t, y, *args), y0, t, jumps)
    return (y, info) if return_info else y


@continues(ode_doc)
class ODE(nn.Module):
    """
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
        step_size: float | None = None,
        first_step: float | None = None,
        max_steps: int = 1024,
        order: int = 1,
        on_failure: str = "raise",
    ):
        super().__init__()
        self.func = func
        self.settings = InitialValueProblem(
            method, rtol, atol, step_size, first_step, max_steps, order, on_failure
        )

    def solve(self, y0: Any, t: Tensor, *args: Any, jumps: Jumps | None = None) -> tuple[Any, ODEInfo]:
        """The solution, and what became of each sample."""
        return self.settings(ops, lambda t, y: self.func(t, y, *args), y0, t, jumps)

    def forward(self, y0: Any, t: Tensor, *args: Any, jumps: Jumps | None = None) -> Any:
        return self.solve(y0, t, *args, jumps=jumps)[0]
