"""The KKT residual map of a cone program and linear solves with its Jacobian.

K stands for the whole set of `optlayers.linalg.rows`. With v = s - y, s = Pi_K(v) and y = s - v (Moreau),
optimality is one square, piecewise smooth equation:

    F(x, v) = [ P x + q + A'(Pi_K(v) - v) ;  A x + Pi_K(v) - b ] = 0
    J       = [ P   -A'(I - D) ;  A   D ],        D = dPi_K(v), symmetric, 0 <= D <= I

Solves use a regularised form. With T = (1 - D) / (D + e), a function of the symmetric D,

    (P + r I + A' T A) dx = -F_1 - A' T F_2,     ds = -F_2 - A dx,     dv = ds + T ds

solves J (dx, dv) = -F up to terms of order e and r. A Newton step, the tangent and the adjoint all use it.

Shapes: x (B, n), v (B, m); P (n, n) or (B, n, n), A (m, n) or (B, m, n), where two axes mean that the
matrix is shared by the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..cones import Cones
from ..ops import Array, Ops, select
from .normal import cholesky_solve, reduce
from .products import batched, matvec, matvec_symmetric
from .rows import curved_half, linearize, spectral

MOST_STEPS = 8  # of iterative refinement; a condition number of 0.4 / e leaves an error of 1e-3 then


class Problem(NamedTuple):
    """minimise 1/2 x'Px + q'x subject to A x + s = b, l <= s <= u on the first k rows, s in K on the rest.

    q (B, n), b (B, m), l and u (B, k), see `optlayers.linalg.rows`. With variables in groups P and A are
    compact, see `optlayers.linalg.products`.
    """

    P: Array
    q: Array
    A: Array
    b: Array
    l: Array
    u: Array

    ndims = 2, 1, 2, 1, 1, 1  # without a batch axis

    @property
    def bounds(self) -> tuple[Array, Array]:
        return self.l, self.u


class Factor(NamedTuple):
    """A factorised regularised Jacobian.

    Attributes:
        cholesky, local: of P + r I + A' T A, see `optlayers.linalg.normal`.
        linearization: spectral data of D, see `optlayers.linalg.rows`.
        e: the regularisation in T (B, 1).
    """

    cholesky: Array
    local: tuple[Array, ...]
    linearization: Any
    e: Array


def factorize(ops: Ops, cones: Cones, problem: Problem, v: Array, e: Array) -> Factor:
    """Factorise the regularised Jacobian at v, with e (B, 1) for both e and r. NaN where it fails."""
    return factorize_at(ops, cones, problem, linearize(ops, cones, problem.bounds, v), e)


def factorize_at(ops: Ops, cones: Cones, problem: Problem, linearization: Any, e: Array) -> Factor:
    """As `factorize`, for given spectral data of D."""
    weigh, k = lambda d: (1 - d) / (d + e), linearization.free.shape[-1]
    half = None
    if cones.rows:
        half = curved_half(ops, cones, linearization, weigh, batched(problem.A[..., k:, :]))
    matrix, local = reduce(ops, cones, problem.P, problem.A, weigh(linearization.free), e, half)
    return Factor(ops.cholesky(ops.add_diagonal(matrix, e)), local, linearization, e)


def inverse(ops: Ops, cones: Cones, A: Any, factor: Factor, transposed: bool = False) -> Callable:
    """The map from F to (dx, dv) with J (dx, dv) = -F up to the regularisation, or the transpose of it."""
    weigh = spectral(ops, cones, factor.linearization, lambda d: (1 - d) / (d + factor.e))
    invert = lambda r: cholesky_solve(ops, cones, factor.cholesky, factor.local, r[:, None])[:, 0]

    def solve(F):
        if transposed:
            F2 = F[1] + weigh(F[1])
            dx = invert(matvec(A.mT, F2) - F[0])
            return dx, weigh(matvec(A, dx)) - F2
        dx = invert(-F[0] - matvec(A.mT, weigh(F[1])))
        ds = -F[1] - matvec(A, dx)
        return dx, ds + weigh(ds)

    return solve


def apply(
    ops: Ops,
    cones: Cones,
    P: Any,
    A: Any,
    linearization: Any,
    dx: Array,
    dv: Array,
    transposed: bool = False,
) -> tuple[Array, Array]:
    """The exact J (dx, dv), or with the transpose of J."""
    D = spectral(ops, cones, linearization, lambda d: d)
    if transposed:
        Adx = matvec(A, dx)
        return matvec_symmetric(P, dx) + matvec(A.mT, dv), D(Adx + dv) - Adx
    ds = D(dv)
    return matvec_symmetric(P, dx) + matvec(A.mT, ds - dv), matvec(A, dx) + ds


def solve_refined(
    ops: Ops,
    cones: Cones,
    P: Any,
    A: Any,
    factor: Factor,
    F: tuple[Array, Array],
    transposed: bool = False,
    rough: Array | None = None,
) -> tuple[Array, Array]:
    """(dx, dv) with J (dx, dv) = -F: `inverse`, and a step of iterative refinement with the exact J.

    The regularisation e leaves a relative error of order e times the condition number, by which each step
    multiplies it again. Problems in `rough` (B,) get MOST_STEPS of them.
    """
    solve = inverse(ops, cones, A, factor, transposed)

    def improve(d):
        J1, J2 = apply(ops, cones, P, A, factor.linearization, *d, transposed)
        ddx, ddv = solve((F[0] + J1, F[1] + J2))
        return d[0] + ddx, d[1] + ddv

    if rough is None:
        return improve(solve(F))
    step = lambda state: (state[0] + 1, select(ops, rough | (state[0] < 2), improve(state[1]), state[1]))
    return ops.repeat(1 + MOST_STEPS, step, (0, (0 * F[0], 0 * F[1])))[1]
