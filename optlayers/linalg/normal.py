"""The matrix M = P + r I + A'WA of the linear systems of all solvers, with diagonal weights W >= 0.

Of n variables the last p may be paired (see `Cones`); these are eliminated first. Such a variable e stands in
two rows, with coefficients a_1 and a_2 beside g_1 and g_2 of the other variables x. In M it meets itself with
d = a_1^2 w_1 + a_2^2 w_2 + r, r here with its entry of P, and the others with c = a_1 w_1 g_1 + a_2 w_2 g_2.
As it follows x by e = -c'x / d, its first row becomes

    h_1 = g_1 - a_1 c / d = ((a_2^2 w_2 + r) g_1 - a_1 a_2 w_2 g_2) / d

and the second one likewise, a form without cancellation. With these rows in H, all others being those of A,
P + r I + G'WH is left of M, of n - p variables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..cones import Cones
from ..ops import Array, Ops


class Reduced(NamedTuple):
    """What the elimination leaves, and the way back.

    Attributes:
        matrix: P + G'WH without r (B, n - p, n - p).
        rows: H (B, m, n - p).
        pairs: c / d (B, p, n - p) and 1 / d (B, p); nothing where p = 0.
    """

    matrix: Array
    rows: Array
    pairs: tuple[Array, ...]


def batched(matrix: Array) -> Array:
    """The matrix (k, n) or (B, k, n) with a batch axis; JAX can be told to insist on it."""
    return matrix[None] if matrix.ndim == 2 else matrix


def reduce(ops: Ops, cones: Cones, P: Array, A: Array, W: Array, r: Array | float, k: int) -> Reduced:
    """The elimination of the paired variables from M, for weights W (B, m) of which k are of bounded rows."""
    p = cones.paired
    if not p:
        return Reduced(batched(P) + gram(ops, A, W), batched(A), ())
    P, A, n = batched(P), batched(A), P.shape[-1] - p
    G, first, second = A[..., :n], slice(k - 2 * p, k - p), slice(k - p, k)
    a_1, a_2 = (ops.diagonal(A[..., rows, n:]) for rows in (first, second))
    f_1, f_2 = a_1 * W[:, first], a_2 * W[:, second]
    ridge = ops.diagonal(P)[..., n:] + r
    inverse = 1 / (a_1 * f_1 + a_2 * f_2 + ridge)
    scale = lambda factor, rows: (inverse * factor)[..., None] * G[..., rows, :]
    H = [
        G[..., : k - 2 * p, :],
        scale(a_2 * f_2 + ridge, first) - scale(a_1 * f_2, second),
        scale(a_1 * f_1 + ridge, second) - scale(a_2 * f_1, first),
        G[..., k:, :],
    ]
    H = ops.concat([ops.broadcast_to(rows, (W.shape[0], *rows.shape[-2:])) for rows in H], -2)
    coupling = scale(f_1, first) + scale(f_2, second)
    return Reduced(P[..., :n, :n] + G.mT @ (W[..., None] * H), H, (coupling, inverse))


def shapes(cones: Cones, n: int) -> list[tuple[int, ...]]:
    """Shapes of the Cholesky factor of what is left, and of `pairs`, without the batch axis."""
    p = cones.paired
    return [(n - p, n - p)] + [(p, n - p), (p,)] * (p > 0)


def solve_reduced(ops: Ops, pairs: tuple[Array, ...], invert: Callable[[Array], Array], r: Array) -> Array:
    """M^-1 r for rows r (B, k, n), given the inverse of what is left of M as a map of such rows."""
    if not pairs:
        return invert(r)
    coupling, inverse = pairs
    n = coupling.shape[-1]
    rest, own = r[..., :n], r[..., n:]
    x = invert(rest - own @ coupling)
    return ops.concat([x, inverse[:, None] * own - x @ coupling.mT], -1)


def cholesky_solve(ops: Ops, cholesky: Array, pairs: tuple[Array, ...], r: Array) -> Array:
    """As `solve_reduced`, from the Cholesky factor of what is left."""
    return solve_reduced(ops, pairs, lambda rows: ops.cholesky_solve(cholesky, rows.mT).mT, r)


def gram(ops: Ops, A: Array, weights: Array) -> Array:
    """A' diag(weights) A (B, n, n) for A (m, n) or (B, m, n) and weights (B, m) >= 0."""
    m, n = A.shape[-2:]
    if A.ndim == 3 or n > weights.shape[0]:
        half = ops.sqrt(weights)[..., None] * (A if A.ndim == 3 else A[None])
        return half.mT @ half  # of which NumPy computes one triangle
    # One product for the whole batch, with less memory than A weighted for each problem.
    products = ops.reshape(A[:, :, None] * A[:, None, :], (m, n * n))
    return ops.reshape(weights @ products, (weights.shape[0], n, n))
