"""`CvxpyLayer` on every cone: certified solutions, gradients against differences, second derivatives."""

import warnings

import cvxpy as cp
import numpy as np
import pytest

from certificates import program_data, residuals
from checks import assert_close, assert_directional_derivatives, direction_of, inner
from cone_problems import CONE_FAMILIES
from frontends import FRONTENDS, in_each_framework
from problems import lane

BATCH, STEP = 2, 1e-5


class Reference:
    """A family, values for a batch of it and for points next to it on either side, in one batch.

    Lanes are BATCH problems, then for each parameter BATCH with it moved ahead and BATCH with it moved back:
    so one call of a layer, which JAX compiles once, gives solutions, gradients and their differences.
    """

    def __init__(self, family):
        rng = np.random.default_rng(1)
        self.family, self.values = family, family.batch(rng, BATCH)
        self.directions = [
            direction_of(rng, parameter, value)
            for value, parameter in zip(self.values, family.parameters, strict=True)
        ]
        moved = [self.values]
        for i, direction in enumerate(self.directions):
            for h in (STEP, -STEP):
                moved.append([v + h * direction if i == j else v for j, v in enumerate(self.values)])
        self.moved = [np.concatenate(column) for column in zip(*moved, strict=True)]
        self.cotangents = [_cotangent(rng, variable) for variable in family.variables]

    def evaluated(self, frontend):
        """A layer's outputs followed by its x, s, y for all lanes, and the gradients of the first BATCH."""
        family = self.family
        layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables, gp=family.gp)

        def solve(*values):
            solution = layer.solve(*values)
            return (*solution.variables, solution.x, solution.s, solution.y)

        self.program = layer._program.program
        lanes, n, m = len(self.moved[0]), self.program.n, self.program.m
        cotangents = [*self.cotangents, np.zeros((BATCH, n)), *[np.zeros((BATCH, m))] * 2]
        padding = [np.zeros((lanes - BATCH, *c.shape[1:]), c.dtype) for c in cotangents]
        weights = [np.concatenate(pair) for pair in zip(cotangents, padding, strict=True)]
        outputs, gradients = frontend.differentiable(solve)(self.moved, weights)
        return outputs, [gradient[:BATCH] for gradient in gradients]

    def differences(self, outputs):
        """For `assert_directional_derivatives`: directions, and central differences of the outputs."""
        derivatives = []
        for i, direction in enumerate(self.directions):
            ahead, behind = (slice((2 * i + k) * BATCH, (2 * i + k + 1) * BATCH) for k in (1, 2))
            pairs = zip(self.cotangents, outputs, strict=False)
            change = sum(inner(c, output[ahead] - output[behind]) for c, output in pairs)
            derivatives.append((direction, change / (2 * STEP)))
        return derivatives


def _cotangent(rng, variable):
    value = rng.standard_normal((BATCH, *variable.shape))
    if variable.is_complex():
        value = value + 1j * rng.standard_normal(value.shape)
    return value


# JAX takes about ten seconds to compile a family: but for slow tests, three of them stand for all.
FAST_IN_JAX = ("norm_ball", "sdp", "exponential_cones")
CASES = in_each_framework(CONE_FAMILIES, FAST_IN_JAX)


class Case:
    """One family in one framework, evaluated once for all tests."""

    def __init__(self, name, framework):
        self.frontend = FRONTENDS[framework]()
        self.reference = Reference(CONE_FAMILIES[name]())
        self.family = self.reference.family
        self.outputs, self.gradients = self.reference.evaluated(self.frontend)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    name, framework = request.param
    pytest.importorskip(framework)
    return Case(name, framework)


def test_solution_is_certified(case):
    """The optimality conditions hold at the layer's own x, s, y for all lanes, shifted ones too."""
    program, family = case.reference.program, case.family
    *_, x, s, y = case.outputs
    for i in range(len(x)):
        data = program_data(program, lane(case.reference.moved, family.parameters, i))
        for name, violation in residuals(program.cones, data, x[i], s[i], y[i])._asdict().items():
            assert violation <= 1e-9, f"{name} of problem {i}: {violation:.1e}"


