"""Every solver, given as a record or by name, and its settings: the same solutions and gradients."""

import cvxpy as cp
import numpy as np
import pytest

from checks import assert_close
from cone_problems import CONE_FAMILIES
from frontends import FRONTENDS
from optlayers.status import SolveError, Status
from problems import lp, qp

FAMILIES = {"qp": qp, "lp": lp} | {
    name: CONE_FAMILIES[name]
    for name in ("norm_ball", "sdp", "exponential_cones", "power_cones", "generalised_power_cones")
}
SOLVERS = ("ADMM", "InteriorPoint", "Clarabel", "SCS", "OSQP")
NAMES = ("auto", cp.CLARABEL, cp.SCS, cp.OSQP, cp.DIFFCP, "ADMM", "osqp", "Scs")
LINEAR_ONLY = ("InteriorPoint", "OSQP")


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request):
    """A family, values for three problems, and what the solver that is chosen by default makes of them."""
    pytest.importorskip("torch")
    family = FAMILIES[request.param]()
    rng = np.random.default_rng(0)
    values = family.batch(rng, 3)
    cotangents = [rng.standard_normal((3, *variable.shape)) for variable in family.variables]
    expected = evaluated(FRONTENDS["torch"](), family, values, cotangents)
    return request.param, family, values, cotangents, expected


def evaluated(frontend, family, values, cotangents, **options):
    layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables, **options)
    outputs, gradients = frontend.differentiable(layer)(values, cotangents)
    return [*outputs, *gradients]


