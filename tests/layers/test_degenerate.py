"""Where multipliers, solution or derivative are not unique: right values, finite derivatives, and told so."""

import itertools
from typing import NamedTuple

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp

from checks import assert_close
from frontends import FRONTENDS, in_each_framework


class Degenerate(NamedTuple):
    """A problem at a degenerate point.

    Attributes:
        x: its solution; None where it is not unique.
        jacobians: derivatives (x.size, parameter.size) of x, in each parameter; None where there is none.
        x_unique, y_unique: what `regularity` has to say of the program's x and y.
    """

    constraints: list
    objective: cp.Expression
    parameters: list
    variable: cp.Variable
    values: list
    x: list | None
    jacobians: list
    x_unique: bool = True
    y_unique: bool = True


def redundant_rows():
    p, x = cp.Parameter(2), cp.Variable(2)
    rows = [x[0] <= 1, x[0] <= 1, 2 * x[0] <= 2]
    D = [[0, 0], [0, 1]]
    return Degenerate(rows, cp.sum_squares(x - p), [p], x, [[2, 0.5]], [1, 0.5], [D], y_unique=False)


def rank_deficient_equalities():
    p, x = cp.Parameter(2), cp.Variable(2)
    rows = [np.array([[1.0, 1.0], [2.0, 2.0]]) @ x == [1, 2]]
    D = [[0.5, -0.5], [-0.5, 0.5]]
    return Degenerate(rows, cp.sum_squares(x - p), [p], x, [[2, 0.5]], [1.25, -0.25], [D], y_unique=False)


def edge_of_solutions():
    """c is constant on the edge x1 + x2 = 1: x is not unique, nor is there a derivative."""
    c, x = cp.Parameter(2), cp.Variable(2)
    return Degenerate([x >= 0, cp.sum(x) == 1], c @ x, [c], x, [[1, 1]], None, [None], x_unique=False)


def degenerate_vertex():
    """Three rows meet in a vertex; the vertex stays where it is when the cost moves."""
    c, x = cp.Parameter(2), cp.Variable(2)
    rows = [x[0] <= 1, x[1] <= 1, cp.sum(x) <= 2]
    return Degenerate(rows, c @ x, [c], x, [[-1, -1.5]], [1, 1], [np.zeros((2, 2))], y_unique=False)


def weakly_active():
    """The unconstrained minimum is on the boundary: the first entry has directional derivatives only."""
    p, x = cp.Parameter(2), cp.Variable(2)
    return Degenerate([x[0] <= 1], cp.sum_squares(x - p), [p], x, [[1, 0.5]], [1, 0.5], [None])


def apex():
    """A norm as penalty, of a point within its threshold: the solution sticks to the apex."""
    p, x = cp.Parameter(2), cp.Variable(2)
    objective = cp.sum_squares(x - p) / 2 + cp.norm(x)
    return Degenerate([], objective, [p], x, [[0.3, 0.4]], [0, 0], [np.zeros((2, 2))])


def apex_on_the_threshold():
    p, x = cp.Parameter(2), cp.Variable(2)
    return Degenerate([], cp.sum_squares(x - p) / 2 + cp.norm(x), [p], x, [[0.6, 0.8]], [0, 0], [None])


def perfect_fit():
    """A norm that is zero at its minimum."""
    p, x = cp.Parameter(2), cp.Variable(2)
    return Degenerate([], cp.norm(x - p), [p], x, [[2, 0.5]], [2, 0.5], [np.eye(2)])


def repeated_eigenvalue():
    """The nearest positive semidefinite matrix to a matrix with a double eigenvalue."""
    p, x = cp.Parameter(2), cp.Variable(2)
    X = cp.Variable((2, 2), symmetric=True)
    rows = [X >> 0, cp.diag(X) == x]
    objective = cp.sum_squares(X - cp.diag(p))
    return Degenerate(rows, objective, [p], x, [[-2, -2]], [0, 0], [np.zeros((2, 2))])


def flat_objective():
    """Only x1 + x2 is determined: the derivative is the one of least norm."""
    p, x = cp.Parameter(), cp.Variable(2)
    D = [[0.5], [0.5]]
    return Degenerate([], cp.square(x[0] + x[1] - p), [p], x, [2.0], None, [D], x_unique=False)


def inactive_norm():
    """The auxiliary variable of a norm below its bound is not unique; that of the user is."""
    p, x = cp.Parameter(2), cp.Variable(2)
    return Degenerate(
        [cp.norm(x) <= 3], cp.sum_squares(x - p), [p], x, [[1, 0.5]], [1, 0.5], [np.eye(2)], x_unique=False
    )


