"""A user's own implicit layer in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..docstring import continues
from ..implicit import Implicit, implicit_doc
from ..ops import torch as ops
from .calling import in_full_precision, refuse_export


class _Layer(Implicit):
    @in_full_precision
    def __call__(self, *theta: Any) -> Tensor:
        refuse_export(
            "torch.export and torch.jit.trace cannot trace the derivative of a residual; "
            "compile the model with torch.compile, or export the solver without the layer"
        )
        return self.apply(ops, *theta)


@continues(implicit_doc)
def implicit(
    solve: Callable[..., Tensor],
    residual: Callable[..., Tensor],
    linear_solve: Callable[[Callable, Tensor], Tensor] | None = None,
    order: int = 2,
) -> Callable[..., Tensor]:
    """
    Example:
        >>> import torch
        >>> from optlayers.torch import implicit
        >>> cube_root = implicit(lambda a: a.sign() * a.abs() ** (1 / 3), lambda z, a: z**3 - a)
        >>> a = torch.tensor([[8.0]], requires_grad=True)
        >>> cube_root(a).sum().backward()
        >>> round(a.grad.item(), 4)  # 1 / (3 * 2**2)
        0.0833
    """
    return _Layer(solve, residual, linear_solve, order)
