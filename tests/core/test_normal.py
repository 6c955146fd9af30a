"""Variables in groups leave the normal matrix without a trace in its inverse, whatever the weights."""

import numpy as np
import pytest

import optlayers.ops.jax as jax_ops
import optlayers.ops.numpy as numpy_ops
import optlayers.ops.torch as torch_ops
import optlayers.ops.torch.host as host
from checks import assert_close
from optlayers.cones import Cones, Groups
from optlayers.linalg.kkt import Problem
from optlayers.linalg.normal import cholesky_solve, others, reduce
from optlayers.linalg.products import constraints, hessian, matvec, whole
from optlayers.solvers.scaling import equilibrate

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

BATCH, FREE, BOUNDED = 3, 4, 31
ARRAYS = {
    "torch": (torch_ops, torch.tensor),
    "torch in NumPy": (host, np.asarray),
    "jax": (jax_ops, jax.numpy.asarray),
}
# Rows of each variable of a kind lie together or apart; rows in no group come first and between.
KINDS = {
    "pairs": (Groups(5, 1, (12, 7)),),
    "exponential": (Groups(4, 1, (), (3, 14)),),
    "both": (Groups(3, 2, (20, 11), (6, 20)),),
    "three": (Groups(5, 3, (25, 18, 13, 5)),),
    "several": (Groups(5, 1, (25, 18)), Groups(2, 3, (6, 4), (3, 11)), Groups(1, 2, (1,), (3, 5))),
}


