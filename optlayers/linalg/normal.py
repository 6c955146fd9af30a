"""The matrix M = P + r I + A'WA of the linear systems of all solvers, with diagonal weights W >= 0.

Variables in groups (see `optlayers.cones.Groups`) are eliminated first, one of each group at a time. With the
rows of a group in sqrt(W) A, its variable meets itself in M with q = a'a + r, r here with its entry of P, and
the others, whose columns are in H, with c = H'a. What is left of H'H is that of the rows

    H - a c' / (q + sqrt(q r)),

a form without cancellation. At last P + r I + H'H is left of M, of the variables in no group, with all other
rows in H besides. Of curved cones, whose part of M is no A'WA, rows H are given of which it is H'H.

Each step leaves 1 / q in D and z = c / q, whose entries of variables of the same group are a row of T,
triangular with a unit diagonal. Variables e of the groups then follow the others by

    e = T^-1 (D T^-T r_e - z x),      with the right-hand side  r_x - z'T^-T r_e  for x.

Substitution with T, and no inverse of the block of a group, leaves residuals as small as a Cholesky factor of
all of M does, where weights are 1e8 times those of others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..cones import Cones
from ..ops import Array, Ops
from .products import batched, split_hessian, variables


class Reduced(NamedTuple):
    """What the elimination leaves of M, of n variables in no group, and the way back to p in groups.

    Attributes:
        matrix: what is left, but for r (B, n, n).
        local: z (B, p, n) and D (B, p), and T, where groups have more than one variable: what each has in the
            column of the first one of its group, of the second and so on (B, w - 1, p). Nothing where p = 0.
    """

    matrix: Array
    local: tuple[Array, ...]


def reduce(
    ops: Ops, cones: Cones, P: Array, A: Array, W: Array, r: Array | float, half: Array | None = None
) -> Reduced:
    """The elimination for weights W (B, k) of the first k rows of A; the others have `half` (B, m - k, .).

    P and A are compact, see `optlayers.linalg.products`.
    """
    P, diagonal = split_hessian(P)
    n, k, m = P.shape[-1], W.shape[-1], A.shape[-2]
    if not cones.groups:
        matrix = batched(P) + gram(ops, A[..., :k, :], W)
        return Reduced(matrix if half is None else matrix + half.mT @ half, ())
    A, root = batched(A), ops.sqrt(W)

    def weighted(rows, columns):
        if half is None or rows.start < k:
            return root[:, rows, None] * A[:, rows, :columns]
        return half[:, rows.start - k : rows.stop - k, :columns]

    matrix, parts, ways = batched(P), [], []
    for group, places in variables(cones):
        blocks = []
        for rows, count, axis in group.blocks(m - cones.rows, m):
            part = weighted(rows, n + group.variables)
            blocks.append((ops.reshape(part, (part.shape[0], *count, part.shape[-1])), axis))
        blocks, *way = _eliminate(ops, blocks, [diagonal[:, place] + r for place in places], cones.width)
        parts += [ops.reshape(block, (block.shape[0], -1, n)) for block, _ in blocks]
        ways.append(way)
    parts += [weighted(rows, n) for rows in others(cones, k, m)]
    for H in parts:
        matrix = matrix + H.mT @ H
    local = zip(zip(*ways, strict=True), (1, 1, 2), strict=False)
    return Reduced(matrix, tuple(ops.concat(parts, axis) for parts, axis in local))


def _eliminate(ops: Ops, blocks: list[tuple[Array, int]], ridge: list[Array], width: int) -> tuple[Any, ...]:
    """What is left of rows, and `local` of `Reduced`.

    The rows come in blocks (B, rows, groups, n + variables) or (B, groups, rows, n + variables), with the
    number of the axis of rows.
    """
    total = lambda arrays: sum(arrays[1:], arrays[0])
    steps = []
    for r in reversed(ridge):
        a = [H[..., -1] for H, _ in blocks]
        blocks = [(H[..., :-1], axis) for H, axis in blocks]
        q = r + total([ops.sum(x * x, axis) for x, (_, axis) in zip(a, blocks, strict=True)])
        c = total([ops.sum(x[..., None] * H, axis) for x, (H, axis) in zip(a, blocks, strict=True)])
        factor = 1 / (q + ops.sqrt(q * r))
        lift = lambda x, axis: x[:, None] if axis == 1 else x[:, :, None]
        blocks = [
            (H - (x * lift(factor, axis))[..., None] * lift(c, axis), axis)
            for x, (H, axis) in zip(a, blocks, strict=True)
        ]
        steps.insert(0, (c / q[..., None], 1 / q))
    n, none = c.shape[-1], 0 * steps[0][1]
    z, D = ops.concat([c[..., :n] for c, _ in steps], 1), ops.concat([d for _, d in steps], -1)
    if width == 1:
        return blocks, z, D
    beside = lambda j, i: steps[j][0][..., n + i] if i < j else none
    T = [ops.concat([beside(j, i) for j in range(len(steps))], -1) for i in range(width - 1)]
    return blocks, z, D, ops.stack(T, 1)


def others(cones: Cones, k: int, m: int) -> list[slice]:
    """The rows in no group; those up to k and those behind it apart."""
    taken = [(k, k)]
    for group in cones.groups:
        taken += [(rows.start, rows.stop) for rows, _, _ in group.blocks(m - cones.rows, m)]
    taken = [(0, 0), *sorted(taken), (m, m)]
    gaps = zip(taken, taken[1:], strict=False)
    return [slice(end, start, 1) for (_, end), (start, _) in gaps if start > end]


def shapes(cones: Cones, n: int) -> list[tuple[int, ...]]:
    """Shapes of the Cholesky factor of what is left of n variables and of `local`, without the batch axis."""
    p, w = cones.local, cones.width
    return [(n - p, n - p)] + [(p, n - p), (p,)] * (p > 0) + [(w - 1, p)] * (w > 1)


def substitute(ops: Ops, cones: Cones, local: tuple[Array, ...], x: Array, transposed: bool = False) -> Array:
    """T^-1 x for x (B, p) or (B, k, p), or T^-T x."""
    if cones.width == 1:
        return x
    T, parts = local[2][:, None] if x.ndim == 3 else local[2], []
    for group, places in variables(cones):
        each = [x[..., place] for place in places]
        order = [(j, i) for j in range(group.variables) for i in range(j)]
        for j, i in reversed(order) if transposed else order:
            to, of = (i, j) if transposed else (j, i)
            each[to] = each[to] - T[..., i, places[j]] * each[of]
        parts += each
    return ops.concat(parts, -1)


def solve_local(ops: Ops, cones: Cones, local: tuple[Array, ...], r: Array) -> Array:
    """What variables in groups are under forces r (B, p), if the others are zero."""
    return substitute(ops, cones, local, local[1] * substitute(ops, cones, local, r, transposed=True))


def solve_reduced(
    ops: Ops, cones: Cones, local: tuple[Array, ...], invert: Callable[[Array], Array], r: Array
) -> Array:
    """M^-1 r for rows r (B, k, n), given the inverse of what is left of M as a map of such rows."""
    if not local:
        return invert(r)
    z, D, *_ = local
    n = z.shape[-1]
    own = substitute(ops, cones, local, r[..., n:], transposed=True)
    x = invert(r[..., :n] - own @ z)
    return ops.concat([x, substitute(ops, cones, local, D[:, None] * own - x @ z.mT)], -1)


def cholesky_solve(ops: Ops, cones: Cones, cholesky: Array, local: tuple[Array, ...], r: Array) -> Array:
    """As `solve_reduced`, from the Cholesky factor of what is left."""
    return solve_reduced(ops, cones, local, lambda rows: ops.cholesky_solve(cholesky, rows.mT).mT, r)


def gram(ops: Ops, A: Array, weights: Array) -> Array:
    """A' diag(weights) A (B, n, n) for A (m, n) or (B, m, n) and weights (B, m) >= 0."""
    A, weights = ops.rows_in_use(A, weights)
    m, n = A.shape[-2:]
    if A.ndim == 3 or n > weights.shape[0]:
        half = ops.sqrt(weights)[..., None] * (A if A.ndim == 3 else A[None])
        return half.mT @ half  # of which NumPy computes one triangle
    # One product for the whole batch, with less memory than A weighted for each problem.
    products = ops.reshape(A[:, :, None] * A[:, None, :], (m, n * n))
    return ops.reshape(weights @ products, (weights.shape[0], n, n))
