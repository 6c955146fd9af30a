"""Problems without solution, of NaN, of extreme scale: what becomes of them and of the rest of the batch."""

import time

import cvxpy as cp
import numpy as np
import pytest

from checks import assert_close
from frontends import FRONTENDS, in_each_framework
from optlayers.status import SolveError, Status
from outcome_problems import KINDS
from problems import qp_shared

BAD = 1  # the lane that has no solution
GOOD = [0, 2]
OUTCOMES = {
    "infeasible": Status.PRIMAL_INFEASIBLE,
    "unbounded": Status.DUAL_INFEASIBLE,
    "nan": Status.NON_FINITE,
    "inf": Status.NON_FINITE,
}
# In JAX every policy and every kind takes about ten seconds to compile.
CASES = in_each_framework(KINDS, ["sdp"])


def values_of(kind, outcome, position=None):
    """The good problems, one of them replaced by one of this outcome."""
    if outcome in ("infeasible", "unbounded"):
        return kind.with_lane(getattr(kind, outcome), BAD)
    values = [value.copy() for value in kind.good]
    bad = values[position][BAD : BAD + 1]
    bad[...] = np.where(np.arange(bad.size).reshape(bad.shape) == 0, float(outcome), bad)
    return values


class Case:
    """A kind of problem in one framework; with `mask`, one compiled function serves most tests."""

    def __init__(self, kind, framework):
        self.kind, self.frontend = KINDS[kind](), FRONTENDS[framework]()
        self.layer = self.kind.layer(self.frontend, on_failure="mask")
        self.differentiable = self.frontend.differentiable(self.layer)
        self.cotangents = [np.ones((3, *self.kind.variables[0].shape))]
        self.good = self(self.kind.good)

    def __call__(self, values):
        outputs, gradients = self.differentiable(values, self.cotangents)
        return [*outputs, *gradients]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    kind, framework = request.param
    pytest.importorskip(framework)
    return Case(kind, framework)


LANES = [(outcome, None) for outcome in ("infeasible", "unbounded")]
LANES += [(outcome, position) for outcome in ("nan", "inf") for position in range(3)]


@pytest.mark.parametrize("outcome, position", LANES, ids=str)
def test_bad_lane_leaves_the_others_bit_identical(case, outcome, position):
    """Solutions and gradients of the other lanes are those of a batch in which that lane is good, too."""
    for actual, expected in zip(case(values_of(case.kind, outcome, position)), case.good, strict=True):
        np.testing.assert_array_equal(actual[GOOD], expected[GOOD])


@pytest.mark.parametrize("outcome, position", LANES, ids=str)
def test_masked_lane_is_finite_and_has_no_gradient(case, outcome, position):
    output, *gradients = case(values_of(case.kind, outcome, position))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[BAD], np.zeros_like(gradient[BAD]))
    assert np.isfinite(output).all()


@pytest.mark.parametrize("policy", ["nan", "mask"])
def test_lane_that_is_not_finite_does_not_reach_the_gradient_of_shared_parameters(frontend, policy):
    """P, A and b are common to the batch, q has NaN in one lane: the others still have a gradient."""
    family = qp_shared()
    layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables, on_failure=policy)
    values = family.batch(np.random.default_rng(0), 3)
    weights = np.ones((3, 4))
    weights[BAD] = 0
    differentiable = frontend.differentiable(layer)
    _, expected = differentiable(values, [weights])
    values[1][BAD, 0] = np.nan
    _, gradients = differentiable(values, [np.ones((3, 4))])
    for parameter, actual, other in zip(family.parameters, gradients, expected, strict=True):
        assert_close(actual, other, 1e-12, parameter.name())


def test_error_names_the_lane(case):
    layer = case.kind.layer(case.frontend)
    if case.frontend.name == "jax":
        pytest.skip("the same code after another compilation; tests of misuse cover it")
    for outcome, position in LANES:
        status = OUTCOMES[outcome]
        with pytest.raises(SolveError, match="1 of 3 problems") as error:
            layer(*map(case.frontend.array, values_of(case.kind, outcome, position)))
        expected = [Status.SOLVED.code, status.code, Status.SOLVED.code]
        np.testing.assert_array_equal(error.value.status, expected)
        assert f"batch index ({BAD},): {status.value}" in str(error.value)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]()


