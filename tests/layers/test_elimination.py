"""Constant equalities are eliminated before a solver sees them, without a trace in the outcome."""

import cvxpy as cp
import numpy as np
import pytest

from checks import assert_close
from optlayers.status import Status

COEFFICIENTS, TOTALS = np.array([0.5, 1.5, 0.8, 1.2]), np.array([0.9, 1.0, 1.1])


def mixed():
    """One equality with constant coefficients, one with a parameter for them; both multipliers returned."""
    x, a, b, p = cp.Variable(4), cp.Parameter(4), cp.Parameter(), cp.Parameter(4)
    constraints = [cp.sum(x) == b, a @ x == 1, x >= 0]
    duals = [constraint.dual_variables[0] for constraint in constraints]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), constraints)
    return problem, [a, b, p], [x, *duals]


def test_multipliers_of_all_rows(frontend, rng):
    problem, parameters, variables = mixed()
    values = [COEFFICIENTS + 0.1 * rng.random((3, 4)), TOTALS, rng.standard_normal((3, 4))]
    layer = frontend.CvxpyLayer(problem, parameters, variables)
    outputs = [frontend.numpy(output) for output in layer(*map(frontend.array, values))]
    for i in range(3):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.value = value[i]
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
        for output, variable in zip(outputs, variables, strict=True):
            assert_close(output[i], variable.value, 1e-6, str(variable))


def test_derivatives_of_all_rows(frontend, rng):
    problem, parameters, variables = mixed()
    values = [COEFFICIENTS, TOTALS[0], rng.standard_normal(4)]
    layer = frontend.CvxpyLayer(problem, parameters, variables, order=1)
    frontend.check_derivatives(layer, values, 1)


@pytest.mark.parametrize("policy", ["mask", "nan"])
def test_a_failed_problem_stays_in_its_row(frontend, rng, policy):
    """NaN in one problem, or that it has no solution, leaves the derivatives of what all share alone."""
    problem, parameters, variables = mixed()
    layer = frontend.CvxpyLayer(problem, parameters, variables, on_failure=policy)
    a, b, p = COEFFICIENTS + 0.1 * rng.random((3, 4)), TOTALS, rng.standard_normal(4)
    weights = [rng.standard_normal((3, *variable.shape)) for variable in variables]
    without = [np.array([1.0, 0.0, 1.0]).reshape(3, *[1] * (w.ndim - 1)) * w for w in weights]
    derive = frontend.differentiable(lambda *v: layer(*v))
    _, expected = derive([a, b, p], without)
    broken = a.copy()
    broken[1, 0] = np.nan
    for values in ([a, np.array([0.9, np.nan, 1.1]), p], [a, np.array([0.9, -1.0, 1.1]), p], [broken, b, p]):
        outputs, actual = derive(values, weights)
        assert all(np.isnan(x[1]).all() if policy == "nan" else np.isfinite(x[1]).all() for x in outputs)
        for found, gradient in zip(actual, expected, strict=True):
            assert_close(found, gradient, 1e-12)


def test_dependent_equalities(frontend):
    """Consistent ones are solved, contradictions are infeasible, problem by problem."""
    x, b = cp.Variable(3), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [cp.sum(x) == b[0], 3 * cp.sum(x) == b[1]])
    layer = frontend.CvxpyLayer(problem, [b], [x], on_failure="nan")
    solution = layer.solve(frontend.array([[0.3, 0.9], [0.3, 0.3], [0.7, 2.1]]))
    outcomes = [list(Status)[code] for code in frontend.numpy(solution.status)]
    assert outcomes == [Status.SOLVED, Status.PRIMAL_INFEASIBLE, Status.SOLVED]
    x = frontend.numpy(solution.variables[0])
    assert_close(x[[0, 2]], [[0.1] * 3, [0.7 / 3] * 3], 1e-12)
    assert np.isnan(x[1]).all()


def test_equalities_that_fix_everything(frontend):
    x, b = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [x == b, x <= 1])
    layer = frontend.CvxpyLayer(problem, [b], [x])
    assert_close(frontend.numpy(layer(frontend.array([0.5, -2.0]))[0]), [0.5, -2.0], 1e-10)


def test_a_warm_start_is_that_of_the_whole_problem(frontend, rng):
    problem, parameters, variables = mixed()
    layer = frontend.CvxpyLayer(problem, parameters, variables)
    values = [COEFFICIENTS, TOTALS[0], rng.standard_normal(4)]
    values = [frontend.array(value) for value in values]
    again = layer.solve(*values, warm_start=layer.solve(*values))
    assert frontend.numpy(again.iterations) == 0


def test_nearly_dependent_equalities_stay_rows(frontend):
    """Their x_0 would be wrong in some digits, which only the residual of the whole program shows."""
    x, b = cp.Variable(3), cp.Parameter(2)
    rows = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0 + 1e-7]])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x)), [rows @ x == b])
    assert frontend.CvxpyLayer(problem, [b], [x])._program.elimination is None
