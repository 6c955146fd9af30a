"""A CVXPY problem as a PyTorch module."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..docstring import continues
from ..layers.approximate import LPGD, Smoothed
from ..layers.conic import point_of
from ..layers.cvxpy import CvxpyProgram, Solution
from ..ops import torch as ops
from ..ops.torch import host
from ..ops.torch.context import outside
from ..status import SolveError
from .arguments import common
from .compiled import CompiledProgram
from .sparse import on_host

ops.run_while_compiling(CvxpyProgram.splits)
ops.run_while_compiling(CvxpyProgram.bounds)


@continues(CvxpyProgram)
class CvxpyLayer(torch.nn.Module):
    """With `compiled` it runs on a CPU as one program that XLA compiles, through JAX, which has to be there,
    after some seconds for each set of shapes: small batches and problems in curved cones in a half to a third
    of the time. What that does not serve goes the usual way: tensors on a GPU, second derivatives and
    forward mode, `torch.func`, `torch.compile`, a `gradient` that is not exact, large sparse problems,
    batches with problems that stay unfinished, and forked processes, as workers of a DataLoader are.

    Example:
        >>> import cvxpy as cp, torch
        >>> from optlayers.torch import CvxpyLayer
        >>> x, p = cp.Variable(2), cp.Parameter(2)
        >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0])
        >>> layer = CvxpyLayer(problem, parameters=[p], variables=[x])
        >>> point = torch.tensor([[1.0, -2.0], [3.0, 4.0]], requires_grad=True)
        >>> (nearest,) = layer(point)
        >>> nearest.sum().backward()
        >>> (point.grad > 0.5).tolist()
        [[True, False], [True, True]]
    """

    def __init__(
        self,
        problem,
        parameters: Sequence,
        variables: Sequence,
        solver: Any = None,
        gp: bool = False,
        verbose: bool = False,
        canon_backend: str | None = None,
        solver_args: Mapping[str, Any] | None = None,
        *,
        order: int = 2,
        on_failure: str = "raise",
        rescue: bool = True,
        gradient: str | Smoothed | LPGD = "exact",
        compiled: bool = False,
    ):
        super().__init__()
        self._program = CvxpyProgram(
            problem,
            parameters,
            variables,
            gp,
            canon_backend,
            solver_args,
            {
                "solver": solver,
                "order": order,
                "on_failure": on_failure,
                "rescue": rescue,
                "gradient": gradient,
            },
        )
        axes = [parameter.ndim for parameter in self._program.parameters]
        self._compiled = CompiledProgram(self._program.solve, axes) if compiled else None
        if verbose:
            print(self)

    def forward(self, *params: Tensor, solver_args: Mapping[str, Any] | None = None) -> tuple[Tensor, ...]:
        """The variables for these parameter values, each with their batch axes in front.

        Args:
            params: one tensor per parameter, of its shape, with the same leading batch axes or none.
            solver_args: settings for this call, in place of those of the constructor.

        Raises:
            ValueError: values of the wrong number, shape, type or device.
            SolveError: some problems were not solved, and `on_failure` is "raise".
        """
        return self._run(CvxpyProgram.call, params, solver_args)

    def solve(
        self,
        *params: Tensor,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: Solution | None = None,
    ) -> Solution:
        """As `forward`, with the multipliers, status and statistics; see `Solution`.

        Args:
            warm_start: an earlier solution of this layer for the same batch, to start from; problems
                whose entries are NaN start anew.
        """
        return self._run(CvxpyProgram.solve, params, solver_args, point_of(warm_start))

    def _run(self, method, params, solver_args, *more) -> Any:
        program = self._program
        layer, like = program.layer(solver_args), program.like(common, params)
        run = functools.partial(_on_host, method) if program.is_sparse else method
        is_dense = not program.is_sparse and layer.gradient is None
        tensors = lambda params: [x for part in (params, *more) for x in part]

        def plain(params):
            if is_dense and host.serves_call(tensors(params)):
                return host.call(functools.partial(method, program), layer, params, *more, like)
            return run(program, ops, layer, params, *more, like)

        try:
            if self._compiled and is_dense and host.is_readable(tensors(params)):
                whole = method is CvxpyProgram.solve
                return self._compiled.solve(plain, layer, whole, params, *(more or ((),)), like)
            return plain(params)
        except SolveError as error:
            find = lambda *values: [*program.faults([x.numpy(force=True) for x in values])]
            for fault in outside(find, *params):
                error.add_note(fault)
            raise

    def summary(self) -> str:
        """Parameters, sizes, cones, outputs, solvers and set-up time, one a line."""
        return self._program.summary()

    def extra_repr(self) -> str:
        return self._program.headline()


@on_host
def _on_host(method, *args) -> Any:
    return method(*args)