@pytest.mark.parametrize("outcome", ["infeasible", "unbounded", "nan"])
@pytest.mark.parametrize("policy", ["nan", "ignore"])
def test_policies(kind, torch_frontend, policy, outcome):
    """The bad lane is NaN, or whatever there is; the good lanes and their gradients are as ever."""
    weights = [np.ones((3, *kind.variables[0].shape))]
    layer = kind.layer(torch_frontend, on_failure=policy)
    (good,), good_gradients = torch_frontend.differentiable(layer)(kind.good, weights)
    values = values_of(kind, outcome, 0)
    (x,), gradients = torch_frontend.differentiable(layer)(values, weights)
    if policy == "nan":
        assert np.isnan(x[BAD]).all()
    elif outcome != "nan":
        assert np.isfinite(x[BAD]).all()
    assert_close(x[GOOD], good[GOOD], 1e-9)
    for actual, expected in zip(gradients, good_gradients, strict=True):
        assert_close(actual[GOOD], expected[GOOD], 1e-8)


def test_empty_batch(kind, torch_frontend):
    values = [value[:0] for value in kind.good]
    shape = (0, *kind.variables[0].shape)
    (x,), gradients = torch_frontend.differentiable(kind.layer(torch_frontend))(values, [np.zeros(shape)])
    assert x.shape == shape
    assert [g.shape for g in gradients] == [v.shape for v in values]


# Scales. Costs do not change x, and sizes scale it.


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
@pytest.mark.parametrize("name", ["lp", "socp", "sdp"])
@pytest.mark.parametrize("what", ["costs", "sizes"])
def test_scaled_data(torch_frontend, name, what, scale):
    kind = KINDS[name]()
    weights = [np.ones((3, *kind.variables[0].shape))]
    differentiable = torch_frontend.differentiable(kind.layer(torch_frontend))
    (expected,), expected_gradients = differentiable(kind.good, weights)
    values, position = list(kind.good), getattr(kind, what)
    values[position] = values[position] * scale
    (x,), gradients = differentiable(values, weights)
    unit = scale if what == "sizes" else 1.0
    assert_close(x / unit, expected, 1e-7)
    for i, (actual, other) in enumerate(zip(gradients, expected_gradients, strict=True)):
        factor = unit / (scale if i == position else 1.0)
        assert_close(actual / factor, other, 1e-6, kind.parameters[i].name())


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e6, 1e8])
def test_scaled_row(torch_frontend, scale):
    """a'x <= total, both times `scale`: the solution is the same, the multiplier the inverse."""
    kind = KINDS["qp"]()
    weights = [np.ones((3, 2))]
    layer = kind.layer(torch_frontend)
    differentiable = torch_frontend.differentiable(layer)
    (expected,), expected_gradients = differentiable(kind.good, weights)
    values = [kind.good[0], *(value * scale for value in kind.good[1:])]
    assert torch_frontend.numpy(layer.solve(*map(torch_frontend.array, values)).regularity.x).all()
    (x,), gradients = differentiable(values, weights)
    assert_close(x, expected, 1e-9)
    for i, (actual, other) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert_close(actual * (scale if i else 1.0), other, 1e-6, kind.parameters[i].name())


@pytest.mark.slow_to_compile
@pytest.mark.parametrize(
    "dtype, large", [("float64", 1e6), ("float64", 1e9), ("float64", 1e11), ("float32", 1e4)]
)
def test_large_numbers_hide_no_error_in_other_rows(frontend, rng, dtype, large):
    """One row is far away, the others are close to one another: solutions are those without it."""
    A, q = rng.standard_normal((100, 7, 2)), 3 * rng.standard_normal((100, 2))
    b = A @ np.array([0.5, -0.5]) + 0.05 * rng.uniform(size=(100, 7))
    shape = {"cones": frontend.module.Cones(nonneg=7), "on_failure": "mask"}
    solutions = []
    for side in (100.0, large):
        b[:, 0] = side
        data = [frontend.array(z, dtype) for z in (0.2 * np.eye(2), q, A, b)]
        solutions.append(frontend.module.solve_conic(*data, **shape))
        assert np.mean(frontend.numpy(solutions[-1].status) == 0) > 0.9
    solved = [frontend.numpy(solution.status) == 0 for solution in solutions]
    near, far = (frontend.numpy(solution.x)[solved[0] & solved[1]] for solution in solutions)
    assert_close(far, near, 1e-7 if dtype == "float64" else 1e-2)


