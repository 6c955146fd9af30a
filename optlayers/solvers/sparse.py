"""Large sparse problems on the host: a library solves, and Newton steps refine.

Two functions of NumPy arrays are offered to the frameworks: `SparseSolve.solve` and the inverse
`SparseSolve.invert` of the KKT system at its result. A matrix is given as entries (values, rows, columns),
each (B, N), of which those at the same place add up; P stands for (P + P') / 2. Vectors are q (B, n),
b (B, m), l and u (B, k); B is 1 where the batch shares one. All arrays may have further axes in front, of
equal length or of length 1. Problems are solved one after the other, in threads.
SciPy frees a factorisation only in the thread that made it, and so each thread keeps its own latest one.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import local
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from ..cones import Cones
from ..linalg.kkt import Problem
from ..linalg.rows import Linearization, flatten, inward, linearize, project, shapes, unflatten
from ..linalg.sparse import (
    HOST,
    REGULARIZATION,
    HostMatrix,
    SparseFactor,
    cone_sizes,
    derivative_factor,
    equilibrate,
    is_convex,
    same,
)
from ..status import Status, is_usable
from .base import RUNNING, Direction, Progress, certify, conclude, tolerances
from .host import INFINITE, Host, _program
from .refinement import Point, evaluate, units
from .scaling import Scaling

# Arrays that describe P and A, in front of all others.
MATRIX_ARRAYS = 6

# Of a thread: what defines a system, and its factor; the derivative asks for that of the solve.
_latest = local()


class _Memo(defaultdict[Host, list]):
    """What each solver keeps of earlier calls, to save time: results are the same without.

    Not copied, and not pickled.
    """

    def __init__(self):
        super().__init__(list)

    def __reduce__(self):
        return _Memo, ()


@dataclass(frozen=True)
class SparseSolve:
    """Solver of problems with m rows and n columns.

    Args:
        cones: the curved cones, in the last rows.
        solvers: tried in turn while there is no solution.
        eps: relative residual of a solution.
    """

    m: int
    n: int
    cones: Cones
    solvers: tuple[Host, ...]
    eps: float
    memo: _Memo = field(default_factory=_Memo, compare=False, repr=False)

    def output_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Shapes of what `solve` returns, of float arrays."""
        scalars = [(batch,)] * 5
        vectors = [(batch, self.n), (batch, self.m)]
        arrays = [shape for shape, _ in shapes(self.cones, batch, self.m - self.cones.rows)]
        return [*vectors, *scalars, *vectors, (batch, 1), *arrays]

    def solve(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """x, v, residual, iterations, x_unique, y_unique, status, the scaling, arrays of the linearisation.

        x, v and the linearisation are of the problem that is equilibrated by the scaling D, E, c.

        Args:
            arrays: entries of P and of A; q, b, l, u; perhaps (x, s, y) to start from.
        """
        lead, lanes = _lanes(arrays)
        if not lanes:
            return [np.zeros((*lead, *shape[1:])) for shape in self.output_shapes(1)]
        results = _in_threads(self._solve_lane, lanes)
        outputs = [np.stack(parts) for parts in zip(*results, strict=True)]
        return [x.reshape(*lead, *x.shape[1:]) for x in outputs]

    def invert(self, r: np.ndarray, *arrays: np.ndarray) -> np.ndarray:
        """(dx, dy) for r = (F_1, F_2) (..., B, n + m), see `SparseFactor.solve`; zero without derivative.

        Args:
            arrays: entries of P and of A; x_unique and y_unique; whether there is a derivative; the scaling
                and the linearisation, from `solve`. The system is that of the equilibrated problem.
        """
        system, lanes = _lanes(arrays, tuple(self.output_shapes(1)[4:]))
        lead = np.broadcast_shapes(system, r.shape[:-1])
        solutions = np.zeros((math.prod(lead), r.shape[-1]))
        if solutions.size:
            rows = np.broadcast_to(r, (*lead, r.shape[-1])).reshape(solutions.shape)
            at = np.broadcast_to(np.arange(len(lanes)).reshape(system), lead).ravel()
            own = [np.flatnonzero(at == i) for i in range(len(lanes))]
            parts = [(rows[i], *lane) for i, lane in zip(own, lanes, strict=True)]
            solutions[np.concatenate(own)] = np.concatenate(_in_threads(self._invert_lane, parts))
        return solutions.reshape(*lead, r.shape[-1])

    def _invert_lane(self, r: np.ndarray, *lane: np.ndarray) -> np.ndarray:
        x_unique, y_unique, is_derived, *arrays = lane[MATRIX_ARRAYS:]
        if not is_derived:
            return 0 * r
        D, E, c, *flat = (np.asarray(x, float)[None] for x in arrays)
        P, A = _scaled(*self._matrices(lane), Scaling(D, E, c))
        linearization = unflatten(self.cones, flat)
        factor = self._factor(P, A, linearization, not (x_unique and y_unique))
        return np.stack([np.concatenate(factor.solve(F[: self.n], F[self.n :])) for F in r])

    def _matrices(self, lane: Sequence[np.ndarray]) -> tuple[Any, Any]:
        check_triangles(*lane[1:3])
        P = _matrix(lane[:3], (self.n, self.n))
        return (P + P.T) / 2, _matrix(lane[3:6], (self.m, self.n))

    def _solve_lane(self, *lane: np.ndarray) -> list[np.ndarray]:
        """The outputs of `solve` for one problem."""
        q, b, l, u, *warm = (np.array(x, float)[None] for x in lane[MATRIX_ARRAYS:])
        finite = _is_finite(lane[0], lane[3], q, b, bounds=(l, u))
        # Of a problem with NaN or infinity only the shapes are used.
        P, A = self._matrices(lane) if finite else (sp.csc_array((k, self.n)) for k in (self.n, self.m))
        q, b, l, u = (z if finite else np.zeros_like(z) for z in (q, b, l, u))
        with np.errstate(all="ignore"):
            scaling, given = _scaling(self.cones, P, A), (P, q[0], A, b[0], l[0], u[0])
            P, A = _scaled(P, A, scaling)
            lane_solve = _LaneSolve(self, given, _scaled_problem(P, q, A, b, l, u, scaling), scaling)
            reason = self._fault(finite, P, l, u)
            best, status, iterations = lane_solve.run(warm) if reason is None else lane_solve.refuse(reason)
            # As `sensitivity.prepare`: rows at a bound without multiplier are held, or free if x needs it.
            step = inward(HOST, lane_solve.problem.bounds, best.v)
            linearization, freed = (lane_solve.linearize(best.v + z) for z in (-step, step))
            x_unique = y_unique = True
            if is_usable(status[0]):
                x_unique, y_unique = self._factor(P, A, linearization, False, best.factor).regularity()
                if step.any() and not self._factor(P, A, freed, False, best.factor).regularity()[0]:
                    x_unique, linearization = False, freed
        scalars = [best.residual[0], iterations[0], x_unique, y_unique, status[0]]
        scalars = [np.array(z, float) for z in scalars]
        return [best.x[0], best.v[0], *scalars, *(z[0] for z in (*scaling, *flatten(linearization)))]

    def _fault(self, finite: bool, P: Any, l: np.ndarray, u: np.ndarray) -> Status | None:
        """Why there is nothing to solve."""
        if not finite:
            return Status.NON_FINITE
        if ((l > u) | (l >= INFINITE) | (u <= -INFINITE)).any():
            return Status.PRIMAL_INFEASIBLE
        return None if is_convex(P) else Status.NON_CONVEX

    def _factor(
        self, P: Any, A: Any, linearization: Linearization, singular: bool, newton: SparseFactor | None = None
    ) -> SparseFactor:
        """The factor for derivatives: the latest one of this thread, or `newton`, if they are that."""
        system = (*(x for M in (P, A) for x in (M.data, M.indices, M.indptr)), *flatten(linearization))
        key, arrays, factor = getattr(_latest, "made", (None, (), None))
        if factor is not None and key == (self.cones, singular) and same(arrays, system):
            return factor
        factor = newton
        if factor is None or factor.e != REGULARIZATION or not factor.is_at(linearization):
            factor = derivative_factor(self.cones, P, A, linearization, singular)
        _latest.made = (self.cones, singular), system, factor
        return factor


class _LaneSolve(NamedTuple):
    """The solve of one equilibrated problem; its arrays have a batch axis of length 1."""

    settings: SparseSolve
    given: tuple[Any, ...]  # as it was, without a batch axis
    problem: Problem
    scaling: Scaling

    @property
    def nothing(self) -> Point:
        """A point that any other is better than."""
        factor: Any = None
        return Point(
            np.zeros((1, self.settings.n)), np.zeros((1, self.settings.m)), np.full(1, np.inf), factor
        )

    def refuse(self, reason: Status) -> Progress:
        """The outcome for data that no solver is asked about."""
        return Progress(self.nothing, np.full(1, reason.code), np.zeros(1))

    def run(self, warm: Sequence[np.ndarray]) -> Progress:
        """Refine the warm start if any, then the answer of each solver, until there is a solution."""
        settings, _, problem, (D, E, c) = self
        _, accept, _ = tolerances(HOST, settings.eps, problem.q)
        best = self.nothing
        status, steps = np.full(1, RUNNING), 0
        if warm and all(np.isfinite(z).all() for z in warm):
            x, s, y = warm
            start = x / D, s * E - y * c / E
            best, steps = self.refine(best, start, settings.solvers[0].refine)
        for solver in settings.solvers:
            if best.residual[0] <= accept or status[0] != RUNNING:
                break
            point, direction = self.call(solver)
            best, count = self.refine(best, point, solver.refine)
            steps += count
            if best.residual[0] > accept:
                status = certify(HOST, settings.cones, problem, direction)
        if best.residual[0] <= accept:
            status = np.full(1, Status.SOLVED.code)
        return conclude(HOST, Progress(best, status, np.full(1, steps)), settings.eps)

    def call(self, solver: Host) -> tuple[tuple[np.ndarray, np.ndarray], Direction]:
        """(x, v) and the certifying directions from a library, which has its own scaling."""
        cones, (D, E, c) = self.settings.cones, self.scaling
        answer = solver._solve(_program(cones, *self.given), self.settings.memo[solver])
        (x, dx), (y, dy) = (z / D for z in answer[::2]), (z * c / E for z in answer[1::2])
        slack = project(HOST, cones, self.problem.bounds, self.problem.b - x @ self.problem.A.mT)
        return (x, slack - y), Direction(dx, dy)

    def linearize(self, v: np.ndarray) -> Linearization:
        return linearize(HOST, self.settings.cones, self.problem.bounds, v)

    def refine(self, best: Point, start: tuple[np.ndarray, np.ndarray], steps: int) -> tuple[Point, int]:
        """The better of `best` and of the Newton iterates from `start`, as `refinement.refine`; the steps."""
        settings, (P, _, A, *_) = self.settings, self.problem
        target, *_ = tolerances(HOST, settings.eps, self.problem.q)
        relative_to = units(HOST, self.problem, self.scaling)
        factor: Any = None
        count, last, (x, v) = 0, 0.0, start
        while True:
            F, error, is_resolved, linearization = evaluate(
                HOST, settings.cones, self.problem, relative_to, x, v
            )
            if is_resolved[0] and error[0] < best.residual[0]:
                best = Point(x, v, error, factor)
            ended = count >= steps and error[0] >= 0.1 * last
            if best.residual[0] <= target or ended or not np.isfinite(error[0]):
                return best, count
            count, last = count + 1, error[0]
            # As on the dense path: little of it where F is linear between bounds.
            e = min(max(0.01 * error[0], REGULARIZATION), 0.01) if settings.cones.rows else REGULARIZATION
            # Where the active rows stay, so does the matrix.
            if factor is None or factor.e > e or not factor.is_at(linearization):
                factor = SparseFactor(settings.cones, P.matrix, A.matrix, linearization, e)
            dx, dy = (-z for z in factor.solve(F[0][0], F[1][0]))
            ds = -F[1][0] - A.matrix @ dx
            x, v = x + dx, v + (ds - dy)


def _scaling(cones: Cones, P: Any, A: Any) -> Scaling:
    """The scaling of `.scaling`, but for beta, in powers of two, with which nothing is rounded.

    c is that of P alone: as x and y grow with q, small multipliers would be less than errors of the slack.
    """
    m, n = A.shape
    K = sp.block_array([[P, A.T], [A, None]], format="coo")
    log = np.log2(equilibrate(K.data, K.row, K.col, n + m, passes=5))
    start = n + m - cones.rows
    for size in cone_sizes(cones):
        log[start : start + size] = log[start : start + size].mean()
        start += size
    D, E = np.exp2(np.round(log[None, :n])), np.exp2(np.round(log[None, n:]))
    size = abs(sp.diags_array(D[0]) @ P @ sp.diags_array(D[0])).max(axis=0).sum() / n or 1.0
    return Scaling(D, E, np.exp2(-np.round(np.log2([[size]]))))


def _scaled(P: Any, A: Any, scaling: Scaling) -> tuple[Any, Any]:
    """c D P D and E A D."""
    D, E, c = (z[0] for z in scaling)
    D = sp.diags_array(D)
    return c * (D @ P @ D), sp.diags_array(E) @ A @ D


def _scaled_problem(P: Any, q, A: Any, b, l, u, scaling: Scaling) -> Problem:
    """The problem with the scaled matrices P and A, and vectors yet to be scaled."""
    D, E, c = scaling
    k = l.shape[1]
    # As `Host` sees them: scaled, they might be below.
    l, u = np.where(b[:, :k] - l < INFINITE, l, -np.inf), np.where(u - b[:, :k] < INFINITE, u, np.inf)
    return Problem(HostMatrix(P), c * D * q, HostMatrix(A), E * b, E[:, :k] * l, E[:, :k] * u)


def check_triangles(rows: np.ndarray, columns: np.ndarray) -> None:
    """Raise for the places of a P of which only one triangle was given."""
    if (rows < columns).any() != (rows > columns).any():
        raise ValueError(
            "P has entries on one side of the diagonal only; give both triangles, P + P' - diag(P)"
        )


def _is_finite(*data: np.ndarray, bounds: Sequence[np.ndarray]) -> bool:
    return all(np.isfinite(x).all() for x in data) and not any(np.isnan(x).any() for x in bounds)


def _matrix(entries: Sequence[np.ndarray], shape: tuple[int, int]) -> Any:
    values, rows, columns = entries
    return sp.csc_array(sp.coo_array((np.asarray(values, float), (rows, columns)), shape=shape))


def _lanes(
    arrays: Sequence[np.ndarray], own: Sequence[tuple[int, ...]] = ()
) -> tuple[tuple[int, ...], list[tuple[np.ndarray, ...]]]:
    """The axes in front of all arrays, the batch axis included, and for each of their indices the arrays.

    Args:
        own: shapes, with the batch axis, of the arrays after those of the matrices; by default (B, k).
    """
    ndims = [len(shape) - 1 for shape in own] or [1] * (len(arrays) - MATRIX_ARRAYS)
    # Copied: the memory may be the framework's, which writes to it again.
    expanded = [np.array(x) for x in arrays]
    ndims = [1] * MATRIX_ARRAYS + ndims
    lead = np.broadcast_shapes(*(x.shape[: x.ndim - k] for x, k in zip(expanded, ndims, strict=True)))

    def at(x: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
        return x[tuple(i if size > 1 else 0 for i, size in zip(index, x.shape, strict=False))]

    return lead, [tuple(at(x, index) for x in expanded) for index in np.ndindex(*lead)]


def _in_threads(function: Callable, arguments: Sequence[tuple]) -> list:
    if len(arguments) == 1:
        return [function(*arguments[0])]

    def work(args: tuple) -> Any:
        try:
            return function(*args)
        finally:
            vars(_latest).clear()  # not when the thread has ended

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(work, arguments))
