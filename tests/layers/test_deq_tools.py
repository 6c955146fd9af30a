"""What users of equilibrium layers need besides: each against what it stands for, by other means."""

import numpy as np
import pytest

from checks import assert_close
from optlayers.status import Status

TIGHT = {"tol": 1e-13, "max_iter": 100}


def cell_of(frontend, A):
    return lambda z, x: frontend.xp.tanh(z @ A.mT + x)


def data(frontend, rng, batch=3, k=4):
    A = rng.standard_normal((k, k))
    return [frontend.array(v) for v in (0.7 * A / np.linalg.norm(A, 2), rng.standard_normal((batch, k)))]


def jitted(frontend, function):
    return frontend.framework.jit(function) if frontend.name == "jax" else function


def with_noise(frontend):
    """The source of randomness that a function of the frontend takes, under its name."""
    if frontend.name == "jax":
        return {"key": frontend.framework.random.key(0)}
    return {"generator": frontend.framework.Generator().manual_seed(0)}


def jacobians(A, z, x):
    """df/dz (B, k, k) of the cell, in NumPy."""
    return (1 - np.tanh(z @ A.T + x) ** 2)[:, :, None] * A


def test_trajectory_holds_the_iterates(frontend, rng):
    """Recorded steps are those of solves that end there; beyond the last step it is the solution."""
    A, x = data(frontend, rng)
    picard = frontend.module.Picard()

    def solve(A, x):
        deq = frontend.module.DEQ(cell_of(frontend, A), solver=picard, record=(1, 3, 100), **TIGHT)
        z, info = deq.solve(x)
        return z, info.trajectory

    z, trajectory = jitted(frontend, solve)(A, x)
    cell, expected = cell_of(frontend, A), [0 * x]
    for _ in range(4):
        expected.append(cell(expected[-1], x))
    for actual, wanted in zip(trajectory, (expected[2], expected[4], z), strict=True):
        assert_close(frontend.numpy(actual), frontend.numpy(wanted), 1e-12)


def test_trajectory_has_the_derivative_of_one_application(frontend, rng):
    A, x = (frontend.numpy(v) for v in data(frontend, rng))
    z = np.tanh(np.tanh(x) @ A.T + x)  # Picard, two steps from zero
    cotangent = rng.standard_normal(x.shape)

    def recorded(A, x):
        deq = frontend.module.DEQ(cell_of(frontend, A), solver=frontend.module.Picard(), record=(2,), **TIGHT)
        return (deq.solve(x)[1].trajectory[0],)

    _, actual = frontend.differentiable(recorded)([A, x], [cotangent])
    _, expected = frontend.differentiable(lambda A, x: (cell_of(frontend, A)(frontend.array(z), x),))(
        [A, x], [cotangent]
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12)


def test_record_beyond_the_last_step_is_refused(frontend):
    with pytest.raises(ValueError, match="record"):
        frontend.module.DEQ(lambda z, x: x, max_iter=5, record=(6,))


def test_unrolling_is_the_iteration(frontend, rng):
    A, x = (frontend.numpy(v) for v in data(frontend, rng))
    cotangent = rng.standard_normal(x.shape)

    def iterated(A, x):
        z = 0 * x
        for _ in range(3):
            z = cell_of(frontend, A)(z, x)
        return (z,)

    deq = lambda A: frontend.module.DEQ(cell_of(frontend, A))
    actual = frontend.differentiable(lambda A, x: (deq(A)(x, unroll=3),))([A, x], [cotangent])
    expected = frontend.differentiable(iterated)([A, x], [cotangent])
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_close(a, e, 1e-13)


def test_unrolling_reports_the_last_change(frontend, rng):
    A, x = data(frontend, rng)
    _, info = frontend.module.DEQ(cell_of(frontend, A)).solve(x, unroll=2)
    first = np.tanh(frontend.numpy(x))
    second = np.tanh(first @ frontend.numpy(A).T + frontend.numpy(x))
    expected = np.linalg.norm(second - first, axis=1) / np.linalg.norm(second, axis=1)
    assert_close(frontend.numpy(info.residual), expected, 1e-12)
    assert (frontend.numpy(info.status) == Status.ITERATION_LIMIT.code).all()
    assert (frontend.numpy(info.iterations) == 2).all()


