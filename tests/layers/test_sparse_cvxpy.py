"""`CvxpyLayer` on large sparse problems, which the host solves: against the oracle and the dense path."""

import copy

import clarabel
import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp

from checks import assert_close, assert_directional_derivatives, directional_derivatives, solve_exactly
from optlayers.layers import cvxpy as layers
from optlayers.status import Status
from problems import FAMILIES, lane

BATCH = 3
COMPILED = ("lp", "lasso", "several_variables")
SLOW = [pytest.param(name, marks=pytest.mark.slow_to_compile) for name in FAMILIES if name not in COMPILED]


@pytest.fixture
def small(monkeypatch):
    """Small problems count as large and sparse ones as well."""
    monkeypatch.setattr(layers, "SPARSE_FROM", 0)
    monkeypatch.setattr(layers, "SPARSE_DENSITY", np.inf)


@pytest.mark.parametrize("name", [*COMPILED, *SLOW])
def test_solution_and_gradient_equal_those_of_cvxpy(name, frontend, rng, small):
    family = FAMILIES[name]()
    values = family.batch(rng, BATCH)
    cotangents = [rng.standard_normal((BATCH, *v.shape)) for v in family.variables]

    def solve(values):
        lanes = [lane(values, family.parameters, i) for i in range(BATCH)]
        each = [solve_exactly(family.problem, family.parameters, family.variables, v) for v in lanes]
        return [np.stack(output) for output in zip(*each, strict=True)]

    layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables)
    assert "sparse" in layer.summary()
    outputs, gradients = frontend.differentiable(layer)(values, cotangents)
    for output, expected in zip(outputs, solve(values), strict=True):
        assert_close(output, expected, 1e-8)
    derivatives = directional_derivatives(solve, values, family.parameters, cotangents, rng)
    assert_directional_derivatives(gradients, derivatives, family.parameters)


def cones(rng):
    """A second-order, an exponential and a power cone, with a parameter as coefficient."""
    x, p, w = cp.Variable(4), cp.Parameter(4), cp.Parameter((3, 4))
    objective = cp.norm(w @ x - 1) - 0.1 * cp.sum(cp.entr(x)) - cp.power(x[0], 0.4) + p @ x
    return cp.Problem(cp.Minimize(objective), [cp.sum(x) == 1]), [p, w], [x]


@pytest.mark.slow_to_compile
def test_curved_cones_as_on_the_dense_path(frontend, rng, monkeypatch):
    arguments = cones(rng)
    values = [rng.standard_normal((2, *p.shape)) for p in arguments[1]]
    cotangents = [rng.standard_normal((2, 4))]
    dense = frontend.differentiable(frontend.CvxpyLayer(*arguments))(values, cotangents)
    monkeypatch.setattr(layers, "SPARSE_FROM", 0)
    monkeypatch.setattr(layers, "SPARSE_DENSITY", np.inf)
    z, gradients = frontend.differentiable(frontend.CvxpyLayer(*arguments))(values, cotangents)
    assert_close(z[0], dense[0][0], 1e-8)
    for a, b in zip(gradients, dense[1], strict=True):
        assert_close(a, b, 1e-6)


def portfolio(n, k, rng):
    """Expected returns to weights, with a covariance of k factors; its matrices, and its function."""
    F = sp.random_array((n, k), density=0.5, rng=rng, data_sampler=rng.standard_normal)
    d = rng.uniform(0.1, k**0.5, n)
    x, y, mu = cp.Variable(n), cp.Variable(k), cp.Parameter(n)
    risk = cp.sum(cp.multiply(d, cp.square(x))) + cp.sum_squares(y)
    problem = cp.Problem(cp.Minimize(risk / 2 - mu @ x), [y == F.T @ x, cp.sum(x) == 1, x >= 0])

    def solve(mu):
        P = sp.block_diag([sp.diags_array(d), sp.eye_array(k)], format="csc")
        A = sp.block_array(
            [
                [F.T, -sp.eye_array(k)],
                [np.ones((1, n)), None],
                [-sp.eye_array(n), None],
            ],
            format="csc",
        )
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
        kinds = [clarabel.ZeroConeT(k + 1), clarabel.NonnegativeConeT(n)]
        b = np.concatenate([np.zeros(k), [1.0], np.zeros(n)])
        q = np.concatenate([-mu, np.zeros(k)])
        return np.array(clarabel.DefaultSolver(P, q, A, b, kinds, settings).solve().x)[:n]

    return (problem, [mu], [x]), solve


def test_large_problem(frontend, rng):
    arguments, solve = portfolio(1500, 20, rng)
    mu, weight, change = (rng.standard_normal(1500) for _ in range(3))
    layer = frontend.CvxpyLayer(*arguments)
    (x,), (gradient,) = frontend.differentiable(layer)([mu], [weight])
    assert_close(x, solve(mu), 1e-7)
    # The active set must not change between the two points of a difference.
    step = 1e-6
    expected = weight @ (solve(mu + step * change) - solve(mu - step * change)) / (2 * step)
    assert abs(gradient @ change - expected) <= 1e-4 * abs(expected)


