"""An LP, a QP, an SOCP and an SDP that parameter values make solvable, infeasible or unbounded."""

from collections.abc import Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np


@dataclass(frozen=True)
class Kind:
    """A problem and values for its parameters; by position, `costs` is the objective and `sizes` scale x.

    Attributes:
        good: values of three problems with a solution, with a batch axis.
        infeasible, unbounded: values of one problem without.
    """

    problem: cp.Problem
    parameters: Sequence[cp.Parameter]
    variables: Sequence[cp.Variable]
    good: Sequence[np.ndarray]
    infeasible: Sequence[np.ndarray]
    unbounded: Sequence[np.ndarray]
    costs: int = 0
    sizes: int = 2

    def with_lane(self, values, index=1):
        """The good problems, with one replaced."""
        batch = [value.copy() for value in self.good]
        for column, value in zip(batch, values, strict=True):
            column[index] = value
        return batch

    def layer(self, frontend, **options):
        return frontend.CvxpyLayer(self.problem, self.parameters, self.variables, **options)


def _values(*values):
    return [np.array(value, float) for value in values]


def _polyhedral(objective):
    c, a, total = cp.Parameter(2, name="c"), cp.Parameter(2, name="a"), cp.Parameter(name="total")
    x = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(c @ x + objective(x)), [x >= 0, a @ x <= total])
    return Kind(
        problem,
        [c, a, total],
        [x],
        _values([[-1, -2.2], [-0.5, -0.2], [-3, -1]], [[1, 1.5], [1, 1], [2, 1]], [2.0, 1.0, 3.0]),
        infeasible=_values([-1, -2], [1, 1], -1),
        unbounded=_values([-1, -1], [1, -1], 1),
    )


def lp():
    return _polyhedral(lambda x: 0)


def qp():
    """P is singular: without it no convex quadratic program is unbounded."""
    return _polyhedral(lambda x: cp.square(x[0]) / 2)


def socp():
    """|F x| <= a'x + total."""
    c, a, total = cp.Parameter(2, name="c"), cp.Parameter(2, name="a"), cp.Parameter(name="total")
    x = cp.Variable(2)
    problem = cp.Problem(
        cp.Minimize(c @ x), [cp.norm(np.array([[1.0, 0.4], [0.0, 0.9]]) @ x) <= a @ x + total]
    )
    return Kind(
        problem,
        [c, a, total],
        [x],
        _values([[1, 2], [-1, 0.3], [0.5, -2]], [[0, 0.2], [0.3, 0.1], [-0.2, 0]], [1.0, 2.0, 0.5]),
        infeasible=_values([1, 1], [0, 0], -1),
        unbounded=_values([-1, 0], [2, 0], 1),
    )


def sdp():
    """minimise tr(CX), X positive semidefinite, tr(AX) = total."""
    C, A = cp.Parameter((2, 2), symmetric=True, name="C"), cp.Parameter((2, 2), symmetric=True, name="A")
    total = cp.Parameter(name="total")
    X = cp.Variable((2, 2), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), [X >> 0, cp.trace(A @ X) == total])
    return Kind(
        problem,
        [C, A, total],
        [X],
        _values(
            [[[1, 0.5], [0.5, -1]], [[2, -1], [-1, 1]], [[0, 1], [1, 3]]],
            [[[1, 0], [0, 1]], [[1, 0.2], [0.2, 1]], [[2, 0], [0, 1]]],
            [1.0, 2.0, 0.7],
        ),
        infeasible=_values(np.eye(2), np.eye(2), -1),
        unbounded=_values(-np.eye(2), np.diag([1, -1]), 1),
    )


KINDS = {kind.__name__: kind for kind in (lp, qp, socp, sdp)}
