"""Control paths: through what is observed, with the right derivatives, and the equations that they drive."""

import numpy as np
import pytest
from scipy.interpolate import CubicSpline
from scipy.linalg import expm

from checks import assert_close


def observations(rng):
    """Times of samples of different lengths, and values of which a third is missing."""
    t = np.sort(rng.uniform(0, 4, (3, 9)), 1)
    x = np.where(rng.uniform(size=(3, 9, 2)) < 0.3, np.nan, rng.standard_normal((3, 9, 2)))
    x[2, :2, 0] = x[0, -2:, 1] = np.nan
    t[1, 6:] = np.nan
    return t, x


def evaluate(frontend, X, times, derivative=False):
    """(B, M, channels) at times (B, M)."""
    call = X.derivative if derivative else X.evaluate
    return np.stack([frontend.numpy(call(frontend.array(column))) for column in times.T], 1)


@pytest.mark.parametrize("kind", ["linear", "rectilinear", "hermite", "natural"])
def test_path_meets_what_is_observed(frontend, rng, kind):
    t, x = observations(rng)
    X = frontend.module.control_path(frontend.array(t), frontend.array(x), kind)
    values = evaluate(frontend, X, np.where(np.isnan(t), t[:, :1], t))
    assert_close(values[..., 0][~np.isnan(t)], t[~np.isnan(t)], 1e-12)
    observed = ~np.isnan(x) & ~np.isnan(t)[..., None]
    assert_close(values[..., 1:][observed], x[observed], 1e-12)
    at, h = t[:, :1] + 0.3, 1e-6
    difference = (evaluate(frontend, X, at + h) - evaluate(frontend, X, at - h)) / (2 * h)
    assert_close(evaluate(frontend, X, at, derivative=True), difference, 1e-7)


def test_natural_spline_equals_that_of_scipy(frontend, rng):
    t, x = observations(rng)
    X = frontend.module.control_path(frontend.array(t), frontend.array(x), "natural", with_time=False)
    for b, c in np.ndindex(3, 2):
        seen = ~np.isnan(x[b, :, c]) & ~np.isnan(t[b])
        spline = CubicSpline(t[b, seen], x[b, seen, c], bc_type="natural")
        times = np.linspace(*t[b, seen][[0, -1]], 7)[:-1] * np.ones((3, 1))
        for order in (0, 1):
            actual = evaluate(frontend, X, times, derivative=order == 1)[b, :, c]
            assert_close(actual, spline(times[0], order), 1e-10)


def test_linear_controlled_equation(frontend):
    """dz = A z dX along a line is z(1) = exp(A (X(1) - X(0))) z(0)."""
    A, x = np.array([[0.0, 1.0], [-1.0, 0.2]]), np.array([[[0.0], [2.0]], [[1.0], [0.5]]])
    X = frontend.module.control_path(frontend.array([0.0, 1.0]), frontend.array(x), "linear", with_time=False)
    z0 = np.array([[1.0, 0.0], [0.3, -1.0]])
    vector = lambda z: (z @ frontend.array(A.T))[..., None]
    f = (lambda t, z: vector(z)) if frontend.name == "torch" else (lambda z, t: vector(z))
    z = frontend.numpy(frontend.module.cdeint(f, frontend.array(z0), X, rtol=1e-9, atol=1e-10))
    expected = np.stack([expm(A * (x[b, 1, 0] - x[b, 0, 0])) @ z0[b] for b in range(2)])
    assert_close(z[:, -1], expected, 1e-7)


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("kind", ["linear", "rectilinear"])
def test_steps_end_where_the_derivative_jumps(frontend, rng, kind):
    """dz = z dX is z = exp(X - X(0)), by half the steps of a solve that does not know of the corners."""
    t, x = observations(rng)
    x = np.nan_to_num(x[..., :1])
    X = frontend.module.control_path(frontend.array(t), frontend.array(x), kind, with_time=False)
    f = lambda *args: frontend.xp.stack([args[0 if frontend.name == "jax" else 1]], -1)

    def solve(**options):
        options |= {"rtol": 1e-6, "atol": 1e-6, "return_info": True}
        z, info = frontend.module.cdeint(f, frontend.array(np.ones((3, 1))), X, **options)
        return frontend.numpy(z)[:, 1], frontend.numpy(info.steps + info.rejected)

    (z, steps), (_, steps_unaware) = solve(), solve(adjoint=frontend.module.Continuous())
    last = np.sum(np.isfinite(t), 1) - 1
    assert_close(z, np.exp(np.stack([x[b, last[b]] - x[b, 0] for b in range(3)])), 1e-5)
    assert (2 * steps < steps_unaware).all()
