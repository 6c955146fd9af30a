"""`CvxpyLayer` against the oracle for every family of problems: values, multipliers and gradients."""

import numpy as np
import pytest

from checks import (
    assert_close,
    assert_directional_derivative,
    assert_kkt,
    closed_form_gradients,
    differences,
    direction_of,
    solve_exactly,
)
from frontends import FRONTENDS
from problems import FAMILIES, Program, lane, lp, qp, random_lp, random_qp, values_of

BATCH = 3


class Case:
    """A family, values for a batch of it, and its layer in one framework, solved and differentiated once."""

    def __init__(self, frontend, family, size=BATCH):
        rng = np.random.default_rng(1)
        self.family, self.size, self.frontend = family, size, frontend
        self.values = family.batch(rng, size)
        self.layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables)
        self.differentiable = frontend.differentiable(self.layer)
        self.cotangents = [rng.standard_normal((size, *v.shape)) for v in family.variables]
        self.outputs, self.gradients = self.differentiable(self.values, self.cotangents)

    def solve(self, values):
        return self.differentiable(values, self.cotangents)[0]

    def exactly(self, values, i):
        """The oracle's outputs of problem i of the batch."""
        family = self.family
        values = lane(values, family.parameters, i)
        return solve_exactly(family.problem, family.parameters, family.variables, values)

    def check_gradients(self, **options):
        assert_directional_derivative(
            *(self.solve, self.values, self.family.parameters, self.cotangents, self.gradients),
            *(np.random.default_rng(2), self.size),
            **options,
        )


@pytest.fixture(scope="session", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="session")
def case(name, frontend):
    return Case(frontend, FAMILIES[name]())


def test_solution_equals_that_of_cvxpy(case):
    for i in range(case.size):
        for variable, output, expected in zip(
            case.family.variables, case.outputs, case.exactly(case.values, i), strict=True
        ):
            assert_close(output[i], expected, 1e-9, f"{variable} of problem {i}")


def test_gradient_equals_differences(case):
    case.check_gradients()


def test_gradient_of_torch_equals_that_of_jax(name, case):
    """Torch's own case is cheap, so it is made again rather than kept."""
    if case.frontend.name == "torch":
        pytest.skip("compared in the turn of jax")
    pytest.importorskip("torch")
    other = Case(FRONTENDS["torch"](), FAMILIES[name]())
    for parameter, a, b in zip(case.family.parameters, case.gradients, other.gradients, strict=True):
        assert_close(a, b, 1e-9, parameter.name())


@pytest.mark.parametrize("name", ["qp", "lasso", "model_predictive_control"])
def test_gradient_equals_differences_of_the_oracle(name, frontend, rng):
    """Once more without a solve of ours in the differences."""
    case = Case(frontend, FAMILIES[name](), size=1)
    cotangents = [c[0] for c in case.cotangents]
    for i, parameter in enumerate(case.family.parameters):
        direction = direction_of(rng, parameter, case.values[i].shape)
        changes = differences(lambda values: case.exactly(values, 0), case.values, i, direction, 1e-5)
        expected = sum((c * dx).sum() for c, dx in zip(cotangents, changes, strict=True))
        actual = (case.gradients[i] * direction).sum()
        assert_close(actual, expected, 1e-5, parameter.name())


def check_known(frontend, family, programs, tolerance):
    """Solution, multipliers and gradients of a batch of programs whose answers are known."""
    rng = np.random.default_rng(3)
    values = values_of(programs)[-len(family.parameters) :]
    layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables)
    n, zero = programs[0].q.size, programs[0].zero
    cotangents = [rng.standard_normal((len(programs), *v.shape)) for v in family.variables]
    (x, *y), gradients = frontend.differentiable(layer)(values, cotangents)
    y = np.concatenate(y, axis=1)
    y_bar = np.concatenate(cotangents[1:], axis=1)
    exact = []
    for i, program in enumerate(programs):
        assert_kkt(program, x[i], y[i], program.b - program.A @ x[i], tolerance)
        assert_close(x[i], program.x, tolerance, f"x of problem {i}")
        assert_close(y[i], program.y, tolerance, f"y of problem {i}")
        exact.append(Program(*closed_form_gradients(program, cotangents[0][i], y_bar[i]), zero, *[None] * 3))
    assert exact[0].q.shape == (n,)
    expected = values_of(exact)[-len(family.parameters) :]
    for parameter, actual, exact_gradient in zip(family.parameters, gradients, expected, strict=True):
        for i in range(len(programs)):
            assert_close(actual[i], exact_gradient[i], 10 * tolerance, f"{parameter.name()} of problem {i}")


@pytest.mark.parametrize("equalities", [0, 2])
def test_known_solution_of_quadratic_programs(equalities, frontend, rng):
    """Programs of every kind in one batch: one failure must not hide behind, nor disturb, the others."""
    sizes = 6, 9, equalities
    programs = [
        *(random_qp(rng, *sizes), random_qp(rng, *sizes, density=0.3), random_qp(rng, *sizes, rank=3)),
        *(random_qp(rng, *sizes, active=0), random_qp(rng, *sizes, active=6 - equalities)),
        *(random_lp(rng, *sizes), random_lp(rng, *sizes, density=0.5)),
    ]
    check_known(frontend, qp(*sizes), programs, 1e-8)


@pytest.mark.parametrize("equalities", [0, 2])
def test_known_solution_of_linear_programs(equalities, frontend, rng):
    sizes = 5, 8, equalities
    programs = [random_lp(rng, *sizes, density=density) for density in (1.0, 1.0, 0.5, 0.5)]
    check_known(frontend, lp(*sizes), programs, 1e-8)


def test_large_quadratic_programs(frontend, rng):
    sizes = 100, 50, 50
    programs = [random_qp(rng, *sizes, active=i % 40) for i in range(128)]
    check_known(frontend, qp(*sizes), programs, 1e-7)


def test_large_linear_programs(frontend, rng):
    sizes = 100, 120, 20
    check_known(frontend, lp(*sizes), [random_lp(rng, *sizes) for _ in range(128)], 1e-7)
