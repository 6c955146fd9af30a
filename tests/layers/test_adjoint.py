"""The first derivative in reverse mode, which torch has written out, is that of the chord step.

With `create_graph=True` gradients are made to be differentiated again, and come from the chord step.
"""

import numpy as np
import pytest

from checks import assert_close
from cone_problems import CONE_FAMILIES
from problems import FAMILIES

torch = pytest.importorskip("torch")

LARGE = 2**22  # numbers: so many are not for NumPy


def assert_same_gradients(outputs, inputs, tolerance=1e-10):
    """Of random weights of the outputs, one by one and all at once."""
    generator = torch.Generator().manual_seed(0)
    outputs = [x for x in outputs if x.requires_grad]
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    for some, their in [([x], [w]) for x, w in zip(outputs, weights, strict=True)] + [(outputs, weights)]:
        options = {"retain_graph": True, "materialize_grads": True}
        gradients = torch.autograd.grad(some, inputs, their, **options)
        chord_step = torch.autograd.grad(some, inputs, their, create_graph=True, **options)
        for found, expected in zip(gradients, chord_step, strict=True):
            size = max(expected.abs().max().item(), 1e-3)
            assert_close(found.detach() / size, expected.detach() / size, tolerance)


def tensors(values):
    return [torch.tensor(np.asarray(value)).requires_grad_() for value in values]


@pytest.mark.parametrize("name", [*FAMILIES, *CONE_FAMILIES])
def test_families(name, rng):
    from optlayers.torch import CvxpyLayer

    family = (FAMILIES | CONE_FAMILIES)[name]()
    inputs = tensors(family.batch(rng, 3))
    layer = CvxpyLayer(
        family.problem, family.parameters, family.variables, gp=getattr(family, "gp", False), order=1
    )
    solution = layer.solve(*inputs)
    assert_same_gradients([*solution.variables, solution.x, solution.s, solution.y], inputs)


def box(rng, batch, shared=()):
    """P, q, A, l, u of quadratic programs with an equality, of which those in `shared` have no batch axis."""
    half, A = rng.standard_normal((batch, 5, 5)), rng.standard_normal((batch, 4, 5))
    q, l = 3 * rng.standard_normal((batch, 5)), -np.ones((batch, 4)) - rng.random((batch, 4))
    u = 0.5 * rng.random((batch, 4))
    l[:, 1] = u[:, 1] = 0.1
    values = [half @ half.swapaxes(-1, -2) + np.eye(5), q, A, l, u]
    return [value[0] if i in shared else value for i, value in enumerate(values)]


@pytest.mark.parametrize("size", [None, LARGE])
@pytest.mark.parametrize("shared", [(), (0, 2), (1, 3, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4)])
def test_shared_data(shared, size, rng, monkeypatch):
    """In NumPy and on tensors; a cotangent of what the batch shares is a sum over it."""
    from optlayers.ops.torch import host
    from optlayers.torch import solve_qp

    if size is not None:
        monkeypatch.setattr(host, "SMALL", 0)
    inputs = tensors(box(rng, 4, shared))
    solution = solve_qp(*inputs, order=1)
    assert_same_gradients(solution[:3], inputs)


def test_float32(rng):
    from optlayers.torch import solve_qp

    inputs = [x.detach().float().requires_grad_() for x in tensors(box(rng, 4))]
    assert_same_gradients(solve_qp(*inputs, order=1)[:3], inputs, 1e-5)


@pytest.mark.parametrize("policy", ["mask", "ignore"])
def test_failed_problems(policy, rng):
    """Infeasible, and not finite."""
    from optlayers.torch import solve_qp

    values = box(rng, 4)
    values[3][1, 2] = values[4][1, 2] + 1.0
    values[1][2, 0] = np.nan
    inputs = tensors(values)
    solution = solve_qp(*inputs, order=1, on_failure=policy)
    assert [int(code) for code in solution.status > 0] == [0, 1, 1, 0]
    assert_same_gradients([solution.x, solution.y], inputs)


def test_solutions_that_are_not_unique(rng):
    """A linear program with a face of solutions, and a row twice."""
    from optlayers.torch import solve_qp

    A = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    inputs = tensors([np.array([-1.0, -1.0]), A.numpy(), np.zeros(4), np.ones((3, 4))])
    solution = solve_qp(None, *inputs, order=1)
    assert not solution.regularity.x.any() or not solution.regularity.y.any()
    assert_same_gradients([solution.x, solution.y], inputs, 2e-5)  # rounding is amplified by e^-2


def test_cotangents_with_tangents_take_the_chord_step(rng):
    """NumPy would lose them in silence."""
    from torch.autograd import forward_ad

    from optlayers.torch import solve_qp

    inputs = tensors(box(rng, 2))
    x = solve_qp(*inputs, order=1).x
    direction = torch.ones_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.zeros_like(x), direction)
        (gradient,) = torch.autograd.grad(x, inputs[1], dual, retain_graph=True)
        tangent = forward_ad.unpack_dual(gradient).tangent
    (expected,) = torch.autograd.grad(x, inputs[1], direction)
    assert_close(tangent, expected, 1e-12)


def test_it_is_used(rng, monkeypatch):
    from optlayers.layers import conic_derivative
    from optlayers.torch import solve_qp

    inputs = tensors(box(rng, 2))
    monkeypatch.delattr(conic_derivative, "attach")
    gradients = torch.autograd.grad(solve_qp(*inputs, order=1).x.sum(), inputs)
    assert all(gradient.any() for gradient in gradients)
