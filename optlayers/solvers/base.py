"""The only solver loop: chunks of a solver's iterations, refinement, checks, and what became of each problem.

A solver is an immutable record with

    max_iter, check_every, refine, scaling          settings that the loop reads (check_every 0: one step)
    init(ops, cones, problem, x, v, active) -> state    from a starting point, on the scaled problem
    step(ops, cones, problem, state) -> state       `check_every` iterations on the whole batch
    point(ops, cones, problem, state) -> (x, v)     the current primal-dual point
    direction(state) -> Direction                   a proof that there is no solution, in the limit

The state is a tree of arrays (B, ...), or (1, ...) for what the batch shares.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..cones import Cones
from ..linalg import rows
from ..linalg.kkt import Factor, Problem
from ..linalg.normal import shapes
from ..linalg.products import constraints, hessian, matvec, matvec_symmetric, norm
from ..linalg.rows import unboundedness
from ..ops import Array, Ops
from ..status import Status
from .refinement import Point, refine
from .scaling import Scaling

RUNNING = -1
FAR = 1e7


class Direction(NamedTuple):
    """Directions of x (B, n) and y (B, m), which may prove that there is no solution."""

    dx: Array
    dy: Array


@runtime_checkable
class Solver(Protocol):
    """What `run` needs of a solver; see the module's docstring."""

    @property
    def max_iter(self) -> int: ...
    @property
    def check_every(self) -> int: ...
    @property
    def refine(self) -> int: ...
    @property
    def scaling(self) -> int: ...

    def init(self, ops: Ops, cones: Cones, problem: Problem, x: Array, v: Array, active: Array) -> Any: ...
    def step(self, ops: Ops, cones: Cones, problem: Problem, state: Any) -> Any: ...
    def point(self, ops: Ops, cones: Cones, problem: Problem, state: Any) -> tuple[Array, Array]: ...
    def direction(self, state: Any) -> Direction: ...


class Progress(NamedTuple):
    """Best point so far, status codes (B,) with RUNNING for the unfinished, and iterations spent (B,)."""

    best: Point
    status: Array
    iterations: Array


