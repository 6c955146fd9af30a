"""Misuse raises ValueError that names the offender; failed problems are named, or masked, one by one."""

import re

import cvxpy as cp
import numpy as np
import pytest

from checks import assert_close
from frontends import FRONTENDS
from optlayers.status import SolveError, Status
from problems import qp_shared


@pytest.fixture(scope="module")
def family():
    return qp_shared()


@pytest.fixture(scope="module")
def layer(frontend, family):
    return frontend.CvxpyLayer(family.problem, family.parameters, family.variables)


@pytest.fixture
def values(family, rng):
    """P, q, A, b, of which q has a batch axis of 3."""
    return family.batch(rng, 3)


def call(frontend, layer, values, **options):
    return [frontend.numpy(x) for x in layer(*map(frontend.array, values), **options)]


# Misuse of a call.


def test_wrong_number_of_values(frontend, layer, values):
    with pytest.raises(ValueError, match=r"expected 4 parameter values \(P \(4, 4\), q \(4,\).*got 3"):
        call(frontend, layer, values[:3])


def test_wrong_shape(frontend, layer, values):
    values[2] = values[2][:, :3]
    with pytest.raises(ValueError, match=r"parameter A \(6, 4\).*got \(6, 3\)"):
        call(frontend, layer, values)


def test_different_batch_axes(frontend, layer, values):
    values[3] = np.stack([values[3]] * 2)
    with pytest.raises(ValueError, match=r"parameter b \(6,\) has batch axes \(2,\).*\(3,\)"):
        call(frontend, layer, values)


def test_complex_value_of_real_parameter(frontend, layer, values):
    arrays = [*map(frontend.array, values[:3]), frontend.array(values[3], "complex128")]
    with pytest.raises(ValueError, match=r"parameter b \(6,\) is real"):
        layer(*arrays)


def test_value_that_is_no_tensor(family, values):
    pytest.importorskip("torch")
    from optlayers.torch import CvxpyLayer

    with pytest.raises(ValueError, match=r"parameter P \(4, 4\) must be a torch tensor, got ndarray"):
        CvxpyLayer(family.problem, family.parameters, family.variables)(*values)


def test_mixed_devices(family, values):
    torch = pytest.importorskip("torch")
    from optlayers.torch import CvxpyLayer

    tensors = [torch.tensor(v) for v in values]
    tensors[2] = tensors[2].to("meta")
    with pytest.raises(
        ValueError, match=r"parameter A \(6, 4\) is on meta, but parameter P \(4, 4\) is on cpu"
    ):
        CvxpyLayer(family.problem, family.parameters, family.variables)(*tensors)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("position", range(4))
def test_non_finite_value_is_named(frontend, layer, values, position, bad):
    """The note names the parameter, the message the problems: all if the parameter is shared."""
    values[position][(-1,) * values[position].ndim] = bad
    with pytest.raises(SolveError, match="NaN or infinity") as error:
        call(frontend, layer, values)
    name = layer._program.parameters[position].name()
    assert [note for note in error.value.__notes__ if "NaN" in note] == [
        f"parameter {name} {layer._program.parameters[position].shape} contains NaN or infinity"
    ]
    expected = [False, False, True] if position == 1 else [True] * 3
    np.testing.assert_array_equal(error.value.status == Status.NON_FINITE.code, expected)


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("attribute, sign", [("nonneg", 1), ("neg", -1), ("boolean", 1)])
def test_value_of_a_sign_that_was_excluded(frontend, attribute, sign):
    """The problem is convex for values of the declared sign only; the others of the batch are solved."""
    x, weight = cp.Variable(2), cp.Parameter(name="weight", **{attribute: True})
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - 3)), [sign * weight * cp.sum_squares(x) <= 1])
    weights = frontend.array([2.0 * sign, -0.1 * sign])
    note = rf"weight \(\) was declared with {attribute}=True, but contains {-0.1 * sign:g}"
    with pytest.raises(SolveError, match=r"1 of 2 problems") as error:
        frontend.CvxpyLayer(problem, [weight], [x])(weights)
    assert re.search(note, error.value.__notes__[0])
    solution = frontend.CvxpyLayer(problem, [weight], [x], on_failure="nan").solve(weights)
    assert frontend.numpy(solution.status).tolist() == [Status.SOLVED.code, Status.NON_FINITE.code]
    np.testing.assert_allclose(frontend.numpy(solution.variables[0]), [[0.5, 0.5], [np.nan] * 2], rtol=1e-8)


def test_parameter_without_logarithm(frontend):
    x, price = cp.Variable(pos=True), cp.Parameter(pos=True, name="price")
    layer = frontend.CvxpyLayer(cp.Problem(cp.Minimize(x + price / x)), [price], [x], gp=True)
    with pytest.raises(SolveError) as error:
        layer(frontend.array([2.0, 0.0]))
    assert error.value.__notes__ == ["parameter price () contains 0, of which there is no logarithm"]