def system(rng, groups, is_shared):
    """P and A with variables in groups, whole and compact, and the cones."""
    cones = Cones(exp=8, pow=((0.5, 0.5),), groups=groups)
    m, n, own = BOUNDED + cones.rows, FREE + cones.local, () if is_shared else (BATCH,)
    P, A = np.zeros((*own, n, FREE)), np.zeros((*own, m, FREE + cones.width))
    half = rng.standard_normal((*own, FREE, FREE))
    P[..., :FREE, :] = half @ half.swapaxes(-1, -2)
    P[..., FREE:, 0] = rng.random(cones.local)
    A[..., :FREE] = rng.standard_normal((*own, m, FREE))
    whole_A, first = np.zeros((*own, m, n)), FREE
    whole_A[..., :FREE] = A[..., :FREE]
    for group in groups:
        for j in range(group.variables):
            for rows in group.slices(BOUNDED, m):
                numbers = np.arange(m)[rows]
                values = rng.standard_normal((*own, group.count))
                A[..., numbers, FREE + j] = values
                whole_A[..., numbers, first + np.arange(group.count)] = values
            first += group.count
    whole_P = np.concatenate([P, np.zeros((*own, n, n - FREE))], -1)
    whole_P[..., FREE:, :] = P[..., FREE:, :1] * np.eye(n)[FREE:]
    return cones, P, A, whole_P, whole_A


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("groups", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("framework", ARRAYS)
def test_solution(framework, groups, is_shared, rng):
    """With weights of all rows, and with rows of their own for the curved cones."""
    ops, array = ARRAYS[framework]
    cones, P, A, whole_P, whole_A = system(rng, groups, is_shared)
    m, n = whole_A.shape[-2:]
    W, e = 10 ** rng.uniform(-2, 2, (BATCH, m)), 0.1 * np.ones((BATCH, 1))
    r = rng.standard_normal((BATCH, 2, n))
    M = whole_P + e[..., None] * np.eye(n) + whole_A.swapaxes(-1, -2) @ (W[..., None] * whole_A)
    expected = (np.linalg.inv(M) @ r.swapaxes(-1, -2)).swapaxes(-1, -2)
    half = array((np.sqrt(W)[..., None] * A)[:, BOUNDED:])
    for weights, rows in [(W, None), (W[:, :BOUNDED], half)]:
        matrix, local = reduce(ops, cones, array(P), array(A), array(weights), array(e), rows)
        factor = ops.cholesky(ops.add_diagonal(matrix, array(e)))
        found = cholesky_solve(ops, cones, factor, local, array(r))
        assert_close(np.asarray(found), expected, 1e-11)


def test_other_rows():
    groups = KINDS["several"]
    cones = Cones(exp=8, pow=((0.5, 0.5),), groups=groups)
    m = BOUNDED + cones.rows
    taken = np.concatenate([np.arange(m)[rows] for group in groups for rows in group.slices(BOUNDED, m)])
    rest = np.concatenate([np.arange(m)[rows] for rows in others(cones, BOUNDED, m)])
    np.testing.assert_array_equal(np.sort(np.append(taken, rest)), np.arange(m))
    assert not any(rows.start < BOUNDED < rows.stop for rows in others(cones, BOUNDED, m))


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("groups", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("framework", ARRAYS)
def test_products(framework, groups, is_shared, rng):
    """Of compact matrices as of the whole ones, with one vector a problem and with several."""
    ops, array = ARRAYS[framework]
    cones, P, A, *expected = system(rng, groups, is_shared)
    m, n = expected[1].shape[-2:]
    for found, matrix in zip(whole(ops, cones, array(P), array(A)), expected, strict=True):
        assert_close(np.asarray(found), matrix, 0)
    rows, quadratic = constraints(ops, cones, array(A)), hessian(ops, array(P))
    for lead in [(BATCH,), (BATCH, 2)]:
        x, y = rng.standard_normal((*lead, n)), rng.standard_normal((*lead, m))
        whole_P, whole_A = (M if len(lead) == 1 or is_shared else M[:, None] for M in expected)
        assert_close(np.asarray(matvec(rows, array(x))), (whole_A @ x[..., None])[..., 0], 1e-13)
        product = (whole_A.swapaxes(-1, -2) @ y[..., None])[..., 0]
        assert_close(np.asarray(matvec(rows.mT, array(y))), product, 1e-13)
        assert_close(np.asarray(matvec(quadratic, array(x))), (whole_P @ x[..., None])[..., 0], 1e-13)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("groups", KINDS.values(), ids=KINDS)
def test_equilibration(groups, is_shared, rng):
    """Of compact matrices as of the whole ones."""
    cones, P, A, *matrices = system(rng, groups, is_shared)
    m, n = matrices[1].shape[-2:]
    q, b, gap = (rng.standard_normal((BATCH, size)) for size in (n, m, BOUNDED))
    results = []
    for each, *data in [(Cones(exp=8, pow=((0.5, 0.5),)), *matrices), (cones, P, A)]:
        problem = Problem(data[0], q, data[1], b, 0 * gap, abs(gap))
        problem, scaling = equilibrate(numpy_ops, each, problem, 5, False)
        problem = problem._replace(
            **dict(zip("PA", whole(numpy_ops, each, problem.P, problem.A), strict=True))
        )
        results.append([*problem, *scaling])
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected, 1e-13)


@pytest.mark.parametrize("groups", KINDS.values(), ids=KINDS)
def test_residual(groups, rng):
    """With weights that are 1e8 or nothing it is as small as that of a Cholesky factor of all of M."""
    cones, P, A, whole_P, whole_A = system(rng, groups, False)
    (m, n), e = whole_A.shape[-2:], np.full((BATCH, 1), 1e-8)
    W = 1e8 * rng.integers(0, 2, (BATCH, m))
    M = whole_P + e[..., None] * np.eye(n) + whole_A.swapaxes(-1, -2) @ (W[..., None] * whole_A)
    r = (W[:, None] * rng.standard_normal((BATCH, 1, m))) @ whole_A
    matrix, local = reduce(host, cones, P, A, W, e)
    x = cholesky_solve(host, cones, host.cholesky(host.add_diagonal(matrix, e)), local, r)
    size = abs(M).max() * abs(x).max()
    assert_close((x @ M) / size, r / size, 1e-14)


def test_no_cancellation(rng):
    """Where one row of each pair outweighs the other by far, what is left is small, and right to rounding."""
    n, p = 3, 8
    A = -np.ones((2 * p, n + 1))
    A[:, :n] = rng.standard_normal((2 * p, n))
    heavy, light = 10 ** rng.uniform(8, 12, (1, p)), 10 ** rng.uniform(-3, 3, (1, p))
    W, P = np.concatenate([heavy, light], -1), np.zeros((n + p, n))
    cones = Cones(groups=(Groups(p, 1, (2 * p, p)),))
    matrix, _ = reduce(numpy_ops, cones, P, A, W, np.zeros((1, 1)))
    difference = A[:p, :n] - A[p:, :n]
    weight = (heavy * light / (heavy + light))[0]
    expected = difference.T @ (weight[:, None] * difference)
    assert_close(matrix[0] / abs(expected).max(), expected / abs(expected).max(), 1e-14)