@pytest.mark.parametrize("large", [1e5, 1e9, 1e14])
@pytest.mark.parametrize("gap", [1e-2, 1.0])
def test_large_numbers_hide_no_contradiction(torch_frontend, gap, large):
    x, p, top, low = cp.Variable(3), cp.Parameter(3), cp.Parameter(), cp.Parameter()
    rows = [x[0] <= top, x[1] >= low, x[1] <= 0, x[1] + x[2] <= 1]
    for cost in (cp.sum_squares(x - p), cp.norm(x - p)):
        layer = torch_frontend.CvxpyLayer(cp.Problem(cp.Minimize(cost), rows), [p, top, low], [x])
        with pytest.raises(SolveError):
            layer(*map(torch_frontend.array, (np.arange(1.0, 4.0), large, gap)))


@pytest.mark.parametrize("far", [1e12, 1e15, 1e18])
def test_bounds_far_away_do_not_excuse_a_point_near_them(torch_frontend, far):
    x, p = cp.Variable(3), cp.Parameter(3)
    for rows in ([x <= far], [cp.sum(x) <= far, x >= -1]):
        layer = torch_frontend.CvxpyLayer(
            cp.Problem(cp.Minimize(cp.norm1(x - p)), rows), [p], [x], on_failure="mask"
        )
        point = np.array([2.0, -0.5, 0.5])
        solution = layer.solve(torch_frontend.array(point))
        if list(Status)[int(solution.status)] is Status.SOLVED:
            assert_close(torch_frontend.numpy(solution.variables[0]), point, 1e-6)


def test_a_distant_minimum_is_no_proof_that_there_is_none(torch_frontend, rng):
    L = rng.standard_normal((10, 5))
    P, q = L @ L.T + 1e-5 * np.eye(10), rng.standard_normal(10)
    for seen in (1e-9, 1e-12):
        data = map(torch_frontend.array, (P, q))
        solution = torch_frontend.module.solve_qp(*data, eps=seen, on_failure="mask")
        assert list(Status)[int(solution.status)] in (Status.SOLVED, Status.INACCURATE)
        expected = -np.linalg.solve(P, q)
        size = np.abs(expected).max()
        assert_close(torch_frontend.numpy(solution.x) / size, expected / size, 1e-7)


# No constraints at all.


def solved(frontend, objective, parameters, variables, values):
    layer = frontend.CvxpyLayer(cp.Problem(cp.Minimize(objective)), parameters, variables)
    return layer.solve(*map(frontend.array, values))


@pytest.mark.parametrize("solver", ["CLARABEL", None])
def test_bounds_that_have_changed_places_have_no_point_between_them(torch_frontend, solver):
    q, eye = (torch_frontend.array(x) for x in (np.ones(2), np.eye(2)))
    l, u = (torch_frontend.array(x) for x in ([[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.9], [1.0, 0.0]]))
    solution = torch_frontend.module.solve_qp(eye, q, eye, l, u, solver=solver, on_failure="nan")
    assert solution.status.tolist() == [Status.PRIMAL_INFEASIBLE.code, Status.SOLVED.code]
    assert_close(solution.x[1], np.zeros(2), 1e-9)


def test_linear_objective_without_constraints_is_unbounded(torch_frontend):
    c, x = cp.Parameter(2), cp.Variable(2)
    with pytest.raises(SolveError, match="unbounded"):
        solved(torch_frontend, c @ x, [c], [x], [[1.0, 0.0]])


def test_norm_without_constraints_is_bounded_while_its_slope_exceeds_the_cost(torch_frontend):
    c, x = cp.Parameter(2), cp.Variable(2)
    solution = solved(torch_frontend, c @ x + cp.norm(x - 1), [c], [x], [[0.3, 0.4]])
    assert_close(torch_frontend.numpy(solution.variables[0]), np.ones(2), 1e-9)
    with pytest.raises(SolveError, match="unbounded"):
        solved(torch_frontend, c @ x + cp.norm(x - 1), [c], [x], [[3.0, 4.0]])


def test_eigenvalue_without_constraints(torch_frontend):
    c, X = cp.Parameter(), cp.Variable((2, 2), symmetric=True)
    objective = c * cp.trace(X) + cp.lambda_max(X) + cp.sum_squares(X) / 2
    solution = solved(torch_frontend, objective, [c], [X], [-1.5])
    assert_close(torch_frontend.numpy(solution.variables[0]), np.eye(2), 1e-9)
    with pytest.raises(SolveError, match="unbounded"):
        solved(torch_frontend, c * cp.trace(X) + cp.lambda_max(X), [c], [X], [-3.0])


