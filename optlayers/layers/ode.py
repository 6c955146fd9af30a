"""Initial value problems as layers: what the two frontends share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..ops import Array, MatrixFreeOps
from ..solvers.runge_kutta import Grid, Outcome, RungeKutta, System
from ..solvers.tableaux import TABLEAUX, Tableau
from ..status import Status, check
from .fixed_point import FAILURE_POLICIES, flatten_state
from .ode_adjoint import Steps, flow

Jumps = tuple[Array, Callable] | tuple[Array, Callable, Array]


class ODEInfo(NamedTuple):
    """What became of each sample, and the states around its jumps. Without batch axis where `t` has none.

    Attributes:
        status: code of `Status`: `list(Status)[code]` (B,).
        steps: accepted steps (B,).
        rejected: rejected steps (B,).
        evaluations: of func (B,).
        time: where the solve ended (B,).
        before: states before each jump, with axes (B, J, ...); NaN where there was none. None without jumps.
        after: states after each jump, likewise.
    """

    status: Array
    steps: Array
    rejected: Array
    evaluations: Array
    time: Array
    before: Any = None
    after: Any = None


@dataclass(frozen=True)
class InitialValueProblem:
    """The settings of `odeint`, and the map from a vector field and a start to the solution."""

    method: str | Tableau = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    step_size: float | None = None
    first_step: float | None = None
    max_steps: int = 1024
    order: int = 1
    on_failure: str = "raise"

    def __post_init__(self):
        if isinstance(self.method, str) and self.method not in TABLEAUX:
            raise ValueError(f"method must be one of {sorted(TABLEAUX)} or a Tableau, got {self.method!r}")
        if self.on_failure not in FAILURE_POLICIES:
            raise ValueError(f"on_failure must be one of {FAILURE_POLICIES}, got {self.on_failure!r}")

    def _runge_kutta(self, ops, y) -> RungeKutta:
        is_double = ops.eps(y) < 1e-10
        rtol = self.rtol if self.rtol is not None else 1e-7 if is_double else 1e-5
        atol = self.atol if self.atol is not None else 1e-9 if is_double else 1e-7
        tableau = TABLEAUX[self.method] if isinstance(self.method, str) else self.method
        return RungeKutta(tableau, rtol, atol, self.step_size, self.first_step, self.max_steps)

    def __call__(
        self, ops: MatrixFreeOps, func: Callable, y0: Any, t: Array, jumps: Jumps | None = None
    ) -> tuple[Any, ODEInfo]:
        """The solution, and what became of each sample.

        Args:
            func: (t, y) to dy/dt.
            t: times (T,) or (B, T).
            jumps: times (J,) or (B, J); (t, y, j) to the state after jump j; optional mask of the times.
        """
        batch = _Batch(ops, y0, t)
        y, method = batch.start, self._runge_kutta(ops, batch.start)
        times, count, sign = _forward(ops, batch.times(t))
        jump_times, jump = _jumps(ops, batch, jumps, sign)
        system, theta = _system(ops, batch, func, jump, sign, times, y)
        grid = Grid(times, count, jump_times)
        frozen = Grid(*map(ops.stop_gradient, grid))
        constants = [ops.stop_gradient(x) for x in theta]
        integrate = lambda: method.integrate(ops, system, ops.stop_gradient(y), frozen, constants)
        results, end, log, outcome = ops.call_detached(integrate)
        if self.on_failure == "raise":
            ops.on_host(check, outcome.status, outcome.time)

        early = ops.stop_gradient(times[:, 0]) - times[:, 0]
        y = flow(lambda t, y: system.field(t, y, theta), times[:, 0], y, early)
        steps = Steps(ops, method, system, frozen, log, y.shape[1])
        inputs = [y, times, jump_times, *theta]
        if self.order == 1:
            results, end = ops.replayed((results, end), steps.replay, steps.sweep, inputs)
            results = ops.guard(results, 1, "second derivatives were asked for; use order=2")
        else:
            results, end = steps.replay(inputs)
        results = self._on_failure(ops, results, end, outcome)
        return batch.split(results, outcome, sign, times.shape[1], jump_times.shape[1])

    def _on_failure(self, ops, results, end, outcome):
        failed = (outcome.status != Status.SOLVED.code)[:, None, None]
        if self.on_failure in ("raise", "nan"):
            return ops.where(failed, ops.nan, results)
        held = ops.where(failed & ~ops.isfinite(results), ops.stop_gradient(end)[:, None], results)
        return ops.where(failed, ops.stop_gradient(held), held) if self.on_failure == "mask" else held


class _Batch:
    """The user's containers and axes, and the arrays (B, k) and (B, T) of the solver."""

    def __init__(self, ops: MatrixFreeOps, y0: Any, t: Array):
        if t.ndim not in (1, 2) or t.shape[-1] == 0:
            raise ValueError(f"t must have the axes (T,) or (B, T), at least one time; got {tuple(t.shape)}")
        self.ops, self.is_single = ops, t.ndim == 1
        y, (leaves, rebuild) = y0, ops.tree_flatten(y0)
        if self.is_single:
            y0 = rebuild([x[None] for x in leaves])
        elif any(x.ndim == 0 or x.shape[0] != t.shape[0] for x in leaves):
            shapes = [tuple(x.shape) for x in leaves]
            raise ValueError(f"t has the batch axis {t.shape[0]}, which y0 must have too; got {shapes}")
        self.start, unflatten = flatten_state(ops, y0)
        self.rank = leaves[0].ndim
        self._shapes = [tuple(x.shape) if self.is_single else tuple(x.shape[1:]) for x in leaves]
        self._wanted = [tuple(x.shape) for x in leaves]
        self._rebuild, self._is_array = rebuild, len(leaves) == 1 and leaves[0] is y

    def times(self, t: Array) -> Array:
        t = self.ops.cast(t, self.start)
        return t[None] if self.is_single else t

    def state(self, y: Array) -> Any:
        """The user's state, of y (..., k); (1, k) has no batch axis where there is none."""
        lead = tuple(y.shape[1:-1] if self.is_single else y.shape[:-1])
        if self._is_array:
            return self.ops.reshape(y, (*lead, *self._shapes[0]))
        y = y[0] if self.is_single else y
        parts, place = [], 0
        for shape in self._shapes:
            size = math.prod(shape)
            parts.append(self.ops.reshape(y[..., place : place + size], (*lead, *shape)))
            place += size
        return self._rebuild(parts)

    def scalar(self, x: Array) -> Array:
        """Numbers (B,) as the user's functions see them: to be broadcast against the (first) state."""
        return x[0] if self.is_single else self.ops.reshape(x, (-1,) + (1,) * (self.rank - 1))

    def index(self, j: Array) -> Array:
        return j[0] if self.is_single else j

    def matrix(self, tree: Any, name: str) -> Array:
        """(B, k), of a value of the user's functions."""
        leaves = [tree] if self._is_array else self.ops.tree_flatten(tree)[0]
        shapes = [tuple(x.shape) for x in leaves]
        if shapes != self._wanted:
            raise ValueError(f"{name} must have the shapes of y, {self._wanted}, but has {shapes}")
        flat = [self.ops.reshape(x, (self.start.shape[0], -1)) for x in leaves]
        return flat[0] if len(flat) == 1 else self.ops.concat(flat, 1)

    def split(self, results, outcome: Outcome, sign, count: int, jumps: int) -> tuple[Any, ODEInfo]:
        around = [None, None]
        if jumps > 0:
            places = (slice(count, count + jumps), slice(count + jumps, count + 2 * jumps))
            around = [self.state(results[:, place]) for place in places]
        outcome = outcome._replace(time=outcome.time * sign)
        return self.state(results[:, :count]), ODEInfo(*map(self.index, outcome), *around)


