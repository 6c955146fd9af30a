"""Batched proximal interior-point method for quadratic programs with polyhedral rows.

    minimise 1/2 x'Px + q'x   subject to   A x + s = b,   l <= s <= u

Each finite side of a row with l < u gets a slack t > 0 and a multiplier z > 0:

    A x + t_l = b - l,    -A x + t_u = u - b,    y = z_l - z_u

Rows with l = u have a free multiplier and no slack, rows without a finite side none of both. An iteration
is a predictor-corrector step (Mehrotra 1992) on the optimality conditions of the problem with a proximal
term on x (weight rho) and on the multipliers (weight delta), both centred at the current iterate, so that
the linear systems are regular whatever the rank of P and A (Friedlander and Orban 2012; Schwan et al. 2023):

    (P + rho I + A' W A) dx = -r_d - A' W g,      dy = W (A dx + g)

where W sums 1 / (t / z + delta) over the sides of a row and is 1 / delta on an equality.

Shapes: x (B, n); y (B, m); sides, all lower before all upper, (B, 2m); numbers per problem (B, 1);
directions carry an axis of k right-hand sides, (B, k, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..ops import Array, Ops, select
from .base import Direction

RHO_RANGE = (1e-12, 1e-10)  # least and first floor of the weight on x
DELTA_RANGE = (1e-10, 1e-8)  # of the weight on the multipliers
DELTA_FLOOR_MAX = 1e-4


class _State(NamedTuple):
    x: Array
    t: Array  # slack and multiplier of each side; 1 and 0 where the side is infinite or an equality's
    z: Array
    y: Array  # multiplier of each row
    rho: Array
    delta: Array
    rho_floor: Array
    delta_floor: Array
    boost: Array  # factor on rho after failed factorisations
    s: Array
    dx: Array
    dy: Array


class _Sides(NamedTuple):
    equal: Array  # (B, m) 1 where l = u
    finite: Array  # (B, 2m) 1 where the side is there
    h: Array  # right-hand sides (B, 2m), of the equalities (B, m)
    e: Array
    count: Array  # at least 1


class _Newton(NamedTuple):
    factor: Array
    rho: Array
    weights: Array  # (B, 1, 2m) and (B, 1, m)
    W: Array
    r_dual: Array  # residuals at the iterate
    r_sides: Array
    r_equal: Array


class _Step(NamedTuple):
    """Directions (B, k, .)."""

    dx: Array
    dy: Array
    dt: Array
    dz: Array


@dataclass(frozen=True)
class InteriorPoint:
    max_iter: int = 150
    check_every: int = 5
    refine: int = 5
    scaling: int = 10
    regularization: float = 1e-4
    refinement: int = 3
    eps: float = 1e-9

    def init(self, ops: Ops, cones: Any, problem: Any, x: Array, v: Array, active: Array) -> _State:
        sides = _sides(ops, problem)
        one = ops.full((x.shape[0], 1), 1.0, x)
        state = _State(
            x=0 * x,
            t=0 * sides.h + 1,
            z=sides.finite,
            y=0 * v,
            rho=self.regularization * one,
            delta=self.regularization * one,
            rho_floor=RHO_RANGE[1] * one,
            delta_floor=DELTA_RANGE[1] * one,
            boost=one,
            s=0 * v,
            dx=0 * x,
            dy=0 * v,
        )
        newton = self._factorize(ops, problem, sides, state)
        # t + G x = h and z = -t: the minimiser of the objective plus |t|^2 / 2.
        newton = newton._replace(r_sides=-sides.h * sides.finite)
        step = self._solve(ops, problem, sides, newton, state, 0 * sides.h[:, None])
        t = sides.h - _signed(ops, _times(problem.A, step.dx))[:, 0]
        t = ops.where(sides.finite > 0, t, 0.0)
        least = ops.maximum(ops.sqrt(ops.sum(t * t, -1, keepdims=True) / sides.count), 1.0)
        z = ops.where(sides.finite > 0, ops.maximum(-t, least), 0.0)
        t = ops.where(sides.finite > 0, ops.maximum(t, least), 1.0)
        x = step.dx[:, 0]
        y = sides.equal * step.dy[:, 0] + _joined(z)
        return state._replace(x=x, t=t, z=z, y=y)

    def step(self, ops: Ops, cones: Any, problem: Any, state: _State) -> _State:
        sides = _sides(ops, problem)
        return ops.repeat(self.check_every, lambda s: self._iterate(ops, problem, sides, s), state)

    def point(self, ops: Ops, cones: Any, problem: Any, state: _State) -> tuple[Array, Array]:
        return state.x, state.s - state.y

    def direction(self, state: _State) -> Direction:
        return Direction(state.dx, state.dy)

    def _iterate(self, ops, problem, sides, state):
        newton = self._factorize(ops, problem, sides, state)
        failed = ~ops.isfinite(ops.sum(ops.sum(newton.factor, -1), -1))
        mu = ops.sum(state.t * state.z, -1, keepdims=True) / sides.count
        tau = ops.where(mu < 0.1, ops.maximum(1 - mu, 0.99), 0.95)
        t, z = state.t[:, None], state.z[:, None]
        affine = self._solve(ops, problem, sides, newton, state, -t * z)
        length = self._length(ops, state, affine, 1.0)
        mu_affine = ops.sum((t + length * affine.dt) * (z + length * affine.dz), -1) / sides.count
        mu_affine = mu_affine * 1.0
        sigma = ops.minimum((mu_affine / ops.where(mu > 0, mu, 1.0)) ** 3, 1.0)
        floor = self._least_mu(ops, problem, sides, state, newton)
        target = ops.maximum(sigma * mu, floor)
        centre = ops.maximum(target, 0.3 * mu)
        second = affine.dt * affine.dz
        goal = ops.concat([target[:, None] - second, centre[:, None] + 0 * second], 1)
        both = self._solve(ops, problem, sides, newton, state, sides.finite[:, None] * (goal - t * z))
        lengths = self._length(ops, state, both, tau[:, None])  # (B, 2, 1)
        first = (lengths[:, 0] >= 0.3) | (lengths[:, 0] >= lengths[:, 1])
        first = first[:, 0]
        step = _Step(*(select(ops, first, d[:, 0], d[:, 1]) for d in both))
        length = ops.where(first[:, None], lengths[:, 0], lengths[:, 1])
        return self._update(ops, problem, sides, state, newton, step, length, mu, failed)

    def _update(self, ops, problem, sides, state, newton, step, length, mu, failed):
        before = _residual(ops, newton)
        new = state._replace(
            x=state.x + length * step.dx,
            t=ops.where(sides.finite > 0, state.t + length * step.dt, 1.0),
            z=ops.where(sides.finite > 0, state.z + length * step.dz, 0.0),
        )
        y = sides.equal * (state.y + length * step.dy) + _joined(new.z)
        new = new._replace(y=y, dx=new.x - state.x, dy=y - state.y)
        ok = ops.isfinite(ops.sum(new.x, -1) + ops.sum(new.z, -1) + ops.sum(new.t, -1)) & ~failed
        new_residual = _residual(ops, _residuals(ops, problem, sides, new))
        slow = (new_residual > 0.7 * before) & (length > 0.5)
        mu_new = ops.sum(new.t * new.z, -1, keepdims=True) / sides.count
        shrink = ops.where(mu > 0, ops.minimum(mu_new / ops.where(mu > 0, mu, 1.0), 1.0), 0.1)
        rho_floor = ops.where(slow, ops.maximum(state.rho_floor / 10, RHO_RANGE[0]), state.rho_floor)
        delta_floor = ops.where(slow, ops.maximum(state.delta_floor / 10, DELTA_RANGE[0]), state.delta_floor)
        new = new._replace(
            rho=ops.maximum(state.rho * shrink, rho_floor),
            delta=ops.maximum(state.delta * shrink, delta_floor),
            rho_floor=rho_floor,
            delta_floor=delta_floor,
            boost=0 * state.boost + 1,
        )
        raised = ops.minimum(state.delta_floor * 10, DELTA_FLOOR_MAX)
        kept = state._replace(
            boost=state.boost * 100, delta_floor=raised, delta=ops.maximum(state.delta, raised)
        )
        new = select(ops, ok, new, kept)
        s = problem.b - _times(problem.A, new.x[:, None])[:, 0]
        return new._replace(s=ops.minimum(ops.maximum(s, problem.l), problem.u))

    def _least_mu(self, ops, problem, sides, state, newton):
        scale = 1 + abs(ops.sum(problem.q * state.x, -1, keepdims=True))
        return ops.minimum(1e-3 * _residual(ops, newton), 0.03 * self.eps * scale / sides.count)

    def _length(self, ops, state, step, tau):
        ratio = ops.maximum(-step.dt / state.t[:, None], ops.where(step.dz < 0, -step.dz, 0.0) / ops.where(state.z > 0, state.z, 1.0)[:, None])
        largest = ops.amax(ratio, -1, keepdims=True)
        return ops.where(largest > tau, tau / ops.where(largest > 0, largest, 1.0), 1.0)

    def _factorize(self, ops, problem, sides, state):
        weights = state.z / (state.t + state.delta * state.z)
        W = weights[:, : state.y.shape[-1]] + weights[:, state.y.shape[-1] :] + sides.equal / state.delta
        rho = state.rho * state.boost
        H = problem.P + rho[..., None] * ops.eye(problem.P.shape[-1], problem.q)
        H = H + problem.A.mT @ (W[..., None] * problem.A)
        r = _residuals(ops, problem, sides, state)
        return _Newton(ops.cholesky(H), rho[:, None], weights[:, None], W[:, None], *r)

    def _solve(self, ops, problem, sides, newton, state, r_comp):
        """Directions for t dz + z dt = r_comp (B, k, 2m)."""
        A, W, m = problem.A, newton.W, state.y.shape[-1]
        z = ops.where(state.z > 0, state.z, 1.0)[:, None]
        g = sides.finite[:, None] * (newton.r_sides[:, None] + r_comp / z)
        Wg = _joined(newton.weights * g) + (sides.equal / state.delta * newton.r_equal)[:, None]
        inverse = ops.where(W > 0, 1 / ops.where(W > 0, W, 1.0), 0.0)
        g_row = inverse * Wg
        r_dual = newton.r_dual[:, None]

        def solve(e1, E2):  # (P + rho) dx + A'dy = e1, dy = W A dx + E2
            dx = ops.cholesky_solve(newton.factor, (e1 - E2 @ A).mT).mT
            return dx, W * (dx @ A.mT) + E2

        def error(dx, dy):
            e1 = -r_dual - dx @ problem.P.mT - newton.rho * dx - dy @ A
            e2 = ops.where(W > 0, dx @ A.mT + g_row - inverse * dy, 0.0)
            return e1, e2, ops.maximum(ops.amax(abs(e1), -1, keepdims=True), ops.amax(abs(e2), -1, keepdims=True))

        dx, dy = solve(-r_dual + 0 * Wg[..., :1], Wg)
        best = (dx, dy, *error(dx, dy))
        for _ in range(self.refinement):
            dx, dy, e1, e2, size = best
            ddx, ddy = solve(e1, W * e2)
            new = (dx + ddx, dy + ddy, *error(dx + ddx, dy + ddy))
            best = tuple(ops.where(new[-1] < size, a, b) for a, b in zip(new, best, strict=True))
        dx, dy = best[:2]
        Gdx = _signed(ops, dx @ A.mT)
        # What refinement added to dy is shared by the sides as the weights are.
        extra = inverse * (dy - (W * (dx @ A.mT) + Wg))
        dz = newton.weights * (Gdx + g + _signed(ops, extra))
        dt = sides.finite[:, None] * (state.delta[:, None] * dz - newton.r_sides[:, None] - Gdx)
        return _Step(dx, dy, dt, dz)


def _sides(ops, problem):
    equal = problem.l == problem.u
    low = ops.isfinite(problem.l) & ~equal
    high = ops.isfinite(problem.u) & ~equal
    finite = ops.concat([low, high], -1)
    h = ops.concat([problem.b - ops.where(low, problem.l, 0.0), ops.where(high, problem.u, 0.0) - problem.b], -1)
    finite = ops.cast(finite, problem.q)
    e = problem.b - ops.where(equal, problem.l, 0.0)
    count = ops.maximum(ops.sum(finite, -1, keepdims=True), 1.0)
    return _Sides(ops.cast(equal, problem.q), finite, h, e, count)


def _residuals(ops, problem, sides, state):
    Ax = _times(problem.A, state.x[:, None])[:, 0]
    r_dual = _times(problem.P, state.x[:, None])[:, 0] + problem.q + (state.y[:, None] @ problem.A)[:, 0]
    r_sides = sides.finite * (_signed(ops, Ax) + state.t - sides.h)
    return r_dual, r_sides, sides.equal * (Ax - sides.e)


def _residual(ops, newton):
    r = tuple(newton)[-3:]
    size = lambda x: ops.amax(abs(x), -1, keepdims=True)
    return ops.maximum(ops.maximum(size(r[0]), size(r[1])), size(r[2]))


def _times(M, x):
    return x @ M.mT


def _signed(ops, a):
    return ops.concat([a, -a], -1)


def _joined(a):
    m = a.shape[-1] // 2
    return a[..., :m] - a[..., m:]
