"""Initial value problems y' = f(t, y) for a batch whose samples take steps of their own.

`integrate` runs the adaptive loop, without derivatives, and logs what it accepted; `replay` repeats the
logged steps as a differentiable computation; `sweep` pulls cotangents back through them, one step at a time,
from the logged states.

Shapes: y (B, k); t, h (B,); output times (B, T); jumps (B, J). Time runs forward. Results are rows of one
array (B, T + 2 J + 1, k): the outputs, the states before and after each jump, and a row for what nobody asked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..ops import Array, MatrixFreeOps, select
from ..status import Status
from .tableaux import Tableau

RUNNING = -1
SAFETY, LEAST, MOST = 0.9, 0.2, 10.0


class System(NamedTuple):
    """What is integrated; `theta` holds the arrays that the functions depend on.

    Attributes:
        field: (t, y, theta) to y'.
        jump: (t, y, j, theta) to the state after jump j (B,).
    """

    field: Callable[[Array, Array, Sequence[Array]], Array]
    jump: Callable[[Array, Array, Array, Sequence[Array]], Array]


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

    def end(self, ops: MatrixFreeOps) -> Array:
        return ops.take_rows(self.outputs, ops.maximum(self.count - 1, 0)[:, None])[:, 0]


class Log(NamedTuple):
    """Accepted steps.

    Attributes:
        states: where each step starts (B, N, k).
        entries: its t, h, first output, number of outputs, and jump at its end or -1 (B, N, 5).
        length: number of steps (B,).
    """

    states: Array
    entries: Array
    length: Array


class Entry(NamedTuple):
    """One step of each sample, as in `Log`."""

    t: Array
    h: Array
    row: Array
    hits: Array
    jump: Array


class Outcome(NamedTuple):
    """What became of each sample (B,): code of `Status`, counts, and the time reached."""

    status: Array
    accepted: Array
    rejected: Array
    evaluations: Array
    time: Array


class _State(NamedTuple):
    k: Any
    t: Array
    y: Array
    f: Array
    h: Array
    error: Array
    row: Array
    jump: Array
    status: Array
    rejected: Array
    log: Log
    results: Array


@dataclass(frozen=True)
class RungeKutta:
    """A method and how its steps are chosen.

    Args:
        tableau: the method.
        rtol, atol: a step is accepted if the root mean square of error / (atol + rtol |y|) is at most 1.
        step_size: of methods without error estimate; None goes from one output to the next.
        first_step: None chooses it.
        max_steps: most attempts, for each sample.
    """

    tableau: Tableau
    rtol: float
    atol: float
    step_size: float | None = None
    first_step: float | None = None
    max_steps: int = 1024

    @property
    def is_adaptive(self) -> bool:
        return self.tableau.error is not None and self.step_size is None

    @property
    def lands(self) -> bool:
        """Whether steps end at output times."""
        return self.tableau.lands or not self.is_adaptive

    def window(self, outputs: int) -> int:
        """Most outputs that one pass over a step writes; a step with more is passed over again."""
        return 1 if self.lands else min(outputs, max(8, outputs // 16))

    def integrate(
        self, ops: MatrixFreeOps, system: System, y: Array, grid: Grid, theta: Sequence[Array]
    ) -> tuple[Array, Array, Log, Outcome]:
        """Results, final states, what was logged, and what became of each sample; no derivatives."""
        count, jumps = grid.outputs.shape[1], grid.jumps.shape[1]
        t, end = grid.outputs[:, 0], grid.end(ops)
        f = system.field(t, y, theta)
        zero = ops.to_int(0 * t)
        started = ops.all(ops.isfinite(y), 1) & ops.all(ops.isfinite(f), 1)
        status = ops.where(started, RUNNING, Status.NON_FINITE.code) + zero
        blank = ops.full((y.shape[0], count + 2 * jumps + 1, y.shape[1]), ops.nan, y) + 0 * y[:, None]
        log = Log(
            ops.rows(y, self.max_steps),
            ops.rows(ops.broadcast_to(0 * t[:, None], (y.shape[0], 5)), self.max_steps),
            zero,
        )
        first_jump = ops.to_int(ops.sum(ops.where(grid.jumps < t[:, None], 1, 0), 1))
        h = self._first_step(ops, system, t, y, f, end, theta)
        state = _State(0, t, y, f, h, 0 * t + 1, zero, first_jump, status, zero, log, blank)

        def unfinished(state):
            return (state.k < self.max_steps) & ops.any_mapped(state.status == RUNNING)

        attempt = lambda state: self._attempt(ops, system, grid, end, theta, state)
        state = ops.while_loop(unfinished, attempt, state)
        status = ops.where(state.status == RUNNING, Status.STEP_LIMIT.code, state.status)
        attempts = state.log.length + state.rejected
        evaluations = 1 + (len(self.tableau.c) - 1) * attempts + (1 if self.is_adaptive else 0)
        outcome = Outcome(status, state.log.length, state.rejected, evaluations, state.t)
        return state.results, state.y, state.log, outcome

    def _first_step(self, ops, system, t, y, f, end, theta):
        """Hairer, Norsett and Wanner (1993), II.4; the interval itself for methods of fixed step."""
        if not self.is_adaptive:
            return 0 * t + (ops.inf if self.step_size is None else self.step_size)
        if self.first_step is not None:
            return 0 * t + self.first_step
        scale = self.atol + self.rtol * abs(y)
        d0, d1 = _size(ops, y / scale), _size(ops, f / scale)
        h0 = ops.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / ops.where(d1 > 0, d1, 1.0))
        h0 = ops.minimum(h0, end - t)
        f1 = system.field(t + h0, y + h0[:, None] * f, theta)
        d2 = _size(ops, (f1 - f) / scale) / ops.where(h0 > 0, h0, 1.0)
        d = ops.maximum(d1, d2)
        exponent = 1 / self.tableau.order
        h1 = ops.where(d <= 1e-15, ops.maximum(1e-3 * h0, 1e-6), (0.01 / ops.maximum(d, 1e-15)) ** exponent)
        return ops.where(ops.isfinite(h1), ops.minimum(100 * h0, h1), h0)

    def _attempt(self, ops, system, grid, end, theta, state):
        k, t, y, f, h, error_before, row, jump, status, rejected, log, results = state
        running, field = status == RUNNING, lambda t, y: system.field(t, y, theta)
        next_jump = _following(ops, grid.jumps, jump)
        stop = ops.minimum(next_jump, end)
        if self.lands:
            stop = ops.minimum(stop, _following(ops, grid.outputs, row))
        h_full = h
        h, lands = self._divide(ops, h, stop - t)
        t_new = ops.where(lands, stop, t + h)
        K, y_new = stages(ops, self.tableau, field, t, h, y, f)
        K.append(field(t_new, y_new))
        error = self._error(ops, h, y, y_new, K)
        accepted = running & (error <= 1)

        hits, times = self._hits(ops, grid, row, t_new)
        advances = accepted & (hits <= times.shape[1])
        leaps = advances & (t_new >= next_jump)
        entry = Entry(t, h, row, ops.where(accepted, hits, 0), ops.where(leaps, jump, -1))
        log = self._write(ops, log, k, entry, y, accepted)

        results = ops.cond(
            ops.any(entry.hits > 0),
            lambda results: ops.put_rows(
                results,
                self.output_rows(ops, grid, entry),
                interpolate(ops, self.tableau, t, h, y, K, times),
            ),
            lambda results: results,
            results,
        )

        def leap(y_new, f_new, results):
            after = select(ops, leaps, system.jump(t_new, y_new, jump, theta), y_new)
            results = ops.put_rows(results, jump_rows(ops, grid, entry), ops.stack([y_new, after], 1))
            return after, select(ops, leaps, field(t_new, after), f_new), results

        f_new = K[-1]
        if grid.jumps.shape[1] > 0:
            stay = lambda *operands: operands
            y_new, f_new, results = ops.cond(ops.any(leaps), leap, stay, y_new, f_new, results)
        jump = jump + ops.to_int(leaps)

        done = advances & (t_new >= end) & (_following(ops, grid.jumps, jump) > end)
        h_next = self._next_step(ops, h, h_full, lands, error, error_before, accepted)
        h_next = ops.where(accepted & ~advances, h_full, h_next)
        failed = running & ~accepted & (h_next < 16 * ops.eps(y) * ops.maximum(abs(t), abs(end)))
        reason = ops.where(ops.isfinite(error), Status.STEP_UNDERFLOW.code, Status.NON_FINITE.code)
        if not self.is_adaptive:
            failed, reason = running & ~accepted, Status.NON_FINITE.code
        status = ops.where(done, Status.SOLVED.code, ops.where(failed, reason, status))
        t, y, f = select(ops, advances, (t_new, y_new, f_new), (t, y, f))
        error_before = ops.where(advances, ops.maximum(error, 1e-4), error_before)
        rejected = rejected + ops.to_int(running & ~accepted)
        row = row + ops.minimum(entry.hits, times.shape[1])
        return _State(k + 1, t, y, f, h_next, error_before, row, jump, status, rejected, log, results)

    def _divide(self, ops, h, gap):
        """The step towards a time that must be met, and whether it meets it; no small step is left over."""
        if not self.is_adaptive:
            parts = 1 + ops.to_int((1 - 1e-9) * ops.minimum(gap / h, 1e9))
            return gap / parts, parts == 1
        lands = 1.01 * h >= gap
        return ops.where(lands, gap, ops.where(2 * h > gap, gap / 2, h)), lands

    def _error(self, ops, h, y, y_new, K):
        """The error relative to the tolerances (B,), infinite or NaN if anything is not finite."""
        if not self.is_adaptive:
            return 0 * (ops.sum(y_new, 1) + ops.sum(K[-1], 1))
        error = h[:, None] * ops.weighted_sum(self.tableau.error, K)
        return _size(ops, error / (self.atol + self.rtol * ops.maximum(abs(y), abs(y_new))))

    def _next_step(self, ops, h, h_full, lands, error, error_before, accepted):
        """PI control (Gustafsson 1991), with the weights of Hairer, Norsett and Wanner (1993), II.4."""
        if not self.is_adaptive:
            return h_full
        order = self.tableau.order
        least = ops.maximum(error, 1e-10)
        proportional = least ** (-0.85 / order) * error_before ** (0.2 / order)
        growth = ops.where(accepted, proportional, least ** (-1 / order))
        growth = ops.where(
            ops.isfinite(growth), ops.minimum(ops.maximum(SAFETY * growth, LEAST), MOST), LEAST
        )
        h_next = h * ops.where(accepted, growth, ops.minimum(growth, 0.9))
        return ops.where(accepted & lands, ops.maximum(h_next, h_full), h_next)

    def _hits(self, ops, grid, row, t_new):
        """How many outputs a step to t_new meets, up to one more than the window, and their times (B, W)."""
        window = self.window(grid.outputs.shape[1])
        rows = row[:, None] + ops.constant(np.arange(window + 1)[None], row)
        asked = rows < grid.count[:, None]
        times = ops.take_rows(grid.outputs, ops.minimum(rows, grid.outputs.shape[1] - 1))
        met = asked & (times <= t_new[:, None])
        return ops.to_int(ops.sum(ops.where(met, 1, 0), 1)), times[:, :window]

    def output_rows(self, ops, grid, entry):
        """Where the outputs (B, W) of a step go in the results."""
        window, last = self.window(grid.outputs.shape[1]), grid.outputs.shape[1] + 2 * grid.jumps.shape[1]
        offset = ops.constant(np.arange(window)[None], entry.row)
        return ops.where(offset < entry.hits[:, None], entry.row[:, None] + offset, last)

    def _write(self, ops, log, k, entry, y, accepted):
        """Every sample writes; what was not accepted is written over, or lies behind the log's end."""
        columns = ops.stack([ops.cast(x, y) for x in entry], 1)[:, None]
        states, entries = ops.grown(log.states, k), ops.grown(log.entries, k)
        place = log.length[:, None]
        return Log(
            ops.put_rows(states, place, y[:, None]),
            ops.put_rows(entries, place, columns),
            log.length + ops.to_int(accepted),
        )


