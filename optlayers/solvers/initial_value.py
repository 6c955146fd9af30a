"""Initial value problems y' = f(t, y) for a batch whose samples take steps of their own.

`RungeKutta.integrate` runs the only loop. It logs the steps that it accepted, for derivatives to be those of
these steps; or it is recorded itself, and then has the derivatives of y while times and step sizes have none.

Shapes: y (B, k); t, h (B,); output times (B, T); jumps (B, J). Time runs forward. Results are the rows of one
array (B, T + 2 J + 1, k): outputs, states before each jump, states after it, and a row for what nobody asked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..ops import Array, MatrixFreeOps, select
from ..status import Status
from .runge_kutta import Stages, interpolate
from .tableaux import Tableau

RUNNING = -1
SAFETY, LEAST, MOST = 0.9, 0.2, 10.0
EVENT_ITERATIONS = 20


class System(NamedTuple):
    """What is integrated; `theta` holds the arrays that the functions depend on.

    Attributes:
        field: (t, y, theta) to y'.
        jump: (t, y, j, theta) to the state after jump j (B,).
        event: (t, y, theta) to numbers (B,), at whose change of sign the solution ends; or None.
    """

    field: Callable[[Array, Array, Sequence[Array]], Array]
    jump: Callable[[Array, Array, Array, Sequence[Array]], Array]
    event: Callable[[Array, Array, Sequence[Array]], Array] | None = None


class Grid(NamedTuple):
    """The times at which something happens, ascending in each row.

    Attributes:
        outputs: output times (B, T); the first is the start, and the first `count` of a row are asked for.
        count: (B,).
        jumps: (B, J), infinite where there is none.
    """

    outputs: Array
    count: Array
    jumps: Array

    @property
    def rows(self) -> int:
        """The row of the results for what nobody asked for."""
        return self.outputs.shape[1] + 2 * self.jumps.shape[1]

    def end(self, ops: MatrixFreeOps) -> Array:
        return ops.take_rows(self.outputs, ops.maximum(self.count - 1, 0)[:, None])[:, 0]

    def blank(self, ops: MatrixFreeOps, y: Array) -> Array:
        """Results of which only the first is known, where it is asked for: the start y."""
        start = ops.where(self.count[:, None] > 0, y, ops.nan)[:, None]
        rest = ops.full((y.shape[0], self.rows, y.shape[1]), ops.nan, y) + 0 * ops.stop_gradient(y)[:, None]
        return ops.concat([start, rest], 1)

    def jump_rows(self, ops: MatrixFreeOps, jump: Array) -> Array:
        """Where the states before and after jumps (B,), -1 for none, go in the results (B, 2)."""
        before = ops.where(jump >= 0, self.outputs.shape[1] + jump, self.rows)
        return ops.stack([before, ops.minimum(before + self.jumps.shape[1], self.rows)], 1)


class Log(NamedTuple):
    """Accepted steps.

    Attributes:
        states: where every so many steps start (B, ceil(N / every), k).
        entries: an `Entry` of each step (B, N, 5).
        length: number of steps (B,).
    """

    states: Array
    entries: Array
    length: Array


class Entry(NamedTuple):
    """One step of each sample (B,): where it starts, its length, its first output, its number of outputs, up
    to one more than the window, and the jump at its end or -1."""

    t: Array
    h: Array
    row: Array
    hits: Array
    jump: Array


class Outcome(NamedTuple):
    """What became of each sample (B,): code of `Status`, counts, the time reached, and whether by the
    event."""

    status: Array
    accepted: Array
    rejected: Array
    evaluations: Array
    time: Array
    happened: Array


class _State(NamedTuple):
    k: Any
    t: Array
    y: Array
    f: Array
    h: Array
    error: Array
    row: Array
    jump: Array
    g: Array
    target: Array
    outcome: Outcome
    log: Log | None
    results: Array
    totals: tuple[Array, ...]


@dataclass(frozen=True)
class RungeKutta:
    """A method and how its steps are chosen.

    Args:
        tableau: the method.
        rtol, atol: a step is accepted if the root mean square of error / (atol + rtol |y|) is at most 1.
        step_size: fixed steps; None adapts them, or goes from one output to the next without error estimate.
        first_step: None chooses it.
        max_steps: most attempts, for each sample.
        every: of how many accepted steps one state is logged; 0 logs nothing.
    """

    tableau: Tableau
    rtol: float
    atol: float
    step_size: float | None = None
    first_step: float | None = None
    max_steps: int = 1024
    every: int = 1

    @property
    def is_adaptive(self) -> bool:
        return self.tableau.error is not None and self.step_size is None

    @property
    def lands(self) -> bool:
        """Whether steps end at output times."""
        return self.tableau.lands or not self.is_adaptive

    def stages(self, order: int = 0) -> Stages:
        # Implicit stages to a thousandth of what a step may be wrong by.
        return Stages(self.tableau, 1e-3 * min(self.rtol, 1e-3), order)

    def window(self, outputs: int) -> int:
        """Most outputs that one pass over a step writes; a step with more is passed over again."""
        return 1 if self.lands else min(outputs, max(8, outputs // 16))

    def integrate(
        self,
        ops: MatrixFreeOps,
        system: System,
        y: Array,
        grid: Grid,
        theta: Sequence[Array],
        quadrature: Callable | None = None,
        totals: Sequence[Array] = (),
        order: int = 0,
    ) -> tuple[Array, Array, Log | None, Outcome, Sequence[Array]]:
        """Results, final states, what was logged, what became of each sample, and the integrals.

        Args:
            quadrature: (t, h, y, increments) of accepted steps (h is zero for others) to what is added to
                `totals`.
            order: derivatives that results and final states have in y and theta, by being recorded.
        """
        return _Loop(ops, self, system, grid, theta, quadrature, order)(y, tuple(totals))

    def output_rows(self, ops: MatrixFreeOps, grid: Grid, entry: Entry) -> Array:
        """Where the outputs (B, W) of a step go in the results."""
        offset = ops.constant(np.arange(self.window(grid.outputs.shape[1]))[None], entry.row)
        return ops.where(offset < entry.hits[:, None], entry.row[:, None] + offset, grid.rows)

    def end_of(self, ops: MatrixFreeOps, grid: Grid, t: Array, h: Array, t_new: Array) -> Array:
        """The time of stages at a step's end: where it may jump there, f is that before the jump."""
        return t_new if grid.jumps.shape[1] == 0 else t_new - 4 * ops.eps(t) * (abs(t_new) + h)

    def divide(self, ops: MatrixFreeOps, h: Array, gap: Array) -> tuple[Array, Array]:
        """The step towards a time that must be met, and whether it meets it; no small step is left over."""
        if not self.is_adaptive:
            rounded = 1 - ops.eps(gap) ** 0.5  # for a gap of n steps to have n of them
            parts = 1 + ops.to_int(rounded * ops.minimum(gap / h, 1e9))
            return gap / ops.cast(parts, gap), parts == 1
        meets = 1.01 * h >= gap
        return ops.where(meets, gap, ops.where(2 * h > gap, gap / 2, h)), meets

    def error(self, ops: MatrixFreeOps, y: Array, y_new: Array, K: Sequence[Array]) -> Array:
        """The error relative to the tolerances (B,), not finite if the step is not."""
        if not self.is_adaptive:
            return 0 * (ops.sum(y_new, 1) + ops.sum(K[-1], 1))
        error = ops.weighted_sum(self.tableau.error, K)
        return _size(ops, error / (self.atol + self.rtol * ops.maximum(abs(y), abs(y_new))))

    def next_step(self, ops, h, h_full, meets, error, error_before, accepted) -> Array:
        """PI control (Gustafsson 1991), its weights near those of Hairer, Norsett and Wanner (1993)."""
        if not self.is_adaptive:
            return h_full
        order = self.tableau.order
        least = ops.maximum(error, 1e-10)
        growth = ops.where(
            accepted, least ** (-0.85 / order) * error_before ** (0.2 / order), least ** (-1 / order)
        )
        growth = ops.where(
            ops.isfinite(growth), ops.minimum(ops.maximum(SAFETY * growth, LEAST), MOST), LEAST
        )
        h_next = h * ops.where(accepted, growth, ops.minimum(growth, 0.9))
        return ops.where(accepted & meets, ops.maximum(h_next, h_full), h_next)