def test_rescue(torch_frontend, rng):
    """With a large cost beside an entropy Clarabel gets what ADMM leaves, and few problems at once."""
    c, x = cp.Parameter(12), cp.Variable(12)
    problem = cp.Problem(cp.Minimize(c @ x - cp.sum(cp.entr(x))), [cp.sum(x) == 1])
    values, weights = [100 * rng.standard_normal((16, 12))], [rng.standard_normal((16, 12))]
    results, iterations = [], []
    for rescue in (True, False):
        layer = torch_frontend.CvxpyLayer(problem, [c], [x], rescue=rescue)
        solution = layer.solve(torch_frontend.array(values[0]))
        assert solution.status.tolist() == [Status.SOLVED.code] * 16
        iterations.append(solution.iterations)
        results.append(torch_frontend.differentiable(layer)(values, weights))
        iterations.append(layer.solve(torch_frontend.array(values[0][:2])).iterations)
        results.append(torch_frontend.differentiable(layer)([values[0][:2]], [weights[0][:2]]))
    assert (iterations[0] == iterations[2].clamp(max=60)).all() and (iterations[2] > 60).any()
    assert not iterations[1].any() and iterations[3].all()
    ((point,), (gradient,)), *others = results
    for (other,), (other_gradient,) in others:
        assert_close(other, point[: len(other)], 1e-8)
        assert_close(other_gradient, gradient[: len(other)], 1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_give_the_same(torch_frontend, reference, solver):
    name, family, values, cotangents, expected = reference
    record = getattr(torch_frontend.module, solver)()
    if solver in LINEAR_ONLY and name not in ("qp", "lp"):
        with pytest.raises(ValueError, match=f"{solver} solves problems with linear constraints only"):
            evaluated(torch_frontend, family, values, cotangents, solver=record)
    elif solver == "SCS" and name == "generalised_power_cones":
        with pytest.raises(ValueError, match="SCS has no power cone of more than 3 dimensions"):
            evaluated(torch_frontend, family, values, cotangents, solver=record)
    else:
        results = evaluated(torch_frontend, family, values, cotangents, solver=record)
        for actual, other in zip(results, expected, strict=True):
            assert_close(actual, other, 1e-7)


@pytest.mark.parametrize("solver", [None, "ADMM"])
def test_leaves_give_the_same_as_on_a_gpu(monkeypatch, torch_frontend, reference, solver):
    """There tensors stay tensors; on a CPU leaves work on NumPy arrays."""
    _, family, values, cotangents, expected = reference
    monkeypatch.setattr("optlayers.ops.torch.host.serves", lambda solve, inputs: False)
    results = evaluated(torch_frontend, family, values, cotangents, solver=solver)
    for actual, other in zip(results, expected, strict=True):
        assert_close(actual, other, 1e-7)


@pytest.mark.parametrize("solver", NAMES)
def test_names(torch_frontend, solver):
    family, rng = qp(), np.random.default_rng(0)
    values, weights = family.batch(rng, 2), [np.ones((2, *v.shape)) for v in family.variables]
    expected = evaluated(torch_frontend, family, values, weights)
    for a, b in zip(evaluated(torch_frontend, family, values, weights, solver=solver), expected, strict=True):
        assert_close(a, b, 1e-7)


@pytest.mark.parametrize("solver", ["GUROBI", "", 3])
def test_unknown_solver(torch_frontend, solver):
    family = qp()
    with pytest.raises(ValueError, match=r"solver .*'CLARABEL'"):
        torch_frontend.CvxpyLayer(family.problem, family.parameters, family.variables, solver=solver)


# Settings.


@pytest.fixture
def solve(torch_frontend):
    """A function of solver and settings: the solution of a fixed second-order cone program, or QP."""

    def call(family, solver, **solver_args):
        layer = torch_frontend.CvxpyLayer(
            family.problem, family.parameters, family.variables, solver=solver, on_failure="ignore"
        )
        values = map(torch_frontend.array, family.batch(np.random.default_rng(0), 2))
        return layer.solve(*values, solver_args=solver_args)

    return call


def test_eps_is_the_residual_at_which_a_problem_counts_as_solved(solve):
    family = CONE_FAMILIES["norm_ball"]()
    strict = solve(family, "ADMM", refine=0, max_iter=50, eps=1e-12)
    loose = solve(family, "ADMM", refine=0, max_iter=50, eps=1e-1)
    assert (strict.status != Status.SOLVED.code).all()
    assert (loose.status == Status.SOLVED.code).all()


@pytest.mark.parametrize("name", ["eps_abs", "eps_rel", "tol_gap_abs"])
def test_names_of_other_libraries_for_eps(solve, name):
    loose = solve(CONE_FAMILIES["norm_ball"](), "ADMM", refine=0, max_iter=50, **{name: 1e-1})
    assert (loose.status == Status.SOLVED.code).all()


@pytest.mark.parametrize("name", ["max_iter", "max_iters"])
def test_iteration_limit(solve, name):
    solution = solve(CONE_FAMILIES["norm_ball"](), "ADMM", refine=0, **{name: 50})
    assert (solution.iterations == 50).all()
    assert (solution.status != Status.SOLVED.code).all()


@pytest.mark.parametrize("name", ["norm_ball", "sdp", "log_sum_exp", "pnorm_three"])
def test_newton_steps_that_converge_go_on(solve, name):
    """To the end of what precision allows, where one step leaves a residual that the next iterations use."""
    solution = solve(CONE_FAMILIES[name](), "ADMM", refine=1, check_every=50)
    assert (solution.iterations == 50).all() and (solution.residual < 1e-13).all()


def test_field_of_the_record(solve, torch_frontend):
    """A setting and the field of the record are the same thing."""
    family, ADMM = CONE_FAMILIES["norm_ball"](), torch_frontend.module.ADMM
    by_setting = solve(family, "ADMM", rho=30.0, refine=0, max_iter=75)
    by_record = solve(family, ADMM(rho=30.0, refine=0, max_iter=75))
    default = solve(family, ADMM(refine=0, max_iter=75))
    assert (by_setting.x == by_record.x).all()
    assert (by_setting.x != default.x).any()


@pytest.mark.parametrize(
    "solver, option, value",
    [("CLARABEL", "max_step_fraction", 0.5), ("SCS", "scale", 5.0), ("OSQP", "polishing", False)],
)
def test_option_of_the_library(solve, solver, option, value):
    """It arrives there: without refinement the answer is another one in its last digits."""
    family = qp()
    default, changed = (solve(family, solver, refine=0, **options) for options in ({}, {option: value}))
    assert (changed.x != default.x).any()


def test_option_that_the_library_refuses(solve):
    with pytest.raises((AttributeError, TypeError, ValueError), match="no_such_option"):
        solve(qp(), "CLARABEL", no_such_option=1)


def test_iteration_limit_of_a_library(solve):
    solution = solve(CONE_FAMILIES["sdp"](), "CLARABEL", max_iter=1, refine=0)
    assert (solution.status == Status.ITERATION_LIMIT.code).all()


def test_unknown_setting_warns(solve):
    with pytest.warns(UserWarning, match="setting 'acceleration_lookback'"):
        solve(qp(), "ADMM", acceleration_lookback=5)


@pytest.mark.parametrize("solver", ["CLARABEL", "SCS", "OSQP", "ADMM"])
def test_outcomes_of_every_solver(torch_frontend, solver):
    """Infeasible, unbounded and solvable, in one batch."""
    c, low, x = cp.Parameter(2), cp.Parameter(2), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(c @ x), [x >= low, x[0] <= 1])
    layer = torch_frontend.CvxpyLayer(problem, [c, low], [x], solver=solver)
    values = [np.array([[1.0, 1.0], [1.0, -1.0], [1.0, 2.0]]), np.array([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])]
    with pytest.raises(SolveError, match="2 of 3") as error:
        layer(*map(torch_frontend.array, values))
    expected = [Status.PRIMAL_INFEASIBLE.code, Status.DUAL_INFEASIBLE.code, Status.SOLVED.code]
    np.testing.assert_array_equal(error.value.status, expected)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_host_solver_under_transforms(framework):
    """vmap over a gradient, under jit in JAX."""
    pytest.importorskip(framework)
    frontend = FRONTENDS[framework]()
    family = CONE_FAMILIES["norm_ball"]()
    layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables[:1], solver="CLARABEL")
    values = [*map(frontend.array, family.batch(np.random.default_rng(0), 3))]

    def gradient(c, F, g, r):
        return frontend.transforms.grad(lambda c: layer(c, F, g, r)[0].sum())(c)

    mapped = frontend.transforms.vmap(gradient)
    actual = (frontend.framework.jit(mapped) if framework == "jax" else mapped)(*values)
    _, (expected, *_) = frontend.differentiable(layer)(
        family.batch(np.random.default_rng(0), 3), [np.ones((3, 3))]
    )
    assert_close(frontend.numpy(actual), expected, 1e-7)


def test_library_that_panics_leaves_the_problem_to_the_next_solver(monkeypatch, torch_frontend, rng):
    """As Clarabel does on some power cones of more than 3 dimensions, with what is no Exception."""

    class PanicException(BaseException):
        pass

    class Broken:
        def solve(self):
            raise PanicException

    family = CONE_FAMILIES["generalised_power_cones"]()
    layer = torch_frontend.CvxpyLayer(family.problem, family.parameters, family.variables)
    values = [torch_frontend.array(value) for value in family.batch(rng, 2)]
    expected = layer(*values)
    monkeypatch.setattr("optlayers.solvers.host.Clarabel._set_up", lambda self, program: Broken())
    for actual, other in zip(layer(*values), expected, strict=True):
        assert_close(torch_frontend.numpy(actual), torch_frontend.numpy(other), 1e-7)