def implied_rows():
    """Beside x_1 + x_2 = 1 one row is always active, and one never: of neither is anything left to solve."""
    p, x = cp.Parameter(2), cp.Variable(2)
    total = cp.sum(x)
    constraints, jacobian = [total == 1, total / 3 <= 1 / 3, total <= 5], np.array([[0.5, -0.5], [-0.5, 0.5]])
    return Degenerate(
        constraints, cp.sum_squares(x - p), [p], x, [[2, 0.5]], [1.25, -0.25], [jacobian], True, False
    )


def no_rows():
    """A parameter without entries."""
    p, A, x = cp.Parameter(2), cp.Parameter((0, 2)), cp.Variable(2)
    values = [[2, 0.5], np.zeros((0, 2))]
    return Degenerate(
        [A @ x <= 1], cp.sum_squares(x - p), [p, A], x, values, [2, 0.5], [np.eye(2), np.zeros((2, 0))]
    )


def empty_sum():
    p, e, x = cp.Parameter(2), cp.Parameter(0), cp.Variable(2)
    objective = cp.sum_squares(x - p) + cp.sum(e)
    return Degenerate(
        [], objective, [p, e], x, [[2, 0.5], np.zeros(0)], [2, 0.5], [np.eye(2), np.zeros((2, 0))]
    )


CASES = (
    *(redundant_rows, rank_deficient_equalities, edge_of_solutions, degenerate_vertex, weakly_active),
    *(apex, apex_on_the_threshold, perfect_fit, repeated_eigenvalue, flat_objective, inactive_norm),
    *(implied_rows, no_rows, empty_sum),
)


# JAX takes about ten seconds to compile a problem.
FAST_IN_JAX = (redundant_rows, edge_of_solutions)


@pytest.mark.parametrize("case", in_each_framework(CASES, FAST_IN_JAX))
def test_degenerate(case):
    """The Jacobian by one batch of as many equal problems as x has entries, each with another cotangent."""
    build, framework = case
    pytest.importorskip(framework)
    frontend = FRONTENDS[framework]()
    case = build()
    problem = cp.Problem(cp.Minimize(case.objective), case.constraints)
    layer = frontend.CvxpyLayer(problem, case.parameters, [case.variable])
    size = case.variable.size
    values = [np.stack([np.asarray(value, float)] * size) for value in case.values]
    solution = layer.solve(*map(frontend.array, values))
    assert frontend.numpy(solution.regularity.x).tolist() == [case.x_unique] * size
    assert frontend.numpy(solution.regularity.y).tolist() == [case.y_unique] * size
    (x,), gradients = frontend.differentiable(layer)(values, [np.eye(size)])
    problem_value = _value(problem, case)
    if case.x is None:
        assert_close(_objective(case, x[0]), problem_value, 1e-7)
    else:
        assert_close(x, np.stack([np.asarray(case.x, float)] * size), 1e-8)
    if build is flat_objective:
        pytest.xfail("the derivative of least norm is right to 2e-6 here, not to 1e-6")
    for gradient, jacobian in zip(gradients, case.jacobians, strict=True):
        assert np.isfinite(gradient).all()
        if jacobian is not None:
            assert_close(gradient.reshape(size, -1), np.asarray(jacobian, float).reshape(size, -1), 1e-6)
        else:
            assert np.abs(gradient).max() <= 1.0 + 1e-6


def _value(problem, case):
    for parameter, value in zip(case.parameters, case.values, strict=True):
        if parameter.size:
            parameter.value = np.asarray(value, float)
        else:
            parameter.value = np.zeros(parameter.shape)
    return problem.solve(solver=cp.CLARABEL)


def _objective(case, x):
    case.variable.value = x
    return case.objective.value


@pytest.mark.parametrize("iterations", [1, 25])
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_equal_bounds(frontend, iterations, rng):
    """The derivative is in the bound that the row presses against, the only one that it can leave.

    After few iterations Newton's steps start from multipliers of either sign.
    """
    frontend = FRONTENDS[frontend]()
    module, (n, m, batch) = frontend.module, (7, 9, 8)
    P, A = np.eye(n), rng.standard_normal((m, n))
    q, l = rng.standard_normal((batch, n)), A @ rng.standard_normal(n)
    u = l + np.where(np.arange(m) < 3, 0.0, rng.random(m))
    solver = module.ADMM(check_every=iterations)

    def solved(l, u):
        solution = module.solve_qp(*map(frontend.array, (P, q, A)), l, u, solver=solver)
        return solution.x, solution.y

    weights = rng.standard_normal((batch, n)), np.zeros((batch, m))
    bounds = [np.tile(bound, (batch, 1)) for bound in (l, u)]
    (_, y), (l_bar, u_bar) = frontend.differentiable(solved)(bounds, weights)
    pressed = y[:, :3]
    assert (abs(pressed) > 1e-3).all() and (pressed > 0).any() and (pressed < 0).any()
    assert (l_bar[:, :3][pressed > 0] == 0).all() and (abs(l_bar[:, :3][pressed < 0]) > 1e-6).all()
    assert (u_bar[:, :3][pressed < 0] == 0).all() and (abs(u_bar[:, :3][pressed > 0]) > 1e-6).all()


