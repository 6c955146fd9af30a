"""A user's own implicit layer in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..implicit import Implicit
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


def implicit(
    solve: Callable[..., Tensor],
    residual: Callable[..., Tensor],
    linear_solve: Callable[[Callable, Tensor], Tensor] | None = None,
    order: int = 2,
) -> Callable[..., Tensor]:
    """A layer whose value comes from `solve` and whose derivatives from `residual(z, *theta) == 0`.

    Args:
        solve: theta to z (B, ...), by any algorithm; it is never differentiated.
        residual: (z, *theta) to a tensor of the shape of z that is zero at the solution, written in torch
            operations; row i may depend on row i of z only. It may close over parameters of modules: their
            gradients arrive.
        linear_solve: (J, r) to J^-1 r, where J(dz) is the derivative of the residual in z, in reverse mode
            the transpose of that; never differentiated. By default the Jacobians (B, k, k) are formed and
            factorised, k entries of z per row.
        order: how many derivatives are right; more raise NotImplementedError.

    Returns:
        The layer, theta to z. Forward and reverse mode, their nestings and `torch.func.vmap` work.

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
