"""Outcome of a solve, one per problem in the batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np

FAILURE_POLICIES = ("raise", "nan", "mask", "ignore")  # of a layer, for problems without solution


class Status(Enum):
    """What became of one problem. The value is the message shown to the user; `code` is stored in arrays.

    Example:
        >>> from optlayers.torch import Status
        >>> Status.ITERATION_LIMIT.code, list(Status)[5]
        (4, <Status.NON_FINITE: 'the data contain NaN or infinity'>)
    """

    SOLVED = "solved to the requested accuracy"
    INACCURATE = (
        "solved, but less accurately than requested; scale the data, or accept it with a larger `eps`"
    )
    PRIMAL_INFEASIBLE = "infeasible: no point satisfies all constraints (certificate found); relax one"
    DUAL_INFEASIBLE = (
        "unbounded: the objective decreases for ever (certificate found); bound the variables or regularise"
    )
    ITERATION_LIMIT = (
        "iteration limit reached before convergence; raise `max_iter`, scale the data, or try another solver"
    )
    NON_FINITE = "the data contain NaN or infinity"
    NON_CONVEX = (
        "not convex: P has a negative eigenvalue, and what satisfies the optimality conditions need not be "
        "a minimum; make P positive semidefinite, as L @ L.mT"
    )
    STEP_LIMIT = (
        "step limit reached before the last time; raise `max_steps`, loosen `rtol` and `atol`, or take an "
        "implicit method if the equation is stiff"
    )
    STEP_UNDERFLOW = (
        "the step size fell to rounding: a singularity, a right-hand side that jumps, or tolerances too tight"
    )

    def __init__(self, message: str):
        self.code = len(type(self).__members__)  # of those before it


def from_code(code: int) -> Status:
    return list(Status)[code]


class SolveError(RuntimeError):
    """Some problems of a batch have no usable solution; `status` and `residual` say what became of each.

    Attributes:
        status: codes of `Status`, one per problem, as a NumPy array.
        residual: relative residual reached by each; of a differential equation, the time reached.

    Example:
        >>> import torch
        >>> from optlayers.torch import SolveError, solve_qp
        >>> A, bound = torch.tensor([[1.0], [-1.0]]), torch.tensor([-1.0, -1.0])
        >>> try:
        ...     solve_qp(torch.eye(1), torch.ones(1), A, u=bound)  # x <= -1 and x >= 1
        ... except SolveError as error:
        ...     print(str(error).splitlines()[1].strip()[:40])
        infeasible: no point satisfies all const
    """

    def __init__(self, status: np.ndarray, residual: np.ndarray, reached: str = "residual {:.1e}"):
        super().__init__(_report(status, residual, reached))
        self.status, self.residual, self.reached = status, residual, reached


@contextmanager
def batch_axes(lead: tuple[int, ...]) -> Iterator[None]:
    """Within it a SolveError for a flat batch names problems by the batch axes `lead`, behind one of vmap."""
    try:
        yield
    except SolveError as error:
        shape = lead if error.status.size == math.prod(lead) else (-1, *lead)
        arrays = (error.status.reshape(shape), error.residual.reshape(shape))
        raise SolveError(*arrays, error.reached) from None


def _report(status: np.ndarray, residual: np.ndarray, reached: str, shown: int = 5) -> str:
    failed = np.argwhere(~is_usable(status))
    lines = [f"{len(failed)} of {status.size} problems were not solved:"]
    for index in map(tuple, failed[:shown].tolist()):
        where = f"batch index {index}: " if index else ""
        lines.append(f"  {where}{from_code(int(status[index])).value} ({reached.format(residual[index])})")
    if len(failed) > shown:
        lines.append(f"  and {len(failed) - shown} more")
    lines.append("To go on without them, build the layer with on_failure='nan', 'mask' or 'ignore'.")
    return "\n".join(lines)


def is_usable(status: Any) -> Any:
    """Whether the solution and its derivative may be used, for an array of codes of any framework."""
    return (status == Status.SOLVED.code) | (status == Status.INACCURATE.code)


def check(status: np.ndarray, residual: np.ndarray, reached: str = "residual {:.1e}") -> None:
    """Raise for failed problems, warn of inaccurate ones; `reached` says what `residual` is.

    Raises:
        SolveError: naming the failed problems and why they failed.
    """
    if not is_usable(status).all():
        raise SolveError(status, residual, reached)
    inaccurate = status == Status.INACCURATE.code
    if inaccurate.any():
        warnings.warn(
            f"{inaccurate.sum()} of {status.size} problems: {Status.INACCURATE.value} "
            f"(largest residual {residual.max():.1e})",
            stacklevel=2,
        )


def warn_of_inexact_gradients(what: str, advice: str, status: np.ndarray, residual: np.ndarray) -> None:
    """Warn where the equations of a derivative were not solved; `what` leads to the residual in the text."""
    failed = status != Status.SOLVED.code
    if failed.any():
        warnings.warn(
            f"the linear equations of the derivative were not solved for {failed.sum()} of {failed.size} "
            f"{what} up to {residual[failed].max():.1e}): these gradients are inexact; {advice}",
            stacklevel=2,
        )