def test_solution_equals_that_of_clarabel(case):
    """Which is right to about 1e-6: the certificate says more, but not that the outputs are read right."""
    family, tolerances = case.family, dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-11)
    for i in range(BATCH):
        for parameter, value in zip(family.parameters, case.reference.values, strict=True):
            parameter.value = value[i]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has reached less than 1e-11
            family.problem.solve(solver=cp.CLARABEL, gp=family.gp, **tolerances)
        for variable, output in zip(family.variables, case.outputs, strict=False):
            assert_close(output[i], variable.value, 1e-5, f"{variable} of problem {i}")


def test_gradient_equals_differences(case):
    derivatives = case.reference.differences(case.outputs)
    assert_directional_derivatives(case.gradients, derivatives, case.family.parameters)


def test_gradients_of_the_frameworks_are_equal(case):
    if case.frontend.name == "torch":
        pytest.skip("the other one compares")
    pytest.importorskip("torch")
    _, gradients = case.reference.evaluated(FRONTENDS["torch"]())
    for parameter, a, b in zip(case.family.parameters, case.gradients, gradients, strict=True):
        assert_close(a, b, 1e-7, parameter.name())


def test_float32(case):
    """Single precision in and out; the work itself may be done in double precision."""
    if case.frontend.name == "jax":
        pytest.skip("compiles for another ten seconds")
    family, reference = case.family, case.reference
    layer = case.frontend.CvxpyLayer(family.problem, family.parameters, family.variables, gp=family.gp)
    outputs, gradients = case.frontend.differentiable(layer, "float32")(
        reference.values, reference.cotangents
    )
    for variable, actual, expected in zip(family.variables, outputs, case.outputs, strict=False):
        assert actual.dtype in (np.float32, np.complex64)
        assert_close(actual, expected[:BATCH], 1e-3, str(variable))
    for parameter, actual, expected in zip(family.parameters, gradients, case.gradients, strict=True):
        assert actual.dtype in (np.float32, np.complex64)
        assert_close(actual, expected, 1e-3, parameter.name())


# Second derivatives, of problems with few numbers.


def tiny_second_order():
    c, r, x = cp.Parameter(2), cp.Parameter(pos=True), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(c @ x), [cp.norm(np.array([[1.0, 0.3], [-0.2, 0.8]]) @ x) <= r])
    return problem, [c, r], x, [np.array([[1.0, -0.5], [0.3, 2.0]]), np.array([1.5, 0.7])]


def tiny_semidefinite():
    C, X = cp.Parameter((2, 2), symmetric=True), cp.Variable((2, 2), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X) + cp.sum_squares(X) / 2), [X >> 0, cp.trace(X) == 1])
    return problem, [C], X, [np.array([[[2.0, 1.0], [1.0, -1.0]], [[0.2, 0.1], [0.1, -0.1]]])]


def tiny_exponential():
    q, t, x = cp.Parameter(3, pos=True), cp.Parameter(), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.kl_div(x, q))), [np.array([1.0, -0.5, 2.0]) @ x == t])
    return problem, [q, t], x, [np.array([[1.0, 0.5, 0.8], [0.4, 1.3, 0.9]]), np.array([1.0, 2.0])]


@pytest.mark.parametrize("build", [tiny_second_order, tiny_semidefinite, tiny_exponential])
@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_second_derivatives_equal_differences(build, framework):
    pytest.importorskip(framework)
    frontend = FRONTENDS[framework]()
    problem, parameters, variable, values = build()
    layer = frontend.CvxpyLayer(problem, parameters, [variable])
    frontend.check_derivatives(lambda *v: layer(*v)[0], values, order=2)