def test_the_choice_between_dense_and_sparse(frontend, rng):
    (problem, parameters, variables), _ = portfolio(1500, 20, rng)
    make = lambda **options: frontend.CvxpyLayer(problem, parameters, variables, **options)
    assert "Clarabel with sparse matrices" in make().summary()
    assert "OSQP with sparse matrices" in make(solver="OSQP").summary()
    for options in ({"solver": "ADMM"}, {"gradient": "lpgd"}):
        assert "sparse" not in make(**options).summary()
    small, _ = portfolio(300, 20, rng)
    assert "sparse" not in frontend.CvxpyLayer(*small).summary()
    x, p = cp.Variable(1000), cp.Parameter(1000)
    full = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [rng.standard_normal((600, 1000)) @ x <= 1])
    assert "sparse" not in frontend.CvxpyLayer(full, [p], [x]).summary()


def test_failed_problems_leave_the_others_alone(frontend, rng, small):
    x, p, a = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [a @ x <= 1, x >= 0])
    values = [rng.standard_normal((3, 3)), rng.standard_normal(3)]
    values[0][1, 0] = np.nan
    layer = frontend.CvxpyLayer(problem, [p, a], [x], on_failure="mask", order=1)
    assert frontend.numpy(layer.solve(*map(frontend.array, values)).status).tolist() == [
        Status.SOLVED.code,
        Status.NON_FINITE.code,
        Status.SOLVED.code,
    ]
    _, gradients = frontend.differentiable(layer)(values, [np.ones((3, 3))])
    alone = [v[[0, 2]] if v.ndim == 2 else v for v in values]
    _, expected = frontend.differentiable(layer)(alone, [np.ones((2, 3))])
    assert_close(gradients[0][[0, 2]], expected[0], 1e-9)
    assert not gradients[0][1].any()
    assert_close(gradients[1], expected[1], 1e-9)
    strict = frontend.CvxpyLayer(problem, [p, a], [x])
    with pytest.raises(frontend.module.SolveError, match=r"batch index \(1,\): the data contain NaN"):
        strict(*map(frontend.array, values))


def test_parameters_of_matrices_may_have_a_batch_axis_or_none(frontend, rng, small):
    x, p, a = cp.Variable(3), cp.Parameter(3), cp.Parameter((2, 3))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [a @ x <= 0.1])
    layer = frontend.CvxpyLayer(problem, [p, a], [x])
    values = [rng.standard_normal((4, 3)), rng.standard_normal((4, 2, 3))]
    solve = lambda *values: frontend.numpy(layer(*map(frontend.array, values))[0])
    together = solve(*values)
    for i in range(4):
        assert_close(solve(values[0][i], values[1][i]), together[i], 1e-10)
    assert_close(solve(values[0], values[1][0])[0], together[0], 1e-10)
    assert_close(solve(values[0][0], values[1])[0], together[0], 1e-10)
    mapped = frontend.transforms.vmap(lambda p, a: layer(p, a)[0])
    assert_close(frontend.numpy(mapped(*map(frontend.array, values))), together, 1e-10)


def test_warm_start_and_copies(frontend, rng, small):
    x, p = cp.Variable(5), cp.Parameter(5)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [cp.abs(x) <= 0.5])
    layer = frontend.CvxpyLayer(problem, [p], [x])
    value = frontend.array(rng.standard_normal(5))
    first = layer.solve(value)
    again = layer.solve(value, warm_start=first)
    assert int(again.iterations) == 0
    assert_close(frontend.numpy(again.variables[0]), frontend.numpy(first.variables[0]), 1e-10)
    other = copy.deepcopy(layer)
    assert_close(frontend.numpy(other(value)[0]), frontend.numpy(first.variables[0]), 1e-12)


def test_settings_of_other_solvers_are_refused(rng, small):
    torch = pytest.importorskip("torch")
    from optlayers.torch import CvxpyLayer

    x, p = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0])
    with pytest.raises(ValueError, match="Clarabel has no setting 'rho'"):
        CvxpyLayer(problem, [p], [x], solver_args={"rho": 1.0})(torch.ones(2))


def test_refuses_to_be_traced(rng, small):
    torch = pytest.importorskip("torch")
    from optlayers.torch import CvxpyLayer

    x, p = cp.Variable(2), cp.Parameter(2)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0]), [p], [x])
    value = torch.ones(2, dtype=torch.float64)
    with pytest.raises(Exception, match="solved on the host"):
        torch.compile(layer, fullgraph=True, backend="eager")(value)
    assert torch.equal(torch.compile(layer, backend="eager")(value)[0], layer(value)[0])
