"""Opposite inequalities reach a solver as one row with two bounds, without a trace in the outcome."""

import cvxpy as cp
import numpy as np
import pytest

from checks import assert_close
from optlayers.canon.cvxpy import canonicalize
from optlayers.layers.ranges import ranges
from optlayers.status import Status

TIGHT = {"solver": cp.CLARABEL, "tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}


def ranged(rng):
    """A box, a range of a sum, a bound from one side, and one from the other with a parameter."""
    x, p, top = cp.Variable(4), cp.Parameter(4), cp.Parameter()
    total = np.array([1.0, -2.0, 0.0, 1.0]) @ x
    constraints = [x >= -1, x <= 0.5, total <= 0.6, -total <= 0.3, 3 * x[0] + x[1] <= 0.9, -total <= top]
    duals = [constraint.dual_variables[0] for constraint in constraints]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), constraints)
    return problem, [p, top], [x, *duals]


def test_rows_that_are_merged(rng):
    """Four of the box and one of the range; parameters keep a row apart, as does a factor."""
    problem, parameters, variables = ranged(rng)
    program = canonicalize(problem, parameters, variables)
    plan = ranges(program)
    assert program.m == 16 and plan.program.m == 11
    np.testing.assert_allclose(np.sort(plan.width[np.isfinite(plan.width)]), [0.9] + [1.5] * 4)
    x, p = cp.Variable(2), cp.Parameter(2)
    one_sided = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0, x <= p, 2 * x >= p])
    assert ranges(canonicalize(one_sided, [p], [x])) is None


@pytest.mark.parametrize("upper_first", [True, False])
def test_sides_of_unequal_size(upper_first):
    """The smaller one is kept; one that is 1e8 times smaller would be lost in the rounding of the width."""
    x, p = cp.Variable(1), cp.Parameter(1)
    for far, rows in ((1e6, 1), (1e12, 2)):
        constraints = [x <= far, x >= -1][:: 1 if upper_first else -1]
        problem = cp.Problem(cp.Minimize(cp.norm(x - p)), constraints)
        program = canonicalize(problem, [p], [x])
        plan = ranges(program)
        assert program.m - (program if plan is None else plan.program).m == 2 - rows
        if plan is not None:
            assert abs(plan.program.b.constant).max() == 1.0


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("far", [1e20, 1e30, np.inf])
def test_far_bounds_are_none(frontend, far):
    x, p = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.norm(x - p)), [x <= np.array([far, 1.0, far]), x >= -1])
    layer = frontend.CvxpyLayer(problem, [p], [x])
    (value,), (gradient,) = frontend.differentiable(layer)([np.array([2.0, -3.0, 0.5])], [np.ones(3)])
    assert_close(value, np.array([2.0, -1.0, 0.5]), 1e-7)
    assert_close(gradient, np.array([1.0, 0.0, 1.0]), 1e-6)


def test_multipliers_of_all_rows(frontend, rng):
    problem, parameters, variables = ranged(rng)
    values = [2 * rng.standard_normal((5, 4)), np.linspace(0.05, 0.45, 5)]
    layer = frontend.CvxpyLayer(problem, parameters, variables)
    outputs = [frontend.numpy(output) for output in layer(*map(frontend.array, values))]
    for i in range(5):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.value = value[i]
        problem.solve(**TIGHT)
        for output, variable in zip(outputs, variables, strict=True):
            assert_close(output[i], variable.value, 1e-6, str(variable))


def test_slacks_and_a_warm_start_are_those_of_all_rows(frontend, rng):
    problem, parameters, variables = ranged(rng)
    layer = frontend.CvxpyLayer(problem, parameters, variables)
    values = [frontend.array(value) for value in (2 * rng.standard_normal((3, 4)), np.full(3, 0.2))]
    solution = layer.solve(*values)
    x, s = frontend.numpy(solution.variables[0]), frontend.numpy(solution.s)
    assert s.shape == (3, 16)
    box = np.sort(np.concatenate([x + 1, 0.5 - x], 1))
    assert all(np.abs(s[i][:, None] - box[i]).min(0).max() < 1e-9 for i in range(3))
    again = layer.solve(*values, warm_start=solution)
    assert frontend.numpy(again.iterations).max() == 0
    assert_close(frontend.numpy(again.y), frontend.numpy(solution.y), 1e-9)


