"""Batched ADMM for cone programs (Stellato et al. 2020; on cones Garstka et al. 2021).

The split variables of  A x + s = b, s in K  are (x, s) and the constraint y = R (s - w) in terms of one
state w, since s = Pi_K(w) (Moreau). With relaxation alpha one iteration is

    x_tilde = (P + sigma I + A' R A)^-1 (sigma x - q + A' (R (b - s) - y))
    s_tilde = b - A x_tilde
    x, h    = alpha (x_tilde, s_tilde) + (1 - alpha) (x, s)
    w       = h - y / R

The penalty R = rho * (1000 on equality rows, 1 elsewhere) adapts for each problem by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..cones import Cones
from ..linalg.kkt import Problem, batched, matvec, norm
from ..linalg.rows import project
from ..ops import Array, Ops
from .base import Direction


class _AdmmState(NamedTuple):
    x: Array  # (B, n)
    w: Array  # (B, m)
    rho: Array  # (B, 1)
    factor: Any
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
    """

    max_iter: int = 2000
    check_every: int = 25
    rho: float = 0.1
    sigma: float = 1e-6
    alpha: float = 1.6
    refine: int = 5
    scaling: int = 5

    def init(self, ops: Ops, cones: Cones, problem: Problem, x: Array, v: Array, active: Array) -> _AdmmState:
        rho = ops.full((x.shape[0], 1), self.rho, x)
        # v = s - y and w = s - y / R: the same point seen with another weight on the multipliers.
        s = project(ops, cones, problem.bounds, v)
        w = s - (s - v) / self._penalties(ops, problem, rho)
        return _AdmmState(x, w, rho, self._factorize(ops, cones, problem, rho), 0 * x, 0 * v)

    def step(self, ops: Ops, cones: Cones, problem: Problem, state: _AdmmState) -> _AdmmState:
        """`check_every` iterations, after adapting the penalty."""
        state = self._adapt(ops, cones, problem, state)
        R = self._penalties(ops, problem, state.rho)

        def iterate(carry):
            x, w = carry[:2]
            s = project(ops, cones, problem.bounds, w)
            rhs = self.sigma * x - problem.q + matvec(problem.A.mT, R * (problem.b - 2 * s + w))
            x_tilde = self._solve(ops, state.factor, state.rho, rhs)
            s_tilde = problem.b - matvec(problem.A, x_tilde)
            x_new = self.alpha * x_tilde + (1 - self.alpha) * x
            return x_new, w + self.alpha * (s_tilde - s), x, w

        x, w, x_old, w_old = ops.repeat(self.check_every, iterate, (state.x, state.w, state.x, state.w))
        y, y_old = (R * (project(ops, cones, problem.bounds, w) - w) for w in (w, w_old))
        return state._replace(x=x, w=w, dx=x - x_old, dy=y - y_old)

    def point(self, ops: Ops, cones: Cones, problem: Problem, state: _AdmmState) -> tuple[Array, Array]:
        s = project(ops, cones, problem.bounds, state.w)
        return state.x, s - self._penalties(ops, problem, state.rho) * (s - state.w)

    def direction(self, state: _AdmmState) -> Direction:
        return Direction(state.dx, state.dy)

    def _penalties(self, ops: Ops, problem: Problem, rho: Array) -> Array:
        rows = 1 + 999 * ops.cast(problem.l == problem.u, rho)
        cones = ops.full((rows.shape[0], problem.b.shape[-1] - rows.shape[-1]), 1.0, rho)
        return rho * ops.concat([rows, cones], -1)

    def _adapt(self, ops: Ops, cones: Cones, problem: Problem, state: _AdmmState) -> _AdmmState:
        """Balance the relative residuals (Stellato et al. 2020, section 5.2)."""
        s = project(ops, cones, problem.bounds, state.w)
        y = self._penalties(ops, problem, state.rho) * (s - state.w)
        Ax, Px, Aty = matvec(problem.A, state.x), matvec(problem.P, state.x), matvec(problem.A.mT, y)
        largest = lambda *arrays: sum_of_norms(ops, arrays)
        primal = norm(ops, Ax + s - problem.b) / largest(Ax, s, problem.b)
        dual = norm(ops, Px + problem.q + Aty) / largest(Px, problem.q, Aty)
        tiny = ops.eps(primal)
        ratio = ops.sqrt((primal + tiny) / (dual + tiny))[:, None]
        # Before the first chunk there is nothing to balance; later, small changes are not worth a factor.
        started = ops.any(state.dx != 0, -1)[:, None]
        change = started & ((ratio > 3) | (ratio < 1 / 3)) & ops.isfinite(ratio)
        rho = ops.where(change, ops.minimum(ops.maximum(state.rho * ratio, 1e-6), 1e6), state.rho)
        w = s - y / self._penalties(ops, problem, rho)
        refactor = lambda rho: self._factorize(ops, cones, problem, rho)
        if self._is_shared(problem):
            return state._replace(rho=rho, w=w)
        factor = ops.cond(ops.any(change), refactor, lambda _: state.factor, rho)
        return state._replace(rho=rho, w=w, factor=factor)

    @staticmethod
    def _is_shared(problem: Problem) -> bool:
        # The penalty of a row depends on its bounds, so these must be shared as well.
        return problem.P.ndim == 2 and problem.A.ndim == 2 and problem.l.shape[0] == 1

    def _factorize(self, ops: Ops, cones: Cones, problem: Problem, rho: Array) -> Any:
        """Cholesky factors (B, n, n); for P and A shared, one simultaneous diagonalisation for every rho.

        With P + sigma I = L L' and L^-1 A'R_1 A L^-T = Q Lambda Q' (R = rho R_1), V = L^-T Q gives
        (P + sigma I + A'RA)^-1 = V (1 + rho Lambda)^-1 V'.
        """
        identity = ops.eye(problem.P.shape[-1], rho)
        shifted = problem.P + self.sigma * (identity if problem.P.ndim == 2 else identity[None])
        if self._is_shared(problem):
            R = self._penalties(ops, problem, ops.full((1, 1), 1.0, rho))[0]
            inverse = ops.inverse_triangular(ops.cholesky(shifted))
            half = problem.A @ inverse.mT
            values, Q = ops.eigh(half.mT @ (R[:, None] * half))
            return values, inverse.mT @ Q
        R = self._penalties(ops, problem, rho)
        A = batched(problem.A)
        return (ops.cholesky(batched(shifted) + A.mT @ (R[..., None] * A)),)

    def _solve(self, ops: Ops, factor: Any, rho: Array, rhs: Array) -> Array:
        if len(factor) == 1:
            return ops.cholesky_solve(factor[0], rhs[..., None])[..., 0]
        values, V = factor
        return ((rhs @ V) / (1 + rho * values[None])) @ V.mT


def sum_of_norms(ops: Ops, arrays) -> Array:
    """1e-10 + sum of the largest entries, a safe denominator (B,)."""
    total = norm(ops, arrays[0]) + 1e-10
    for array in arrays[1:]:
        total = total + norm(ops, array)
    return total