@pytest.mark.parametrize("solver", [None, "ADMM", "CLARABEL"])
def test_small_coefficients_bound_a_large_variable(torch_frontend, solver):
    """1e-6 x <= 1 is no direction in which x may grow for ever."""
    rows = torch_frontend.array([[1e-6, 0.0], [0.0, 1.0], [1.0, -1.0]])
    l, u = torch_frontend.array([0.0, 0.0, -np.inf]), torch_frontend.array([1.0, 1.0, np.inf])
    q = torch_frontend.array([-1.0, -1.0])
    solution = torch_frontend.module.solve_qp(None, q, rows, l, u, solver=solver)
    assert_close(torch_frontend.numpy(solution.x), np.array([1e6, 1.0]), 1e-9)


# Infeasible or unattained by so little that there is no certificate: the layer must come to an end.


def weakly_infeasible():
    p, x, y = cp.Parameter(), cp.Variable(), cp.Variable()
    return cp.Problem(cp.Minimize(cp.square(y - p)), [cp.norm(cp.hstack([1, x])) <= x]), p, x


def unattained():
    p, x, y = cp.Parameter(nonneg=True), cp.Variable(), cp.Variable()
    return cp.Problem(cp.Minimize(p * x), [cp.quad_over_lin(1, y) <= x]), p, x


@pytest.mark.parametrize("build", [weakly_infeasible, unattained])
def test_problem_without_certificate_ends_and_is_not_solved(torch_frontend, build):
    problem, parameter, variable = build()
    layer = torch_frontend.CvxpyLayer(
        problem, [parameter], [variable], on_failure="ignore", solver_args={"max_iter": 200}
    )
    start = time.monotonic()
    solution = layer.solve(torch_frontend.array(1.0))
    assert time.monotonic() - start < 60
    assert int(solution.status) != Status.SOLVED.code


def test_non_convex_problems_are_refused(frontend):
    """In [-1, 1] x = 1 satisfies the optimality conditions of min -x^2 + 0.1 x, but x = -1 is better."""
    P = np.array([[[2.0]], [[-2.0]], [[-1e-3]], [[0.0]]])
    solution = frontend.module.solve_qp(
        *map(frontend.array, (P, [0.1], [[1.0]], [-1.0], [1.0])), on_failure="nan"
    )
    outcomes = [list(Status)[code] for code in frontend.numpy(solution.status)]
    assert outcomes == [Status.SOLVED, Status.NON_CONVEX, Status.NON_CONVEX, Status.SOLVED]
    assert_close(frontend.numpy(solution.x)[[0, 3]], [[-0.05], [-1.0]], 1e-12)
    assert np.isnan(frontend.numpy(solution.x)[1:3]).all()


def test_constant_that_was_only_said_to_be_convex(frontend):
    """CVXPY takes the user's word for P; the layer looks once."""
    x, q = cp.Variable(2), cp.Parameter(2)
    cost = cp.quad_form(x, np.diag([1.0, -1.0]), assume_PSD=True) + q @ x
    layer = frontend.CvxpyLayer(cp.Problem(cp.Minimize(cost), [cp.abs(x) <= 1]), [q], [x], on_failure="mask")
    assert list(Status)[int(layer.solve(frontend.array([0.1, 0.2])).status)] is Status.NON_CONVEX


def test_single_precision_allows_slacks_much_larger_than_the_data(rng):
    """Rounding is larger there than what would tell them from a problem that is infeasible by a little."""
    jax = pytest.importorskip("jax")
    from optlayers.jax import CvxpyLayer

    x, q = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.norm(x - 1) + cp.sum_squares(x) / 1000 - q @ x))
    values = 2 + rng.random((4, 3))
    with jax.enable_x64(False):
        quick = {"xla_backend_optimization_level": 0}
        solve = jax.jit(CvxpyLayer(problem, [q], [x], on_failure="nan").solve, compiler_options=quick)
        solution = solve(jax.numpy.asarray(values, "float32"))
    found = np.asarray(solution.variables[0])
    assert found.dtype == np.float32 and not solution.status.any() and abs(found).max() > 1000
    # 2 x / 1000 = q - (x - 1) / |x - 1|
    direction = (found - 1) / np.linalg.norm(found - 1, axis=1, keepdims=True)
    assert_close(found, 500 * (values - direction), 1e-4)
