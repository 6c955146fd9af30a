"""The derivatives offered by name, for problems whose exact one is zero or jumps."""

import numpy as np
import pytest

from checks import assert_close

ROWS = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 0.5], [0.3, -1.0]])
UPPER = np.array([1.0, 1.2, 0.9, 1.1])


def solve(frontend, q, gradient, P=None):
    A, u = frontend.array(ROWS), frontend.array(UPPER)
    return frontend.module.solve_qp(P, q, A, None, u, gradient=gradient)


def gradient_of_x(frontend, q, gradient, weights, P=None):
    P = None if P is None else frontend.array(P)
    call = frontend.differentiable(lambda q: (solve(frontend, q, gradient, P).x,))
    return call([q], [weights])[1][0]


def test_small_smoothing_gives_the_exact_derivative(frontend, rng):
    q, weights, P = rng.standard_normal((3, 2)), rng.standard_normal((3, 2)), np.eye(2)
    exact = gradient_of_x(frontend, q, "exact", weights, P)
    for gradient in (frontend.module.Smoothed(1e-10), frontend.module.LPGD(1e-6)):
        assert_close(gradient_of_x(frontend, q, gradient, weights, P), exact, 1e-6)


def central_point(q, mu):
    """x of the central path of  minimise q'x  subject to  ROWS x <= UPPER, by Newton on the barrier."""
    x = np.zeros(2)
    for _ in range(200):
        slack = UPPER - ROWS @ x
        gradient = q + ROWS.T @ (mu / slack)
        step = -np.linalg.solve(ROWS.T @ (mu / slack[:, None] ** 2 * ROWS), gradient)
        length = 1.0
        while (UPPER - ROWS @ (x + length * step)).min() <= 0.1 * slack.min():
            length /= 2
        x = x + length * step
    assert np.abs(gradient).max() < 1e-10
    return x


def test_smoothed_is_the_derivative_of_the_central_path(frontend):
    q, weights, direction, mu, h = (
        np.array([-1.0, 0.3]),
        np.array([1.0, -2.0]),
        np.array([0.4, 1.0]),
        0.05,
        1e-5,
    )
    expected = (
        weights @ (central_point(q + h * direction, mu) - central_point(q - h * direction, mu)) / (2 * h)
    )
    gradient = gradient_of_x(frontend, q, frontend.module.Smoothed(mu), weights)
    assert_close(gradient @ direction, expected, 1e-7)
    assert abs(expected) > 1e-2
    assert_close(gradient_of_x(frontend, q, "exact", weights), np.zeros(2), 1e-9)


@pytest.mark.parametrize("name", ["smoothed", "lpgd"])
def test_value_is_the_exact_solution(frontend, name):
    q = frontend.array([-1.0, 0.3])
    x, expected = (frontend.numpy(solve(frontend, q, gradient).x) for gradient in (name, "exact"))
    assert_close(x, expected, 1e-12)


@pytest.mark.parametrize(("name", "learns"), [("exact", False), ("smoothed", True), ("lpgd", True)])
def test_only_an_approximate_gradient_learns_the_cost_of_a_linear_program(frontend, name, learns):
    targets = np.array([[-1.0, 0.3], [0.5, 1.0], [1.0, -0.2]])
    wanted = frontend.numpy(solve(frontend, frontend.array(targets), "exact").x)
    records = {"exact": "exact", "smoothed": frontend.module.Smoothed(0.1), "lpgd": frontend.module.LPGD(1.0)}
    call = frontend.differentiable(lambda q: (solve(frontend, q, records[name]).x,))
    q, x = np.array([[1.0, 1.0], [-1.0, 1.0], [-0.2, -1.0]]), np.zeros_like(wanted)
    for _ in range(30):
        (x,), _ = call([q], [np.zeros_like(x)])
        if np.abs(x - wanted).max() < 1e-6:
            break
        _, (gradient,) = call([q], [x - wanted])
        q = q - gradient
        q = q / np.linalg.norm(q, axis=1, keepdims=True)
    assert (np.abs(x - wanted).max() < 1e-6) == learns


def test_smoothed_has_second_derivatives_and_lpgd_refuses_them(frontend):
    q, P = np.array([[-1.0, 0.3]]), np.eye(2)
    smooth = frontend.module.Smoothed(0.05)
    layer = lambda q: solve(frontend, q, smooth, frontend.array(P)).x
    offset = layer(frontend.array(q))
    assert offset.shape == (1, 2)
    hessian = frontend.transforms.jacfwd(frontend.transforms.jacrev(lambda q: (layer(q) ** 2).sum()))
    assert np.isfinite(frontend.numpy(hessian(frontend.array(q)))).all()
    rough = lambda q: (solve(frontend, q, "lpgd", frontend.array(P)).x ** 2).sum()
    with pytest.raises((RuntimeError, NotImplementedError)):
        frontend.transforms.jacrev(frontend.transforms.jacrev(rough))(frontend.array(q))


def test_what_a_gradient_cannot_do_is_refused(frontend):
    with pytest.raises(ValueError, match="gradient must be one of"):
        solve(frontend, frontend.array([1.0, 1.0]), "smooth")
    module, identity = frontend.module, frontend.array(np.eye(3))
    b, q = frontend.array([0.0, 0.0, 0.0]), frontend.array([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="linear constraints"):
        module.solve_conic(identity, q, identity, b, module.Cones(soc=(3,)), gradient="smoothed")
