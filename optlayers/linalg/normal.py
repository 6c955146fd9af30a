"""The matrix M = P + r I + A'WA of the linear systems of all solvers, with diagonal weights W >= 0.

Of n variables the last p may be paired (see `Cones`); these are eliminated first. Such a variable e stands in
two rows, with coefficients a_1 and a_2 beside g_1 and g_2 of the other variables x. In M it meets itself with
d = a_1^2 w_1 + a_2^2 w_2 + r, r here with its entry of P, and the others with c = a_1 w_1 g_1 + a_2 w_2 g_2.
As it follows x by e = -c'x / d, its first row becomes

    h_1 = g_1 - a_1 c / d = ((a_2^2 w_2 + r) g_1 - a_1 a_2 w_2 g_2) / d

and the second one likewise, a form without cancellation. With these rows in H, all others being those of A,
P + r I + G'WH is left of M, of n - p variables.

Single variables stand in one exponential cone each, whose part of M is H'H with rows H. Beside the columns of
the other variables such a row has its own coefficient; with a (3,) of those of a cone, q = a'a + r and
c = H'a, what is left of its part is that of the rows H - a c' / (q + sqrt(q r)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..cones import Cones
from ..ops import Array, Ops
from .products import batched


class Reduced(NamedTuple):
    """What the elimination leaves of n other variables, and the way back.

    Attributes:
        matrix: P + G'WH without r (B, n, n).
        rows: H (B, m, n).
        pairs: c / d (B, p, n) and 1 / d (B, p); nothing where p = 0.
    """

    matrix: Array
    rows: Array
    pairs: tuple[Array, ...]


def reduce(ops: Ops, p: int, n: int, P: Array, A: Array, W: Array, r: Array | float, k: int) -> Reduced:
    """The elimination of the last p variables, which are paired, from M, of which the first n are kept.

    W (B, m) are the weights, k of them those of bounded rows, which no others than these n + p stand in. A is
    compact, see `optlayers.linalg.products`.
    """
    if not p:
        return Reduced(batched(P)[..., :n, :n] + gram(ops, A[..., :n], W), batched(A), ())
    P, A = batched(P), batched(A)
    G, first, second = A[..., :n], slice(k - 2 * p, k - p), slice(k - p, k)
    a_1, a_2 = A[..., first, -1], A[..., second, -1]
    f_1, f_2 = a_1 * W[:, first], a_2 * W[:, second]
    ridge = ops.diagonal(P)[..., -p:] + r
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


def _single_rows(cones: Cones) -> tuple[int, int]:
    """First and last but one of the rows of curved cones that single variables stand in."""
    stop = cones.rows - sum(len(weights) + 1 for weights in cones.pow)
    return stop - 3 * cones.single, stop


def own_coefficients(ops: Ops, cones: Cones, A: Array) -> Array:
    """Rows (B, m, n') of curved cones without eliminated columns, whose coefficients are in a last one."""
    s, n = cones.single, A.shape[-1] - (cones.paired > 0) - cones.single
    if not s:
        return A[..., :n]
    start, stop = _single_rows(cones)
    own = [ops.diagonal(A[..., start + i : stop : 3, n : n + s]) for i in range(3)]
    own = ops.reshape(ops.stack(own, -1), (-1, 3 * s, 1))
    column = ops.concat([0 * A[..., :start, :1], own, 0 * A[..., stop:, :1]], -2)
    return ops.concat([A[..., :n], column], -1)


def reduce_single(
    ops: Ops, cones: Cones, P: Array, half: Array, r: Array, pairs: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """The elimination of the single variables from rows H with their coefficients, see `own_coefficients`.

    Returns:
        The rows (B, m, n) of what is left, and `pairs` with those of single variables in front.
    """
    s, n = cones.single, half.shape[-1] - 1
    if not s:
        return half, pairs
    start, stop = _single_rows(cones)
    parts = ops.reshape(half[:, start:stop], (-1, s, 3, n + 1))
    H, a = parts[..., :n], parts[..., n:]
    ridge = (ops.diagonal(batched(P))[..., n : n + s] + r)[..., None, None]
    q = a.mT @ a + ridge
    root = ops.eye(3, a)[None, None] - a @ a.mT / (q + ops.sqrt(q * ridge))
    product = ops.concat([root, a.mT], -2) @ H
    rows = [half[:, :start, :n], ops.reshape(product[:, :, :3], (-1, 3 * s, n)), half[:, stop:, :n]]
    new = product[:, :, 3] / q[..., 0], 1 / q[..., 0, 0]
    pairs = tuple(ops.concat(both, 1) for both in zip(new, pairs, strict=True)) if pairs else new
    return ops.concat(rows, 1), pairs


def shapes(cones: Cones, n: int) -> list[tuple[int, ...]]:
    """Shapes of the Cholesky factor of what is left, and of `pairs`, without the batch axis."""
    p = cones.paired + cones.single
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