def _forward(ops: MatrixFreeOps, t: Array) -> tuple[Array, Array, Array]:
    """Ascending times, how many of each row are asked for, and the sign of each row's direction."""
    asked = ops.isfinite(t)
    count = ops.to_int(ops.sum(ops.where(asked, 1, 0), 1))
    t = ops.where(asked, t, 0.0)
    last = ops.take_rows(t, ops.maximum(count - 1, 0)[:, None])
    t = ops.where(asked, t, last)
    sign = ops.stop_gradient(ops.where(last < t[:, :1], -1.0, 1.0))
    sign = ops.cast(sign, t)
    ops.on_host(_check_times, asked, t * sign)
    return t * sign, count, sign[:, 0]


def _check_times(asked: np.ndarray, t: np.ndarray) -> None:
    if (asked[:, 1:] & ~asked[:, :-1]).any():
        raise ValueError("times that are not finite may only stand at the end of a row of t")
    if (np.diff(t, axis=1) < 0).any():
        raise ValueError("each row of t must ascend, or descend")


def _jumps(ops, batch, jumps, sign):
    if jumps is None:
        return batch.start[:, :0], None
    times, jump, *mask = jumps
    times = batch.times(times)
    valid = ops.isfinite(times)
    if mask:
        valid = valid & (mask[0][None] if batch.is_single else mask[0])
    times = ops.where(valid, times * sign[:, None], ops.inf)
    ops.on_host(_check_jumps, times)
    return times, jump


