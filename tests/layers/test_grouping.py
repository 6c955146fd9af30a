"""Variables that share rows with few others are eliminated in the solvers, without a trace outside."""

import cvxpy as cp
import numpy as np
import pytest

from checks import assert_close, solve_exactly
from optlayers.cones import Groups
from optlayers.layers import grouping
from optlayers.layers.cvxpy import CvxpyProgram
from optlayers.status import Status


@pytest.fixture(autouse=True)
def groups_of_small_programs(monkeypatch):
    monkeypatch.setattr(grouping, "FEWEST", 8)


CHOICES = {"solver": None, "order": 2, "on_failure": "raise", "rescue": False, "gradient": "exact"}


def quadratic(rng, n=4, m=5):
    """Absolute values and positive parts of rows with parameters, soft bounds, an equality and a box."""
    x, soft = cp.Variable(n), cp.Variable(2, nonneg=True)
    F, g, c = cp.Parameter((m, n)), cp.Parameter(m), cp.Parameter(nonneg=True)
    bends = cp.norm1(F @ x - g) + c * cp.sum(cp.pos(x - 0.2)) + cp.sum_squares(soft) + cp.sum(soft)
    constraints = [cp.sum(x) == 1, x >= -2, x <= 2, x[:2] - soft <= 0.1]
    duals = [constraint.dual_variables[0] for constraint in constraints]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + bends), constraints)
    values = [rng.standard_normal((m, n)), 2 * rng.standard_normal(m), np.array(0.7)]
    return problem, [F, g, c], [x, soft, *duals], values


def linear(rng):
    """A linear program: the least sum of absolute deviations, in a box that is merged into ranges."""
    x, F, g = cp.Variable(3), cp.Parameter((9, 3)), cp.Parameter(9)
    problem = cp.Problem(cp.Minimize(cp.norm1(F @ x - g)), [x >= -5, x <= 5])
    return problem, [F, g], [x], [rng.standard_normal((9, 3)), rng.standard_normal(9)]


def conic(rng, n=9, m=11):
    x, F, g = cp.Variable(n), cp.Parameter((m, n)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(cp.norm(F @ x - g) + 0.3 * cp.norm1(x)), [cp.norm(x) <= 1])
    return problem, [F, g], [x], [rng.standard_normal((m, n)), 3 * rng.standard_normal(m)]


def mixed(rng, n=9):
    """Entropies, absolute values, and cones of other kinds before and behind the exponential ones."""
    x, c, t = cp.Variable(n), cp.Parameter(n), cp.Variable(2)
    F = rng.standard_normal((n, n)) / n
    cost = c @ x - cp.sum(cp.entr(x)) + 0.1 * cp.norm1(F @ x - 0.2) + cp.sum_squares(x) + cp.sum(t)
    powers = [cp.PowCone3D(t[0] + 1, t[1] + 1, x[0] + x[1], 0.4)]
    rest = [cp.sum(x) == 1, cp.norm(x) <= 0.9, cp.exp(x[0]) + cp.exp(x[1]) <= 2.5, t <= 2]
    return cp.Problem(cp.Minimize(cost), rest + powers), [c], [x], [rng.standard_normal(n)]


def regression(rng, m=9):
    """Residuals in rows of the zero cone, with a constraint on the others."""
    x, F, g = cp.Variable(3), cp.Parameter((m, 3)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g) + cp.norm1(x)), [cp.sum(x) == 1])
    return problem, [F, g], [x], [rng.standard_normal((m, 3)), rng.standard_normal(m)]


def huber(rng, m=7):
    x, F, g = cp.Variable(3), cp.Parameter((m, 3)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.huber(F @ x - g, 0.7)) + 0.1 * cp.sum_squares(x)))
    return problem, [F, g], [x], [rng.standard_normal((m, 3)), 2 * rng.standard_normal(m)]


def logistic(rng, m=6):
    """Beside absolute values, and a weight that makes P a parameter of each problem."""
    x, c, F, weight = cp.Variable(4), cp.Variable(), cp.Parameter((m, 4)), cp.Parameter(nonneg=True)
    bends = cp.norm1(x[:2] - 0.1) + cp.norm1(rng.standard_normal((8, 4)) @ x)
    cost = cp.sum(cp.logistic(F @ x + c)) + weight * (cp.sum_squares(x) + c**2) + 0.1 * bends
    return cp.Problem(cp.Minimize(cost)), [F, weight], [x], [rng.standard_normal((m, 4)), np.array(0.3)]


