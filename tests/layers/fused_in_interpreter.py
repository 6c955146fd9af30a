"""The kernel for small quadratic programs against the operations it stands for.

Run by `test_fused.py` in a process of its own: the interpreter has to be chosen before Triton is imported.
"""

import cvxpy as cp
import numpy as np
import pytest
import torch

from optlayers.ops import torch as ops
from optlayers.ops.torch import fused
from optlayers.torch import ADMM, CvxpyLayer, Status, solve_qp

FUSED = ADMM(fused=True)
# Of NaN and the like, about which a GPU says nothing.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """As on a GPU: leaves work on tensors, and small programs go to the kernel, which counts its calls."""
    calls = []

    def solve_small(inputs, settings, counts):
        calls.append(inputs)
        return fused.solve(inputs, settings, counts)

    monkeypatch.setattr(ops, "solve_small", solve_small)
    monkeypatch.setattr(ops.host, "serves", lambda solve, inputs: False)
    return calls


def programs(batch, n, m):
    """Convex programs with equalities, one-sided, two-sided and free rows, and a feasible point."""
    rng = np.random.default_rng(0)
    root, q, A = (rng.standard_normal(shape) for shape in ((batch, n, n), (batch, n), (batch, m, n)))
    at = (A @ rng.standard_normal((batch, n, 1)))[..., 0]
    l, u = at - rng.uniform(size=at.shape), at + rng.uniform(size=at.shape)
    u[:, 0] = l[:, 0] = at[:, 0]
    l[:, 1], u[:, 2], l[:, 3], u[:, 3] = -np.inf, np.inf, -np.inf, np.inf
    P = root @ root.swapaxes(1, 2) / n + 0.1 * np.eye(n)
    return [torch.tensor(x) for x in (P, q, A, l, u)]


def everything(data, solver):
    """x, y, and the gradient of a weighted sum of both in all data."""
    data = [x.clone().requires_grad_() for x in data]
    solution = solve_qp(*data, solver=solver)
    weights = [torch.linspace(-1, 1, z.shape[-1], dtype=z.dtype) for z in (solution.x, solution.y)]
    value = sum((z * w).sum() for z, w in zip((solution.x, solution.y), weights, strict=True))
    return solution, [solution.x, solution.y, *torch.autograd.grad(value, data)]


@pytest.mark.parametrize("shared", [(), (0, 2), (1, 2, 3, 4)])
@pytest.mark.parametrize("n, m", [(3, 4), (7, 9)])
def test_solutions_and_gradients(interpreted, n, m, shared):
    data = [x[0] if k in shared else x for k, x in enumerate(programs(4, n, m))]
    if shared == (0, 2):  # constraints that hold for all at a common point
        data[3:] = [x[:1].expand(4, -1) for x in data[3:]]
    expected, numbers = everything(data, ADMM())
    solution, actual = everything(data, FUSED)
    assert len(interpreted) == 1
    assert (solution.iterations > 0).all()
    assert expected.status.tolist() == solution.status.tolist() == [Status.SOLVED.code] * 4
    for a, b in zip(actual, numbers, strict=True):
        assert abs(a - b).max() < 1e-9 * (1 + abs(b).max())


def test_the_rest_is_left_to_plain_operations(interpreted):
    """Beside a solved one: no solution, in two ways; not convex; not finite; rows that are equal."""
    P, q, A, l, u = programs(6, 3, 5)
    l[1], u[1] = 1.0, 0.0
    A[2, 1] = A[2, 0]
    u[2, 1] = l[2, 0] - 1
    P[3] = -P[3]
    q[4, 0] = torch.nan
    A[5, 2] = A[5, 1]
    l[5, 2], u[5, 2] = l[5, 1], u[5, 1]
    expected = solve_qp(P, q, A, l, u, on_failure="ignore")
    solution = solve_qp(P, q, A, l, u, solver=ADMM(fused=True, max_iter=100), on_failure="ignore")
    names = [list(Status)[code].name for code in solution.status]
    assert names[:5] == ["SOLVED", "PRIMAL_INFEASIBLE", "PRIMAL_INFEASIBLE", "NON_CONVEX", "NON_FINITE"]
    assert solution.status.tolist() == expected.status.tolist()
    assert solution.regularity.y.tolist() == expected.regularity.y.tolist()
    assert abs(solution.x - expected.x)[[0, 5]].max() < 1e-9


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_setting_of_a_layer(interpreted, batch):
    x, p = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0, cp.sum(x) == 1])
    value = torch.tensor(np.random.default_rng(0).standard_normal((batch, 3)))
    results = []
    for settings in ({}, {"fused": True}):
        live = value.clone().requires_grad_()
        (point,) = CvxpyLayer(problem, [p], [x], solver_args=settings)(live)
        results.append((point, *torch.autograd.grad(point.square().sum(), live)))
    assert len(interpreted) == 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