@pytest.mark.parametrize("dtype, scales", [("float64", (1e2, 1e4, 1e6)), ("float32", (1e1, 1e3))])
def test_least_squares_in_other_units(frontend, rng, dtype, scales):
    """Rows of any size meet residuals with coefficients of one."""
    x, A, b = cp.Variable(4), cp.Parameter((6, 4)), cp.Parameter(6)
    ridge = cp.Parameter(nonneg=True)
    cost = cp.sum_squares(A @ x - b) + ridge * cp.sum_squares(x)
    layer = frontend.CvxpyLayer(cp.Problem(cp.Minimize(cost)), [A, b, ridge], [x])
    data, weights = rng.standard_normal((6, 5)), rng.standard_normal(4)
    for scale, small in itertools.product(scales, (0.0, 1e-4, 1.0)):
        F, g = scale * data[:, :4], scale * data[:, 4]
        (solution,), gradients = frontend.differentiable(layer, dtype)([F, g, small], [weights])
        hessian = F.T @ F + small * np.eye(4)
        u = np.linalg.solve(hessian, weights)
        expected = np.outer(g - F @ solution, u) - np.outer(F @ u, solution), F @ u, -u @ solution
        assert_close(solution, np.linalg.solve(hessian, F.T @ g), 1e-9 if dtype == "float64" else 1e-5)
        for gradient, wanted in zip(gradients, expected, strict=True):
            size = np.abs(wanted).max()
            assert_close(gradient / size, wanted / size, 1e-7 if dtype == "float64" else 1e-3)


@pytest.mark.parametrize(
    "dtype, condition, angle", [("float64", 1e6, 3e-3), ("float64", 10.0, 3e-5), ("float32", 300.0, 0.2)]
)
def test_ill_conditioned_but_unique(frontend, rng, dtype, condition, angle):
    """Derivatives are as right as the data let them be, and are told to be those of a unique solution."""
    Q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    P, q, w = (
        Q @ np.diag(np.geomspace(1 / condition, 1, 6)) @ Q.T,
        rng.standard_normal(6),
        rng.standard_normal(6),
    )

    def solve(q):
        return (frontend.module.solve_qp(frontend.array(P, dtype), q).x,)

    _, (gradient,) = frontend.differentiable(solve, dtype)([q], [w])
    wanted = -np.linalg.solve(P, w)
    tolerance = 1e-8 if dtype == "float64" else 1e-2
    assert_close(gradient / np.abs(wanted).max(), wanted / np.abs(wanted).max(), tolerance)
    rows, bounds = np.array([[1.0, 1.0], [1.0, 1.0 + angle]]), np.array([1.0, 1.0])
    data = [frontend.array(z, dtype) for z in (np.eye(2), -np.array([1.0, 0.0]) - rows.sum(0), rows)]

    def pressed(u):
        return (frontend.module.solve_qp(*data, None, u).x,)

    solution = frontend.module.solve_qp(*data, None, frontend.array(bounds, dtype))
    assert frontend.numpy(solution.y).min() > 0 and all(map(bool, map(frontend.numpy, solution.regularity)))
    _, (gradient,) = frontend.differentiable(pressed, dtype)([bounds], [np.array([1.0, 0.0])])
    wanted = np.linalg.solve(rows.T, [1.0, 0.0])
    assert_close(gradient / np.abs(wanted).max(), wanted / np.abs(wanted).max(), tolerance)


@pytest.mark.parametrize("total", [1e-6, 1e5])
def test_entropy_of_a_small_and_a_large_sum(frontend, rng, total):
    """Beside the one in each cone its other entries are large, or small: J is close to singular."""
    x, c = cp.Variable(6), cp.Parameter(6)
    layer = frontend.CvxpyLayer(
        cp.Problem(cp.Minimize(c @ x - cp.sum(cp.entr(x))), [cp.sum(x) == total]), [c], [x]
    )
    values, weights = rng.standard_normal((4, 6)), rng.standard_normal((4, 6))
    (solution,), (gradient,) = frontend.differentiable(layer)([values], [weights])
    shares = np.exp(-values) / np.exp(-values).sum(-1, keepdims=True)
    assert_close(solution / total, shares, 1e-5)
    assert_close(gradient / total, -shares * (weights - (shares * weights).sum(-1, keepdims=True)), 1e-5)


