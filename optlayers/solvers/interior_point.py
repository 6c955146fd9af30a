"""Batched proximal interior-point method for quadratic programs.

    minimise 1/2 x'Px + q'x   subject to   A x + s = b,   l <= s <= u

Each finite side of a row with l < u gets a slack t > 0 and a multiplier z > 0, and G stacks A and -A:

    A x + t_l = b - l,    -A x + t_u = u - b,    y = z_l - z_u

A row with l = u has a multiplier of either sign and no slack, a row without a finite side has neither. An
iteration is a predictor-corrector step (Mehrotra 1992) on the optimality conditions of the problem with
proximal terms on x (weight rho) and on the multipliers (weight delta), both centred at the iterate, so that
the linear systems are regular whatever the ranks of P and A (Friedlander and Orban 2012; Schwan et al. 2023):

    (P + rho I + A'WA) dx = -r_dual - A'W g,      dy = W (A dx + g)

W sums the weights 1 / (t / z + delta) of the sides of a row; on an equality it is 1 / delta.

Shapes: x (B, n), y (B, m); sides (B, 2m), all lower before all upper; a number per problem (B, 1). Right-hand
sides and directions have an axis of k systems with one matrix, (B, k, n) and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..cones import Cones
from ..linalg.kkt import Problem, batched, matvec
from ..ops import Array, Ops, select
from .base import Direction

# The floors of rho and delta: where they start and the least they come down to, where progress is slow.
RHO_FLOORS = 1e-10, 1e-12
DELTA_FLOORS = 1e-8, 1e-10
DELTA_FLOOR_MAX = 1e-4  # the most that failed factorisations raise the floor of delta to


class _State(NamedTuple):
    x: Array
    y: Array
    t: Array  # 1 where there is no side
    z: Array  # 0 where there is no side
    rho: Array
    delta: Array
    rho_floor: Array
    delta_floor: Array
    unit: Array  # what 1 stands for in delta and 1 / rho, see `_first_point`
    boost: Array  # factor on rho after failed factorisations
    dx: Array  # last increments, from which infeasibility is certified
    dy: Array


class _Sides(NamedTuple):
    """The constant data of the sides; masks are 0 or 1."""

    equal: Array  # (B, m) rows with l = u
    e: Array  # (B, m) their right-hand side, A x = e
    finite: Array  # (B, 2m)
    h: Array  # (B, 2m) right-hand sides, G x + t = h
    count: Array  # finite sides, at least 1
    cost: Array  # factor on the objective


class _Residuals(NamedTuple):
    dual: Array  # P x + q + A'y
    sides: Array  # G x + t - h
    equal: Array  # A x - e


class _System(NamedTuple):
    """A factorised linear system."""

    cholesky: Array
    rho: Array  # (B, 1, 1)
    delta: Array  # (B, 1, 1)
    z: Array  # (B, 1, 2m), 1 where there is no side
    side_weights: Array  # (B, 1, 2m)
    W: Array  # (B, 1, m)


class _Step(NamedTuple):
    """Directions (B, k, .)."""

    dx: Array
    dy: Array
    dt: Array
    dz: Array


@dataclass(frozen=True)
class InteriorPoint:
    """Proximal interior-point method: 10 to 50 iterations, of one Cholesky factorisation each, on any data.

    It does not profit from a starting point.

    Args:
        max_iter: iterations before it gives up.
        check_every: iterations between two checks (active-set refinement, certificates).
        refine: Newton steps tried at each check; see `optlayers.solvers.newton`.
        scaling: equilibration passes.
        regularization: starting value of rho and delta, which then shrink with the complementarity.
        linear_steps: steps of iterative refinement in the solution of a linear system.
    """

    max_iter: int = 150
    check_every: int = 5
    refine: int = 5
    scaling: int = 10
    regularization: float = 1e-4
    linear_steps: int = 3

    def init(self, ops: Ops, cones: Cones, problem: Problem, x: Array, v: Array, active: Array) -> _State:
        sides = _split(ops, problem)
        one = ops.full((x.shape[0], 1), 1.0, x)
        start = _State(
            x=0 * x,
            y=0 * v,
            t=0 * sides.h + 1,
            z=sides.finite,
            rho=self.regularization * one,
            delta=self.regularization * one,
            rho_floor=RHO_FLOORS[0] * one,
            delta_floor=DELTA_FLOORS[0] * one,
            unit=one,
            boost=one,
            dx=0 * x,
            dy=0 * v,
        )
        return self._first_point(ops, problem, sides, start)

    def step(self, ops: Ops, cones: Cones, problem: Problem, state: _State) -> _State:
        sides = _split(ops, problem)
        return ops.repeat(self.check_every, lambda state: self._iterate(ops, problem, sides, state), state)

    def point(self, ops: Ops, cones: Cones, problem: Problem, state: _State) -> tuple[Array, Array]:
        s = problem.b - matvec(problem.A, state.x)
        y = state.y / _cost_scale(ops, problem)
        return state.x, ops.minimum(ops.maximum(s, problem.l), problem.u) - y

    def direction(self, state: _State) -> Direction:
        return Direction(state.dx, state.dy)

    def _first_point(self, ops: Ops, problem: Problem, sides: _Sides, start: _State) -> _State:
        """The minimiser of the objective plus |h - G x|^2 / 2, moved away from the boundary.

        Slacks have at least their mean size s there, which may be anything; multipliers, whose natural size
        in the scaled problem is 1, at least the square root of it. Measured against s for both (mean
        iterations 32, 2 of 28 linear programs not solved) and 1 for both (27, 1 not solved): 23, all solved.
        rho x and A'y, and delta y and A x, are added: regularisations of s^(1/4) times 1 / rho and delta took
        another 5 to 15 % off, the full ratio s failed on 4 of 77.
        """
        system = _factorize(ops, problem, sides, start)
        residuals = _Residuals(sides.cost * problem.q, -sides.h * sides.finite, -sides.e * sides.equal)
        step = self._solve(ops, problem, sides, system, residuals, 0 * sides.h[:, None], self.linear_steps)
        x = step.dx[:, 0]
        Ax = matvec(problem.A, x)
        t = (sides.h - ops.concat([Ax, -Ax], -1)) * sides.finite
        size = ops.maximum(ops.sqrt(ops.sum(t * t, -1, keepdims=True) / sides.count), 1.0)
        z = sides.finite * ops.maximum(-t / ops.sqrt(size), ops.sqrt(size))
        unit = ops.minimum(ops.sqrt(ops.sqrt(size)), 100.0)
        return start._replace(
            x=x,
            y=_joined(z),
            t=ops.where(sides.finite > 0, ops.maximum(t, size), 1.0),
            z=z,
            rho=start.rho / unit,
            delta=start.delta * unit,
            rho_floor=start.rho_floor / unit,
            delta_floor=start.delta_floor * unit,
            unit=unit,
        )

    def _iterate(self, ops: Ops, problem: Problem, sides: _Sides, state: _State) -> _State:
        t, z, finite, count = state.t[:, None], state.z[:, None], sides.finite[:, None], sides.count[:, None]
        residuals = _evaluate(ops, problem, sides, state)
        system = _factorize(ops, problem, sides, state)
        mu = ops.sum(t * z, -1, keepdims=True) / count
        some_mu = ops.where(mu > 0, mu, 1.0)
        affine = self._solve(ops, problem, sides, system, residuals, -t * z, self.linear_steps - 1)
        length = _longest(ops, state, affine, 1.0)
        mu_affine = ops.sum((t + length * affine.dt) * (z + length * affine.dz), -1, keepdims=True) / count
        sigma = ops.minimum(mu_affine / some_mu, 1.0) ** 3
        target = ops.maximum(sigma * mu, _least_mu(ops, sides, state, residuals))
        # Mehrotra's step, and one towards the centre for where that is short: two right-hand sides.
        second_order = affine.dt * affine.dz
        goals = [target - second_order, ops.maximum(target, 0.3 * mu) + 0 * second_order]
        rhs = finite * (ops.concat(goals, 1) - t * z)
        steps = self._solve(ops, problem, sides, system, residuals, rhs, self.linear_steps)
        tau = ops.where(mu < 0.1, ops.minimum(ops.maximum(1 - mu, 0.99), 1 - 1e-6), 0.95)
        lengths = _longest(ops, state, steps, tau)[..., 0]
        first = (lengths[:, 0] >= 0.3) | (lengths[:, 0] >= lengths[:, 1])
        step = _Step(*(select(ops, first, d[:, 0], d[:, 1]) for d in steps))
        length = ops.where(first, lengths[:, 0], lengths[:, 1])[:, None]
        return _advance(ops, problem, sides, state, residuals, step, length)

    def _solve(
        self, ops: Ops, problem: Problem, sides: _Sides, system: _System, residuals: _Residuals, rhs: Array, refinements: int
    ) -> _Step:
        """Steps (B, k, .) that cancel the residuals with  t dz + z dt = rhs (B, k, 2m).

        The matrix of condition up to 1 / (rho delta) costs digits, which refinement on the two equations

            (P + rho I) dx + A'dy = -r_dual,      dy / W - A dx = g

        regains; of its iterates the one with the smallest error is kept.
        """
        P, A, W, cost = problem.P, problem.A, system.W, sides.cost[:, None]
        g_sides = sides.finite[:, None] * (residuals.sides[:, None] + rhs / system.z)
        equal = (sides.equal * residuals.equal)[:, None] / system.delta
        Wg = _joined(system.side_weights * g_sides) + equal
        compliance = ops.where(W > 0, 1 / ops.where(W > 0, W, 1.0), 0.0)
        r_dual = residuals.dual[:, None] + ops.full((1, rhs.shape[1], 1), 0.0, rhs)

        def solve(first, second):
            dx = ops.cholesky_solve(system.cholesky, (first - second @ A).mT).mT
            return dx, W * (dx @ A.mT) + second

        def measured(dx, dy):
            first = -r_dual - cost * (dx @ P.mT) - system.rho * dx - dy @ A
            second = ops.where(W > 0, dx @ A.mT + compliance * (Wg - dy), 0.0)
            return dx, dy, first, second, ops.maximum(_size(ops, first), _size(ops, second))

        best = measured(*solve(-r_dual, Wg))
        for _ in range(refinements):
            dx, dy, first, second, error = best
            ddx, ddy = solve(first, W * second)
            new = measured(dx + ddx, dy + ddy)
            best = tuple(ops.where(new[-1] < error, a, b) for a, b in zip(new, best, strict=True))
        dx, dy = best[:2]
        Adx = dx @ A.mT
        Gdx = ops.concat([Adx, -Adx], -1)
        # Refinement has moved dy; the sides of a row share that as they share the weight of the row.
        moved = compliance * (dy - Wg) - Adx
        dz = system.side_weights * (Gdx + g_sides + ops.concat([moved, -moved], -1))
        dt = sides.finite[:, None] * (system.delta * dz - residuals.sides[:, None] - Gdx)
        return _Step(dx, dy, dt, dz)


def _joined(sides: Array) -> Array:
    """Lower minus upper: (..., 2m) to (..., m)."""
    m = sides.shape[-1] // 2
    return sides[..., :m] - sides[..., m:]


def _size(ops: Ops, x: Array) -> Array:
    return ops.amax(abs(x), -1, keepdims=True)


def _split(ops: Ops, problem: Problem) -> _Sides:
    l, u = (ops.broadcast_to(bound, problem.b.shape) for bound in problem.bounds)
    low, high = ops.isfinite(l) & (l != u), ops.isfinite(u) & (l != u)
    h = [problem.b - ops.where(low, l, 0.0), ops.where(high, u, 0.0) - problem.b]
    finite = ops.cast(ops.concat([low, high], -1), problem.b)
    equal = ops.cast(l == u, problem.b)
    e = problem.b - ops.where(l == u, l, 0.0)
    count = ops.maximum(ops.sum(finite, -1, keepdims=True), 1.0)
    return _Sides(equal, e, finite, ops.concat(h, -1), count, _cost_scale(ops, problem))


def _cost_scale(ops: Ops, problem: Problem) -> Array:
    """The factor (B, 1) that makes the larger of |q| and the mean column of P one.

    Equilibration has done that, except where a shared P has to have the same factor throughout the batch.
    """
    columns = ops.amax(abs(batched(problem.P)), -1)
    mean = ops.sum(columns, -1, keepdims=True) / max(columns.shape[-1], 1)
    size = ops.maximum(_size(ops, problem.q), mean)
    return 1 / ops.where(size > 0, size, 1.0)


def _evaluate(ops: Ops, problem: Problem, sides: _Sides, state: _State) -> _Residuals:
    Ax, Aty = matvec(problem.A, state.x), matvec(problem.A.mT, state.y)
    r_sides = sides.finite * (ops.concat([Ax, -Ax], -1) + state.t - sides.h)
    gradient = sides.cost * (matvec(problem.P, state.x) + problem.q)
    return _Residuals(gradient + Aty, r_sides, sides.equal * (Ax - sides.e))


def _largest(ops: Ops, residuals: _Residuals) -> Array:
    dual, sides, equal = (_size(ops, r) for r in residuals)
    return ops.maximum(ops.maximum(dual, sides), equal)


def _factorize(ops: Ops, problem: Problem, sides: _Sides, state: _State) -> _System:
    weights = state.z / (state.t + state.delta * state.z)
    m = state.y.shape[-1]
    W = weights[:, :m] + weights[:, m:] + sides.equal / state.delta
    rho = (state.rho * state.boost)[..., None]
    P, A, identity = (batched(M) for M in (problem.P, problem.A, ops.eye(state.x.shape[-1], state.x)))
    cholesky = ops.cholesky(sides.cost[..., None] * P + rho * identity + A.mT @ (W[..., None] * A))
    z = ops.where(sides.finite > 0, state.z, 1.0)[:, None]
    return _System(cholesky, rho, state.delta[..., None], z, weights[:, None], W[:, None])


def _least_mu(ops: Ops, sides: _Sides, state: _State, residuals: _Residuals) -> Array:
    """A complementarity (B, 1, 1) of 2 % of what the residuals contribute to the duality gap.

    The gap is r_dual'x + r_sides'z + r_equal'y + t'z. With t'z much below the rest the iterate is glued to
    the boundary while it still has far to go. With 0.1 % one more linear program of 44 was not solved, 10 %
    cost 5 % more iterations.
    """
    pairs = zip(residuals, (state.x, state.z, state.y), strict=True)
    dual, inequality, equality = (ops.sum(abs(r * w), -1, keepdims=True) for r, w in pairs)
    return (0.02 * (dual + inequality + equality) / sides.count)[:, None]


def _longest(ops: Ops, state: _State, step: _Step, tau: Array | float) -> Array:
    """Length (B, k, 1), at most 1, that goes a fraction tau of the way to the boundary."""
    z = ops.where(state.z > 0, state.z, 1.0)
    ratio = ops.maximum(-step.dt / state.t[:, None], -step.dz / z[:, None])
    nearest = ops.amax(ratio, -1, keepdims=True)
    return ops.where(nearest > tau, tau / ops.where(nearest > tau, nearest, 1.0), 1.0)


def _advance(
    ops: Ops, problem: Problem, sides: _Sides, state: _State, before: _Residuals, step: _Step, length: Array
) -> _State:
    """The next iterate and its regularisation; without a finite step the same with more regularisation."""
    t = ops.where(sides.finite > 0, state.t + length * step.dt, 1.0)
    z = ops.where(sides.finite > 0, state.z + length * step.dz, 0.0)
    x, y = state.x + length * step.dx, sides.equal * (state.y + length * step.dy) + _joined(z)
    new = state._replace(x=x, y=y, t=t, z=z, dx=x - state.x, dy=y - state.y)
    residual = _largest(ops, _evaluate(ops, problem, sides, new))
    # Residuals of this size are rounding: less regularisation would not reduce them.
    rounding = 50 * ops.eps(x) * (1 + sum(_size(ops, a) for a in (t, y, sides.h)))
    slow = (residual > ops.maximum(0.7 * _largest(ops, before), rounding)) & (length > 0.5)
    rho_floor = ops.maximum(state.rho_floor / 10, RHO_FLOORS[1] / state.unit)
    delta_floor = ops.maximum(state.delta_floor / 10, DELTA_FLOORS[1] * state.unit)
    rho_floor = ops.where(slow, rho_floor, state.rho_floor)
    delta_floor = ops.where(slow, delta_floor, state.delta_floor)
    mu, new_mu = (ops.sum(s.t * s.z, -1, keepdims=True) for s in (state, new))
    shrink = ops.where(mu > 0, ops.minimum(new_mu / ops.where(mu > 0, mu, 1.0), 1.0), 0.1)
    new = new._replace(
        rho=ops.maximum(state.rho * shrink, rho_floor),
        delta=ops.maximum(state.delta * shrink, delta_floor),
        rho_floor=rho_floor,
        delta_floor=delta_floor,
        boost=0 * state.boost + 1,
    )
    raised = ops.minimum(state.delta_floor * 10, DELTA_FLOOR_MAX * state.unit)
    boost = ops.minimum(state.boost * 100, 1e10)
    same = state._replace(boost=boost, delta_floor=raised, delta=ops.maximum(state.delta, raised))
    finite = ops.isfinite(residual + new_mu + ops.sum(x, -1, keepdims=True))[:, 0]
    return select(ops, finite, new, same)
