"""Elimination of the equalities A_E x = b_E whose coefficients do not depend on parameters.

With N an orthonormal basis of the null space of A_E and x_0 = A_E^+ b_E, every solution is x = N z + x_0, and
the program in z has fewer variables and rows, and a better condition:

    P_z = N'PN,    q_z = N'(P x_0 + q),    A_z = A_I N,    b_z = b_I - A_I x_0

Multipliers follow from stationarity, y_E = -(A_E^+)'(P x + q + A_I'y_I) + W w. The columns of W span the left
null space of A_E: where its rows are dependent, W'b_E = 0 stays as rows of zeros, with multipliers w. All is
written in operations that have derivatives.

Variables in groups (see `optlayers.cones.Groups`) stand in no such row, and stay what they are: P, A, x here
are of the others, and only joined with what belongs to the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from ..canon.program import AffineMap, Program
from ..linalg.kkt import Problem
from ..linalg.products import matvec
from ..ops import Array, Ops, numpy
from .conic import ConicSolution

Entries = tuple[np.ndarray, np.ndarray]
LARGEST_CONDITION = 1e4  # of rows of length one; rounding in x_0 is as many times that of b


@dataclass(frozen=True, eq=False)
class Elimination:
    """What the elimination of some rows takes.

    Attributes:
        rows, kept: the eliminated rows E and the others, m numbers in all.
        bounded: those of `kept` that have bounds, before those of curved cones.
        order: puts entries of `rows` and then `kept` in their places.
        basis: N (n, n_z).
        inverse: A_E^+ (n, m_E).
        dependent: W (m_E, m_E - rank); None where the rows are independent.
        P, A: those of the program in z; None where they depend on parameters.
        shifts: N'P A_E^+ (n_z, m_E) and A_I A_E^+ (m_I, m_E), what b_E adds to q_z and takes from b_z; None
            where they depend on parameters.
    """

    rows: np.ndarray
    kept: np.ndarray
    bounded: np.ndarray
    order: np.ndarray
    basis: np.ndarray
    inverse: np.ndarray
    dependent: np.ndarray | None
    P: np.ndarray | None
    A: np.ndarray | None
    shifts: tuple[np.ndarray, np.ndarray] | None

    def parts(self, entries: np.ndarray) -> Entries:
        """Which of these entries of x, in order, are made of z, and which are variables in groups."""
        n = len(self.basis)
        return entries[entries < n], entries[entries >= n] - n


def elimination(program: Program) -> Elimination | None:
    """The elimination of the constant rows of the zero cone; None without any, or if they fix everything.

    Also where they are close to dependent: x_0 would be inaccurate, and no residual of the rest shows it.
    """
    m, n = program.A.shape
    row = program.A.positions // n
    is_constant = np.arange(m) < program.cones.zero
    is_constant[row[program.A.rows]] = False
    rows = np.flatnonzero(is_constant)
    if not len(rows):
        return None
    P, A = _dense(program.P), _dense(program.A)
    n = P.shape[-1]
    A_E = A[rows, :n]
    size = np.linalg.norm(A_E, axis=1, keepdims=True)
    size[size == 0] = 1.0
    # Others stay what they are, as simple as they were.
    used = A_E.any(0)
    U, singular, Vt = scipy.linalg.svd(A_E[:, used] / size)
    rank = int(np.sum(singular > max(A_E.shape) * np.finfo(float).eps * singular.max(initial=0.0)))
    if rank == 0 or rank == n or singular[rank - 1] < singular[0] / LARGEST_CONDITION:
        return None
    inverse = np.zeros(A_E.shape[::-1])
    inverse[used] = (Vt[:rank].T / singular[:rank]) @ U[:, :rank].T / size.T
    kept = np.flatnonzero(~is_constant)
    bounded = kept[kept < program.cones.zero + program.cones.nonneg]
    order = np.argsort(np.append(rows, kept))
    dependent = U[:, rank:] / size if rank < len(rows) else None
    basis = np.zeros((n, n - rank))
    basis[used, : used.sum() - rank] = Vt[rank:].T
    basis[~used, used.sum() - rank :] = np.eye(n - used.sum())
    P_z = None if len(program.P.rows) else _reduced_P(numpy, P, basis)
    A_z = None if len(program.A.rows) else _reduced_A(numpy, A[kept], basis)
    shifts = None
    if P_z is not None and A_z is not None:
        shifts = tuple(
            _exact(numpy, rows @ inverse, _size(numpy, rows) * _size(numpy, inverse.T).T)
            for rows in (basis.T @ P[:n], A[kept, :n])
        )
    return Elimination(rows, kept, bounded, order, basis, inverse, dependent, P_z, A_z, shifts)


def _dense(affine: AffineMap) -> np.ndarray:
    """The matrix of an affine map without its parameters."""
    dense = np.zeros(affine.shape)
    dense.flat[affine.positions] = affine.constant
    return dense


def eliminate(
    ops: Ops, plan: Elimination, data: Problem, warm: Sequence[Array]
) -> tuple[Problem, list[Array], Callable[[ConicSolution, Array, Entries | None], ConicSolution]]:
    """The program in z, an earlier (x, s, y) in its terms, and the way back from its solution.

    The data have one batch axis or none, as in `ConicLayer`. The way back takes the solution, which rows of
    the batch (B,) have derivatives, and None, or the `parts` of the entries of x that are wanted if s and y
    are not: then P and A may be None where there are `shifts`.
    """
    P, q, A, b, l, u = data
    N, n = ops.constant(plan.basis, q), len(plan.basis)
    W, k = None, 0
    if plan.dependent is not None:
        W, k = ops.constant(plan.dependent, q), plan.dependent.shape[-1]
    zeros = lambda *shape: ops.full(shape, 0.0, q)
    pick = lambda vector, rows: ops.take(vector, ops.constant(rows, q)) if len(rows) else vector[..., :0]
    own = lambda vector: vector[None] if vector.ndim == 1 else vector
    q_x, q_e = own(q)[:, :n], own(q)[:, n:]
    b_E, b_I = own(pick(b, plan.rows)), own(pick(b, plan.kept))
    A_I: Any = None if A is None else pick(A.mT, plan.kept).mT
    # What is not finite is told by q_z and b_z; as a factor it would reach the derivatives of what is shared.
    is_finite = lambda z: ops.all(ops.isfinite(z), -1)[:, None]
    clean = lambda data: tuple(ops.where(ops.isfinite(z), z, 0.0) for z in data)
    finite = is_finite(q_x) & is_finite(b_E)
    if plan.shifts is None:
        inverse = ops.constant(plan.inverse, q).mT
        moved = lambda P, A_I, x_0: (matvec(P[..., :n, :], x_0), matvec(A_I[..., :n], x_0))
        gradient, shift = moved(*map(ops.stop_gradient, (P, A_I, b_E @ inverse)))
        finite, is_met = finite & is_finite(gradient), is_finite(shift)
        b_I = ops.where(is_met, b_I, ops.nan)
        is_bad = ops.any(~finite) | ops.any(~is_met)
        P, A_I, q_x, b_E = ops.cond_or_both(is_bad, clean, tuple, (P, A_I, q_x, b_E))
        gradient, shift = moved(P, A_I, b_E @ inverse)
        gradient = q_x + gradient
        q_z = _exact(ops, gradient @ N, _size(ops, q_x) + _size(ops, gradient))
    else:
        q_x, b_E = ops.cond_or_both(ops.any(~finite), clean, tuple, (q_x, b_E))
        gradient, shift = (b_E @ ops.constant(part, q).mT for part in plan.shifts)
        q_z = _exact(ops, q_x @ N + gradient, _size(ops, q_x) + _size(ops, gradient))
    q_z = ops.where(finite, q_z, ops.nan)
    q_z = _joined(ops, q_z, q_e)
    b_z = _exact(ops, b_I - shift, abs(b_I) + abs(shift))
    A_z = _reduced_A(ops, A_I, N) if plan.A is None else ops.constant(plan.A, q)
    P_z = _reduced_P(ops, P, N) if plan.P is None else ops.constant(plan.P, q)
    bounds = [pick(bound, plan.bounded) for bound in (l, u)]
    if W is not None:
        b_W = _exact(ops, b_E @ W, _size(ops, b_E) * _size(ops, W.mT).mT)
        batch = max(b_W.shape[0], b_z.shape[0])
        b_z = ops.concat([ops.broadcast_to(part, (batch, part.shape[-1])) for part in (b_W, b_z)], -1)
        A_z = ops.concat([zeros(*A_z.shape[:-2], k, A_z.shape[-1]), A_z], -2)
        bounds = [ops.concat([zeros(k), bound], -1) for bound in bounds]
    if b.ndim == 1:
        b_z = b_z[0] if A_z.ndim == 2 else b_z
        q_z = q_z[0] if q.ndim == 1 and P_z.ndim == 2 else q_z
    reduced = Problem(P_z, q_z, A_z, b_z, *bounds)

    def restore(solution: ConicSolution, derived: Array, chosen: Entries | None) -> ConicSolution:
        mask = lambda value: ops.where(derived[:, None], value, ops.stop_gradient(value))
        chosen_x, chosen_e = (None, None) if chosen is None else chosen
        N, inverse = (
            ops.constant(part if chosen is None else part[chosen_x], q) for part in (plan.basis, plan.inverse)
        )
        z, e = solution.x[:, : N.shape[-1]], solution.x[:, N.shape[-1] :]
        x = z @ N.mT + mask(0 * z[:, :1] + b_E @ inverse.mT)
        if chosen is not None:
            return solution._replace(x=_joined(ops, x, pick(e, chosen_e)))
        w, y = solution.y[:, :k], solution.y[:, k:]
        y_E = -(matvec(P[..., :n, :], x) + q_x + matvec(A_I[..., :n].mT, y)) @ inverse
        y_E = mask(y_E if W is None else y_E + w @ W.mT)
        s, y = (pick(ops.concat(parts, -1), plan.order) for parts in ((0 * y_E, solution.s[:, k:]), (y_E, y)))
        return solution._replace(x=_joined(ops, x, e), s=s, y=y)

    if warm:
        x, s, y = warm
        s, y = (ops.concat([zeros(*z.shape[:-1], k), pick(z, plan.kept)], -1) for z in (s, y))
        warm = [_joined(ops, x[..., :n] @ N, x[..., n:]), s, y]
    return reduced, list(warm), restore


def _joined(ops: Ops, x: Array, e: Array) -> Array:
    """Of one batch, x (B, n) and e (B, p), of which one may be shared."""
    if not e.shape[-1]:
        return x
    shape = max(x.shape[:-1], e.shape[:-1])
    return ops.concat([ops.broadcast_to(part, (*shape, part.shape[-1])) for part in (x, e)], -1)


def _reduced_A(ops: Ops, A_I: Array, N: Array) -> Array:
    rows, own = A_I[..., : N.shape[0]], A_I[..., N.shape[0] :]
    reduced = _exact(ops, rows @ N, _size(ops, rows))
    return ops.concat([reduced, own], -1) if own.shape[-1] else reduced


def _reduced_P(ops: Ops, P: Array, N: Array) -> Array:
    P, diagonal = P[..., : N.shape[0], :], P[..., N.shape[0] :, : N.shape[1]]
    reduced = _exact(ops, N.mT @ (P @ N), ops.amax(_size(ops, P), -2, keepdims=True))
    return ops.concat([reduced, diagonal], -2) if diagonal.shape[-2] else reduced


def _size(ops: Ops, x: Array) -> Array:
    return ops.amax(abs(x), -1, keepdims=True)


def _exact(ops: Ops, x: Array, size: Array) -> Array:
    """`x` and its derivatives, with zeros where its value is the rounding of a sum of terms of this size.

    Of what an equality fixes nothing may be left: equilibration would enlarge it.
    """
    rounding = abs(x) <= 16 * ops.eps(x) * size
    return x - ops.stop_gradient(ops.where(rounding, x, 0.0))