PROBLEMS = [quadratic, linear, conic, mixed, regression, huber, logistic]


def grouped(problem, parameters, variables, **choices):
    program = CvxpyProgram(problem, parameters, variables, False, None, None, CHOICES | choices)
    return program, program.program.cones.groups


@pytest.mark.parametrize(
    "build, kinds",
    [
        (quadratic, [(11, 1, 2, 0)]),
        (linear, [(9, 1, 2, 0)]),
        (conic, [(9, 1, 2, 0)]),
        (mixed, [(9, 1, 0, 3), (9, 1, 2, 0)]),
        (regression, [(9, 1, 1, 0)]),
        (huber, [(7, 3, 3, 0)]),
        (logistic, [(10, 1, 2, 0), (6, 3, 1, 6)]),
    ],
)
def test_places(build, kinds, rng):
    """Each row of a group has entries of its own variables alone, of the last ones of the program."""
    problem, parameters, variables, _ = build(rng)
    program, groups = grouped(problem, parameters, variables)
    found = [(group.count, group.variables, len(group.bounded), group.curved[0]) for group in groups]
    assert sorted(found) == sorted(kinds)
    arranged = program.program if program.ranges is None else program.ranges.program
    cones, n, m = arranged.cones, arranged.n, arranged.m
    assert f"({cones.local} eliminated)" in program.summary()
    entries, allowed = np.zeros((m, n), bool), np.zeros((m, n), bool)
    entries.flat[arranged.A.positions] = True
    first = n - cones.local
    for group in cones.groups:
        rows = [np.arange(m)[rows] for rows in group.slices(cones.zero + cones.nonneg, m)]
        for _ in range(group.variables):
            for each in rows:
                allowed[each, first + np.arange(group.count)] = True
            first += group.count
    local = np.arange(n) >= n - cones.local
    assert not (entries & ~allowed)[:, local].any() and entries[:, local].any(0).all()
    i, j = np.divmod(arranged.P.positions, n)
    assert (i == j)[local[i] | local[j]].all()
    assert program.solved.A.shape == (m, n - cones.local + cones.width)


def batch_of(values, rng, count=5):
    scale = lambda value: 1 + 0.3 * rng.standard_normal((count, *value.shape))
    return [value * scale(value) if value.ndim else np.tile(value, count) for value in values]


def test_what_is_in_no_group():
    """Few variables; those of merged and of eliminated rows; chains. Of all variables one group stays."""
    x, low, high = cp.Variable(9), cp.Parameter(9), cp.Parameter(9)
    found = lambda cost, constraints, parameters, **choices: grouped(
        cp.Problem(cp.Minimize(cost), constraints), parameters, [x], **choices
    )[1]
    assert not found(cp.sum_squares(x - low) + cp.norm1(cp.multiply(low, x)[:3]), [], [low])
    assert not found(cp.sum_squares(x - low), [x >= 0, x <= 1], [low])
    assert not found(low @ x + cp.sum_squares(x), [x[:8] - x[1:] <= high[:8]], [low, high])
    F = np.random.default_rng(0).standard_normal((9, 9))
    assert not found(cp.sum_squares(x) + cp.sum_squares(F @ x - low), [], [low])
    (pairs,) = found(cp.sum_squares(x), [x >= low, x <= high], [low, high])
    assert (pairs.count, pairs.variables) == (8, 1)
    assert not found(cp.sum_squares(x), [x >= low, x <= high], [low, high], gradient="lpgd")


def test_many_groups_are_not_for_sparse_factorisations(rng):
    """Of 300 samples little is left; of a chain of 600 variables all is."""
    problem, parameters, variables, _ = logistic(rng, 300)
    program, groups = grouped(problem, parameters, variables)
    assert program.program.n + program.program.m > 2500 and not program.is_sparse
    assert program.solved.A.shape[1] == program.program.n - program.program.cones.local + 3
    x, y = cp.Variable(600), cp.Parameter(600)
    chain = cp.Problem(cp.Minimize(cp.sum_squares(x - y) + cp.norm1(cp.diff(x))))
    program, groups = grouped(chain, [y], [x])
    assert groups and program.is_sparse