def test_jacobian_norm(frontend, rng):
    """The mean of many probes is |A|_F^2 / k; its relative deviation is at most sqrt(2 / probes)."""
    A, x = data(frontend, rng)
    z = 0.5 * x
    norm = jitted(
        frontend,
        lambda A: frontend.module.jacobian_norm(
            cell_of(frontend, A), z, x, probes=400, **with_noise(frontend)
        ),
    )
    J = jacobians(*map(frontend.numpy, (A, z, x)))
    ratio = frontend.numpy(norm(A)) / ((J**2).sum((1, 2)) / 4)
    assert np.abs(ratio - 1).max() < 4 * (2 / 400) ** 0.5


def test_derivative_of_the_jacobian_norm(frontend, rng):
    A, x = (frontend.numpy(v) for v in data(frontend, rng))
    weights, direction = rng.standard_normal(3), rng.standard_normal((4, 4))

    def norm(A):
        cell, z = cell_of(frontend, A), frontend.array(0.5 * x)
        return (frontend.module.jacobian_norm(cell, z, frontend.array(x), **with_noise(frontend)),)

    evaluate = frontend.differentiable(norm)
    _, (gradient,) = evaluate([A], [weights])
    ahead, behind = (evaluate([A + h * direction], [weights])[0][0] for h in (1e-6, -1e-6))
    assert_close((gradient * direction).sum(), weights @ (ahead - behind) / 2e-6, 1e-7)


@pytest.mark.parametrize("kind", ["symmetric", "rotation"])
def test_spectral_radius(frontend, rng, kind):
    """Of a linear map with a real largest eigenvalue, and with a complex pair of them."""
    if kind == "symmetric":
        basis = np.linalg.qr(rng.standard_normal((4, 4)))[0]
        A = basis @ np.diag([0.9, 0.4, -0.3, 0.1]) @ basis.T
    else:
        A = np.zeros((4, 4))
        A[:2, :2] = 0.8 * np.array([[np.cos(1), np.sin(1)], [-np.sin(1), np.cos(1)]])
        A[2:, 2:] = np.diag([0.3, -0.2])
    matrix, z = frontend.array(A), frontend.array(rng.standard_normal((3, 4)))
    radius = jitted(
        frontend,
        lambda z: frontend.module.spectral_radius(lambda z: z @ matrix.mT, z, **with_noise(frontend)),
    )
    assert_close(frontend.numpy(radius(z)), np.full(3, np.abs(np.linalg.eigvals(A)).max()), 1e-6)


def test_small_cotangents_keep_their_digits(frontend, rng):
    """In single precision the squares of numbers of size 1e-25 vanish."""
    A, x = (frontend.numpy(v) for v in data(frontend, rng))
    z = lambda A, x: (frontend.module.fixed_point(lambda z: z @ A.mT + x, 0 * x, max_iter=100),)
    cotangent = rng.standard_normal(x.shape)
    gradient = frontend.differentiable(z, "float32")
    _, (_, small) = gradient([A, x], [1e-25 * cotangent])
    _, (_, usual) = gradient([A, x], [cotangent])
    assert_close(1e25 * small.astype(float), usual.astype(float), 1e-4)


def test_solution_zero_is_found(frontend):
    """Where z = 0 no step makes a relative residual small."""
    z, info = frontend.module.fixed_point(
        lambda z: 0.5 * z, frontend.array(np.ones((2, 3))), return_info=True
    )
    assert (frontend.numpy(info.status) == Status.SOLVED.code).all()
    assert np.abs(frontend.numpy(z)).max() < 1e-10


def test_convergence_plot(frontend, rng):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    A, x = data(frontend, rng)
    _, info = frontend.module.DEQ(
        cell_of(frontend, A), solver=frontend.module.Picard(), max_iter=6, on_failure="ignore"
    ).solve(x)
    axes = frontend.module.plot_convergence(info, label="Picard")
    median, crosses = axes.get_lines()
    assert_close(median.get_ydata(), np.median(frontend.numpy(info.history), axis=0), 1e-15)
    assert_close(crosses.get_ydata(), frontend.numpy(info.residual), 1e-15)
    pyplot.close(axes.figure)
