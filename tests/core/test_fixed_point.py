"""Fixed-point solvers: convergence where it is due, and each sample of a batch by itself."""

import importlib

import numpy as np
import pytest

from checks import assert_close
from optlayers.linalg.gmres import gmres
from optlayers.solvers.fixed_point import (
    Anderson,
    Broyden,
    NewtonKrylov,
    Picard,
    Problem,
    inverse_product,
)
from optlayers.solvers.fixed_point import run as run_eagerly
from optlayers.status import Status

SOLVERS = [Picard(), Picard(0.7), Anderson(), Anderson(3, damping=0.5), Broyden(), NewtonKrylov()]
SOLVED, LIMIT, NON_FINITE = (s.code for s in (Status.SOLVED, Status.ITERATION_LIMIT, Status.NON_FINITE))


def array(ops, x):
    if ops.__name__.endswith("torch"):
        import torch

        return torch.from_numpy(np.array(x))
    import jax

    return jax.numpy.asarray(x)


def compiled(ops, function):
    """`function()`; in JAX as one program, else every operation of every test would be compiled by itself."""
    return function() if ops.__name__.endswith("torch") else importlib.import_module("jax").jit(function)()


def run(ops, *args):
    return compiled(ops, lambda: run_eagerly(ops, *args))


def affine(ops, A, b):
    """z to A z + b, sample by sample, for A (B, k, k) and b (B, k)."""
    A, b = array(ops, A), array(ops, b)
    times = lambda z: (A @ z[..., None])[..., 0]
    return Problem(lambda z: times(z) + b, lambda z: times)


def contraction(rng, norm, batch=3, k=6):
    A = rng.standard_normal((batch, k, k))
    return norm * A / np.linalg.norm(A, 2, axis=(1, 2), keepdims=True), rng.standard_normal((batch, k))


def solve_directly(A, b):
    return np.linalg.solve(np.eye(b.shape[1]) - A, b[..., None])[..., 0]


def numpy(x):
    return np.asarray(x)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_contraction(ops, rng, solver):
    A, b = contraction(rng, 0.7)
    result = run(ops, solver, affine(ops, A, b), array(ops, 0 * b), 1e-12, 200, (), True)
    assert (numpy(result.status) == SOLVED).all()
    assert_close(numpy(result.z), solve_directly(A, b), 1e-11)
    assert (numpy(result.residual) <= 1e-12).all()
    steps, history = numpy(result.iterations), numpy(result.history)
    assert history.shape == (3, 200)
    for i, n in enumerate(steps):
        assert (history[i, : n - 1] > 1e-12).all() and history[i, n - 1] <= 1e-12
        assert (history[i, n - 1 :] == history[i, n - 1]).all()


@pytest.mark.parametrize("solver", [Anderson(6), Broyden(), NewtonKrylov()], ids=repr)
def test_converges_where_picard_diverges(ops, rng, solver):
    """Eigenvalues of A at -3 to -1.5 and 2 to 4."""
    basis = np.linalg.qr(rng.standard_normal((2, 6, 6)))[0]
    A = basis @ (np.array([-3, -2, -1.5, 2, 3, 4.0])[:, None] * np.swapaxes(basis, 1, 2))
    b = rng.standard_normal((2, 6))
    picard = run(ops, Picard(), affine(ops, A, b), array(ops, 0 * b), 1e-10, 60)
    assert (numpy(picard.status) == LIMIT).all()
    result = run(ops, solver, affine(ops, A, b), array(ops, 0 * b), 1e-10, 60)
    assert (numpy(result.status) == SOLVED).all()
    assert_close(numpy(result.z), solve_directly(A, b), 1e-9)


def test_broyden_fulfils_the_secant_equation(ops, rng):
    """After a step s that changed g by y, H y = s; and the transpose is one."""
    (A, b), solver = contraction(rng, 0.9), Broyden()
    problem, running = affine(ops, A, b), array(ops, np.ones(3, bool))

    def steps():
        z, path = array(ops, 0 * b), []
        state = solver.init(ops, z, problem.value(z) - z)
        for k in range(4):
            g = problem.value(z) - z
            new, state = solver.step(ops, problem, k, z, g, state, running)
            path, z = [*path, (z, g)], new
        (z, g), (z_last, g_last) = path[-1], path[-2]
        H = lambda x: inverse_product(ops, state.U, state.V, 4, x)
        transpose = inverse_product(ops, state.V, state.U, 4, z)
        return H(g - g_last), z - z_last, ops.sum(transpose * g, 1), ops.sum(z * H(g), 1)

    actual, expected, left, right = map(numpy, compiled(ops, steps))
    assert_close(actual, expected, 1e-12)
    assert_close(left, right, 1e-12)