@pytest.mark.slow_to_compile
def test_zero_in_a_geometric_program_has_no_gradient(frontend):
    """min x + a / x has the solution sqrt(a)."""
    x, a = cp.Variable(pos=True), cp.Parameter(pos=True)
    layer = frontend.CvxpyLayer(cp.Problem(cp.Minimize(x + a / x)), [a], [x], gp=True, on_failure="mask")
    (x,), (gradient,) = frontend.differentiable(layer)([np.array([4.0, 0.0, 1.0])], [np.ones(3)])
    assert_close(x[::2], [2.0, 1.0], 1e-8)
    assert_close(gradient, [0.25, 0.0, 0.5], 1e-8)


def test_call_after_an_error_works(frontend, layer, values):
    expected = call(frontend, layer, values)
    with pytest.raises(ValueError):
        call(frontend, layer, values[1:])
    with pytest.raises(SolveError):
        call(frontend, layer, [values[0], np.nan * values[1], *values[2:]])
    assert_close(call(frontend, layer, values), expected, 0.0)


# Misuse of the constructor.


def test_parameter_that_is_not_in_the_problem(frontend, family):
    other = cp.Parameter(2, name="other")
    with pytest.raises(
        ValueError, match=r"parameters\[4\] \(other\) is not a parameter of the problem.*P, q"
    ):
        frontend.CvxpyLayer(family.problem, [*family.parameters, other], family.variables)


def test_parameter_that_is_not_listed(frontend, family):
    with pytest.raises(ValueError, match="does not list: b"):
        frontend.CvxpyLayer(family.problem, family.parameters[:3], family.variables)


def test_variable_that_is_not_in_the_problem(frontend, family):
    with pytest.raises(ValueError, match=r"variables\[0\] \(stranger\) is not in the problem"):
        frontend.CvxpyLayer(family.problem, family.parameters, [cp.Variable(2, name="stranger")])


def test_no_variables(frontend, family):
    with pytest.raises(ValueError, match="variables is empty"):
        frontend.CvxpyLayer(family.problem, family.parameters, [])


def test_problem_that_is_not_dpp(frontend):
    x, a, b = cp.Variable(2), cp.Parameter(name="a"), cp.Parameter(name="b")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + a * b * x[0]))
    with pytest.raises(ValueError, match=r"not DPP.*a @ b|not DPP.*a \* b"):
        frontend.CvxpyLayer(problem, [a, b], [x])


@pytest.mark.parametrize("kind", ["integer", "boolean"])
def test_discrete_variable(frontend, kind):
    x, p = cp.Variable(2, name="steps", **{kind: True}), cp.Parameter(2)
    with pytest.raises(ValueError, match=r"steps is boolean or integer"):
        frontend.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - p))), [p], [x])


def test_unknown_failure_policy(frontend, family):
    with pytest.raises(ValueError, match=r"on_failure must be one of .*'nan'.*got 'warn'"):
        frontend.CvxpyLayer(family.problem, family.parameters, family.variables, on_failure="warn")


def test_unknown_solver(frontend, family):
    with pytest.raises(ValueError, match=r"solver 'ECOS' is unknown; expected 'auto', one of \['ADMM'"):
        frontend.CvxpyLayer(family.problem, family.parameters, family.variables, solver="ECOS")


def test_unknown_setting_warns(frontend, family, layer, values):
    with pytest.warns(UserWarning, match="setting 'acceleration'") as warned:
        call(frontend, layer, values, solver_args={"acceleration": 1})
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="setting 'acceleration'"):
        frontend.CvxpyLayer(
            family.problem, family.parameters, family.variables, solver_args={"acceleration": 1}
        )


# Problems without solution: x >= low and x <= high, of which some have low > high.


def interval_layer(frontend, **options):
    """The point of [low, high] nearest to `point`; three entries."""
    point, low, high, x = cp.Parameter(3), cp.Parameter(3), cp.Parameter(3), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - point)), [x >= low, x <= high])
    return frontend.CvxpyLayer(problem, [point, low, high], [x], **options)


@pytest.fixture(scope="module")
def interval(frontend):
    return interval_layer(frontend)


