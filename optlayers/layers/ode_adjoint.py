"""Derivatives of the steps that `RungeKutta.integrate` has logged.

The states y_0 ... y_N satisfy y_{i+1} = step(y_i, t_i, h_i, theta), whose linear equations for a cotangent
are
block bidiagonal: one sweep backwards through the steps solves them. Times and step sizes of the log are
constants. The first and last time, the outputs' and the jumps' enter where the solution is evaluated at them:
a state is moved by the zero that a time differs from its value, along the flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..ops import Array, MatrixFreeOps
from ..solvers.runge_kutta import Entry, Grid, Log, RungeKutta, System, interpolate, jump_rows, stages


@dataclass(frozen=True)
class Steps:
    """The logged steps of one solve, as functions of the live inputs [y0, outputs, jumps, *theta]."""

    ops: MatrixFreeOps
    method: RungeKutta
    system: System
    grid: Grid
    log: Log
    width: int

    def replay(self, inputs: Sequence[Array], repeat: Callable | None = None) -> tuple[Array, Array]:
        """Results and final states."""
        ops, (y, *live) = self.ops, inputs
        count, jumps = self.grid.outputs.shape[1], self.grid.jumps.shape[1]
        blank = ops.full((y.shape[0], count + 2 * jumps + 1, self.width), ops.nan, y) + 0 * y[:, None]

        def body(carry):
            i, y, results = carry
            entry, active = self._entry(i)
            y_new, outputs, around = self._advance(entry, ops.where(active, y, self.log.states[:, 0]), live)
            results = ops.put_rows(results, self.method.output_rows(ops, self.grid, entry), outputs)
            if around is not None:
                results = ops.put_rows(results, jump_rows(ops, self.grid, entry), around)
            return i + 1, ops.where(active, y_new, y), results

        _, y, results = (repeat or ops.repeat)(ops.largest(self.log.length), body, (0, y, blank))
        return results, y

    def sweep(self, inputs: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        """Cotangents of the inputs."""
        ops, live = self.ops, inputs[1:]
        results_bar, y_bar = cotangents
        last = results_bar.shape[1] - 1

        def rows_of(rows):
            return ops.where((rows < last)[..., None], ops.take_rows(results_bar, rows), 0.0)

        def body(carry):
            i, y_bar, totals = carry
            i = i - 1
            entry, active = self._entry(i)
            y = ops.where(active, self.log.states[:, i], self.log.states[:, 0])
            step = lambda y, live: tuple(x for x in self._advance(entry, y, live) if x is not None)
            _, pull = ops.vjp(step, y, live)
            bars = [ops.where(active, y_bar, 0.0), rows_of(self.method.output_rows(ops, self.grid, entry))]
            if self.grid.jumps.shape[1] > 0:
                bars.append(rows_of(jump_rows(ops, self.grid, entry)))
            y_before, more = pull(tuple(bars))
            totals = [a if b is None else a + b for a, b in zip(totals, more, strict=True)]
            return i, ops.where(active, y_before, y_bar), totals

        count = ops.largest(self.log.length)
        nothing = [ops.full(x.shape, 0.0, x) for x in live]
        _, y_bar, totals = ops.repeat(count, body, (count, y_bar, nothing))
        return [y_bar, *totals]

    def _entry(self, i) -> tuple[Entry, Array]:
        """Step i of each sample, and which samples (B, 1) have one; the others stay where they are."""
        ops, log = self.ops, self.log
        active = i < log.length
        t, h, row, hits, jump = (log.entries[:, i, column] for column in range(5))
        t = ops.where(active, t, log.entries[:, 0, 0])
        h, hits, jump = (ops.where(active, x, x_idle) for x, x_idle in ((h, 0.0), (hits, 0.0), (jump, -1.0)))
        row = ops.where(active, row, 0.0)
        return Entry(t, h, *map(ops.to_int, (row, hits, jump))), active[:, None]

    def _advance(self, entry: Entry, y: Array, live: Sequence[Array]):
        """One step: the next y (B, k), its outputs (B, W, k), and the states around its jump (B, 2, k)."""
        ops, method, system = self.ops, self.method, self.system
        outputs, jumps, *theta = live
        t, h, window = entry.t, entry.h, method.window(outputs.shape[1])
        field = lambda t, y: system.field(t, y, theta)
        K, y_new = stages(ops, method.tableau, field, t, h, y, field(t, y))

        def emit(y_new):
            rows = ops.minimum(method.output_rows(ops, self.grid, entry), outputs.shape[1] - 1)
            times = ops.where(rows >= entry.row[:, None], ops.take_rows(outputs, rows), t[:, None])
            slopes = [*K, field(t + h, y_new)]
            return interpolate(ops, method.tableau, t, h, y, slopes, times)

        def emit_nothing(y_new):
            return ops.broadcast_to(0 * y_new[:, None], (y.shape[0], window, y.shape[1]))

        emitted = ops.cond_or_both(ops.any(entry.hits > 0), emit, emit_nothing, y_new)
        advances = (entry.hits <= window)[:, None]
        if jumps.shape[1] == 0:
            return ops.where(advances, y_new, y), emitted, None

        def leap(y_new):
            j = ops.maximum(entry.jump, 0)
            leaps = (entry.jump >= 0)[:, None]
            times = ops.where(leaps[:, 0], ops.take_rows(jumps, j[:, None])[:, 0], t)
            early = times - ops.stop_gradient(times)
            before = flow(field, ops.stop_gradient(times), y_new, early)
            after = system.jump(times, before, j, theta)
            y_after = flow(field, times, after, -early)
            return ops.where(leaps, y_after, y_new), ops.stack([before, after], 1)

        y_new, around = ops.cond_or_both(
            ops.any(entry.jump >= 0), leap, lambda y_new: (y_new, ops.stack([y_new, y_new], 1)), y_new
        )
        return ops.where(advances, y_new, y), emitted, around


def flow(field: Callable, t: Array, y: Array, d: Array) -> Array:
    """The state at t + d where that at t is y, for d = 0: its first and second derivatives are right."""
    half = d[:, None] / 2
    return y + 2 * half * field(t + d / 2, y + half * field(t, y))
