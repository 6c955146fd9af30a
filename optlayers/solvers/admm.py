"""Batched ADMM for cone programs (Stellato et al. 2020; on cones Garstka et al. 2021).

The split variables of  A x + s = b, s in K  are (x, s) and the constraint y = R (s - w) in terms of one
state w, since s = Pi_K(w) (Moreau). With relaxation alpha one iteration is

    x = (P + sigma I + A' R A)^-1 (sigma x_0 - q + A' (R (b - s) - y))
    w = w + alpha (b - A x - s)

where y = R (s - w) and the proximal centre x_0 is the x of the last check.
The penalty R = rho * (1000 on equality rows, 1 elsewhere) adapts for each problem by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..cones import Cones
from ..linalg.kkt import Problem
from ..linalg.normal import reduce, solve_local, solve_reduced, substitute
from ..linalg.products import (
    collect,
    constraints,
    followed,
    hessian,
    matvec,
    matvec_symmetric,
    norm,
    own_rows,
    spread,
    whole,
)
from ..linalg.rows import project
from ..ops import Array, Ops
from .base import Direction


class _Factor(NamedTuple):
    """M^-1 = (P + sigma I + A' R A)^-1 = V (1 + rho values)^-1 V'.

    values (1, n), V (B, n, n) and U = A V (B, m, n), of which the batch shares one where it shares P, A and
    the ratios of the penalties: V then diagonalises for every rho. Else the values are zero, V V' is the
    inverse of what the elimination of p variables in groups leaves of M, with n - p in place of n, U the rows
    that are left of A times V (see `optlayers.linalg.normal`), and without groups there is U U' (B, m, m)
    unless that is larger than V and U.
    """

    values: Array
    V: Array
    U: Array
    UUt: tuple[Array, ...]
    local: tuple[Array, ...]

    def solve(self, ops: Ops, cones: Cones, rho: Array, r: Array) -> Array:
        """M^-1 r for r (B, n)."""
        invert = lambda r: matvec(self.V, matvec(self.V.mT, r) / (1 + rho * self.values))
        if not self.local:
            return invert(r)
        rows = solve_reduced(ops, cones, self.local, lambda rows: invert(rows[:, 0])[:, None], r[:, None])
        return rows[:, 0]


class _AdmmState(NamedTuple):
    x: Array  # (B, n)
    w: Array  # (B, m)
    s: Array  # Pi_K(w)
    rho: Array  # (B, 1)
    factor: _Factor
    dx: Array  # last increments, from which infeasibility is certified
    dy: Array


@dataclass(frozen=True)
class ADMM:
    """Alternating direction method of multipliers, a first-order method that runs as batched products.

    Args:
        max_iter: iterations before it gives up.
        check_every: iterations between two checks (refinement, certificates, adaptation of rho).
        rho: starting penalty, in units of the scaled problem.
        sigma: proximal weight on x.
        alpha: over-relaxation, in (0, 2).
        refine: Newton steps tried at each check; see `optlayers.solvers.refinement`.
        scaling: equilibration passes.
        fused: quadratic programs of at most 64 variables and rows are solved in one kernel of Triton, where
            they are PyTorch's on CUDA; elsewhere it has no effect. The first call compiles it, for seconds.

    Example:
        >>> import torch
        >>> from optlayers.torch import ADMM, solve_qp
        >>> I, one = torch.eye(2), torch.ones(2)
        >>> solve_qp(I, torch.tensor([-3.0, 0.5]), I, -one, one, solver=ADMM(rho=1.0)).x
        tensor([ 1.0000, -0.5000])
    """

    max_iter: int = 2000
    check_every: int = 25
    rho: float = 1.0
    sigma: float = 1e-6
    alpha: float = 1.6
    refine: int = 5
    scaling: int = 5
    fused: bool = False

    def __post_init__(self):
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho must be positive and finite, got {self.rho}")

    def init(self, ops: Ops, cones: Cones, problem: Problem, x: Array, v: Array, active: Array) -> _AdmmState:
        rho = ops.full((x.shape[0], 1), self.rho, x)
        # v = s - y and w = s - y / R: the same point seen with another weight on the multipliers.
        s = project(ops, cones, problem.bounds, v)
        w = s - (s - v) / self._penalties(ops, problem, rho)
        return _AdmmState(x, w, s, rho, self._factorize(ops, cones, problem, rho), 0 * x, 0 * v)

    def step(self, ops: Ops, cones: Cones, problem: Problem, state: _AdmmState) -> _AdmmState:
        """`check_every` iterations, after adapting the penalty."""
        if not ops.holds(ops.all(state.dx == 0)):  # before the first chunk there is nothing to balance
            state = self._adapt(ops, cones, problem, state)
        R, factor = self._penalties(ops, problem, state.rho), state.factor
        solve = lambda force: factor.solve(ops, cones, state.rho, self.sigma * state.x - problem.q + force)
        response, weights = _response(ops, cones, problem, state), self.alpha * R
        A = constraints(ops, cones, problem.A)
        constant = self.alpha * (problem.b - matvec(A, solve(matvec(A.mT, R * problem.b))))

        def iterate(carry):
            w, s, _ = carry
            mirrored = s + s - w
            w = w - self.alpha * s + (constant + response(weights * mirrored))
            return w, project(ops, cones, problem.bounds, w, s), mirrored

        w, s, mirrored = ops.repeat(self.check_every, iterate, (state.w, state.s, state.w))
        x = solve(matvec(A.mT, R * (problem.b - mirrored)))
        dy = R * (s - w) - R * (state.s - state.w)
        return state._replace(x=x, w=w, s=s, dx=x - state.x, dy=dy)

    def point(self, ops: Ops, cones: Cones, problem: Problem, state: _AdmmState) -> tuple[Array, Array]:
        return state.x, state.s - self._penalties(ops, problem, state.rho) * (state.s - state.w)

    def direction(self, state: _AdmmState) -> Direction:
        return Direction(state.dx, state.dy)

    def _penalties(self, ops: Ops, problem: Problem, rho: Array) -> Array:
        rows = 1 + 999 * ops.cast(problem.l == problem.u, rho)
        cones = ops.full((rows.shape[0], problem.b.shape[-1] - rows.shape[-1]), 1.0, rho)
        return rho * ops.concat([rows, cones], -1)

    def _adapt(self, ops: Ops, cones: Cones, problem: Problem, state: _AdmmState) -> _AdmmState:
        """Balance the relative residuals (Stellato et al. 2020, section 5.2)."""
        s, y = state.s, self._penalties(ops, problem, state.rho) * (state.s - state.w)
        A = constraints(ops, cones, problem.A)
        Ax, Aty = matvec(A, state.x), matvec(A.mT, y)
        Px = matvec_symmetric(hessian(ops, problem.P), state.x)
        largest = lambda *arrays: sum_of_norms(ops, arrays)
        primal = norm(ops, Ax + s - problem.b) / largest(Ax, s, problem.b)
        dual = norm(ops, Px + problem.q + Aty) / largest(Px, problem.q, Aty)
        tiny = ops.eps(primal)
        ratio = ops.sqrt((primal + tiny) / (dual + tiny))[:, None]
        # Small changes are not worth a factor.
        started = ops.any(state.dx != 0, -1)[:, None]
        change = started & ((ratio > 3) | (ratio < 1 / 3)) & ops.isfinite(ratio)
        rho = ops.where(change, ops.minimum(ops.maximum(state.rho * ratio, 1e-6), 1e6), state.rho)
        w = s - y / self._penalties(ops, problem, rho)  # of which s is the projection as well
        refactor = lambda rho: self._factorize(ops, cones, problem, rho)
        if self._is_shared(cones, problem):
            return state._replace(rho=rho, w=w)
        factor = ops.cond(ops.any(change), refactor, lambda _: state.factor, rho)
        return state._replace(rho=rho, w=w, factor=factor)

    @staticmethod
    def _is_shared(cones: Cones, problem: Problem) -> bool:
        # The penalty of a row depends on whether its bounds are equal. Beside curved cones that is so in all
        # of the batch or nowhere, though they are scaled for each problem.
        is_same = bool(cones.rows) or problem.l.shape[0] == 1
        return problem.P.ndim == 2 and problem.A.ndim == 2 and is_same

    def _factorize(self, ops: Ops, cones: Cones, problem: Problem, rho: Array) -> _Factor:
        """With L L' = M, or what is left of it, V = L^-T.

        Shared, L L' = P + sigma I, L^-1 A'R_1 A L^-T = Q Lambda Q' (R = rho R_1) and V = L^-T Q.
        """
        if self._is_shared(cones, problem):
            # The same for all, also for a batch of none.
            R = ops.amax(self._penalties(ops, problem, ops.full((1, 1), 1.0, rho)), 0, keepdims=True)
            return ops.remembered(_diagonalize, (ops, self.sigma, cones), problem.P, problem.A, R)
        R = self._penalties(ops, problem, rho)
        A, n = problem.A, problem.P.shape[-1]
        matrix, local = reduce(ops, cones, problem.P, A, R, self.sigma)
        V = _inverse_root(ops, matrix, self.sigma)
        U = A[..., :n] @ V
        if not local:
            return _Factor(ops.full((1, n), 0.0, rho), V, U, (U @ U.mT,) if U.shape[-2] <= 2 * n else (), ())
        moved = spread(ops, cones, substitute(ops, cones, local, (local[0] @ V).mT), A.shape[-2])
        U = U - followed(ops, own_rows(cones, A)[:, None], moved).mT
        return _Factor(ops.full((1, n), 0.0, rho), V, U, (), local)


def _inverse_root(ops: Ops, matrix: Array, sigma: float) -> Array:
    """L^-T with L L' = matrix + sigma I; the matrix may be overwritten."""
    return ops.inverse_triangular(ops.cholesky(ops.add_diagonal(matrix, sigma))).mT


def _diagonalize(ops: Ops, sigma: float, cones: Cones, P: Array, A: Array, R: Array) -> _Factor:
    P, A = whole(ops, cones, P, A)
    V = _inverse_root(ops, 1.0 * P, sigma)
    half = A @ V
    values, Q = ops.eigh(half.mT @ (R[0][:, None] * half))
    V = V @ Q
    return _Factor(values[None], V[None], (A @ V)[None], (), ())


def _response(ops: Ops, cones: Cones, problem: Problem, state: _AdmmState) -> Callable[[Array], Array]:
    """A M^-1 A': what x adds to the rows under a force on them, as a map of forces (B, m)."""
    values, _, U, UUt, local = state.factor
    inverse = 1 / (1 + state.rho * values)
    if UUt:
        return lambda r: matvec_symmetric(*UUt, r)
    if not local:
        return lambda r: matvec(U, inverse * matvec(U.mT, r))
    own = 1.0 * own_rows(cones, problem.A)  # in one piece

    def response(r):
        forces = collect(ops, cones, own * r[:, None])
        moved = spread(ops, cones, solve_local(ops, cones, local, forces), r.shape[-1])
        return matvec(U, matvec(U.mT, r)) + followed(ops, own, moved)

    return response


def sum_of_norms(ops: Ops, arrays) -> Array:
    """1e-10 + sum of the largest entries, a safe denominator (B,)."""
    total = norm(ops, arrays[0]) + 1e-10
    for array in arrays[1:]:
        total = total + norm(ops, array)
    return total