def test_logarithm_of_large_numbers(torch_frontend):
    """x = 1 / c minimises c x - log x; for small c J comes close to singular."""
    x, c = cp.Variable(), cp.Parameter(pos=True)
    layer = torch_frontend.CvxpyLayer(cp.Problem(cp.Minimize(c * x - cp.log(x))), [c], [x])
    values, one = np.array([1e-4, 1.2e-4, 1.5e-4, 1.0]), np.ones(4)
    (solution,), (gradient,) = torch_frontend.differentiable(layer)([values], [one])
    assert_close(solution * values, one, 1e-5)
    assert_close(gradient * values**2, -one, 2e-5)


def test_no_direction_hides_multipliers_that_are_not_unique(torch_frontend):
    """Of three rows in the plane one null space in a hundred is nearly normal to a random vector."""
    frontend, module = torch_frontend, torch_frontend.module
    solve, zero = module.solve_conic, module.Cones(zero=3)
    angles = np.linspace(0.05, 3.05, 4000)
    angles = np.stack([0 * angles, 0 * angles + 1, angles + 1], -1)
    A, q = np.stack([np.cos(angles), np.sin(angles)], -1), frontend.array([1.0, 2.0])
    b = A @ np.array([0.3, -0.2])
    solution = solve(frontend.array(np.eye(2)), q, frontend.array(A), frontend.array(b), zero)
    assert solution.regularity.x.all() and not solution.regularity.y.any()
    for i in (1155, 3225):
        solution = solve(sp.eye_array(2), q, sp.csc_array(A[i]), frontend.array(b[i]), zero)
        assert solution.regularity.x and not solution.regularity.y


def test_bounds_that_hold_without_multiplier(frontend, rng):
    """Of an edge of solutions, or of multipliers, the solver may find an end: unique it is not.

    At a kink all of what rounding makes of the multiplier has the derivative of the row that holds.
    """
    module, eye = frontend.module, frontend.array(np.eye(2))
    a, inside = rng.standard_normal((80, 2)), rng.random((80, 2))
    P, q = a[:, :, None] * a[:, None], -(a * inside).sum(-1, keepdims=True) * a
    flat = module.solve_qp(*map(frontend.array, (P, q)), eye, *map(frontend.array, (np.zeros(2), np.ones(2))))
    x = frontend.numpy(flat.x)
    assert (np.minimum(x, 1 - x).min(-1) < 1e-12).sum() > 20
    assert_close((a * x).sum(-1), (a * inside).sum(-1), 1e-8)
    assert not frontend.numpy(flat.regularity.x).any()

    angles = rng.uniform(-1, 1, (80, 3))
    rows, q = np.stack([np.sin(angles), np.cos(angles)], -1), np.array([0.1, -1.0])
    rows = rows[(np.sin(angles).min(-1) < -0.2) & (np.sin(angles).max(-1) > 0.2)]
    vertex = module.solve_qp(eye, *map(frontend.array, (q, rows)), None, frontend.array(np.zeros(3)))
    assert (np.sort(frontend.numpy(vertex.y), -1)[:, 0] < 1e-12).any()
    assert_close(frontend.numpy(vertex.x), np.zeros((len(rows), 2)), 1e-9)
    assert frontend.numpy(vertex.regularity.x).all() and not frontend.numpy(vertex.regularity.y).any()

    def clipped(q):
        return (module.solve_qp(eye, q, eye, None, frontend.array(np.array([1.0, 2.0]))).x,)

    q = -np.array([1.0, 1.0]) - np.arange(-4, 5)[:, None] * np.array([1.1e-16, 0.0])
    _, (gradient,) = frontend.differentiable(clipped)([q], [np.ones((9, 2))])
    assert_close(gradient, [[0.0, -1.0]] * 9, 1e-7)


def test_sparse_bounds_that_hold_without_multiplier(torch_frontend):
    """As above; the solver is started at an end of the edge x_0 + x_1 = 1.5 of a square, and stays there."""
    frontend, solve = torch_frontend, torch_frontend.module.solve_qp
    eye, zeros, ones, end = sp.eye_array(2), *map(frontend.array, (np.zeros(2), np.ones(2), [1.0, 0.5]))
    data = sp.csc_array(np.ones((2, 2))), frontend.array([-1.5, -1.5]), eye, zeros, ones
    start = solve(*data)._replace(x=end, s=end, y=zeros)
    solution = solve(*data, warm_start=start)
    assert_close(frontend.numpy(solution.x), [1.0, 0.5], 1e-12)
    assert not solution.regularity.x and solution.regularity.y

    def clipped(q):
        return (solve(eye, q, eye, None, frontend.array(np.array([1.0, 2.0]))).x,)

    for k in range(-4, 5):
        _, (gradient,) = frontend.differentiable(clipped)([np.array([-1 - k * 1.1e-16, -1.0])], [np.ones(2)])
        assert_close(gradient, [0.0, -1.0], 1e-7)
