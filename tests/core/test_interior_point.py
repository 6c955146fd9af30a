"""The interior point on hard, infeasible, batched and compiled problems."""

import numpy as np
import pytest

import optlayers.ops.jax as jax_ops
import optlayers.ops.torch as torch_ops
from optlayers.cones import Cones
from optlayers.linalg.kkt import Problem
from optlayers.solvers.interior_point import InteriorPoint
from optlayers.status import Status
from qp_families import (
    FAMILIES,
    dual_infeasible,
    eight_decades,
    fixed_and_free,
    portfolio,
    primal_infeasible,
    problems,
    residuals,
    weakly_active,
)

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")


def stacked(qps, array):
    """One batched `Problem` in the form A x + s = b, with s zero at the upper bound where there is one."""
    P, q, A, lo, hi = (np.stack(part) for part in zip(*qps, strict=True))
    lo, hi = np.where(lo <= -1e20, -np.inf, lo), np.where(hi >= 1e20, np.inf, hi)
    b = np.where(np.isfinite(hi), hi, np.where(np.isfinite(lo), lo, 0.0))
    return Problem(*map(array, (P, q, A, b, b - hi, b - lo)))


def perturbed(family, size, count):
    """`count` problems that differ in q, all solvable if the variables are bounded."""
    qp, rng = family(np.random.default_rng(3), size), np.random.default_rng(4)
    return [
        qp._replace(q=qp.q + 0.1 * abs(qp.q).max() * rng.standard_normal(qp.q.size)) for _ in range(count)
    ]


def iterate(ops, problem, steps):
    """The point after `steps` chunks of iterations from the solver's own start."""
    solver, cones = InteriorPoint(), Cones()
    running = ops.full((problem.q.shape[0],), 1.0, problem.q) > 0
    state = solver.init(ops, cones, problem, 0 * problem.q, 0 * problem.b, running)
    for _ in range(steps):
        state = solver.step(ops, cones, problem, state)
    return solver.point(ops, cones, problem, state)


def solve(qps, **settings):
    from optlayers.torch import solve_qp

    P, q, A, lo, hi = (torch.as_tensor(np.stack(part)) for part in zip(*qps, strict=True))
    with torch.no_grad():
        return solve_qp(P, q, A, lo, hi, solver=InteriorPoint(), on_failure="ignore", **settings)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_hard_problems_are_solved(family):
    ((_, qp),) = problems((20,), (family,))
    solution = solve([qp], eps=1e-11)
    assert residuals(qp, solution.x[0], solution.y[0]).max() <= 1e-9
    assert solution.iterations[0] <= 60


def test_residuals_reject_a_wrong_answer():
    ((_, qp),) = problems((20,), (portfolio,))
    solution = solve([qp])
    x, y = solution.x[0].numpy(), solution.y[0].numpy()
    assert residuals(qp, x, y).max() <= 1e-8
    assert residuals(qp, x + 1e-4, y)[0] > 1e-6
    assert residuals(qp, x, y + 1e-4)[1] > 1e-6
    assert residuals(qp, x, -y)[2] > 1e-6


def test_outcomes_in_one_batch():
    """Solvable and infeasible problems side by side: every certificate is found, none where there is none."""
    n, count = 20, 20
    families = {
        "SOLVED": weakly_active,
        "PRIMAL_INFEASIBLE": primal_infeasible,
        "DUAL_INFEASIBLE": dual_infeasible,
    }
    expected = [Status[name].code for name in families for _ in range(count)]
    qps = [family(np.random.default_rng([5, i]), n) for family in families.values() for i in range(count)]
    assert solve(qps).status.tolist() == expected


@pytest.mark.parametrize(
    "family", [eight_decades, fixed_and_free, portfolio], ids=lambda family: family.__name__
)
def test_a_batch_equals_its_problems(family):
    qps = perturbed(family, 20, 32)
    together = iterate(torch_ops, stacked(qps, torch.as_tensor), 2)
    for i, qp in enumerate(qps):
        alone = iterate(torch_ops, stacked([qp], torch.as_tensor), 2)
        for a, b in zip(together, alone, strict=True):
            assert abs(a[i] - b[0]).max() <= 1e-9 * (1 + abs(b).max())


def test_jax_under_jit_equals_torch():
    qps = perturbed(portfolio, 20, 4)
    expected = iterate(torch_ops, stacked(qps, torch.as_tensor), 2)
    compiled = jax.jit(lambda problem: iterate(jax_ops, problem, 2))
    for a, b in zip(compiled(stacked(qps, jax.numpy.asarray)), expected, strict=True):
        assert abs(np.asarray(a) - b.numpy()).max() <= 1e-8 * (1 + abs(b).max())


def test_shared_matrices_equal_repeated_ones():
    qps = perturbed(portfolio, 20, 4)
    problem = stacked(qps, torch.as_tensor)
    shared = problem._replace(P=problem.P[0], A=problem.A[0])
    for a, b in zip(iterate(torch_ops, shared, 2), iterate(torch_ops, problem, 2), strict=True):
        assert abs(a - b).max() <= 1e-9 * (1 + abs(b).max())


def test_a_scaled_objective_has_the_same_solution():
    """Also by 1e8 with a shared P, whose cost scale equilibration takes from P alone."""
    ((_, qp),) = problems((20,), (portfolio,))
    larger = qp._replace(q=1e8 * qp.q, P=1e8 * qp.P)
    x, scaled = (solve([p], eps=1e-11).x[0] for p in (qp, larger))
    assert abs(x - scaled).max() <= 1e-8
