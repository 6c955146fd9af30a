"""Batched proximal interior-point method for quadratic programs.

    minimise 1/2 x'Px + q'x   subject to   A x + s = b,   l <= s <= u

A row has up to two sides, each with a slack t >= 0 and a multiplier z >= 0, and as a third one, without a
slack, the equality where l = u:

    A x + t = b - l,     -A x + t = u - b,     A x = b - l;     in short G x + t = h, y = z_1 - z_2 + z_3

An iteration is a predictor-corrector step (Mehrotra 1992) on the optimality conditions of the problem with
proximal terms on x (weight rho) and on z (weight delta), both centred at the iterate, so that the linear
systems are regular whatever the ranks of P and A (Friedlander and Orban 2012; Schwan et al. 2023):

    (P + rho I + A'WA) dx = -r_dual - A'W g,      dy = W (A dx + g)

W sums over the sides of a row the weights 1 / (t / z + delta), 1 / delta for an equality.

Shapes: x (B, n), y (B, m), sides (B, 3m) with 0 for t, z and h where there is none, a number per problem
(B, 1). Right-hand sides and directions have an axis of k systems with the same matrix, (B, k, n) and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..cones import Cones
from ..linalg.kkt import Problem
from ..linalg.normal import cholesky_solve, reduce
from ..linalg.products import batched, constraints, hessian, matvec, matvec_symmetric
from ..ops import Array, Ops, select
from .base import Direction

# The floors of rho and delta at the start, and where they come down to if progress is slow.
RHO_FLOORS = 1e-10, 1e-12
DELTA_FLOORS = 1e-8, 1e-10
DELTA_FLOOR_MAX = 1e-4  # failed factorisations raise it up to here
ENOUGH = 1e-8  # error of a linear system relative to its right-hand side


class _State(NamedTuple):
    x: Array
    t: Array
    z: Array
    r_dual: Array  # P x + q + A'y
    r_sides: Array  # G x + t - h
    rho: Array
    delta: Array
    rho_floor: Array
    delta_floor: Array
    unit: Array  # what 1 stands for in delta and 1 / rho, see `_start`
    boost: Array  # factor on rho after failed factorisations


class _Sides(NamedTuple):
    h: Array
    open: Array  # 1 for a side with a slack
    equal: Array  # 1 for an equality
    count: Array  # sides with a slack, at least 1
    cost: Array  # factor on the objective


class _System(NamedTuple):
    """The factorised linear system at an iterate."""

    cholesky: Array
    local: tuple[Array, ...]
    rho: Array  # (B, 1, 1)
    weights: Array  # (B, 1, 3m)


class _Step(NamedTuple):
    dx: Array
    dt: Array
    dz: Array


@dataclass(frozen=True)
class InteriorPoint:
    """Proximal interior-point method: 10 to 50 steps, of one Cholesky factorisation each, from any start.

    Args:
        max_iter: iterations before it gives up.
        check_every: iterations between two checks (active-set refinement, certificates).
        refine: Newton steps tried at each check; see `optlayers.solvers.refinement`.
        scaling: equilibration passes.
        regularization: starting value of rho and delta, which then shrink with the complementarity.
        linear_steps: most steps of iterative refinement of a solution of a linear system.

    Example:
        >>> import torch
        >>> from optlayers.torch import InteriorPoint, solve_qp
        >>> I, one = torch.eye(2), torch.ones(2)
        >>> solve_qp(None, torch.tensor([-3.0, 0.5]), I, -one, one, solver=InteriorPoint()).x
        tensor([ 1., -1.])
    """

    max_iter: int = 150
    check_every: int = 5
    refine: int = 5
    scaling: int = 10
    regularization: float = 1e-4
    linear_steps: int = 2

    def init(self, ops: Ops, cones: Cones, problem: Problem, x: Array, v: Array, active: Array) -> _State:
        """The minimiser of the objective plus |h - G x|^2 / 2, moved away from the boundary.

        Slacks may have any size there, s in the mean; multipliers of the scaled problem are of size 1. Slacks
        of at least s and multipliers of at least sqrt(s) left no linear program of 28 unsolved, s for both
        two, 1 for multipliers one. Regularisation follows the ratio s of the two sizes by its fourth root,
        which saved 10 % of the iterations; the ratio itself lost problems.
        """
        sides, one = _split(ops, problem), ops.full((x.shape[0], 1), 1.0, x)
        rho = self.regularization * one
        floors = RHO_FLOORS[0] * one, DELTA_FLOORS[0] * one
        cost, none = sides.cost * problem.q, 0 * sides.h
        origin = _State(0 * x, sides.open, sides.open, cost, none, rho, rho, *floors, one, one)
        system = _factorize(ops, cones, problem, sides, origin)
        A = constraints(ops, cones, problem.A)
        rhs = matvec(A.mT, _gather(system.weights[:, 0] * sides.h)) - cost
        x = cholesky_solve(ops, cones, system.cholesky, system.local, rhs[:, None])[:, 0]
        t = sides.open * (sides.h - _spread(ops, matvec(A, x)))
        size = ops.maximum(ops.sqrt(ops.sum(t * t, -1, keepdims=True) / sides.count), 1.0)
        unit = ops.minimum(ops.sqrt(ops.sqrt(size)), 100.0)
        state = origin._replace(
            x=x,
            t=sides.open * ops.maximum(t, size),
            z=sides.open * ops.maximum(-t / ops.sqrt(size), ops.sqrt(size)),
            rho=rho / unit,
            delta=rho * unit,
            rho_floor=floors[0] / unit,
            delta_floor=floors[1] * unit,
            unit=unit,
        )
        return _with_residuals(ops, cones, problem, sides, state)

    def step(self, ops: Ops, cones: Cones, problem: Problem, state: _State) -> _State:
        sides = _split(ops, problem)
        iterate = lambda state: self._iterate(ops, cones, problem, sides, state)
        return ops.repeat(self.check_every, iterate, state)

    def point(self, ops: Ops, cones: Cones, problem: Problem, state: _State) -> tuple[Array, Array]:
        s = problem.b - matvec(constraints(ops, cones, problem.A), state.x)
        y = _gather(state.z) / _cost_scale(ops, problem)
        return state.x, ops.minimum(ops.maximum(s, problem.l), problem.u) - y

    def direction(self, state: _State) -> Direction:
        # The diverging iterates turn into the direction sooner, and more steadily, than their increments.
        return Direction(state.x, _gather(state.z))

    def _iterate(self, ops: Ops, cones: Cones, problem: Problem, sides: _Sides, state: _State) -> _State:
        """Mehrotra's step, or one towards the centre where that is longer: two right-hand sides.

        The predictor goes through the same lines before them, as a pair of equal ones.
        """
        system = _factorize(ops, cones, problem, sides, state)
        t, z, count = state.t[:, None], (sides.open * state.z)[:, None], sides.count[:, None]
        mu = ops.sum(t * z, -1, keepdims=True) / count
        least = _least_mu(ops, sides, state, mu)
        tau = ops.where(mu < 0.1, ops.minimum(ops.maximum(1 - mu, 0.99), 1 - 1e-6), 0.95)

        def solve(carry):
            steps = self._solve(ops, cones, problem, sides, state, system, carry[0])
            lengths = _longest(ops, sides, state, steps, tau)
            dt, dz, length = steps.dt[:, :1], steps.dz[:, :1], lengths[:, :1]
            mu_affine = ops.sum((t + length * dt) * (z + length * dz), -1, keepdims=True) / count
            sigma = ops.minimum(mu_affine / ops.where(mu > 0, mu, 1.0), 1.0) ** 3
            target = ops.maximum(sigma * mu, least)
            goals = [target - dt * dz, ops.maximum(target, 0.3 * mu) + 0 * dz]
            return sides.open[:, None] * (ops.concat(goals, 1) - t * z), steps, lengths

        pair = ops.concat([-t * z, -t * z], 1)
        none = _Step(0 * ops.concat([state.x[:, None]] * 2, 1), pair, pair)
        _, steps, lengths = ops.repeat(2, solve, (pair, none, pair[..., :1]))
        first = ((lengths[:, 0] >= 0.3) | (lengths[:, 0] >= lengths[:, 1]))[:, 0]
        step = _Step(*(select(ops, first, d[:, 0], d[:, 1]) for d in steps))
        length = select(ops, first, lengths[:, 0], lengths[:, 1])
        return _advance(ops, cones, problem, sides, state, step, length)

    def _solve(
        self, ops: Ops, cones: Cones, problem: Problem, sides: _Sides, state: _State, system: _System, rhs
    ) -> _Step:
        """Steps (B, k, .) that cancel the residuals with  t dz + z dt = rhs (B, k, 3m).

        A matrix of condition up to 1 / (rho delta) costs digits, which refinement on the two equations

            (P + rho I) dx + A'dy = -r_dual,      dy / W - A dx = g

        regains; of its iterates the one with the smallest error is kept.
        """
        P, A = hessian(ops, problem.P), constraints(ops, cones, problem.A)
        cost = sides.cost[:, None]
        r_dual, r_sides = state.r_dual[:, None], state.r_sides[:, None]
        g_sides = r_sides + rhs / ops.where(sides.open > 0, state.z, 1.0)[:, None]
        W, Wg = _gather(system.weights, 1), _gather(system.weights * g_sides)
        compliance = ops.where(W > 0, 1 / ops.where(W > 0, W, 1.0), 0.0)
        r_dual = ops.broadcast_to(r_dual, (*rhs.shape[:2], r_dual.shape[-1]))

        start = 0 * r_dual, 0 * Wg, -r_dual, compliance * Wg, ops.inf + 0 * r_dual[..., :1]
        enough = ENOUGH * ops.maximum(_size(ops, start[2]), _size(ops, start[3]))

        def improve(best):
            dx, dy, first, second, error = best
            ddx = cholesky_solve(ops, cones, system.cholesky, system.local, first - matvec(A.mT, W * second))
            dx, dy = dx + ddx, dy + W * (matvec(A, ddx) + second)
            first = -r_dual - cost * matvec_symmetric(P, dx) - system.rho * dx - matvec(A.mT, dy)
            second = ops.where(W > 0, matvec(A, dx) + compliance * (Wg - dy), 0.0)
            new_error = ops.maximum(_size(ops, first), _size(ops, second))
            new = dx, dy, first, second, new_error
            # NaN, of a failed factorisation, is not a smaller error, but is to be seen.
            keeps = (new_error >= error) | (error <= enough)
            return tuple(ops.where(keeps, b, a) for a, b in zip(new, best, strict=True))

        is_rough = lambda best: ~(best[-1] <= enough)
        dx, dy, *_ = ops.repeat_while(1 + self.linear_steps, is_rough, improve, start)
        Adx = matvec(A, dx)
        # Refinement has moved dy; the sides of a row share that as they share the weight of the row.
        moved = compliance * (dy - Wg) - Adx
        dz = system.weights * (_spread(ops, Adx + moved) + g_sides)
        dt = sides.open[:, None] * (state.delta[:, None] * dz - r_sides - _spread(ops, Adx))
        return _Step(dx, dt, dz)


def _spread(ops: Ops, rows: Array) -> Array:
    return ops.concat([rows, -rows, rows], -1)


def _gather(sides: Array, sign: int = -1) -> Array:
    m = sides.shape[-1] // 3
    return sides[..., :m] + sign * sides[..., m : 2 * m] + sides[..., 2 * m :]


def _size(ops: Ops, x: Array) -> Array:
    return ops.amax(abs(x), -1, keepdims=True)


def _split(ops: Ops, problem: Problem) -> _Sides:
    low, high = (ops.broadcast_to(bound, problem.b.shape) for bound in problem.bounds)
    equal, zero = low == high, 0 * problem.b
    kinds = [ops.isfinite(low) & ~equal, ops.isfinite(high) & ~equal, equal]
    h = [problem.b - low, high - problem.b, problem.b - low]
    h = ops.concat([ops.where(kind, part, zero) for kind, part in zip(kinds, h, strict=True)], -1)
    low, high, equal = (ops.cast(kind, problem.b) for kind in kinds)
    open_sides = ops.concat([low, high, zero], -1)
    count = ops.maximum(ops.sum(open_sides, -1, keepdims=True), 1.0)
    return _Sides(h, open_sides, ops.concat([zero, zero, equal], -1), count, _cost_scale(ops, problem))


def _cost_scale(ops: Ops, problem: Problem) -> Array:
    """The factor (B, 1) that makes the larger of |q| and the mean column of P one.

    Equilibration has done that, except where a shared P has to have the same factor throughout the batch.
    """
    columns = ops.amax(abs(batched(problem.P)), -1)
    mean = ops.sum(columns, -1, keepdims=True) / max(columns.shape[-1], 1)
    size = ops.maximum(_size(ops, problem.q), mean)
    return 1 / ops.where(size > 0, size, 1.0)


def _with_residuals(ops: Ops, cones: Cones, problem: Problem, sides: _Sides, state: _State) -> _State:
    A = constraints(ops, cones, problem.A)
    gradient = sides.cost * (matvec_symmetric(hessian(ops, problem.P), state.x) + problem.q)
    r_sides = _spread(ops, matvec(A, state.x)) + state.t - sides.h
    r_dual = gradient + matvec(A.mT, _gather(state.z))
    return state._replace(r_dual=r_dual, r_sides=(sides.open + sides.equal) * r_sides)


def _residual(ops: Ops, state: _State) -> Array:
    return ops.maximum(_size(ops, state.r_dual), _size(ops, state.r_sides))


def _factorize(ops: Ops, cones: Cones, problem: Problem, sides: _Sides, state: _State) -> _System:
    opposing = ops.where(sides.open > 0, state.t + state.delta * state.z, state.delta)
    weights = ops.where(sides.open > 0, state.z, sides.equal) / opposing
    W, rho = _gather(weights, 1), state.rho * state.boost
    P = sides.cost[..., None] * batched(problem.P)
    matrix, local = reduce(ops, cones, P, problem.A, W, rho)
    return _System(ops.cholesky(ops.add_diagonal(matrix, rho)), local, rho[..., None], weights[:, None])


def _least_mu(ops: Ops, sides: _Sides, state: _State, mu: Array) -> Array:
    """A complementarity (B, 1, 1) of 2 % of what the residuals contribute to the duality gap, at most 0.3 mu.

    The gap is r_dual'x + r_sides'z + t'z. With t'z much below the rest the iterate is glued to the boundary
    while it still has far to go. With 0.1 % a linear program more was not solved, 10 % cost 5 % more steps.
    Without the limit mu would follow the diverging x or z of a problem that has no solution.
    """
    dual = ops.sum(abs(state.r_dual * state.x), -1, keepdims=True)
    primal = ops.sum(abs(state.r_sides * state.z), -1, keepdims=True)
    return ops.minimum((0.02 * (dual + primal) / sides.count)[:, None], 0.3 * mu)


def _longest(ops: Ops, sides: _Sides, state: _State, step: _Step, tau: Array | float) -> Array:
    """Length (B, k, 1), at most 1, that goes a fraction tau of the way to the boundary."""
    t, z = (ops.where(sides.open > 0, side, ops.inf)[:, None] for side in (state.t, state.z))
    nearest = ops.amax(ops.maximum(-step.dt / t, -step.dz / z), -1, keepdims=True)
    return ops.where(nearest > tau, tau / ops.where(nearest > tau, nearest, 1.0), 1.0)


def _advance(
    ops: Ops, cones: Cones, problem: Problem, sides: _Sides, state: _State, step: _Step, length: Array
) -> _State:
    """The next iterate and its regularisation; without a finite step the same with more regularisation."""
    x, t, z = (old + length * d for old, d in zip(state[:3], step, strict=True))
    new = state._replace(x=x, t=t, z=z)
    new = _with_residuals(ops, cones, problem, sides, new)
    residual = _residual(ops, new)
    # Residuals of this size are rounding: less regularisation would not reduce them.
    rounding = 50 * ops.eps(x) * (1 + _size(ops, t) + _size(ops, z) + _size(ops, sides.h))
    slow = (residual > ops.maximum(0.7 * _residual(ops, state), rounding)) & (length > 0.5)
    rho_floor = ops.maximum(state.rho_floor / 10, RHO_FLOORS[1] / state.unit)
    delta_floor = ops.maximum(state.delta_floor / 10, DELTA_FLOORS[1] * state.unit)
    rho_floor = ops.where(slow, rho_floor, state.rho_floor)
    delta_floor = ops.where(slow, delta_floor, state.delta_floor)
    mu, new_mu = (ops.sum(s.t * s.z, -1, keepdims=True) for s in (state, new))
    shrink = ops.where(mu > 0, ops.minimum(new_mu / ops.where(mu > 0, mu, 1.0), 1.0), 0.1)
    rho = ops.maximum(state.rho * shrink, rho_floor)
    delta = ops.maximum(state.delta * shrink, delta_floor)
    new = new._replace(rho=rho, delta=delta, rho_floor=rho_floor, delta_floor=delta_floor, boost=0 * rho + 1)
    raised = ops.minimum(state.delta_floor * 10, DELTA_FLOOR_MAX * state.unit)
    delta = ops.maximum(state.delta, raised)
    same = state._replace(delta=delta, delta_floor=raised, boost=ops.minimum(state.boost * 100, 1e10))
    finite = ops.isfinite(residual + new_mu + ops.sum(x, -1, keepdims=True))[:, 0]
    return select(ops, finite, new, same)
