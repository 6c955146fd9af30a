"""Quadratic and cone programs given as matrices, in PyTorch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.sparse import issparse
from torch import Tensor

from ..cones import Cones
from ..docstring import continues
from ..layers.approximate import LPGD, Smoothed
from ..layers.conic import ConicSolution, conic_layer, point_of
from ..layers.cvxpy import Solution
from ..layers.direct import curved_part, solve_box, solve_cone, solve_matrices
from ..ops import torch as ops
from ..ops.torch import host
from . import sparse
from .arguments import common
from .compiled import CompiledProgram


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
    compiled: bool = False,
) -> ConicSolution:
    """
    P and A may also be sparse; see `optlayers.layers.sparse`. For `compiled` see `CvxpyLayer`.

    Example:
        >>> import torch
        >>> from optlayers.torch import solve_qp
        >>> q = torch.tensor([-3.0, 0.5], requires_grad=True)
        >>> solution = solve_qp(torch.eye(2), q, torch.eye(2), -torch.ones(2), torch.ones(2))
        >>> solution.x.sum().backward()
        >>> q.grad.round().int().tolist()
        [0, -1]
    """
    data, choices = {"P": P, "q": q, "A": A, "l": l, "u": u}, (solver, eps, order, on_failure, gradient)
    return _solve(None, Cones(), data, warm_start, choices, rescue, compiled)


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
    compiled: bool = False,
) -> ConicSolution:
    """
    P and A may also be sparse; see `optlayers.layers.sparse`. For `compiled` see `CvxpyLayer`.

    Example:
        >>> import torch
        >>> from optlayers.torch import Cones, solve_conic
        >>> A, b = -torch.eye(2), torch.zeros(2)
        >>> solution = solve_conic(torch.eye(2), torch.tensor([1.0, -2.0]), A, b, Cones(nonneg=2))
        >>> abs(solution.x).round(decimals=6).tolist()
        [0.0, 2.0]
    """
    data, choices = {"P": P, "q": q, "A": A, "b": b}, (solver, eps, order, on_failure, gradient)
    return _solve(cones, curved_part(cones), data, warm_start, choices, rescue, compiled)


@dataclass(frozen=True)
class _Matrices:
    """`solve_matrices` of those arguments that are given."""

    cones: Cones | None
    given: tuple[bool, ...]

    def solve(self, ops, layer, values, warm, like) -> Solution:
        rest = iter(values)
        data = [next(rest) if given else None for given in self.given]
        return Solution((), *solve_matrices(ops, layer, self.cones, data, warm, like))


@functools.cache
def _compiled(program: _Matrices) -> CompiledProgram:
    return CompiledProgram(program.solve, list(itertools.compress((2, 1, 2, 1, 1), program.given)))


def _solve(
    cones: Cones | None,
    curved: Cones,
    data: Mapping[str, Any],
    warm_start: ConicSolution | None,
    choices: tuple[Any, ...],
    rescue: bool,
    compiled: bool,
) -> ConicSolution:
    """`solve_conic`, or `solve_qp` where there are no cones."""
    P, q, A, *vectors = data.values()
    # Matrices of SciPy have no type of the results to say; q must be there.
    typed = {key: x for key, x in data.items() if key == "q" or not (x is None or issparse(x))}
    like, warm = common([*typed.values()], [*typed].__getitem__, lambda i: False), point_of(warm_start)
    if sparse.is_sparse(P) or sparse.is_sparse(A):
        return sparse.solve(cones, curved, P, A, (q, *vectors), warm, like, *choices)
    solver, eps, order, on_failure, gradient = choices
    layer = conic_layer(curved, P is None, solver, {"eps": eps}, order, on_failure, rescue, gradient)
    program = _Matrices(cones, tuple(x is not None for x in data.values()))
    values = [x for x in data.values() if x is not None]
    plain = lambda values: program.solve(ops, layer, values, warm, like)
    if compiled and layer.gradient is None and host.is_readable([*values, *warm]):
        solution = _compiled(program).solve(plain, layer, True, values, warm, like)
    else:
        solution = plain(values)
    return ConicSolution(*solution[1:])
