"""Fixed points z = f(z) of maps of (B, k) to itself that treat each row, a sample, by itself.

A solver is an immutable record with

    init(ops, z) -> state
    step(ops, problem, k, z, fz, state, running) -> (z, state)      iteration k, from z and fz = f(z)

and `run` owns the only loop. Writing g(z) = f(z) - z, a step is z - H g(z) with some H for (f'(z) - I)^-1:

    Picard         H = -I
    Anderson       H from least squares over the last steps        Walker and Ni (2011)
    Broyden        H from rank-one updates                         Broyden (1965); Bai et al. (2019)
    NewtonKrylov   H g by GMRES with products f'(z) dz             Knoll and Keyes (2004)

States are (B, m, k) for a memory of m steps. Nothing here is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..ops import Array, MatrixFreeOps, select
from ..status import Status

RUNNING = -1


class Problem(NamedTuple):
    """The map f and, at a point z, its derivative dz to f'(z) dz."""

    value: Callable[[Array], Array]
    tangent: Callable[[Array], Callable[[Array], Array]]


class FixedPointSolver(Protocol):
    """What `run` needs of a solver; see the module's docstring."""

    def init(self, ops: MatrixFreeOps, z: Array) -> Any: ...
    def step(
        self,
        ops: MatrixFreeOps,
        problem: Problem,
        k: Any,
        z: Array,
        fz: Array,
        state: Any,
        running: Array,
    ) -> tuple[Array, Any]: ...


class Solution(NamedTuple):
    """Where `run` ended.

    Attributes:
        z: the iterate with the least residual (B, k).
        status: codes of `Status` (B,).
        iterations: steps taken (B,).
        residual: |f(z) - z| / |f(z)| (B,), infinite where no finite one was met.
        history: residual after each step (B, max_iter); a finished sample repeats its last one.
        state: of the solver.
    """

    z: Array
    status: Array
    iterations: Array
    residual: Array
    history: Array
    state: Any


def run(
    ops: MatrixFreeOps, solver: FixedPointSolver, problem: Problem, z: Array, tol: float, max_iter: int
) -> Solution:
    """Iterate from `z` until each residual is at most `tol`, or is not finite, or `max_iter` is spent.

    A finished sample is frozen: it keeps its value however long the others take.
    """
    accept = max(tol, 8 * ops.eps(z))
    index = ops.constant(np.arange(max_iter)[None], z)

    def judge(running, z, fz, best, status):
        residual = _relative(ops, fz, z)
        finite = ops.isfinite(residual)
        residual = ops.where(finite, residual, ops.inf)
        nearest = select(ops, running & (residual < best[1]), (z, residual), best)
        outcome = ops.where(residual <= accept, Status.SOLVED.code, RUNNING)
        outcome = ops.where(finite, outcome, Status.NON_FINITE.code)
        return residual, nearest, ops.where(running, outcome, status)

    def body(carry):
        k, z, fz, best, status, iterations, history, state = carry
        running = status == RUNNING
        new, state = solver.step(ops, problem, k, z, fz, state, running)
        z = select(ops, running, new, z)
        fz = problem.value(z)
        residual, best, status = judge(running, z, fz, best, status)
        history = ops.where((index >= k) & running[:, None], residual[:, None], history)
        return k + 1, z, fz, best, status, iterations + ops.to_int(running), history, state

    def unfinished(carry):
        return (carry[0] < max_iter) & ops.any_mapped(carry[4] == RUNNING)

    # Made of z and not of a constant: under a vectorising map the loop's state is mapped from the start.
    zero = ops.sum(0 * ops.where(ops.isfinite(z), z, 0.0), 1)
    fz, nothing = problem.value(z), (z, zero + ops.inf)
    status = ops.to_int(zero) + RUNNING
    residual, best, status = judge(status == RUNNING, z, fz, nothing, status)
    history = ops.broadcast_to(residual[:, None], (z.shape[0], max_iter)) + 0 * zero[:, None]
    carry = (0, z, fz, best, status, ops.to_int(zero), history, solver.init(ops, z))
    _, _, _, best, status, iterations, history, state = ops.while_loop(unfinished, body, carry)
    status = ops.where(status == RUNNING, Status.ITERATION_LIMIT.code, status)
    return Solution(best[0], status, iterations, best[1], history, state)


def _norm(ops: MatrixFreeOps, x: Array) -> Array:
    return ops.sqrt(ops.sum(x * x, -1))