def _check_jumps(times: np.ndarray) -> None:
    if (times[:, 1:] < times[:, :-1]).any():
        raise ValueError(
            "each row of the jump times must be ordered as t is, with times that are masked or NaN at its end"
        )


def _system(ops, batch, func, jump, sign, times, y):
    def field(t, y):
        slope = func(batch.scalar(t * sign), batch.state(y))
        return batch.matrix(slope, "func's value") * sign[:, None]

    def leap(t, y, j):
        if jump is None:
            return y
        return batch.matrix(
            jump(batch.scalar(t * sign), batch.state(y), batch.index(j)), "the state after a jump"
        )

    examples = [(ops.stop_gradient(x) for x in (times[:, 0], y))]
    examples = [tuple(map(ops.stop_gradient, (times[:, 0], y)))]
    examples.append((*examples[0], ops.to_int(0 * examples[0][0])))
    functions, theta = ops.explicit([field, leap], examples)
    return System(*functions), theta


def odeint_doc():
    """The solution y(t) of dy/dt = f(t, y) from y(t[0]) = y0, at all times t; differentiable.

    Times of one axis make y0 one system, whatever its shape. Times (B, T) make it a batch, whose samples have
    times, step sizes and an outcome each of their own; func must then treat each row of the batch by itself,
    and gets t in a shape to be broadcast against y, (B, 1, ..., 1). Gradients are those of the steps that
    were taken, to rounding; they reach y0, t, args, the jumps, and whatever func closes over, with memory for
    one state a step.

    Args:
        func: the right-hand side; see below for its arguments. It gives arrays like y0.
        y0: start: an array, or nested containers of arrays.
        t: times (T,) or (B, T), ascending or descending; NaN behind the last one of a sample.
        args: whatever func takes besides t and y.
        rtol, atol: a step is accepted where the root mean square of error / (atol + rtol |y|) is at most 1;
            None is 1e-7 and 1e-9 in double precision, and 1e-5 and 1e-7 in single.
        method: "dopri5", "tsit5", "bosh3", "dopri8"; of fixed step "euler", "midpoint", "heun", "rk4".
        jumps: (times, fn) or (times, fn, mask): at times (J,) or (B, J) the state is replaced by that which
            fn gives. Times that are NaN or masked stand at the end of a row, and nothing happens at them. An
            output at the time of a jump is the state before it.
        step_size: of methods with fixed steps; None steps from one output to the next.
        first_step: None chooses it.
        max_steps: most attempts for each sample. JAX reserves memory for so many states.
        order: how many derivatives are right; 2 and more need the memory of all stages of all steps.
        on_failure: for samples that did not reach the end: "raise", or "nan", "mask" (the last state reached,
            with zero derivatives) or "ignore" (the last state reached).
        return_info: return (y, info), with info an `ODEInfo`.

    Returns:
        y: with the axes of t in front of those of a sample's state: (T, ...) or (B, T, ...).

    Raises:
        SolveError: some samples did not reach the end, and `on_failure` is "raise".
    """


def ode_doc():
    """A layer whose output is the solution of dy/dt = f(t, y).

    `ode(y0, t, *args)` is y(t), and `ode.solve(y0, t, *args)` is y(t) with an `ODEInfo`. Both take `jumps=`.
    The arguments are those of `odeint`.
    """
