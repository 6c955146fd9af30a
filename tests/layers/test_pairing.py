"""Variables in two inequalities, or in one cone, are eliminated in the solvers, without a trace outside."""

import cvxpy as cp
import numpy as np
import pytest

from checks import assert_close, solve_exactly
from optlayers.layers import pairing
from optlayers.layers.cvxpy import CvxpyProgram
from optlayers.status import Status


@pytest.fixture(autouse=True)
def pairs_of_small_programs(monkeypatch):
    monkeypatch.setattr(pairing, "FEWEST", 8)


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


PROBLEMS = [quadratic, linear, conic, mixed]


def paired(problem, parameters, variables):
    program = CvxpyProgram(problem, parameters, variables, False, None, None, CHOICES)
    return program, program.program.cones.paired


def test_places_of_single_variables(rng):
    """They come before the paired ones, each in one of the last exponential cones."""
    problem, parameters, variables, _ = mixed(rng)
    program, p = paired(problem, parameters, variables)
    solved, cones = program.solved, program.program.cones
    assert p == 9 and cones.single == 9 and cones.exp == 11 and "(18 eliminated)" in program.summary()
    row, column = np.divmod(solved.A.positions, solved.n)
    stop = solved.m - 3  # before the power cone
    cone, variable = (row - stop + 27) // 3, column - (solved.n - 18)
    is_single = (variable >= 0) & (variable < 9)
    assert is_single.sum() >= 9
    np.testing.assert_array_equal(cone[is_single], variable[is_single])


def batch_of(values, rng, count=5):
    scale = lambda value: 1 + 0.3 * rng.standard_normal((count, *value.shape))
    return [value * scale(value) if value.ndim else np.tile(value, count) for value in values]


@pytest.mark.parametrize("build, count", [(quadratic, 11), (linear, 9), (conic, 9)])
def test_places(build, count, rng):
    """The paired variables are the last ones, in the last linear rows, also after merging and elimination."""
    problem, parameters, variables, _ = build(rng)
    program, p = paired(problem, parameters, variables)
    assert p == count and f"({p} eliminated)" in program.summary()
    solved = program.solved
    k, n = solved.cones.zero + solved.cones.nonneg, solved.n
    row, column = np.divmod(solved.A.positions, n)
    is_last = column >= n - p
    expected = [(k - 2 * p + i, n - p + i % p) for i in range(2 * p)]
    assert sorted(zip(row[is_last], column[is_last], strict=True)) == expected
    i, j = np.divmod(solved.P.positions, n)
    assert (i == j)[(i >= n - p) | (j >= n - p)].all()
    if program.elimination is not None:
        basis = program.elimination.basis
        np.testing.assert_array_equal(basis[-p:, -p:], np.eye(p))
        assert not basis[:-p, -p:].any() and not basis[-p:, :-p].any()


def test_what_is_not_paired():
    """Few variables; those of merged rows; of three rows. Of a program of nothing but pairs one stays."""
    x, low, high = cp.Variable(9), cp.Parameter(9), cp.Parameter(9)
    few = cp.Problem(cp.Minimize(cp.sum_squares(x - low) + cp.norm1(x[:7])))
    assert paired(few, [low], [x])[1] == 0
    merged = cp.Problem(cp.Minimize(cp.sum_squares(x - low)), [x >= 0, x <= 1])
    assert paired(merged, [low], [x])[1] == 0
    three = cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= low, x <= high, 2 * x <= high])
    assert paired(three, [low, high], [x])[1] == 0
    all_of_them = cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= low, x <= high])
    assert paired(all_of_them, [low, high], [x])[1] == 8


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
    order = 2 if build in (conic, mixed) and frontend.name == "torch" else 1
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
    for fewest in (pairing.FEWEST, 1000):
        monkeypatch.setattr(pairing, "FEWEST", fewest)
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
    assert layer._program.program.cones.paired == 8
    costs = np.array([0.5 * np.ones(8), np.r_[-0.5, 0.5 * np.ones(7)]])
    found = layer.solve(frontend.array(costs))
    outcomes = [list(Status)[code] for code in frontend.numpy(found.status)]
    assert outcomes == [Status.SOLVED, Status.DUAL_INFEASIBLE]
    assert_close(frontend.numpy(found.variables[0])[0], 0.75 * np.ones(8), 1e-9)


def test_only_layers_count_them(frontend):
    A, b = frontend.array(np.eye(2)), frontend.array(np.ones(2))
    with pytest.raises(ValueError, match="only a CvxpyLayer counts"):
        frontend.module.solve_conic(None, b, A, b, frontend.module.Cones(nonneg=2, paired=1))
