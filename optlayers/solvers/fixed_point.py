"""Fixed points z = f(z) of maps of (B, k) to itself that treat each row, a sample, by itself.

A solver is an immutable record with

    init(ops, z, g) -> state                                        from the first z and g = f(z) - z
    step(ops, problem, k, z, g, state, running) -> (z, state)       iteration k, from z and g

and `run` owns the only loop. A step is z - H g with some H for (f'(z) - I)^-1:

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

from ..linalg.basis import combine, empty_rows, products
from ..linalg.gmres import gmres
from ..ops import Array, MatrixFreeOps, select
from ..status import Status


class Problem(NamedTuple):
    """The map f and, at a point z, its derivative dz to f'(z) dz."""

    value: Callable[[Array], Array]
    tangent: Callable[[Array], Callable[[Array], Array]]


class FixedPointSolver(Protocol):
    """What `run` needs of a solver; see the module's docstring."""

    def init(self, ops: MatrixFreeOps, z: Array, g: Array) -> Any: ...
    def step(
        self,
        ops: MatrixFreeOps,
        problem: Problem,
        k: Any,
        z: Array,
        g: Array,
        state: Any,
        running: Array,
    ) -> tuple[Array, Any]: ...


class Solution(NamedTuple):
    """Where `run` ended.

    Attributes:
        z: the iterate with the least residual (B, k).
        status: codes of `Status` (B,).
        iterations: steps taken (B,).
        residual: |f(z) - z| / max(|f(z)|, tol) (B,), infinite where no finite one was met.
        history: residual after each step (B, max_iter); a finished sample repeats its last one. It is (B, 0)
            where it was not to be recorded.
        trajectory: for each number of steps that was to be recorded, z after so many (B, k).
        state: of the solver.
    """

    z: Array
    status: Array
    iterations: Array
    residual: Array
    history: Array
    trajectory: tuple[Array, ...]
    state: Any


def run(
    ops: MatrixFreeOps,
    solver: FixedPointSolver,
    problem: Problem,
    z: Array,
    tol: float,
    max_iter: int,
    record: tuple[int, ...] = (),
    with_history: bool = False,
) -> Solution:
    """Iterate from `z` until each residual is at most `tol`, or is not finite, or `max_iter` is spent.

    A finished sample stays where it is however long the others take. Should it depend on them, so that it is
    no solution any more, it runs on.
    """
    accept = max(tol, 8 * ops.eps(z))

    def observe(z, running, best, last):
        """g at z; the nearest iterate and its residual, the last residual, and who runs on, from there."""
        fz = problem.value(z)
        g = fz - z
        # The maximum is for solutions z = 0, near which no step makes a relative residual small.
        residual = ops.norm(g) / ops.maximum(ops.norm(fz), accept)
        is_finite = residual < ops.inf  # which NaN is not either
        residual = ops.where(is_finite, residual, ops.inf)
        again = ~running & (last <= accept) & (residual > 2 * accept)
        running = running | again
        nearer, new = again | (running & (residual < best[1])), (z, residual)
        some = lambda new: select(ops, nearer, new, best)
        best = ops.cond_or_both(~ops.all(nearer), some, lambda new: new, new)
        return g, best, ops.where(running, residual, last), running & is_finite & (residual > accept)

    def body(carry):
        k, z, g, best, last, running, iterations, history, trajectory, state = carry
        z, state = solver.step(ops, problem, k, z, g, state, running)
        z = ops.where(running[:, None], z, best[0])
        iterations = iterations + ops.to_int(running)
        g, best, last, running = observe(z, running, best, last)
        history = ops.put(history, k, last) if with_history else history
        trajectory = tuple(
            ops.cond(k < steps, lambda new, _: new, lambda _, old: old, best[0], old)
            for steps, old in zip(record, trajectory, strict=True)
        )
        return k + 1, z, g, best, last, running, iterations, history, trajectory, state

    def unfinished(carry):
        return (carry[0] < max_iter) & ops.any_mapped(carry[5])

    # Made of z and not of a constant: under a vectorising map the loop's state is mapped from the start.
    first = z[:, :1]
    zero = ops.sum(0 * ops.where(ops.isfinite(first), first, 0.0), 1)
    g, best, last, running = observe(z, zero == 0, (z, zero + ops.inf), zero)
    rows = max_iter if with_history else 0
    history = ops.broadcast_to(last[None], (rows, z.shape[0])) + 0 * zero[None]
    trajectory = tuple(best[0] for _ in record)
    carry = (0, z, g, best, last, running, ops.to_int(zero), history, trajectory, solver.init(ops, z, g))
    carry = ops.while_loop(unfinished, body, carry)
    k, _, _, best, last, _, iterations, history, trajectory, state = carry
    is_later = ops.constant(np.arange(rows)[:, None], z) >= k
    history = ops.where(is_later, last[None], history).mT
    status = ops.where(last < ops.inf, Status.ITERATION_LIMIT.code, Status.NON_FINITE.code)
    status = ops.where(last <= accept, Status.SOLVED.code, status)
    return Solution(best[0], status, iterations, best[1], history, trajectory, state)


