"""Derivatives of first and second order, in every mode, and the refusal of those above `order`."""

import cvxpy as cp
import numpy as np
import pytest


def small_qp(frontend, **options):
    """A layer with parameters P, q, A, b, two variables and three inequalities."""
    P, q = cp.Parameter((2, 2), PSD=True), cp.Parameter(2)
    A, b = cp.Parameter((3, 2)), cp.Parameter(3)
    x = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), [A @ x <= b])
    return frontend.CvxpyLayer(problem, [P, q, A, b], [x], **options)


VALUES = (
    np.array([[2.0, 0.5], [0.5, 1.0]]),
    np.array([-3.0, 1.0]),
    np.array([[1.0, 0.2], [0.3, -1.0], [-1.0, 0.7]]),
    np.array([0.7, 2.0, 3.0]),
)


def batch_of(value):
    """Three problems: with one active row, with another one, and with none."""
    if value.shape == (2,):
        return np.stack([value, [1.0, 5.0], [-0.2, 0.1]])
    return np.stack([value, 1.05 * value, 0.9 * value])


slow_to_compile = pytest.mark.slow_to_compile
BATCHED = [pytest.param("", marks=slow_to_compile), "q", pytest.param("PqAb", marks=slow_to_compile)]


@pytest.mark.parametrize("batched", BATCHED, ids=["single", "shared", "batched"])
def test_derivatives_equal_differences(frontend, batched):
    layer = small_qp(frontend)
    values = [batch_of(v) if name in batched else v for name, v in zip("PqAb", VALUES, strict=True)]
    frontend.check_derivatives(lambda *v: layer(*v)[0], values, order=2)


def test_first_order_layer_has_first_derivatives(frontend):
    layer = small_qp(frontend, order=1)
    frontend.check_derivatives(lambda *v: layer(*v)[0], VALUES, order=1)


@pytest.mark.parametrize("outer", ["jacfwd", "jacrev"])
@pytest.mark.parametrize("inner", ["jacfwd", "jacrev"])
def test_first_order_layer_refuses_second_derivatives(frontend, inner, outer):
    layer = small_qp(frontend, order=1)
    P, q, A, b = map(frontend.array, VALUES)
    first, second = (getattr(frontend.transforms, name) for name in (inner, outer))
    with pytest.raises(NotImplementedError, match="order=2"):
        second(first(lambda q: layer(P, q, A, b)[0]))(q)


def test_second_order_layer_refuses_third_derivatives(frontend):
    layer = small_qp(frontend)
    P, q, A, b = map(frontend.array, VALUES)
    grad = frontend.transforms.grad

    def third(function):
        for _ in range(3):
            function = grad(lambda x, inner=function: inner(x).sum())
        return function

    with pytest.raises(NotImplementedError, match="order=3"):
        third(lambda q: layer(P, q, A, b)[0])(q)
