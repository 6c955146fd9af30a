"""Equilibration of a cone program: x = D x_hat, s = s_hat / E, y = E y_hat / c.

Ruiz (2001) iterations in the 2-norm on the matrix [P A'; A 0], the E of a curved cone being one number per
cone so that the cone is unchanged; then a cost scale c. With curved cones one factor beta on x and s brings
the right-hand side to size one: D and E then stand for beta D and E / beta, c for c / beta^2 so that P, or
without P for c / beta so that q stays as it was.
"""

from __future__ import annotations

from typing import NamedTuple

from ..cones import Cones
from ..linalg.kkt import Problem
from ..linalg.products import constraints, hessian, matvec, matvec_symmetric, spread
from ..linalg.rows import whole_cones
from ..ops import Array, Ops


class Scaling(NamedTuple):
    """D (B, n), E (B, m), c (B, 1); the leading axis is 1 where the batch shares them."""

    D: Array
    E: Array
    c: Array

    ndims = 1, 1, 1  # without a batch axis

    def restore(self, x: Array, s: Array, y: Array) -> tuple[Array, Array, Array]:
        """A point of the scaled problem in the units of the given one."""
        return self.D * x, s / self.E, y * self.E / self.c


def equilibrate(
    ops: Ops, cones: Cones, problem: Problem, passes: int, linear: bool
) -> tuple[Problem, Scaling]:
    """The scaled problem and its scaling; `linear` says that P is zero."""
    settings, matrices = (ops, cones, passes), (problem.P, problem.A)
    is_shared = all(M.ndim == 2 for M in matrices)
    D, E, columns = (
        ops.remembered(_balance, settings, *matrices) if is_shared else _balance(*settings, *matrices)
    )
    q = D * problem.q
    c = _cost_scale(ops, None if linear else columns, q, problem.P.ndim == 2 and len(D) == 1)
    P = _scale_hessian(ops, problem.P, D if linear else c * D, D)
    A = _scale_constraints(ops, cones, problem.A, E, D)
    if cones.rows:
        beta = _size(ops, E * problem.b, c * q, linear)
        D, E, c, q = beta * D, E / beta, c / (beta if linear else beta**2), beta * q
    k = problem.l.shape[-1]
    l, u = (E[:, :k] * bound for bound in problem.bounds)
    return Problem(P, c * q, A, E * problem.b, l, u), Scaling(D, E, c)


def _balance(ops: Ops, cones: Cones, passes: int, P: Array, A: Array) -> tuple[Array, Array, Array]:
    """D, E and the norms of the columns of D P D."""
    P2, A2 = hessian(ops, P**2), constraints(ops, cones, A**2)
    batch = max(len(M) if M.ndim == 3 else 1 for M in (P, A))
    one = ops.full((batch, P.shape[-2]), 1.0, P)
    own = ops.sqrt(matvec_symmetric(P2, one))
    if not passes:
        return one, 1 + 0 * matvec(A2, one), own
    D2 = 1 / ops.where(own > 0, own, 1.0)
    # A row that defines a variable of P, which no other row has, is in units of that, as residuals may be of
    # data of any size. Others get size one first: one 1e8 times longer would shrink columns that it meets.
    all_rows = whole_cones(ops, cones, matvec(A2, D2), mean=True)
    entries = constraints(ops, cones, ops.cast(A != 0, A))
    is_defined = (own > 0) & (matvec(entries.mT, 1 + 0 * all_rows) == 1)
    rows = whole_cones(ops, cones, matvec(A2, ops.where(is_defined, D2, 0.0)), mean=True)
    no_row = ops.cast(all_rows <= 0, D2)  # added, so that rows and columns of zeros stay as they are
    E = 1 / ops.sqrt(ops.where(rows > 0, rows, all_rows) + no_row)
    columns = own + matvec(A2.mT, E * E)
    no_column = ops.cast(columns <= 0, D2)
    D = 1 / ops.sqrt(columns + no_column)

    def balance(state):
        D, E = state
        D2, E2 = D * D, E * E
        columns = D2 * (matvec_symmetric(P2, D2) + matvec(A2.mT, E2)) + no_column
        rows = whole_cones(ops, cones, E2 * matvec(A2, D2), mean=True) + no_row
        return D / ops.sqrt(ops.sqrt(columns)), E / ops.sqrt(ops.sqrt(rows))

    D, E = ops.repeat(passes, balance, (D, E))
    return D, E, D * ops.sqrt(matvec_symmetric(P2, D * D))


def _size(ops: Ops, b: Array, q: Array, linear: bool) -> Array:
    """About the size of x and s (B, 1) where P and A have size one: that of b, and of q if there is a P."""
    size = ops.amax(abs(b), -1, keepdims=True)
    if not linear:
        size = ops.maximum(size, ops.amax(abs(q), -1, keepdims=True))
    return ops.where(size > 0, size, 1.0)


def _cost_scale(ops: Ops, columns: Array | None, q: Array, is_shared: bool) -> Array:
    """1 / max(mean of the column norms of P, |q|), (B, 1); from P alone, (1, 1), where the batch shares P."""
    size = ops.amax(abs(q), -1, keepdims=True)
    if columns is not None:
        mean = ops.sum(columns, -1, keepdims=True) / max(columns.shape[-1], 1)
        size = mean if is_shared else ops.maximum(mean, size)
    return 1 / ops.where(size > 0, size, 1.0)


def _scale_matrix(M: Array, left: Array, right: Array) -> Array:
    return _scale(M, left[..., :, None] * right[..., None, :])


def _scale(M: Array, factors: Array) -> Array:
    scaled = (M[None] if M.ndim == 2 else M) * factors
    return scaled[0] if M.ndim == 2 and scaled.shape[0] == 1 else scaled


def _scale_hessian(ops: Ops, P: Array, left: Array, right: Array) -> Array:
    n = P.shape[-1]
    if P.shape[-2] == n:
        return _scale_matrix(P, left, right)
    diagonal = _scale(P[..., n:, :], (left * right)[:, n:, None])
    return ops.concat([_scale_matrix(P[..., :n, :], left[:, :n], right[:, :n]), diagonal], -2)


def _scale_constraints(ops: Ops, cones: Cones, A: Array, E: Array, D: Array) -> Array:
    if not cones.groups:
        return _scale_matrix(A, E, D)
    n = D.shape[-1] - cones.local
    own = (E[:, None] * spread(ops, cones, D[:, n:], A.shape[-2])).mT
    return ops.concat([_scale_matrix(A[..., :n], E, D[:, :n]), _scale(A[..., n:], own)], -1)