@pytest.mark.parametrize("build", [quadratic, linear])
def test_multipliers_of_all_rows(frontend, build, rng):
    problem, parameters, variables, values = build(rng)
    batch = batch_of(values, rng)
    layer = frontend.CvxpyLayer(problem, parameters, variables)
    outputs = [frontend.numpy(output) for output in layer(*map(frontend.array, batch))]
    for i in range(len(batch[0])):
        expected = solve_exactly(problem, parameters, variables, [value[i] for value in batch])
        for output, value, variable in zip(outputs, expected, variables, strict=True):
            assert_close(output[i], value, 1e-8, str(variable))


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("build", PROBLEMS)
def test_derivatives(frontend, build, rng):
    problem, parameters, variables, values = build(rng)
    order = 2 if build in (conic, mixed, logistic) and frontend.name == "torch" else 1
    layer = frontend.CvxpyLayer(problem, parameters, variables[:1], order=order)
    frontend.check_derivatives(layer, values, order)


@pytest.mark.parametrize("build", PROBLEMS)
def test_solutions_are_those_without_elimination(frontend, build, rng, monkeypatch):
    """Values, multipliers, slacks and gradients, with a warm start, and with a bad problem in the batch."""
    problem, parameters, variables, values = build(rng)
    batch = [frontend.array(value) for value in batch_of(values, rng)]
    bad = [1.0 * np.asarray(value) for value in batch]
    bad[-1][2] = np.nan
    weights = rng.standard_normal(variables[0].shape)
    results = []
    for fewest in (grouping.FEWEST, 1000):
        monkeypatch.setattr(grouping, "FEWEST", fewest)
        # Clarabel, if it may, would find other slacks where they are not unique.
        layer = frontend.CvxpyLayer(problem, parameters, variables[:1], on_failure="mask", rescue=False)
        solution = layer.solve(*batch)
        assert not frontend.numpy(solution.status).any()
        again = layer.solve(*batch, warm_start=solution)
        assert frontend.numpy(again.iterations).max() == 0
        found = frontend.numpy(layer.solve(*map(frontend.array, bad)).status)
        assert [list(Status)[code] for code in found] == [
            Status.NON_FINITE if i == 2 else Status.SOLVED for i in range(5)
        ]
        _, gradients = frontend.differentiable(layer)(bad, [np.tile(weights, (5, 1))])
        sizes = [np.sort(frontend.numpy(z), -1) for z in (solution.s, solution.y)]
        results.append([frontend.numpy(solution.variables[0]), *sizes, *gradients])
    for eliminated, plain in zip(*results, strict=True):
        assert_close(eliminated, plain, 1e-7)


def test_negative_costs_are_unbounded(frontend, rng):
    """A bend towards the other side is no convex function, but a program without a bound."""
    x, c = cp.Variable(8), cp.Parameter(8)
    t = cp.Variable(8)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - 1) + c @ t), [x <= t, -x <= t])
    layer = frontend.CvxpyLayer(problem, [c], [x], on_failure="nan")
    assert layer._program.program.cones.local == 8
    costs = np.array([0.5 * np.ones(8), np.r_[-0.5, 0.5 * np.ones(7)]])
    found = layer.solve(frontend.array(costs))
    outcomes = [list(Status)[code] for code in frontend.numpy(found.status)]
    assert outcomes == [Status.SOLVED, Status.DUAL_INFEASIBLE]
    assert_close(frontend.numpy(found.variables[0])[0], 0.75 * np.ones(8), 1e-9)


def test_only_layers_count_them(frontend):
    A, b = frontend.array(np.eye(2)), frontend.array(np.ones(2))
    cones = frontend.module.Cones(nonneg=2, groups=(Groups(1, 1, (2,)),))
    with pytest.raises(ValueError, match="only a CvxpyLayer puts variables in groups"):
        frontend.module.solve_conic(None, b, A, b, cones)