def test_broyden_restarts(ops, rng):
    A, b = contraction(rng, 0.9, k=12)
    result = run(ops, Broyden(memory=4), affine(ops, A, b), array(ops, 0 * b), 1e-10, 200)
    assert (numpy(result.status) == SOLVED).all()
    assert (numpy(result.iterations) > 5).all()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_divergent_sample_leaves_the_others_as_they_are(ops, rng, solver):
    """Sample 1 squares itself to infinity; with another sample in its place the others are bit-identical."""
    A, b = contraction(rng, 0.5)

    def solve(power):
        linear, curved = affine(ops, A, b), array(ops, np.array([[0.0], [power], [0.0]]))
        value = lambda z: linear.value(z) + curved * z * z
        tangent = lambda z: lambda d: linear.tangent(z)(d) + 2 * curved * z * d
        z0 = 0 * b
        z0[1] = power
        return run(ops, solver, Problem(value, tangent), array(ops, z0), 1e-10, 60)

    good, bad = solve(0.0), solve(1e155)
    assert numpy(bad.status).tolist() == [SOLVED, NON_FINITE, SOLVED]
    assert np.isfinite(numpy(bad.z)).all()
    for a, c in zip(good[:5], bad[:5], strict=True):
        assert (numpy(a)[[0, 2]] == numpy(c)[[0, 2]]).all()


def test_non_finite_data(ops, rng):
    A, b = contraction(rng, 0.5)
    b[2, 1] = np.nan
    result = run(ops, Anderson(), affine(ops, A, b), array(ops, np.zeros_like(b)), 1e-10, 50)
    assert numpy(result.status).tolist() == [SOLVED, SOLVED, NON_FINITE]
    assert numpy(result.iterations)[2] == 0 and np.isinf(numpy(result.residual)[2])


def test_iteration_limit_returns_the_best_iterate(ops):
    """z to -1.1 z + 2.1: each step is farther away than the one before."""
    b = np.array([[2.1]])
    result = run(ops, Picard(), affine(ops, [[[-1.1]]], b), array(ops, np.array([[0.9]])), 1e-10, 8)
    assert numpy(result.status).tolist() == [LIMIT] and numpy(result.iterations).tolist() == [8]
    assert_close(numpy(result.residual), [0.21 / 1.11], 1e-12)
    assert_close(numpy(result.z), [[0.9]], 1e-12)


def test_singular_anderson_system_takes_a_plain_step(ops, rng):
    """Two equal differences of the residual: without regularisation the normal equations are singular."""
    solver, z = Anderson(2, regularization=0.0), rng.standard_normal((2, 3))
    same = np.ones((2, 2, 3))
    same[1, 1] = [1.0, -1.0, 2.0]  # the second sample's equations are regular
    gram = same @ np.swapaxes(same, 1, 2)
    state = solver.init(ops, array(ops, z), array(ops, -z))._replace(
        dG=array(ops, same), steps=array(ops, same), gram=array(ops, gram)
    )
    g = array(ops, 1 - z)  # g has changed by 1: the row that is written again stays as it is
    step = lambda: solver.step(ops, None, 1, array(ops, z), g, state, None)[0]
    new = numpy(compiled(ops, step))
    assert_close(new[0], np.ones(3), 1e-15)
    assert np.isfinite(new[1]).all() and np.abs(new[1] - 1).max() > 1e-3


def test_anderson_on_a_map_of_one_dimension(ops):
    """From the second difference on all are parallel, so that the normal equations are singular."""
    A, b = np.array([[[0.9]]]), np.array([[1.0]])
    result = run(ops, Anderson(), affine(ops, A, b), array(ops, 0 * b), 1e-12, 50)
    assert numpy(result.iterations).max() <= 4
    assert_close(numpy(result.z), [[10.0]], 1e-11)


def test_zero_right_hand_side_is_solved_at_once(ops):
    A = 0.5 * np.eye(3)[None]
    result = run(ops, Anderson(), affine(ops, A, np.zeros((1, 3))), array(ops, np.zeros((1, 3))), 1e-10, 50)
    assert numpy(result.iterations).tolist() == [0] and numpy(result.status).tolist() == [SOLVED]


@pytest.mark.parametrize("k", [2, 7])
def test_gmres_solves_a_skew_system(ops, rng, k):
    """x'Ax = 0 for every x, where methods that minimise along the residual never move."""
    A = rng.standard_normal((2, k, k))
    A = A - np.swapaxes(A, 1, 2) + (1e-2 * np.eye(k) if k % 2 else 0)
    b = rng.standard_normal((2, k))
    At = array(ops, A)
    times = lambda d: (At @ d[..., None])[..., 0]
    x = compiled(ops, lambda: gmres(ops, times, array(ops, b), k, 1e-14))
    expected = np.linalg.solve(A, b[..., None])[..., 0]
    assert_close(numpy(x), expected, 1e-9)