def _relative(ops: MatrixFreeOps, fz: Array, z: Array) -> Array:
    return _norm(ops, fz - z) / (_norm(ops, fz) + 1e-30)


def _put(ops: MatrixFreeOps, rows: Array, row: Array, where: Array) -> Array:
    """`rows` (B, m, k) with `row` (B, k) in the places `where` (B, m)."""
    return ops.where(where[..., None], row[:, None], rows)


def _slot(ops: MatrixFreeOps, memory: int, k: Any, running: Array, like: Array) -> Array:
    """The place (B, memory) of step k - 1 in a ring: none for k = 0 nor for finished samples."""
    return (ops.constant(np.arange(memory)[None], like) == (k - 1) % memory) & running[:, None] & (k > 0)


def _combine(ops: MatrixFreeOps, weights: Array, rows: Array) -> Array:
    return (weights[:, None] @ rows)[:, 0]


def _products(ops: MatrixFreeOps, rows: Array, x: Array) -> Array:
    return (rows @ x[..., None])[..., 0]


@dataclass(frozen=True)
class Picard:
    """z <- (1 - damping) z + damping f(z), which converges where f is a contraction.

    Example:
        >>> from optlayers.torch import Picard
        >>> Picard(damping=0.5)
        Picard(damping=0.5)
    """

    damping: float = 1.0

    def init(self, ops, z):
        return ()

    def step(self, ops, problem, k, z, fz, state, running):
        return z + self.damping * (fz - z), state