@dataclass(frozen=True)
class _Loop:
    ops: MatrixFreeOps
    method: RungeKutta
    system: System
    grid: Grid
    theta: Sequence[Array]
    quadrature: Callable | None
    order: int

    def field(self, t: Array, y: Array) -> Array:
        return self.system.field(t, y, self.theta)

    def event(self, t: Array, y: Array) -> Array:
        event = self.system.event
        return 0 * t if event is None else self.ops.stop_gradient(event(t, y, self.theta))

    def __call__(self, y: Array, totals: tuple[Array, ...]):
        ops, method, grid = self.ops, self.method, self.grid
        state = self._start(y, totals)

        def unfinished(state):
            return (state.k < method.max_steps) & ops.any_mapped(state.outcome.status == RUNNING)

        end = grid.end(ops)
        state = ops.while_loop(unfinished, lambda state: self._attempt(end, state), state)
        status = state.outcome.status
        status = ops.where(status == RUNNING, Status.STEP_LIMIT.code, status)
        outcome = state.outcome._replace(status=status, time=state.t)
        return state.results, state.y, state.log, outcome, state.totals

    def _start(self, y, totals):
        ops, method, grid = self.ops, self.method, self.grid
        t, f = grid.outputs[:, 0], self.field(grid.outputs[:, 0], y)
        zero = ops.to_int(0 * t)
        started = ops.all(ops.isfinite(y), 1) & ops.all(ops.isfinite(f), 1)
        status = ops.where(started, RUNNING, Status.NON_FINITE.code) + zero
        outcome = Outcome(status, zero, zero, zero + (2 if method.is_adaptive else 1), t, zero < 0)
        fixed_y, fixed_f = ops.stop_gradient(y), ops.stop_gradient(f)
        log = None
        if method.every > 0:
            entries = ops.broadcast_to(0 * t[:, None], (y.shape[0], 5))
            states = ops.rows(fixed_y, -(-method.max_steps // method.every) + 1)
            log = Log(states, ops.rows(entries, method.max_steps), zero)
        first_jump = ops.to_int(ops.sum(ops.where(grid.jumps < t[:, None], 1, 0), 1))
        g = self.event(t, fixed_y)
        h, inf = self._first_step(t, fixed_y, fixed_f), 0 * t + ops.inf
        results = grid.blank(ops, y)
        row = zero + ops.minimum(grid.count, 1)
        return _State(0, t, y, f, h, 0 * t + 1, row, first_jump, g, inf, outcome, log, results, totals)

    def _first_step(self, t, y, f):
        """Hairer, Norsett and Wanner (1993), II.4; all that is left, for methods of fixed step."""
        ops, method = self.ops, self.method
        if not method.is_adaptive:
            return 0 * t + (ops.inf if method.step_size is None else method.step_size)
        if method.first_step is not None:
            return 0 * t + method.first_step
        scale = method.atol + method.rtol * abs(y)
        d0, d1 = _size(ops, y / scale), _size(ops, f / scale)
        h0 = ops.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / ops.where(d1 > 0, d1, 1.0))
        h0 = ops.minimum(h0, self.grid.end(ops) - t)
        f1 = ops.stop_gradient(self.field(t + h0, y + h0[:, None] * f))
        d2 = _size(ops, (f1 - f) / scale) / ops.where(h0 > 0, h0, 1.0)
        d = ops.maximum(d1, d2)
        h1 = (0.01 / ops.maximum(d, 1e-15)) ** (1 / method.tableau.order)
        h1 = ops.where(d <= 1e-15, ops.maximum(1e-3 * h0, 1e-6), h1)
        return ops.where(ops.isfinite(h1), ops.minimum(100 * h0, h1), h0)

    def _attempt(self, end, state):
        ops, method, grid = self.ops, self.method, self.grid
        _, t, y, f, h_full, error_before, row, jump, g, target, outcome, _, _, _ = state
        running = outcome.status == RUNNING
        next_jump = _following(ops, grid.jumps, jump)
        stop = ops.minimum(ops.minimum(next_jump, end), target)
        if method.lands:
            stop = ops.minimum(stop, _following(ops, grid.outputs, row))
        h, meets = method.divide(ops, h_full, stop - t)
        h = ops.where(running, h, 0.0) if self.order > 0 else h
        t_new = ops.where(meets, stop, t + h)
        stage_end = method.end_of(ops, grid, t, h, t_new)
        taken, work = self._take(t, h, y, f, stage_end)
        *K, y_new, f_new = map(ops.stop_gradient, taken)
        error = method.error(ops, ops.stop_gradient(y), y_new, K)
        is_exact = running & (error <= 1)
        g_new, target, accepted = self._event(state, is_exact, target, t, h, y, K, t_new, y_new)
        if self.order > 0:
            *K, y_new, f_new = self._recorded(taken, running, accepted, t, h, y, f, stage_end)

        hits, times = self._hits(row, t_new)
        advances = accepted & (hits <= times.shape[1])
        happened = advances & (t_new >= target)
        leaps = advances & (t_new >= next_jump) & ~happened
        entry = Entry(t, h, row, ops.where(accepted, hits, 0), ops.where(leaps, jump, -1))
        log = self._write(state, entry, accepted)
        results = self._emit(state.results, entry, y, K, y_new, times)
        y_new, f_new, g_new, results = self._leap(entry, t_new, y_new, f_new, g_new, results)
        jump = jump + ops.to_int(leaps)
        totals = state.totals
        if self.quadrature is not None:
            added = self.quadrature(t, ops.where(advances, h, 0.0), y, K)
            totals = tuple([a + b for a, b in zip(totals, added, strict=True)])

        done = advances & (t_new >= end) & (_following(ops, grid.jumps, jump) > end) | happened
        h_next = method.next_step(ops, h, h_full, meets, error, error_before, accepted)
        failed, reason = self._failure(running & ~is_exact, error, h_next, t, end)
        status = ops.where(done, Status.SOLVED.code, ops.where(failed, reason, outcome.status))
        outcome = Outcome(
            status,
            outcome.accepted + ops.to_int(accepted),
            outcome.rejected + ops.to_int(running & ~accepted),
            outcome.evaluations + ops.where(running, work, 0) + ops.to_int(leaps),
            t,
            outcome.happened | happened,
        )
        moved = t_new, y_new, f_new, g_new, h_next, ops.maximum(error, 1e-4)
        if not ops.holds(ops.all(advances)):
            h_next = ops.where(is_exact, h_full, h_next)
            moved = select(ops, advances, moved, (t, y, f, g, h_next, error_before))
        t, y, f, g, h_next, error_before = moved
        row = row + ops.minimum(entry.hits, times.shape[1])
        return _State(
            state.k + 1, t, y, f, h_next, error_before, row, jump, g, target, outcome, log, results, totals
        )

    def _take(self, t, h, y, f, end):
        """Increments, state and slope at the end of a step, in one list; and evaluations of the field."""
        stages = self.method.stages(self.order)
        K, y_new, work = stages(self.ops, self.field, t, h, y, f, end)
        K, f_new = stages.complete(self.ops, self.field, h, K, y_new, f, end)
        return [*K, y_new, f_new], work if self.method.tableau.diagonal else work + 1

    def _recorded(self, taken, running, accepted, t, h, y, f, end):
        """What `_take` has found, where refused steps are not recorded: their derivatives may be infinite."""
        ops = self.ops
        if ops.holds(ops.all(accepted | ~running)):
            return taken
        fixed = ops.stop_gradient(y), ops.stop_gradient(f)
        if not ops.holds(ops.any(accepted)):
            return list(map(ops.stop_gradient, taken))
        return self._take(t, ops.where(accepted, h, 0.0), *select(ops, accepted, (y, f), fixed), end)[0]

    def _failure(self, refused, error, h_next, t, end):
        """Which samples cannot go on, and why."""
        ops = self.ops
        if not self.method.is_adaptive:
            return refused, Status.NON_FINITE.code
        # Not relative to the end, which may be far behind a fast start; but near t = 0 steps end somewhere.
        eps = ops.eps(t)
        underflow = refused & (h_next < 16 * eps * ops.maximum(abs(t), eps * abs(end)))
        return underflow, ops.where(ops.isfinite(error), Status.STEP_UNDERFLOW.code, Status.NON_FINITE.code)

    def _hits(self, row, t_new):
        """How many outputs a step to t_new meets, up to one more than the window, and their times (B, W)."""
        ops, outputs = self.ops, self.grid.outputs
        window = self.method.window(outputs.shape[1])
        rows = row[:, None] + ops.constant(np.arange(window + 1)[None], row)
        times = ops.take_rows(outputs, ops.minimum(rows, outputs.shape[1] - 1))
        met = (rows < self.grid.count[:, None]) & (times <= t_new[:, None])
        return ops.to_int(ops.sum(ops.where(met, 1, 0), 1)), times[:, :window]

    def _write(self, state, entry, accepted):
        """Every sample writes; what was not accepted is written over, or lies behind the log's end."""
        ops, log, every = self.ops, state.log, self.method.every
        if log is None:
            return None
        columns = ops.stack([ops.cast(x, state.y) for x in entry], 1)[:, None]
        states = ops.grown(log.states, state.k // every)
        entries = ops.grown(log.entries, state.k)
        place = log.length[:, None]
        if every > 1:
            place = ops.where(place % every == 0, place // every, states.shape[1] - 1)
        states = ops.put_rows(states, place, state.y[:, None])
        entries = ops.put_rows(entries, log.length[:, None], columns)
        return Log(states, entries, log.length + ops.to_int(accepted))

    def _emit(self, results, entry, y, K, y_new, times):
        ops, method = self.ops, self.method

        def emit(results):
            values = y_new[:, None]
            if not method.lands:
                values = interpolate(ops, method.tableau, entry.t, entry.h, y, K, times)
            return ops.put_rows(results, method.output_rows(ops, self.grid, entry), values)

        return ops.cond(ops.any_mapped(entry.hits > 0), emit, lambda results: results, results)

    def _leap(self, entry, t_new, y_new, f_new, g_new, results):
        ops, grid = self.ops, self.grid
        if grid.jumps.shape[1] == 0:
            return y_new, f_new, g_new, results

        def leap(y_new, f_new, g_new, results):
            leaps, jump = entry.jump >= 0, ops.maximum(entry.jump, 0)
            after = select(ops, leaps, self.system.jump(t_new, y_new, jump, self.theta), y_new)
            results = ops.put_rows(results, grid.jump_rows(ops, entry.jump), ops.stack([y_new, after], 1))
            restarted = after, self.field(t_new, after), self.event(t_new, after)
            return *select(ops, leaps, restarted, (after, f_new, g_new)), results

        stay = lambda *operands: operands
        return ops.cond(ops.any_mapped(entry.jump >= 0), leap, stay, y_new, f_new, g_new, results)

    def _event(self, state, accepted, target, t, h, y, K, t_new, y_new):
        """A step over the event is refused, and the next one ends at it, as the interpolant has it."""
        ops = self.ops
        if self.system.event is None:
            return state.g, target, accepted
        g_new = self.event(t_new, y_new)
        crosses = accepted & (state.g != 0) & (state.g * g_new <= 0) & (t_new < target)

        def locate():
            def value(fraction):
                time = t + fraction * h
                at = interpolate(ops, self.method.tableau, t, h, y, K, time[:, None])[:, 0]
                return self.event(time, at)

            return t + _illinois(ops, value, state.g, g_new) * h

        found = ops.cond(ops.any_mapped(crosses), locate, lambda: t)
        target = ops.where(crosses, ops.minimum(found, t_new), target)
        return g_new, target, accepted & ~crosses


def _illinois(ops: MatrixFreeOps, value: Callable, g0: Array, g1: Array) -> Array:
    """The root in [0, 1] of functions (B,) with values of opposite sign at the ends (Dowell and Jarratt
    1971)."""

    def body(carry):
        a, b, ga, gb = carry
        c = a - ga * (b - a) / ops.where(gb != ga, gb - ga, 1.0)
        gc = value(c)
        crossed = gc * gb < 0
        return ops.where(crossed, b, a), c, ops.where(crossed, gb, ga / 2), gc

    return ops.repeat(EVENT_ITERATIONS, body, (0 * g0, 0 * g0 + 1, g0, g1))[1]


def _size(ops: MatrixFreeOps, x: Array) -> Array:
    return ops.sqrt(ops.sum(x * x, 1) / x.shape[1])


def _following(ops: MatrixFreeOps, times: Array, index: Array) -> Array:
    """The time number `index` of each row, infinite behind the last."""
    if times.shape[1] == 0:
        return ops.full(index.shape, ops.inf, times)
    last = times.shape[1] - 1
    time = ops.take_rows(times, ops.minimum(index, last)[:, None])[:, 0]
    return ops.where(index > last, ops.inf, time)