@pytest.mark.slow_to_compile
def test_derivatives(frontend, rng):
    problem, parameters, variables = ranged(rng)
    layer = frontend.CvxpyLayer(problem, parameters, variables, order=1)
    frontend.check_derivatives(layer, [2 * rng.standard_normal(4), np.array(0.1)], 1)


@pytest.mark.parametrize(
    "low, high, status", [(0.5, 0.5, Status.SOLVED), (0.6, 0.5, Status.PRIMAL_INFEASIBLE)]
)
def test_ranges_of_no_width(frontend, low, high, status):
    x, p = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [cp.sum(x) >= low, cp.sum(x) <= high])
    layer = frontend.CvxpyLayer(problem, [p], [x], on_failure="mask")
    solution = layer.solve(frontend.array([1.0, 0.0]))
    assert list(Status)[int(solution.status)] is status
    if status is Status.SOLVED:
        assert_close(frontend.numpy(solution.variables[0]), [0.75, -0.25], 1e-9)


COSTS = {
    "absolute values": cp.norm1,
    "least squares": cp.sum_squares,
    "Huber": lambda r: cp.sum(cp.huber(r, 0.7)),
    "norm": cp.norm2,
    "cubes": lambda r: cp.sum(cp.power(cp.abs(r), 3)),
    "logistic": lambda r: cp.sum(cp.logistic(r)),
    "exponentials": lambda r: cp.log_sum_exp(r),
    "entropies": lambda r: cp.norm2(r) - cp.sum(cp.entr(r[:3] + 10)),
    "eigenvalue": lambda r: cp.lambda_max(cp.diag(r[:4]) + 0.5),
}


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("has_equality", [False, True])
@pytest.mark.parametrize("name", COSTS)
def test_beside_cones_and_groups(frontend, name, has_equality, rng):
    """A box that is active, and a range, beside all that a cost may be; with equalities of parameters."""
    x, F, g, h = cp.Variable(6), cp.Parameter((24, 6)), cp.Parameter(24), cp.Parameter((2, 6))
    cost = COSTS[name](F @ x - g) + 0.1 * cp.sum_squares(x)
    constraints = [x >= -0.1, x <= 0.2, cp.sum(x) <= 0.27, cp.sum(x) >= -0.33]
    constraints += [h @ x == 0.05] if has_equality else [h @ x <= 1]
    problem = cp.Problem(cp.Minimize(cost), constraints)
    values = [rng.standard_normal(shape) for shape in ((24, 6), (24,), (2, 6))]
    directions = [rng.standard_normal(value.shape) for value in values]
    duals = [constraint.dual_variables[0] for constraint in constraints]
    layer = frontend.CvxpyLayer(problem, [F, g, h], [x, *duals], order=1)
    outputs = layer(*map(frontend.array, values))
    for parameter, value in zip([F, g, h], values, strict=True):
        parameter.value = value
    problem.solve(**TIGHT | {key: 1e-9 for key in TIGHT if key != "solver"})
    assert np.isclose(np.abs(x.value + 0.1).min(), 0) or np.isclose(np.abs(x.value - 0.2).min(), 0)
    for output, variable in zip(outputs, [x, *duals], strict=True):
        assert_close(frontend.numpy(output), variable.value, 5e-5, str(variable))

    def along(t):
        return layer(*(frontend.array(z) + t[i] * frontend.array(d) for i, (z, d) in pairs))[0]

    pairs = [*enumerate(zip(values, directions, strict=True))]
    frontend.check_derivatives(along, [np.zeros(3)], 1)