def rounds(solver: Solver) -> int:
    """Number of steps that `solver.max_iter` iterations make; one for a solver that counts none."""
    return -(-solver.max_iter // solver.check_every) if solver.check_every else 1


def tolerances(ops: Ops, eps: float, like: Array) -> tuple[float, float, float]:
    """Relative residuals: the target of refinement, that of a solution, that of an inaccurate one."""
    rounding = ops.eps(like)
    accept = max(eps, 50 * rounding)
    return max(1e-4 * eps, 4 * rounding), accept, max(1e3 * accept, accept**0.5)


def start(ops: Ops, cones: Cones, problem: Problem, x: Array, v: Array) -> Progress:
    """No progress yet: the starting point with an infinite residual, and no factor."""
    batch, n = x.shape
    zeros = lambda shape: ops.full(shape, 0.0, x)
    cholesky, *local = (zeros((batch, *own)) for own in shapes(cones, n))
    linearization = [zeros(shape) for shape, _ in rows.shapes(cones, batch, problem.l.shape[-1])]
    linearization = rows.unflatten(cones, linearization)
    factor = Factor(cholesky, tuple(local), linearization, ops.full((batch, 1), 1.0, x))
    best = Point(x, v, ops.full((batch,), ops.inf, x), factor)
    running = ops.to_int(ops.full((x.shape[0],), RUNNING, x))
    return Progress(best, running, 0 * running)


def run(
    ops: Ops,
    solver: Solver,
    cones: Cones,
    problem: Problem,
    scaling: Scaling,
    progress: Progress,
    eps: float,
) -> Progress:
    """Work on the problems that are still RUNNING until all are decided or `solver.max_iter` is spent."""

    def chunk(data, carry):
        problem, scaling = Problem(*data[:6]), Scaling(*data[6:])
        state, progress = carry
        running = progress.status == RUNNING
        state = solver.step(ops, cones, problem, state)
        point = solver.point(ops, cones, problem, state)
        progress = advance(ops, cones, problem, scaling, progress, point, solver.refine, eps)
        best, status, iterations = progress
        iterations = iterations + solver.check_every * ops.to_int(running)
        name = lambda status: ops.where(
            status == RUNNING, certify(ops, cones, problem, solver.direction(state)), status
        )
        status = ops.cond(ops.any(status == RUNNING), name, lambda status: status, status)
        return state, Progress(best, status, iterations)

    def body(carry):
        k, state, progress = carry
        data, ndims = (*problem, *scaling), (*Problem.ndims, *Scaling.ndims)
        return k + 1, *ops.on_rows(progress.status == RUNNING, chunk, data, ndims, (state, progress))

    def unfinished(carry):
        k, _, progress = carry
        return (k < rounds(solver)) & ops.any(progress.status == RUNNING)

    state = solver.init(ops, cones, problem, progress.best.x, progress.best.v, progress.status == RUNNING)
    return ops.while_loop(unfinished, body, (0, state, progress))[2]


def advance(
    ops: Ops,
    cones: Cones,
    problem: Problem,
    scaling: Scaling,
    progress: Progress,
    point: tuple[Array, Array],
    steps: int,
    eps: float,
) -> Progress:
    """Refine `point` by at most `steps` Newton steps; problems that it solves are SOLVED."""
    target, accept, _ = tolerances(ops, eps, problem.q)
    best, status, iterations = progress
    running = status == RUNNING
    best = refine(ops, cones, problem, scaling, best, point, steps, target, running)
    status = ops.where(running & (best.residual <= accept), Status.SOLVED.code, status)
    return Progress(best, status, iterations)


def conclude(ops: Ops, progress: Progress, eps: float) -> Progress:
    """Name the outcome of the problems that are still RUNNING."""
    best, status, iterations = progress
    _, _, inaccurate = tolerances(ops, eps, best.x)
    rest = ops.where(best.residual <= inaccurate, Status.INACCURATE.code, Status.ITERATION_LIMIT.code)
    return Progress(best, ops.where(status == RUNNING, rest, status), iterations)


def certify(ops: Ops, cones: Cones, problem: Problem, direction: Direction, eps: float = 1e-5) -> Array:
    """Status code (B,) of infeasibility where the direction proves it, else RUNNING.

    Primal: A'y = 0 and b'y below the least s'y over the set of s. Dual: P x = 0, q'x < 0 and -A x a
    direction in which that set is unbounded (Banjac et al. 2019). All relative to the size of y and x and in
    the equilibrated problem: in the user's units 1e-6 x <= 1 would not stop a large x. Where the small x'P x
    has a minimum along x, that is at least FAR away.
    """
    dx, dy = direction
    y_size, x_size = norm(ops, dy), norm(ops, dx)
    tiny = ops.eps(dx)
    A = constraints(ops, cones, problem.A)
    Aty, Ax = matvec(A.mT, dy), matvec(A, dx)
    Px = matvec_symmetric(hessian(ops, problem.P), dx)
    least, outside, inside = unboundedness(ops, cones, problem.bounds, dy, -Ax)
    slope = ops.sum(problem.q * dx, -1)
    primal = (
        (y_size > tiny)
        & (norm(ops, Aty) <= eps * y_size)
        & (norm(ops, outside) <= eps * y_size)
        & (ops.sum(problem.b * dy, -1) - least < -eps * y_size)
    )
    dual = (
        (x_size > tiny)
        & (norm(ops, Px) <= eps * x_size)
        & (norm(ops, Ax + inside) <= eps * x_size)
        & (slope < -eps * x_size * norm(ops, problem.q))
        & (slope * x_size < -FAR * ops.sum(dx * Px, -1))
    )
    code = ops.where(dual, Status.DUAL_INFEASIBLE.code, RUNNING)
    return ops.where(primal, Status.PRIMAL_INFEASIBLE.code, code)