def jump_rows(ops, grid, entry):
    """Where the states before and after a jump (B, 2) go in the results."""
    count, jumps = grid.outputs.shape[1], grid.jumps.shape[1]
    last = count + 2 * jumps
    before = ops.where(entry.jump >= 0, count + entry.jump, last)
    return ops.stack([before, ops.minimum(before + jumps, last)], 1)


def stages(ops, tableau, field, t, h, y, first):
    """The slopes of all stages but the last, and the last stage, which is the result."""
    K, column = [first], h[:, None]
    for c, row in zip(tableau.c[1:-1], tableau.a[1:-1], strict=True):
        K.append(field(t + c * h, y + column * ops.weighted_sum(row, K)))
    return K, y + column * ops.weighted_sum(tableau.a[-1], K)


def interpolate(ops, tableau, t, h, y, K, times):
    """States (B, W, k) at `times` (B, W) within a step."""
    ahead = times - t[:, None]
    fraction = ahead / ops.where(h > 0, h, 1.0)[:, None]
    weights = tableau.weights
    powers = [0 * fraction + 1]
    for _ in weights[1:]:
        powers.append(powers[-1] * fraction)
    slopes = ops.stack(powers, -1) @ ops.constant(weights, y)[None] @ ops.stack(K, 1)
    return y[:, None] + ahead[..., None] * slopes


def _size(ops, x):
    return ops.sqrt(ops.sum(x * x, 1) / x.shape[1])


def _following(ops, times, index):
    """The time number `index` of each row, infinite behind the last."""
    if times.shape[1] == 0:
        return 0 * ops.cast(index, times) + ops.inf
    last = times.shape[1] - 1
    time = ops.take_rows(times, ops.minimum(index, last)[:, None])[:, 0]
    return ops.where(index > last, ops.inf, time)