class _AndersonState(NamedTuple):
    z: Array
    g: Array
    dZ: Array
    dG: Array


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration (Walker and Ni 2011): the step of least residual over the last `memory` ones.

        gamma = argmin |g - dG' gamma|,     z <- z + damping g - (dZ + damping dG)' gamma

    dZ and dG hold differences of z and of g = f(z) - z. The least squares are solved by normal equations on
    rows of dG scaled to unit length; a sample whose equations are singular takes the damped Picard step.

    Args:
        memory: number of differences kept; storage is 2 (B, memory, k).
        regularization: added to the unit diagonal of the normal equations; None is 100 times the rounding.
        damping: weight of the new residual.

    Example:
        >>> from optlayers.torch import Anderson
        >>> Anderson(memory=3).damping
        1.0
    """

    memory: int = 5
    regularization: float | None = None
    damping: float = 1.0

    def init(self, ops, z):
        nothing = ops.broadcast_to(0 * z[:, None], (z.shape[0], self.memory, z.shape[1]))
        return _AndersonState(z, 0 * z, nothing, nothing)

    def step(self, ops, problem, k, z, fz, state, running):
        g, slot = fz - z, _slot(ops, self.memory, k, running, z)
        dZ = _put(ops, state.dZ, z - state.z, slot)
        dG = _put(ops, state.dG, g - state.g, slot)
        gamma = self._weights(ops, dG, g)
        new = z + self.damping * g - _combine(ops, gamma, dZ + self.damping * dG)
        return new, _AndersonState(z, g, dZ, dG)

    def _weights(self, ops, dG, g):
        size = _norm(ops, dG)
        unit = dG / ops.where(size > 0, size, 1.0)[..., None]
        diagonal = 100 * ops.eps(g) if self.regularization is None else self.regularization
        empty = ops.where(size > 0, diagonal, 1.0)  # an empty row gets the equation gamma = 0
        matrix = unit @ unit.mT + empty[..., None] * ops.eye(self.memory, g)[None]
        rhs = _products(ops, unit, g)[..., None]
        gamma = ops.cholesky_solve(ops.cholesky(matrix), rhs)[..., 0]
        usable = ops.all(ops.isfinite(gamma), -1)[:, None]
        return ops.where(usable, gamma, 0.0) / ops.where(size > 0, size, 1.0)


class _BroydenState(NamedTuple):
    z: Array
    g: Array
    U: Array
    V: Array


@dataclass(frozen=True)
class Broyden:
    """Broyden's good method with limited memory, for maps that are no contractions.

        z <- z - damping H g,      H = -I + sum_i u_i v_i'

    where H fulfils the last secant equation (Broyden 1965; for equilibrium layers Bai et al. 2019). H starts
    anew after `memory` updates.

    Args:
        memory: number of updates kept; storage is 2 (B, memory, k).
        damping: factor of the step.

    Example:
        >>> from optlayers.torch import Broyden
        >>> Broyden(memory=10).memory
        10
    """

    memory: int = 20
    damping: float = 1.0

    def init(self, ops, z):
        nothing = ops.broadcast_to(0 * z[:, None], (z.shape[0], self.memory, z.shape[1]))
        return _BroydenState(z, 0 * z, nothing, nothing)

    def step(self, ops, problem, k, z, fz, state, running):
        g = fz - z
        U, V = self._update(ops, k, z - state.z, g - state.g, state, running)
        return z - self.damping * inverse_product(ops, U, V, g), _BroydenState(z, g, U, V)

    def _update(self, ops, k, s, y, state, running):
        slot = _slot(ops, self.memory, k, running, s)
        anew = slot[:, :1, None]  # the first place is written again: forget the others
        U, V = (ops.where(anew, 0.0, rows) for rows in (state.U, state.V))
        Hy, sH = inverse_product(ops, U, V, y), inverse_product(ops, V, U, s)
        product = ops.sum(s * Hy, -1)
        valid = abs(product) > ops.eps(s) * _norm(ops, s) * _norm(ops, Hy)
        u = (s - Hy) / ops.where(valid, product, 1.0)[:, None]
        slot = slot & valid[:, None]
        return _put(ops, U, u, slot), _put(ops, V, sH, slot)


def inverse_product(ops: MatrixFreeOps, U: Array, V: Array, x: Array) -> Array:
    """(-I + U'V) x for rank-one terms U, V (B, m, k): Broyden's H; with U and V exchanged its transpose."""
    return _combine(ops, _products(ops, V, x), U) - x


@dataclass(frozen=True)
class NewtonKrylov:
    """Newton's method, its linear equations (I - f'(z)) dz = f(z) - z solved by GMRES.

    It needs products f'(z) dz and no matrix (Knoll and Keyes 2004). There is no line search.

    Args:
        krylov: most GMRES iterations a step; storage is 2 (B, krylov, k).
        inner_tol: relative residual at which GMRES stops.
        damping: factor of the step.

    Example:
        >>> from optlayers.torch import NewtonKrylov
        >>> NewtonKrylov(krylov=30).inner_tol
        0.001
    """

    krylov: int = 20
    inner_tol: float = 1e-3
    damping: float = 1.0

    def init(self, ops, z):
        return ()

    def step(self, ops, problem, k, z, fz, state, running):
        tangent = problem.tangent(z)
        rhs = ops.where(running[:, None], fz - z, 0.0)
        dz = gmres(ops, lambda d: d - tangent(d), rhs, self.krylov, self.inner_tol)
        return z + self.damping * dz, state


def gmres(
    ops: MatrixFreeOps, apply: Callable[[Array], Array], rhs: Array, max_iter: int, tol: float
) -> Array:
    """x of least |rhs - apply(x)| in the Krylov space, row by row (B, k), without restarts.

    Adaptive simpler GMRES (Jiranek and Rozloznik 2010): images Q = apply(P) are kept orthonormal, so there is
    no small least-squares problem; the next direction is the residual if it fell, else the last image.
    """
    start = _norm(ops, rhs)
    index = ops.constant(np.arange(max_iter)[None], rhs)
    tiny = 8 * ops.eps(rhs)

    def body(carry):
        j, x, r, p, P, Q = carry
        p = p / _or_one(ops, _norm(ops, p))[:, None]
        q = apply(p)
        size = _norm(ops, q)
        for _ in range(2):  # once more against rounding
            weights = _products(ops, Q, q)
            p, q = p - _combine(ops, weights, P), q - _combine(ops, weights, Q)
        left = _norm(ops, q)
        scale = (ops.where(left > tiny * size, 1.0, 0.0) / _or_one(ops, left))[:, None]
        p, q = p * scale, q * scale
        step = ops.sum(q * r, -1)[:, None]
        before, x, r = _norm(ops, r), x + step * p, r - step * q
        fell = _norm(ops, r) < 0.9 * before
        place = ops.broadcast_to(index == j, P.shape[:2])
        return j + 1, x, r, select(ops, fell, r, q), _put(ops, P, p, place), _put(ops, Q, q, place)

    def unfinished(carry):
        return (carry[0] < max_iter) & ops.any_mapped(_norm(ops, carry[2]) > tol * start)

    nothing = ops.broadcast_to(0 * rhs[:, None], (rhs.shape[0], max_iter, rhs.shape[1]))
    return ops.while_loop(unfinished, body, (0, 0 * rhs, rhs, rhs, nothing, nothing))[1]


def _or_one(ops: MatrixFreeOps, x: Array) -> Array:
    return ops.where(x > 0, x, 1.0)