POINT = np.array([0.5, -2.0, 3.0])
LOW = np.array([[-1.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [-1.0, -1.0, -1.0]])
HIGH = np.ones(3)
NEAREST = np.array([0.5, -1.0, 1.0])


def test_infeasible_problem_is_named(frontend, interval):
    with pytest.raises(SolveError, match=r"1 of 3 problems.*\n.*batch index \(1,\): infeasible") as error:
        call(frontend, interval, [POINT, LOW, HIGH])
    expected = [Status.SOLVED.code, Status.PRIMAL_INFEASIBLE.code, Status.SOLVED.code]
    np.testing.assert_array_equal(error.value.status, expected)


@pytest.mark.slow_to_compile
def test_infeasible_problem_is_named_by_all_its_batch_axes(frontend, interval):
    low = np.stack([LOW, LOW[[0, 0, 1]]])
    with pytest.raises(SolveError, match="2 of 6 problems") as error:
        call(frontend, interval, [POINT, low, HIGH])
    assert error.value.status.shape == (2, 3)
    assert "batch index (0, 1)" in str(error.value) and "batch index (1, 2)" in str(error.value)


@pytest.mark.slow_to_compile
def test_single_infeasible_problem_has_no_index(frontend, interval):
    with pytest.raises(SolveError, match="infeasible") as error:
        call(frontend, interval, [POINT, LOW[1], HIGH])
    assert "batch index" not in str(error.value)


def test_constants_inside_jit_become_nan_where_infeasible():
    jax = pytest.importorskip("jax")
    layer = interval_layer(FRONTENDS["jax"]())
    solution = jax.jit(lambda scale: scale * layer(POINT, LOW, HIGH)[0])(2.0)
    assert np.isnan(solution[1]).all()
    assert_close(solution[::2], 2 * np.stack([NEAREST, NEAREST]), 1e-9)


def test_infeasible_problem_is_named_under_transforms_of_torch():
    torch = pytest.importorskip("torch")
    layer = interval_layer(FRONTENDS["torch"]())
    point, low, high = (torch.tensor(value) for value in (POINT, LOW, HIGH))
    low[0, 0] = np.nan
    with pytest.raises(
        SolveError, match=r"2 of 3 problems.*\n.*index \(0,\): the data.*\n.*\(1,\): infeas"
    ) as error:
        torch.func.vmap(lambda low: layer(point, low, high)[0])(low)
    assert "contains NaN" in error.value.__notes__[0]
    with pytest.raises(SolveError, match=r"batch index \(2, 0\): infeasible"):
        torch.func.vmap(lambda point: layer(point, low[1:], high)[0])(point.expand(3, 3))
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(SolveError, match="1 of 1 problems"):
            transform(lambda low: layer(point, low, high)[0].sum())(low[1])


@pytest.mark.slow_to_compile
def test_unbounded_problem_is_named(frontend):
    c, x = cp.Parameter(2), cp.Variable(2)
    layer = frontend.CvxpyLayer(cp.Problem(cp.Minimize(c @ x), [x >= 0]), [c], [x])
    with pytest.raises(SolveError, match=r"batch index \(0,\): unbounded") as error:
        call(frontend, layer, [np.array([[-1.0, 1.0], [1.0, 1.0]])])
    np.testing.assert_array_equal(error.value.status, [Status.DUAL_INFEASIBLE.code, Status.SOLVED.code])


@pytest.mark.parametrize(
    "policy", ["nan", *(pytest.param(p, marks=pytest.mark.slow_to_compile) for p in ("mask", "ignore"))]
)
def test_failed_problem_does_not_touch_the_others(frontend, policy):
    """Gradients of x'1: 1 where an entry follows its parameter, 0 elsewhere, also summed over the batch.

    JAX's is a trace, in which nothing can be raised: the default policy becomes "nan" there.
    """
    is_default = policy == "nan" and frontend.name == "jax"
    layer = interval_layer(frontend, **({} if is_default else {"on_failure": policy}))
    (x,), (point, low, high) = frontend.differentiable(layer)([POINT, LOW, HIGH], [np.ones((3, 3))])
    assert_close(x[[0, 2]], np.stack([NEAREST] * 2), 1e-9)
    assert np.isnan(x[1]).all() if policy == "nan" else np.isfinite(x[1]).all()
    assert_close(low[[0, 2]], np.array([[0.0, 1.0, 0.0]] * 2), 1e-8)
    if policy != "ignore":
        assert_close(low[1], np.zeros(3), 0.0)
        assert_close(point, np.array([2.0, 0.0, 0.0]), 1e-8)
        assert_close(high, np.array([0.0, 0.0, 2.0]), 1e-8)


@pytest.mark.slow_to_compile
def test_nan_in_a_matrix_is_masked(frontend, family, rng):
    """The gradients are those of a batch in which that problem has no weight."""
    P, q, A, b = family.batch(rng, 1)
    A = np.stack([A, 1.1 * A, 0.9 * A])
    broken = A.copy()
    broken[1, 2, 3] = np.nan
    layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables, on_failure="mask")
    differentiable = frontend.differentiable(layer)
    (x,), gradients = differentiable([P, q[0], broken, b], [np.ones((3, 4))])
    weights = np.outer([1, 0, 1], np.ones(4))
    (expected,), expected_gradients = differentiable([P, q[0], A, b], [weights])
    assert np.isfinite(x).all()
    assert_close(x[[0, 2]], expected[[0, 2]], 1e-9)
    for actual, exact in zip(gradients, expected_gradients, strict=True):
        assert_close(actual, exact, 1e-8)
