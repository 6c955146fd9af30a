"""Well-kept solver libraries for the CPU, one problem of the batch after another.

They solve; the result is refined and differentiated like that of the solvers of this package. One call from
the device takes the whole batch: see `Ops.call_host`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from ..cones import Cones
from ..linalg.kkt import Problem
from ..linalg.products import constraints, matvec
from ..linalg.sparse import equilibrate
from ..ops import Array, Ops
from .base import Direction

INFINITE = 1e20  # bounds from here on are none


class _Program(NamedTuple):
    """One problem: minimise 1/2 x'Px + q'x, G x + s = h, s in {0}^equal x {s >= 0}^inequalities x cones.

    Of P it has the upper triangle. Row i of G is `sign[i]` times row `source[i]` of the m original ones.
    """

    P: sp.csc_array
    q: np.ndarray
    G: sp.csc_array
    h: np.ndarray
    equal: int
    inequalities: int
    cones: Cones
    m: int
    source: np.ndarray
    sign: np.ndarray


class _HostState(NamedTuple):
    x: Array
    y: Array
    dx: Array
    dy: Array
    active: Array


class _Answer(NamedTuple):
    """x (n,), y (m,) and, where there is no solution, the certifying directions; else zeros."""

    x: np.ndarray
    y: np.ndarray
    dx: np.ndarray
    dy: np.ndarray


@dataclass(frozen=True)
class Host:
    """What the host solvers share: one step of the loop is one complete solve on the host.

    Args:
        max_iter: iteration limit of the library.
        options: further settings under the library's own names.
        refine: Newton steps tried on the answer; see `optlayers.solvers.refinement`.
        scaling: equilibration passes.
        most: it leaves problems to the next solver if this limits their number times (entries of A + 2,500),
            the latter for what a call takes whatever its size; None for no limit.
    """

    max_iter: int = 10_000
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    check_every: int = 0
    refine: int = 5
    scaling: int = 10
    most: int | None = None

    def with_option(self, name: str, value: Any) -> Host:
        return replace(self, options={**self.options, name: value})

    def takes(self, ops: Ops, problem: Problem, running: Array) -> bool:
        """Whether the problems that are `running` (B,) are few and small enough, where that is known."""
        m, n = problem.A.shape[-2:]
        return self.most is None or ops.holds(ops.sum(ops.to_int(running), -1) * (m * n + 2500) <= self.most)

    def init(self, ops: Ops, cones: Cones, problem: Problem, x: Array, v: Array, active: Array) -> _HostState:
        return _HostState(x, 0 * v, 0 * x, 0 * v, active)

    def step(self, ops: Ops, cones: Cones, problem: Problem, state: _HostState) -> _HostState:
        solve = partial(_solve_batch, self._solve, cones)
        shapes = [state.x.shape, state.y.shape, state.x.shape, state.y.shape]
        x, y, dx, dy = ops.call_host(solve, shapes, state.active, *problem)
        return _HostState(x, y, dx, dy, state.active)

    def point(self, ops: Ops, cones: Cones, problem: Problem, state: _HostState) -> tuple[Array, Array]:
        return state.x, problem.b - matvec(constraints(ops, cones, problem.A), state.x) - state.y

    def direction(self, state: _HostState) -> Direction:
        return Direction(state.dx, state.dy)

    def _solve(self, program: _Program, made: list | None = None) -> _Answer:
        """The answer; with `made`, it may keep there what helps with other data at the same places."""
        raise NotImplementedError


def _solve_batch(solve: Callable, cones: Cones, active: np.ndarray, *problem: np.ndarray) -> list[np.ndarray]:
    """x, y, dx, dy for the active problems, zeros for the others.

    Args:
        active: (..., B); the matrices and vectors have the same axes in front, or lack the last of them.
    """
    lead = active.shape

    def expand(array: np.ndarray, own: int) -> np.ndarray:
        at = array.ndim - own
        array = np.expand_dims(array, at) if at < len(lead) else array
        shape = array.shape[array.ndim - own :]
        return np.broadcast_to(array, (*lead, *shape)).reshape(active.size, *shape)

    data = [expand(array, own) for array, own in zip(problem, (2, 1, 2, 1, 1, 1), strict=True)]
    (n,), (m,) = data[1].shape[1:], data[3].shape[1:]
    results = [np.zeros((active.size, k)) for k in (n, m, n, m)]

    def work(i: int) -> None:
        # The bounds and matrices of a shared problem are read, never written.
        for result, part in zip(results, solve(_program(cones, *(a[i] for a in data))), strict=True):
            result[i] = part

    lanes = np.flatnonzero(active)
    if len(lanes) == 1:
        work(lanes[0])
    else:  # these libraries release the GIL while they solve
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(work, lanes))
    return [result.reshape(*lead, result.shape[-1]) for result in results]


def _program(cones: Cones, P, q, A, b, l, u) -> _Program:
    """Bounded rows l <= s <= u become equalities and up to two inequalities each; P and A dense or sparse."""
    if cones.groups:
        P, A = _whole(cones, P, A)
    k, m = l.shape[0], b.shape[0]
    equal = np.flatnonzero(l == u)
    lower = np.flatnonzero(np.isfinite(l) & (l != u) & (b[:k] - l < INFINITE))
    upper = np.flatnonzero(np.isfinite(u) & (l != u) & (u - b[:k] < INFINITE))
    curved = np.arange(k, m)
    # s >= l is A x + s' = b - l, s' >= 0;  s <= u is -A x + s' = u - b.
    h = np.concatenate([b[equal] - l[equal], b[lower] - l[lower], u[upper] - b[upper], b[curved]])
    source, sign = np.concatenate([equal, lower, upper, curved]), np.ones(h.size)
    sign[equal.size + lower.size : h.size - curved.size] = -1
    if sp.issparse(A):
        triangle, G = sp.triu(P, format="csc"), sp.csc_array(sp.csr_array(A)[source])
    else:
        triangle, G = _compressed(np.triu(P)), _compressed(A[source])
    G.data *= sign[G.indices]
    return _Program(triangle, q, G, h, equal.size, lower.size + upper.size, cones, m, source, sign)


def _whole(cones: Cones, P: np.ndarray, A: np.ndarray) -> tuple[sp.coo_array, sp.coo_array]:
    """Compact P and A, see `optlayers.linalg.products`, as sparse matrices."""
    n, shape = P.shape[-1], (len(A), len(P))
    columns = np.hstack([np.broadcast_to(np.arange(n), (len(A), n)), n + cones.owners(len(A)).T])
    rows, places = np.nonzero(A)
    A = sp.coo_array((A[rows, places], (rows, columns[rows, places])), shape)
    rows, places = np.nonzero(P)
    return sp.coo_array((P[rows, places], (rows, np.where(rows < n, places, rows))), P.shape[:1] * 2), A


def _compressed(matrix: np.ndarray) -> sp.csc_array:
    """A dense matrix in columns, in half the time that scipy takes."""
    m, n = matrix.shape
    entries = matrix.T.ravel()
    places = np.flatnonzero(entries)
    starts = np.searchsorted(places, m * np.arange(n + 1))
    return sp.csc_array((entries[places], places % m, starts), matrix.shape)


def _answer(program: _Program, outcome: str, x: np.ndarray, z: np.ndarray) -> _Answer:
    """What a library returned: a solution, or with `outcome` "primal" or "dual" a certificate."""
    x = np.zeros(program.q.size) if x is None or not np.all(np.isfinite(x)) else np.asarray(x)
    z = np.zeros(program.h.size) if z is None or not np.all(np.isfinite(z)) else np.asarray(z)
    y = np.bincount(program.source, program.sign * z, program.m)
    none_x, none_y = 0 * x, 0 * y
    if outcome == "primal":
        return _Answer(none_x, none_y, none_x, y)
    if outcome == "dual":
        return _Answer(none_x, none_y, x, none_y)
    return _Answer(x, y, none_x, none_y)


@dataclass(frozen=True)
class Clarabel(Host):
    """Clarabel: an interior-point method for every cone (Goulart and Chen 2024).

    Example:
        >>> import torch
        >>> from optlayers.torch import Clarabel, solve_qp
        >>> I, one, solver = torch.eye(2), torch.ones(2), Clarabel(options={"max_step_fraction": 0.9})
        >>> solve_qp(I, torch.tensor([-3.0, 0.5]), I, -one, one, solver=solver).x
        tensor([ 1.0000, -0.5000])
    """

    def _solve(self, program: _Program, made: list | None = None) -> _Answer:
        if (
            made is None
            or program.cones.rows
            or self.options.keys() & {"equilibrate_enable", "presolve_enable"}
        ):
            answer = _unless_panic(self._set_up(program))
            return _answer(program, _outcome(answer), answer.x, answer.z)
        # To set up takes up to four times as long as to solve. Scaled by us and not by Clarabel, which would
        # keep the scaling, a solver with new data gives what a new one would.
        program, restore = _equilibrated(program)
        solver = _made_before(made, program)
        if solver is None:
            solver = self._set_up(program, equilibrate_enable=False, presolve_enable=False)
        answer = solver.solve()
        if str(answer.status) == "Solved":
            made.append((program, solver))
        return _answer(program, _outcome(answer), *restore(np.array(answer.x), np.array(answer.z)))

    def _set_up(self, program: _Program, **options: bool) -> Any:
        import clarabel

        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.max_threads = 1
        for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas"):
            setattr(settings, name, 1e-10)
        settings.max_iter = self.max_iter
        for name, value in (options | dict(self.options)).items():
            if not hasattr(settings, name):
                raise ValueError(f"Clarabel has no setting {name!r}; see clarabel.DefaultSettings")
            setattr(settings, name, value)
        kinds = [(clarabel.ZeroConeT, program.equal), (clarabel.NonnegativeConeT, program.inequalities)]
        cones = [kind(size) for kind, size in kinds if size]
        cones += [clarabel.SecondOrderConeT(size) for size in program.cones.soc]
        cones += [clarabel.PSDTriangleConeT(order) for order in program.cones.psd]
        cones += [clarabel.ExponentialConeT() for _ in range(program.cones.exp)]
        for weights in program.cones.pow:
            is_3d = len(weights) == 2
            cones.append(clarabel.PowerConeT(weights[0]) if is_3d else clarabel.GenPowerConeT(weights, 1))
        return clarabel.DefaultSolver(program.P, program.q, program.G, program.h, cones, settings)


def _unless_panic(solver: Any) -> Any:
    """The answer of Clarabel, an empty one where an assertion of its own fails.

    In 0.11 that happens on power cones of more than 3 dimensions; it raises no Exception, and would end
    the whole batch.
    """
    try:
        return solver.solve()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return SimpleNamespace(status="Panic", x=None, z=None)


def _outcome(answer: Any) -> str:
    outcomes = {"PrimalInfeasible": "primal", "DualInfeasible": "dual"}
    outcomes |= {f"Almost{name}": outcome for name, outcome in outcomes.items()}
    return outcomes.get(str(answer.status), "")


def _equilibrated(program: _Program) -> tuple[_Program, Callable]:
    """A program without curved cones, scaled, and the way back for its x and z: x = D x', z = E z' / c.

    Of 124 hard quadratic programs Clarabel solves 119 to its tolerance, with its own scaling 113 and in 3 %
    more steps. More than 3 passes do not help.
    """
    P, G, n = program.P, program.G, program.q.size
    (i, j), (row, column) = ((M.indices, np.repeat(np.arange(n), np.diff(M.indptr))) for M in (P, G))
    values = np.concatenate([P.data, P.data, G.data, G.data])
    rows, columns = np.concatenate([i, j, n + row, column]), np.concatenate([j, i, column, n + row])
    scale = equilibrate(values, rows, columns, n + program.h.size, passes=3)
    D, E = scale[:n], scale[n:]
    p, q, g = P.data * D[i] * D[j], D * program.q, G.data * E[row] * D[column]
    largest = np.zeros(n)
    np.maximum.at(largest, np.concatenate([i, j]), np.concatenate([abs(p), abs(p)]))
    c = 1 / (max(largest.sum() / max(n, 1), abs(q).max(initial=0.0)) or 1.0)
    P, G = (sp.csc_array((values, M.indices, M.indptr), M.shape) for values, M in ((c * p, P), (g, G)))
    scaled = program._replace(P=P, q=c * q, G=G, h=E * program.h)
    return scaled, lambda x, z: (D * x, E * z / c)


def _made_before(made: list, program: _Program) -> Any:
    """A solver that was `made` for the structure of `program`, now with its data; None if there is none."""
    try:
        old, solver = made.pop()  # at once, as other threads may do the same
    except IndexError:
        return None
    pairs = (program.P, old.P), (program.G, old.G)
    same = all(np.array_equal(a.indptr, b.indptr) and np.array_equal(a.indices, b.indices) for a, b in pairs)
    if not same or (program.equal, program.inequalities) != (old.equal, old.inequalities):
        return None
    solver.update(P=program.P.data, q=program.q, A=program.G.data, b=program.h)
    return solver


@dataclass(frozen=True)
class SCS(Host):
    """SCS: a first-order method for every cone but the n-dimensional power cone (O'Donoghue 2021).

    Example:
        >>> import torch
        >>> from optlayers.torch import SCS, solve_qp
        >>> I, one, solver = torch.eye(2), torch.ones(2), SCS(max_iter=1000)
        >>> solve_qp(I, torch.tensor([-3.0, 0.5]), I, -one, one, solver=solver).x
        tensor([ 1.0000, -0.5000])
    """

    def _solve(self, program: _Program, made: list | None = None) -> _Answer:
        import scs

        order = np.concatenate([np.arange(program.h.size - program.cones.rows), self._rows(program)])
        cones = {"z": program.equal, "l": program.inequalities, **self._cones(program.cones)}
        data = {"P": program.P, "A": program.G[order], "b": program.h[order]}
        settings = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": self.max_iter, "verbose": False}
        answer = scs.solve(data | {"c": program.q}, cones, **settings | dict(self.options))
        z = np.empty(program.h.size)
        z[order] = answer["y"]
        outcome = {-2: "primal", -7: "primal", -1: "dual", -6: "dual"}.get(answer["info"]["status_val"], "")
        return _answer(program, outcome, answer["x"], z)

    @staticmethod
    def _cones(cones: Cones) -> dict[str, Any]:
        if any(len(weights) > 2 for weights in cones.pow):
            raise ValueError("SCS has no power cone of more than 3 dimensions; use Clarabel or ADMM")
        exponents = [weights[0] for weights in cones.pow]
        named = {"q": list(cones.soc), "s": list(cones.psd), "ep": cones.exp, "p": exponents}
        return {name: value for name, value in named.items() if value}

    @staticmethod
    def _rows(program: _Program) -> np.ndarray:
        """Rows of the cones in SCS's order: of a matrix, the lower triangle column by column."""
        cones, start, order = program.cones, program.h.size - program.cones.rows, []
        start += sum(cones.soc)
        order.append(np.arange(start - sum(cones.soc), start))
        for k in cones.psd:
            j, i = np.triu_indices(k)
            order.append(start + i * (i + 1) // 2 + j)
            start += k * (k + 1) // 2
        return np.concatenate([*order, np.arange(start, program.h.size)])


@dataclass(frozen=True)
class OSQP(Host):
    """OSQP: a first-order method for quadratic programs (Stellato et al. 2020).

    Example:
        >>> import torch
        >>> from optlayers.torch import OSQP, solve_qp
        >>> I, one, solver = torch.eye(2), torch.ones(2), OSQP(options={"rho": 1.0})
        >>> solve_qp(I, torch.tensor([-3.0, 0.5]), I, -one, one, solver=solver).x
        tensor([ 1.0000, -0.5000])
    """

    def _solve(self, program: _Program, made: list | None = None) -> _Answer:
        import osqp

        if program.cones.rows:
            raise ValueError("OSQP solves problems with linear constraints only; use Clarabel, SCS or ADMM")
        lower = np.where(np.arange(program.h.size) < program.equal, program.h, -np.inf)
        settings = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": self.max_iter, "polishing": True}
        # Its own tolerances of infeasibility are ten times wider than those of `certify`.
        settings |= {"eps_prim_inf": 1e-7, "eps_dual_inf": 1e-7, "verbose": False}
        solver = osqp.OSQP()
        # OSQP warns of the newer sparse arrays.
        P, G = sp.csc_matrix(program.P), sp.csc_matrix(program.G)
        solver.setup(P, program.q, G, lower, program.h, **settings | dict(self.options))
        answer = solver.solve(raise_error=False)
        if "primal infeasible" in answer.info.status:
            return _answer(program, "primal", None, answer.prim_inf_cert)
        if "dual infeasible" in answer.info.status:
            return _answer(program, "dual", answer.dual_inf_cert, None)
        return _answer(program, "", answer.x, answer.y)
