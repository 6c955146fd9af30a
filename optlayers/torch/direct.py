"""Quadratic and cone programs given as matrices, in PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..cones import Cones
from ..docstring import continues
from ..layers.approximate import LPGD, Smoothed
from ..layers.conic import ConicSolution, conic_layer
from ..layers.direct import curved_part, solve_box, solve_cone
from ..ops import torch as ops
from . import sparse


@continues(solve_box)
def solve_qp(
    P: Tensor | None,
    q: Tensor,
    A: Tensor | None = None,
    l: Tensor | None = None,
    u: Tensor | None = None,
    *,
    solver: Any = None,
    eps: float = 1e-9,
    order: int = 2,
    on_failure: str = "raise",
    rescue: bool = True,
    gradient: str | Smoothed | LPGD = "exact",
    warm_start: ConicSolution | None = None,
) -> ConicSolution:
    """
    P and A may also be sparse; see `optlayers.layers.sparse`.

    Example:
        >>> import torch
        >>> from optlayers.torch import solve_qp
        >>> q = torch.tensor([-3.0, 0.5], requires_grad=True)
        >>> solution = solve_qp(torch.eye(2), q, torch.eye(2), -torch.ones(2), torch.ones(2))
        >>> solution.x.sum().backward()
        >>> q.grad.round().int().tolist()
        [0, -1]
    """
    if sparse.is_sparse(P) or sparse.is_sparse(A):
        options = {"solver": solver, "eps": eps, "order": order, "on_failure": on_failure}
        return sparse.solve_qp(P, q, A, l, u, _point(warm_start), gradient=gradient, **options)
    layer = conic_layer(Cones(), P is None, solver, {"eps": eps}, order, on_failure, rescue, gradient)
    return solve_box(ops, layer, (P, q, A, l, u), _point(warm_start), q)


@continues(solve_cone)
def solve_conic(
    P: Tensor | None,
    q: Tensor,
    A: Tensor,
    b: Tensor,
    cones: Cones,
    *,
    solver: Any = None,
    eps: float = 1e-9,
    order: int = 2,
    on_failure: str = "raise",
    rescue: bool = True,
    gradient: str | Smoothed | LPGD = "exact",
    warm_start: ConicSolution | None = None,
) -> ConicSolution:
    """
    P and A may also be sparse; see `optlayers.layers.sparse`.

    Example:
        >>> import torch
        >>> from optlayers.torch import Cones, solve_conic
        >>> A, b = -torch.eye(2), torch.zeros(2)
        >>> solution = solve_conic(torch.eye(2), torch.tensor([1.0, -2.0]), A, b, Cones(nonneg=2))
        >>> abs(solution.x).round(decimals=6).tolist()
        [0.0, 2.0]
    """
    if sparse.is_sparse(P) or sparse.is_sparse(A):
        options = {"solver": solver, "eps": eps, "order": order, "on_failure": on_failure}
        return sparse.solve_conic(P, q, A, b, cones, _point(warm_start), gradient=gradient, **options)
    layer = conic_layer(
        curved_part(cones), P is None, solver, {"eps": eps}, order, on_failure, rescue, gradient
    )
    return solve_cone(ops, layer, cones, (P, q, A, b), _point(warm_start), q)


def _point(solution: ConicSolution | None) -> tuple[Tensor, ...]:
    return () if solution is None else tuple(solution[:3])
