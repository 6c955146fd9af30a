"""Derivatives of solved initial value problems.

The states y_0 ... y_N that the solver has logged satisfy y_{i+1} = step(y_i, t_i, h_i, theta), whose linear
equations for a cotangent are block bidiagonal: one sweep backwards through the steps solves them. Times and
sizes of steps are constants in this. The first time, the outputs' and the jumps' enter where the solution is
evaluated at them: a state is moved along the flow by the zero that a time differs from its value.

Inputs are [y0, outputs, jumps, *theta], with y0 (B, k); see `solvers.initial_value` for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..ops import Array, MatrixFreeOps
from ..solvers.initial_value import Entry, Grid, Outcome, RungeKutta, System
from ..solvers.runge_kutta import flow, interpolate


class Solved(NamedTuple):
    """A solve that is to be differentiated: what it was, and what came of it."""

    ops: MatrixFreeOps
    method: RungeKutta
    system: System
    grid: Grid
    inputs: list[Array]
    results: Array
    end: Array
    log: Any  # a Log, or None where nothing is logged
    outcome: Outcome


class Adjoint(Protocol):
    """How derivatives are attached."""

    @property
    def checkpoint_every(self) -> int:
        """Of how many steps one state is logged; 0 records the steps themselves where the framework can."""
        ...

    def __call__(self, solved: Solved, order: int) -> tuple[Array, Array]: ...


@dataclass(frozen=True)
class Discrete:
    """The derivatives of the computed solution, to rounding: those of its steps.

    Args:
        checkpoint_every: steps between the states that are kept; those between them are computed again. With
            0 whatever the steps have computed is kept: fastest, with the memory of all stages of all steps.
            JAX, and torch in forward mode, under vmap or for times or jump times with gradients, take it
            for 1.

    Example:
        >>> from optlayers.torch import Discrete
        >>> Discrete(checkpoint_every=10)
        Discrete(checkpoint_every=10)
    """

    checkpoint_every: int = 1

    def __post_init__(self):
        if self.checkpoint_every < 0:
            raise ValueError(f"checkpoint_every must not be negative, got {self.checkpoint_every}")

    def __call__(self, solved, order):
        ops, steps, values = solved.ops, Steps(solved, order), (solved.results, solved.end)
        if solved.log is None:
            results, end = values
        elif order == 1:
            results, end = ops.replayed(values, steps.replay, steps.sweep, solved.inputs)
        else:
            results, end = steps.replay(solved.inputs, ops.bounded_repeat)
        message = f"derivatives of order above {order} were asked for; use order={order + 1}"
        return ops.guard(results, order, message), ops.guard(end, order, message)


@dataclass(frozen=True)
class Steps:
    """The logged steps, as functions of live inputs."""

    solved: Solved
    order: int

    def replay(self, inputs: Sequence[Array], repeat: Any = None) -> tuple[Array, Array]:
        """Results and final states."""
        solved, (y, *live) = self.solved, inputs
        ops, grid, start = solved.ops, solved.grid, solved.log.states[:, 0]

        def body(carry):
            i, y, results = carry
            entry, active = self._entry(i)
            y_new, outputs, around = self._advance(entry, ops.where(active, y, start), live)
            results = ops.put_rows(results, solved.method.output_rows(ops, grid, entry), outputs)
            if around is not None:
                results = ops.put_rows(results, grid.jump_rows(ops, entry.jump), around)
            return i + 1, ops.where(active, y_new, y), results

        count, carry = ops.largest(solved.log.length), (0, y, grid.blank(ops, y))
        if repeat is None:
            _, y, results = ops.repeat(count, body, carry)
        else:
            _, y, results = repeat(count, solved.method.max_steps, body, carry)
        return results, y

    def sweep(self, inputs: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        """Cotangents of the inputs."""
        ops, log, live = self.solved.ops, self.solved.log, inputs[1:]
        every = self.solved.method.every
        results_bar, y_bar = cotangents
        count, nothing = ops.largest(log.length), [ops.full(x.shape, 0.0, x) for x in live]

        def back(states, first):
            """Step i - 1 back, with its state in `states`, of which the first is that of step `first`."""

            def body(carry):
                i, y_bar, totals = carry
                y_bar, more = self._pull(i - 1, states[:, i - 1 - first], live, results_bar, y_bar)
                totals = [a if b is None else a + b for a, b in zip(totals, more, strict=True)]
                return i - 1, y_bar, totals

            return body

        def segment(carry):
            """All steps since a checkpoint, whose states are computed again."""
            i, y_bar, totals = carry
            checkpoint = (i - 1) // every
            first = checkpoint * every

            def forward(carry):
                j, y, states = carry
                entry, active = self._entry(j)
                y_new, _, _ = self._advance(entry, ops.where(active, y, log.states[:, 0]), live)
                y = ops.where(active, y_new, y)
                states = ops.put_rows(states, 0 * log.length[:, None] + (j + 1 - first), y[:, None])
                return j + 1, y, states

            y = log.states[:, checkpoint]
            states = ops.put_rows(ops.rows(y, every), 0 * log.length[:, None], y[:, None])
            _, _, states = ops.call_detached(lambda: ops.repeat(i - 1 - first, forward, (first, y, states)))
            return ops.repeat(i - first, back(states, first), (i, y_bar, totals))

        if every == 1:
            _, y_bar, totals = ops.repeat(count, back(log.states, 0), (count, y_bar, nothing))
        else:
            segments = (count + every - 1) // every
            _, y_bar, totals = ops.repeat(segments, segment, (count, y_bar, nothing))
        return [y_bar, *totals]

    def _pull(self, i, y, live, results_bar, y_bar):
        """Cotangents of the state before step i and of the live inputs."""
        ops, method, _, grid, *_ = self.solved
        entry, active = self._entry(i)
        step = lambda y, live: tuple(x for x in self._advance(entry, y, live) if x is not None)
        _, pull = ops.vjp(step, ops.where(active, y, self.solved.log.states[:, 0]), live)

        def rows(rows):
            return ops.where((rows < grid.rows)[..., None], ops.take_rows(results_bar, rows), 0.0)

        bars = [ops.where(active, y_bar, 0.0), rows(method.output_rows(ops, grid, entry))]
        if grid.jumps.shape[1] > 0:
            bars.append(rows(grid.jump_rows(ops, entry.jump)))
        y_before, more = pull(tuple(bars))
        return ops.where(active, y_before, y_bar), more

    def _entry(self, i) -> tuple[Entry, Array]:
        """Step i of each sample, and which samples (B, 1) have one; the others stay where they started."""
        ops, log = self.solved.ops, self.solved.log
        active = i < log.length
        t, h, row, hits, jump = (log.entries[:, i, column] for column in range(5))
        idle = (log.entries[:, 0, 0], 0.0, 0.0, 0.0, -1.0)
        t, h, row, hits, jump = (
            ops.where(active, x, y) for x, y in zip((t, h, row, hits, jump), idle, strict=True)
        )
        return Entry(t, h, *map(ops.to_int, (row, hits, jump))), active[:, None]

    def _advance(self, entry: Entry, y: Array, live: Sequence[Array]):
        """One step: the next y (B, k), its outputs (B, W, k), and the states around its jump (B, 2, k)."""
        ops, method, system, grid, *_ = self.solved
        outputs, jumps, *theta = live
        t, h, window = entry.t, entry.h, method.window(outputs.shape[1])
        field = lambda t, y: system.field(t, y, theta)
        stages, end = method.stages(self.order), method.end_of(ops, grid, t, h, t + h)
        first = field(t, y)
        K, y_new, _ = stages(ops, field, t, h, y, first, end)

        def emit(y_new):
            if method.lands and ops.is_constant(outputs):
                return y_new[:, None]
            rows = ops.minimum(method.output_rows(ops, grid, entry), outputs.shape[1] - 1)
            times = ops.where(rows >= entry.row[:, None], ops.take_rows(outputs, rows), t[:, None])
            if method.lands:  # interpolants of these methods know no second derivative
                return flow(field, end, y_new, (times - ops.stop_gradient(times))[:, 0])[:, None]
            all_increments, _ = stages.complete(ops, field, h, K, y_new, first, end)
            return interpolate(ops, method.tableau, t, h, y, all_increments, times)

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
            move = (lambda t, y, d: y) if ops.is_constant(jumps) else (lambda *args: flow(field, *args))
            before = move(end, y_new, early)  # along the field before the jump
            after = system.jump(times, before, j, theta)
            y_new = ops.where(leaps, move(times, after, -early), y_new)
            return y_new, ops.stack([before, after], 1)

        def stay(y_new):
            return y_new, ops.stack([y_new, y_new], 1)

        y_new, around = ops.cond_or_both(ops.any(entry.jump >= 0), leap, stay, y_new)
        return ops.where(advances, y_new, y), emitted, around