@dataclass(frozen=True)
class Picard:
    """z <- (1 - damping) z + damping f(z), which converges where f is a contraction.

    Example:
        >>> from optlayers.torch import Picard
        >>> Picard(damping=0.5)
        Picard(damping=0.5)
    """

    damping: float = 1.0

    def init(self, ops, z, g):
        return ()

    def step(self, ops, problem, k, z, g, state, running):
        return ops.weighted_sum([self.damping], [g], z), state


class _AndersonState(NamedTuple):
    z: Array
    g: Array
    steps: Array
    dG: Array
    gram: Array


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration (Walker and Ni 2011): the step of least residual over the last `memory` ones.

        gamma = argmin |g - dG' gamma|,     z <- z + damping g - (dZ + damping dG)' gamma

    dZ and dG hold differences of z and of g = f(z) - z. The least squares are solved by normal equations,
    scaled to a unit diagonal; a sample whose equations are singular takes the damped Picard step.

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

    def __post_init__(self):
        if self.memory < 1:
            raise ValueError(f"memory must be at least 1, got {self.memory}")

    def init(self, ops, z, g):
        steps, dG = (empty_rows(ops, self.memory, z) for _ in range(2))
        gram = ops.concat([empty_rows(ops, self.memory, z[:, :1])] * self.memory, 2)
        return _AndersonState(z, g, steps, dG, gram)

    def step(self, ops, problem, k, z, g, state, running):
        place, y = (k - 1) % self.memory, g - state.g  # zero in iteration 0
        steps = ops.put_row(state.steps, place, z - state.z + self.damping * y)
        dG = ops.put_row(state.dG, place, y)
        with_y, with_g = products(dG, y), products(dG, g)
        gram = ops.put_row(ops.put_row(state.gram, place, with_y).mT, place, with_y).mT
        gamma = self._weights(ops, gram, with_g)
        return z + self.damping * g - combine(gamma, steps), _AndersonState(z, g, steps, dG, gram)

    def _weights(self, ops, gram, rhs):
        """gamma (B, m) with (gram + regularization) gamma = rhs, all zero for a singular sample."""
        identity = ops.eye(self.memory, rhs)[None]
        size = ops.sqrt(ops.sum(gram * identity, -1))
        added = 100 * ops.eps(rhs) if self.regularization is None else self.regularization
        is_filled = size > 0
        size = ops.where(is_filled, size, 1.0)
        diagonal = ops.where(is_filled, added, size)  # an empty row gets the equation gamma = 0
        matrix = gram / (size[..., None] * size[:, None]) + diagonal[..., None] * identity
        gamma = ops.cholesky_solve(ops.cholesky(matrix), (rhs / size)[..., None])[..., 0]
        usable = ops.all(ops.isfinite(gamma), -1)[:, None]
        return ops.where(usable, gamma, 0.0) / size


class _BroydenState(NamedTuple):
    z: Array
    g: Array
    U: Array
    V: Array
    used: Array


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

    def __post_init__(self):
        if self.memory < 1:
            raise ValueError(f"memory must be at least 1, got {self.memory}")

    def init(self, ops, z, g):
        U, V = (empty_rows(ops, self.memory, z) for _ in range(2))
        return _BroydenState(z, g, U, V, ops.to_int(0 * z[:, 0]))

    def step(self, ops, problem, k, z, g, state, running):
        place = (k - 1) % self.memory
        U, V = (ops.leading(rows, place) for rows in (state.U, state.V))
        u, v = self._update(ops, U, V, place, z - state.z, g - state.g)
        keep = lambda row, rows: ops.where(running[:, None], row, rows[:, place])
        U = ops.put_row(state.U, place, keep(u, state.U))
        V = ops.put_row(state.V, place, keep(v, state.V))
        used = ops.where(running, place + 1, state.used)
        Hg = inverse_product(ops, *(ops.leading(rows, place + 1) for rows in (U, V)), place + 1, g)
        return z - self.damping * Hg, _BroydenState(z, g, U, V, used)

    def _update(self, ops, U, V, used, s, y):
        """The rows u and v that make H y = s, or zeros where there are none."""
        Hy, sH = inverse_product(ops, U, V, used, y), inverse_product(ops, V, U, used, s)
        product = ops.sum(s * Hy, -1)
        valid = abs(product) > ops.eps(s) * ops.norm(s) * ops.norm(Hy)
        u = (s - Hy) / ops.where(valid, product, 1.0)[:, None]
        return ops.where(valid[:, None], u, 0.0), ops.where(valid[:, None], sH, 0.0)


def inverse_product(ops: MatrixFreeOps, U: Array, V: Array, used: Any, x: Array) -> Array:
    """Broyden's H x = (-I + sum_i u_i v_i') x with the first `used` rows; U and V exchanged, H' x.

    Args:
        used: an integer, or one for each sample (B, 1); rows from there on are of an earlier cycle.
    """
    index = ops.constant(np.arange(U.shape[1])[None], x)
    return combine(ops.where(index < used, products(V, x), 0.0), U) - x


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

    def __post_init__(self):
        if self.krylov < 1:
            raise ValueError(f"krylov must be at least 1, got {self.krylov}")

    def init(self, ops, z, g):
        return ()

    def step(self, ops, problem, k, z, g, state, running):
        tangent = problem.tangent(z)
        rhs = ops.where(running[:, None], g, 0.0)
        dz = gmres(ops, lambda d: d - tangent(d), rhs, self.krylov, self.inner_tol)
        return z + self.damping * dz, state
