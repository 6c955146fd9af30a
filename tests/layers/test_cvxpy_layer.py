"""`CvxpyLayer` against the oracle for every family of problems: values, multipliers and gradients."""

from types import SimpleNamespace

import numpy as np
import pytest

from checks import (
    assert_close,
    assert_directional_derivatives,
    assert_kkt,
    closed_form_gradients,
    directional_derivatives,
    solve_exactly,
)
from cone_problems import CONE_FAMILIES
from frontends import FRONTENDS
from problems import FAMILIES, Program, lane, lp, qp, random_lp, random_qp, values_of

BATCH = 3


class Reference:
    """A family, values for a batch of it, and what the oracle makes of them: outputs, derivatives."""

    def __init__(self, family):
        rng = np.random.default_rng(1)
        self.family, self.values = family, family.batch(rng, BATCH)
        self.cotangents = [rng.standard_normal((BATCH, *v.shape)) for v in family.variables]
        self.outputs = self.solve(self.values)
        self.derivatives = directional_derivatives(
            self.solve, self.values, family.parameters, self.cotangents, rng
        )

    def solve(self, values):
        """The oracle's outputs (B, ...)."""
        family = self.family
        lanes = [lane(values, family.parameters, i) for i in range(BATCH)]
        outputs = [solve_exactly(family.problem, family.parameters, family.variables, v) for v in lanes]
        return [np.stack(output) for output in zip(*outputs, strict=True)]


def evaluated(frontend, reference):
    """Outputs and gradients of a layer for the values of a reference."""
    family = reference.family
    layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables)
    return frontend.differentiable(layer)(reference.values, reference.cotangents)


# What differs between the frameworks shows in a few families.
COMPILED = ("lp", "qp_shared", "lasso", "model_predictive_control", "several_variables")
SLOW = [pytest.param(name, marks=pytest.mark.slow_to_compile) for name in FAMILIES if name not in COMPILED]


@pytest.fixture(scope="session", params=[*COMPILED, *SLOW])
def reference(request):
    return Reference(FAMILIES[request.param]())


@pytest.fixture(scope="session")
def layer(reference, frontend):
    """Compiled, solved and differentiated once for all tests of a family."""
    outputs, gradients = evaluated(frontend, reference)
    return SimpleNamespace(outputs=outputs, gradients=gradients)


def test_solution_equals_that_of_cvxpy(reference, layer):
    pairs = zip(layer.outputs, reference.outputs, strict=True)
    for variable, (output, expected) in zip(reference.family.variables, pairs, strict=True):
        for i in range(BATCH):
            assert_close(output[i], expected[i], 1e-9, f"{variable} of problem {i}")


def test_gradient_equals_differences_of_the_solution_of_cvxpy(reference, layer):
    assert_directional_derivatives(layer.gradients, reference.derivatives, reference.family.parameters)


@pytest.mark.parametrize("frontend", ["jax"], indirect=True, scope="session")
def test_gradients_of_the_frameworks_are_equal(reference, layer):
    """Those of torch are cheap: they are computed again beside those of jax rather than kept."""
    pytest.importorskip("torch")
    _, gradients = evaluated(FRONTENDS["torch"](), reference)
    for parameter, a, b in zip(reference.family.parameters, layer.gradients, gradients, strict=True):
        assert_close(a, b, 1e-9, parameter.name())


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


@pytest.mark.parametrize("equalities", [2, pytest.param(0, marks=pytest.mark.slow_to_compile)])
def test_known_solution_of_quadratic_programs(equalities, frontend, rng):
    """Programs of every kind in one batch: one failure must not hide behind, nor disturb, the others."""
    sizes = 6, 9, equalities
    programs = [
        *(random_qp(rng, *sizes), random_qp(rng, *sizes, density=0.3), random_qp(rng, *sizes, rank=3)),
        *(random_qp(rng, *sizes, active=0), random_qp(rng, *sizes, active=6 - equalities)),
        *(random_lp(rng, *sizes), random_lp(rng, *sizes, density=0.5)),
    ]
    check_known(frontend, qp(*sizes), programs, 1e-8)


@pytest.mark.slow_to_compile
def test_known_solution_of_linear_programs(frontend, rng):
    sizes = 5, 8, 2
    programs = [random_lp(rng, *sizes, density=density) for density in (1.0, 1.0, 0.5, 0.5)]
    check_known(frontend, lp(*sizes), programs, 1e-8)


def test_large_quadratic_programs(frontend, rng):
    sizes = 100, 50, 50
    programs = [random_qp(rng, *sizes, active=i % 40) for i in range(128)]
    check_known(frontend, qp(*sizes), programs, 1e-7)


def test_large_linear_programs(frontend, rng):
    sizes = 100, 120, 20
    check_known(frontend, lp(*sizes), [random_lp(rng, *sizes) for _ in range(128)], 1e-7)


@pytest.mark.parametrize(
    "name", [*FAMILIES, "entropy", "sdp", "geometric", "complex_fit", "second_order_cones"]
)
def test_small_calls_without_derivatives(monkeypatch, name):
    """They stay in NumPy from end to end, with the results of tensors."""
    pytest.importorskip("torch")
    from torch.utils._pytree import tree_leaves

    from optlayers.ops.torch import host

    torch_frontend = FRONTENDS["torch"]()
    family = (FAMILIES | CONE_FAMILIES)[name]()
    gp = getattr(family, "gp", False)
    layer = torch_frontend.CvxpyLayer(family.problem, family.parameters, family.variables, gp=gp)
    values = [torch_frontend.array(value) for value in family.batch(np.random.default_rng(0), 2)]
    calls, call = [], host.call
    monkeypatch.setattr(host, "call", lambda *args: calls.append(args) or call(*args))
    results = [layer(*values), (solution := layer.solve(*values)), layer.solve(*values, warm_start=solution)]
    assert len(calls) == 3
    monkeypatch.setattr(host, "serves_call", lambda tensors: False)
    expected = [layer(*values), layer.solve(*values), layer.solve(*values, warm_start=solution)]
    assert len(calls) == 3
    for actual, other in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        assert actual.dtype == other.dtype and actual.shape == other.shape
        assert_close(1.0 * actual.numpy(), 1.0 * other.numpy(), 1e-9)


def test_recorded_calls_hold_no_numbers():
    """Where torch records operations, small calls are made of them: not of arrays, which it does not see."""
    torch = pytest.importorskip("torch")
    from torch.fx.experimental.proxy_tensor import make_fx

    family = qp()
    layer = FRONTENDS["torch"]().CvxpyLayer(family.problem, family.parameters, family.variables)
    values, others = (
        [torch.tensor(value) for value in family.batch(np.random.default_rng(seed), 2)] for seed in (0, 1)
    )
    recorded = make_fx(lambda *values: layer(*values))(*values)
    for actual, expected in zip(recorded(*others), layer(*others), strict=True):
        assert_close(actual.numpy(), expected.numpy(), 1e-12)
