"""Paired variables leave the normal matrix without a trace in its inverse, whatever the weights."""

import numpy as np
import pytest

import optlayers.ops.jax as jax_ops
import optlayers.ops.numpy as numpy_ops
import optlayers.ops.torch as torch_ops
from checks import assert_close
from optlayers.cones import Cones
from optlayers.linalg.kkt import Problem
from optlayers.linalg.normal import cholesky_solve, own_coefficients, reduce, reduce_single
from optlayers.linalg.products import Compact, compacted, expanded, matvec
from optlayers.solvers.scaling import equilibrate

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

BATCH, FREE, PAIRED, ABOVE, BELOW = 3, 4, 5, 2, 3
ARRAYS = {"torch": (torch_ops, torch.tensor), "jax": (jax_ops, jax.numpy.asarray)}


def system(rng, is_shared):
    """P, A and bounded rows of a program with paired variables, in rows between others."""
    n, own = FREE + PAIRED, () if is_shared else (BATCH,)
    P, A = np.zeros((*own, n, n)), rng.standard_normal((*own, ABOVE + 2 * PAIRED + BELOW, n))
    half = rng.standard_normal((*own, FREE, FREE))
    P[..., :FREE, :FREE] = half @ half.swapaxes(-1, -2)
    each = np.arange(PAIRED)
    P[..., FREE + each, FREE + each] = rng.random(PAIRED)
    coefs = A[..., ABOVE : ABOVE + 2 * PAIRED, FREE:].copy()
    A[..., FREE:] = 0.0
    for start in (0, PAIRED):
        A[..., ABOVE + start + each, FREE + each] = coefs[..., start + each, each]
    return P, A, ABOVE + 2 * PAIRED


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("framework", ARRAYS)
def test_solution(framework, is_shared, rng):
    ops, array = ARRAYS[framework]
    P, A, k = system(rng, is_shared)
    W, e = 10 ** rng.uniform(-2, 2, (BATCH, A.shape[-2])), 0.1 * np.ones((BATCH, 1))
    r = rng.standard_normal((BATCH, 2, FREE + PAIRED))
    compact = compacted(ops, Cones(exp=BELOW // 3, paired=PAIRED), array(A))
    reduced = reduce(ops, PAIRED, FREE, array(P), compact, array(W), array(e), k)
    factor = ops.cholesky(ops.add_diagonal(reduced.matrix, array(e)))
    found = cholesky_solve(ops, factor, reduced.pairs, array(r))
    M = P + e[..., None] * np.eye(FREE + PAIRED) + A.swapaxes(-1, -2) @ (W[..., None] * A)
    assert_close(np.asarray(found), (np.linalg.inv(M) @ r.swapaxes(-1, -2)).swapaxes(-1, -2), 1e-11)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("framework", ARRAYS)
def test_products(framework, is_shared, rng):
    """Of a compact matrix as of the whole one, with one vector a problem and with several."""
    ops, array = ARRAYS[framework]
    A = system(rng, is_shared)[1]
    m, n = A.shape[-2:]
    cones = Cones(exp=BELOW // 3, paired=PAIRED)
    compact = Compact(ops, cones, compacted(ops, cones, array(A)))
    assert compact.matrix.shape == (*A.shape[:-1], FREE + 1)
    assert_close(np.asarray(expanded(ops, cones, compact.matrix)), A, 0)
    for lead in [(BATCH,), (BATCH, 2)]:
        x, y = rng.standard_normal((*lead, n)), rng.standard_normal((*lead, m))
        whole = A if len(lead) == 1 or is_shared else A[:, None]
        expected = (whole @ x[..., None])[..., 0], (whole.swapaxes(-1, -2) @ y[..., None])[..., 0]
        assert_close(np.asarray(matvec(compact, array(x))), expected[0], 1e-13)
        assert_close(np.asarray(matvec(compact.mT, array(y))), expected[1], 1e-13)


@pytest.mark.parametrize("is_shared", [True, False])
def test_equilibration(is_shared, rng):
    """Of a compact matrix as of the whole one."""
    P, A, k = system(rng, is_shared)
    vectors = [rng.standard_normal((BATCH, size)) for size in (A.shape[-1], A.shape[-2], k)]
    q, b, gap = vectors
    scaled = {}
    for paired in (0, PAIRED):
        cones = Cones(exp=BELOW // 3, paired=paired)
        problem = Problem(P, q, compacted(numpy_ops, cones, A), b, 0 * gap, abs(gap))
        problem, scaling = equilibrate(numpy_ops, cones, problem, 5, False)
        scaled[paired] = (*problem._replace(A=0.0), *scaling, problem.A)
    *whole, A = scaled[0]
    *compact, matrix = scaled[PAIRED]
    for a, b in zip(whole, compact, strict=True):
        assert_close(a, b, 1e-13)
    assert_close(expanded(numpy_ops, cones, matrix), A, 1e-13)


@pytest.mark.parametrize("paired", [0, 2])
@pytest.mark.parametrize("framework", ARRAYS)
def test_single_variables(framework, paired, rng):
    """Between other cones, and before paired variables, of which `pairs` has something already."""
    ops, array = ARRAYS[framework]
    cones = Cones(soc=(4,), exp=7, pow=((0.5, 0.5),), single=PAIRED, paired=paired)
    n, s, rows = FREE + PAIRED + paired, PAIRED, slice(4 + 6, 4 + 21)
    A, P = rng.standard_normal((BATCH, cones.rows, n)), np.diag(rng.random(n))
    own = A[:, rows, FREE : FREE + s].reshape(BATCH, s, 3, s)
    A[..., FREE:] = 0.0
    A[:, rows, FREE : FREE + s] = (own * np.eye(s)[:, None]).reshape(BATCH, 3 * s, s)
    e, r = 0.1 * np.ones((BATCH, 1)), rng.standard_normal((BATCH, 1, FREE + s))
    pairs = tuple(array(rng.random((BATCH, paired, *shape))) for shape in [(FREE,), ()]) if paired else ()
    half = own_coefficients(ops, cones, array(A[..., : FREE + s + (paired > 0)]))
    half, pairs = reduce_single(ops, cones, array(P), half, array(e), pairs)
    assert [z.shape[1] for z in pairs] == [s + paired] * 2
    kept = P[:FREE, :FREE] + np.asarray(half).swapaxes(-1, -2) @ np.asarray(half)
    factor = ops.cholesky(ops.add_diagonal(array(kept), array(e)))
    found = cholesky_solve(ops, factor, tuple(z[:, :s] for z in pairs), array(r))
    A, P = A[..., : FREE + s], P[: FREE + s, : FREE + s]
    M = P + e[..., None] * np.eye(FREE + s) + A.swapaxes(-1, -2) @ A
    assert_close(np.asarray(found), (np.linalg.inv(M) @ r.swapaxes(-1, -2)).swapaxes(-1, -2), 1e-11)


def test_no_cancellation(rng):
    """Where one row of each pair outweighs the other by far, what is left is small, and right to rounding."""
    n, p = 3, 8
    A = np.zeros((2 * p, n + p))
    A[:, :n] = rng.standard_normal((2 * p, n))
    A[:p, n:] = A[p:, n:] = -np.eye(p)
    heavy, light = 10 ** rng.uniform(8, 12, (1, p)), 10 ** rng.uniform(-3, 3, (1, p))
    W, P = np.concatenate([heavy, light], -1), np.zeros((n + p, n + p))
    A_compact = compacted(numpy_ops, Cones(paired=p), A)
    matrix, _, _ = reduce(numpy_ops, p, n, P, A_compact, W, 0.0, 2 * p)
    difference = A[:p, :n] - A[p:, :n]
    weight = (heavy * light / (heavy + light))[0]
    expected = difference.T @ (weight[:, None] * difference)
    assert_close(matrix[0] / abs(expected).max(), expected / abs(expected).max(), 1e-14)
