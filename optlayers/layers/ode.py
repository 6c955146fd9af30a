"""Initial value problems as layers: what the two frontends share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..ops import Array, MatrixFreeOps
from ..solvers.initial_value import Grid, RungeKutta, System
from ..solvers.runge_kutta import flow
from ..solvers.tableaux import TABLEAUX, Tableau
from ..status import FAILURE_POLICIES, Status, check
from .ode_adjoint import Adjoint, Discrete, Solved
from .ode_axes import Axes, ascending

Jumps = tuple[Array, Callable] | tuple[Array, Callable, Array]


class ODEInfo(NamedTuple):
    """What became of each sample, and the states around its jumps. Without batch axis where `t` has none.

    Attributes:
        status: code of `Status`: `list(Status)[code]` (B,).
        steps: accepted steps (B,).
        rejected: rejected steps (B,).
        evaluations: of func, as far as this sample needed them (B,).
        time: where the solve ended (B,).
        before: states before each jump, with axes (B, J, ...); NaN where there was none. None without jumps.
        after: states after each jump, likewise.
        event_time: when the event happened (B,), differentiable; NaN where it did not. None without event.
        event_state: the state at that time, likewise.

    Example:
        >>> import torch
        >>> from optlayers.torch import odeint
        >>> fall, ground = lambda t, y: torch.stack([y[1], -torch.ones(())]), lambda t, y: y[0]
        >>> start, t = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 9.0])
        >>> y, info = odeint(fall, start, t, event=ground, return_info=True)
        >>> round(info.event_time.item(), 4)  # 2 - t^2 / 2 = 0
        2.0
    """

    status: Array
    steps: Array
    rejected: Array
    evaluations: Array
    time: Array
    before: Any = None
    after: Any = None
    event_time: Any = None
    event_state: Any = None


@dataclass(frozen=True)
class InitialValueProblem:
    """The settings of `odeint`, and the map from a vector field and a start to the solution."""

    method: str | Tableau = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    adjoint: Adjoint = Discrete()
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
        if self.order < 1 or self.max_steps < 1:
            raise ValueError(f"order and max_steps must be at least 1, got {self.order} and {self.max_steps}")
        if any(size is not None and not size > 0 for size in (self.step_size, self.first_step)):
            raise ValueError(
                "step_size and first_step must be positive, backwards in time too, or None; "
                f"got {self.step_size} and {self.first_step}"
            )
        if any(x is not None and not x >= 0 for x in (self.rtol, self.atol)):
            raise ValueError(f"rtol and atol must not be negative, got {self.rtol} and {self.atol}")

    def _runge_kutta(self, ops: MatrixFreeOps, y: Array, every: int) -> RungeKutta:
        is_double = ops.eps(y) < 1e-10
        rtol = self.rtol if self.rtol is not None else 1e-7 if is_double else 1e-5
        atol = self.atol if self.atol is not None else 1e-9 if is_double else 1e-7
        tableau = TABLEAUX[self.method] if isinstance(self.method, str) else self.method
        return RungeKutta(tableau, rtol, atol, self.step_size, self.first_step, self.max_steps, every)

    def __call__(
        self,
        ops: MatrixFreeOps,
        func: Callable,
        y0: Any,
        t: Array,
        jumps: Jumps | None = None,
        event: Callable | None = None,
    ) -> tuple[Any, ODEInfo]:
        """The solution, and what became of each sample.

        Args:
            func: (t, y) to dy/dt.
            t: times (T,) or (B, T).
            jumps: times (J,) or (B, J); (t, y, j) to the state after jump j; optional mask of the times.
            event: (t, y) to one number for each sample.
        """
        axes = Axes(ops, y0, t)
        y = axes.start
        times, count, sign, is_ordered = ascending(ops, _movable(ops, axes.times(t), self.order))
        if not ops.holds(ops.all(is_ordered)):  # where times are traced: else it has raised
            y = ops.where(is_ordered[:, None], y, ops.nan)
        jump_times, order, jump = _jumps(ops, axes, jumps, sign, self.order)
        every = self.adjoint.checkpoint_every
        is_recorded = every == 0 and ops.has_tape() and all(map(ops.is_constant, (times, jump_times)))
        system, theta = _system(ops, axes, func, jump, event, sign, times[:, 0], is_recorded)
        inputs = [y, times, jump_times, *theta]
        is_logged = not (is_recorded or all(map(ops.is_constant, inputs)))
        method = self._runge_kutta(ops, y, max(every, 1) if is_logged else 0)
        grid = Grid(*map(ops.stop_gradient, (times, count, jump_times)))
        if is_recorded:
            results, end, log, outcome, _ = method.integrate(ops, system, y, grid, theta, order=self.order)
        else:
            integrate = lambda y, *theta: method.integrate(ops, system, y, grid, theta)
            results, end, log, outcome, _ = ops.call_detached(integrate, y, *theta)
        if self.on_failure == "raise":
            report = lambda status, time: check(status, time, "at t = {:.6g}")
            ops.on_host(report, axes.lane(outcome.status), axes.lane(outcome.time * sign))

        if log is not None and self.on_failure != "ignore":
            # Steps of failed samples, which have no derivatives, are not taken again: they might end in NaN.
            log = log._replace(length=ops.where(outcome.status == Status.SOLVED.code, log.length, 0))
        if not ops.is_constant(times):
            early = ops.stop_gradient(times[:, 0]) - times[:, 0]
            inputs[0] = flow(lambda t, y: system.field(t, y, theta), times[:, 0], y, early)
        solved = Solved(ops, method, system, grid, inputs, results, end, log, outcome)
        results, end = self.adjoint(solved, self.order)
        start = ops.where(count[:, None] > 0, y, ops.nan)  # as it is, when times move
        results = ops.concat([start[:, None], results[:, 1:]], 1)
        results = self._on_failure(solved, results)
        info = _info(axes, solved, results, end, order, sign, self.order)
        return axes.state(results[:, : times.shape[1]]), info

    def _on_failure(self, solved: Solved, results: Array) -> Array:
        ops, outcome = solved.ops, solved.outcome
        failed = (outcome.status != Status.SOLVED.code)[:, None, None]
        if self.on_failure in ("raise", "nan"):
            return ops.where(failed, ops.nan, results)
        if self.on_failure == "mask":
            results = ops.where(failed, solved.results, results)
        held = ops.where(failed & ~ops.isfinite(results), ops.stop_gradient(solved.end)[:, None], results)
        return ops.where(failed, ops.stop_gradient(held), held) if self.on_failure == "mask" else held


def _movable(ops: MatrixFreeOps, x: Array, order: int) -> Array:
    """`x`, where derivatives in times are those of a move along the flow, whose error is of third order."""
    message = (
        "derivatives in the times of outputs, jumps and events are right up to order 2; detach the times"
    )
    return ops.guard(x, 2, message) if order > 2 else x


def _jumps(ops: MatrixFreeOps, axes: Axes, jumps: Jumps | None, sign: Array, derivatives: int):
    """Jump times in ascending order, infinite where there is none; their numbers; and the function."""
    if jumps is None:
        return ops.stop_gradient(axes.start)[:, :0], None, None  # a constant
    times, jump, *mask = jumps
    times = _movable(ops, axes.times(times), derivatives)
    valid = ops.isfinite(times)
    if mask:
        valid = valid & axes.rows(mask[0])
    times = ops.where(valid, times * sign[:, None], ops.inf)
    order = ops.argsort(ops.stop_gradient(times))

    def numbered(t, y, j):
        return jump(t, y, axes.lane(ops.take_rows(order, j[:, None])[:, 0]))

    return ops.take_rows(times, order), order, numbered


def _system(ops, axes: Axes, func, jump, event, sign, start, is_recorded) -> tuple[System, list[Array]]:
    """The user's functions as those of the solver, and the arrays that they depend on, unless they are
    recorded."""
    is_forward = ops.holds(ops.all(sign > 0))

    def turn(x):
        return x if is_forward else x * ops.reshape(sign, (-1,) + (1,) * (x.ndim - 1))

    def field(t, y):
        return turn(axes.matrix(func(axes.scalar(turn(t)), axes.state(y)), "func's value"))

    def leap(t, y, j):
        return axes.matrix(jump(axes.scalar(turn(t)), axes.state(y), j), "the state after a jump")

    def trigger(t, y):
        return axes.vector(event(axes.scalar(turn(t)), axes.state(y)), "the event's value")

    t, y = ops.stop_gradient(start), ops.stop_gradient(axes.start)
    wanted = [(field, (t, y))]
    if jump is not None:
        wanted.append((leap, (t, y, ops.to_int(0 * t))))
    if event is not None:
        wanted.append((trigger, (t, y)))
    if is_recorded:
        functions, theta = [lambda *args, f=f: f(*args[:-1]) for f, _ in wanted], []
    else:
        functions, theta = ops.explicit(*zip(*wanted, strict=True))
    found = dict(zip([function for function, _ in wanted], functions, strict=True))
    return System(found[field], found.get(leap), found.get(trigger)), theta


def _info(axes: Axes, solved: Solved, results, end, order, sign, derivatives: int) -> ODEInfo:
    ops, outcome, count = solved.ops, solved.outcome, solved.grid.outputs.shape[1]
    before = after = event_time = event_state = None
    if order is not None:
        place, number = ops.argsort(order), order.shape[1]
        before, after = (
            axes.state(ops.take_rows(results[:, i : i + number], place)) for i in (count, count + number)
        )
    event = solved.system.event
    if event is not None:
        time, state = _event(solved, event, end, derivatives)
        event_time, event_state = axes.lane(time * sign), axes.state(state)
    counts = map(axes.lane, outcome[:4])
    time = axes.lane(outcome.time * sign)
    return ODEInfo(*counts, time, before, after, event_time, event_state)


def _event(solved: Solved, event: Callable, end: Array, order: int) -> tuple[Array, Array]:
    """When the event happened, and the state then; NaN where it did not.

    From the time that the solver has found, chord steps along the flow go to g(t + d, y(t + d)) = 0: the
    first ones remove the error of the interpolant, the last ones bring the derivatives.
    """
    ops, system, outcome = solved.ops, solved.system, solved.outcome
    theta, t, happened = solved.inputs[3:], outcome.time, outcome.happened
    field = lambda t, y: system.field(t, y, theta)
    g = lambda d: event(t + d, flow(field, t, end, d), theta)
    d = 0 * t
    rate = ops.tangent_map(g, d)(d + 1)
    flat = happened & (rate == 0)
    moves = happened & ~flat
    for _ in range(order + 2):
        d = d - ops.where(moves, g(d), 0.0) / ops.where(moves, rate, 1.0)
    # Zero with derivatives that are NaN: those of a piecewise constant g do not tell how the time moves.
    d = ops.where(flat, ops.sqrt(ops.where(flat, 0 * ops.sum(end, 1), 1.0)), d)
    state = flow(field, t, end, d)
    time, state = ops.where(happened, t + d, ops.nan), ops.where(happened[:, None], state, ops.nan)
    return _movable(ops, time, order), _movable(ops, state, order)


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
        t: times (T,) or (B, T), ascending or descending; NaN behind the last one of a sample. With
            "dopri5", "tsit5" and "bosh3", outputs are read from the interpolants of the steps: more of them
            cost hardly any steps. The other methods end a step at each.
        args: whatever func takes besides t and y.
        rtol, atol: a step is accepted where the root mean square of error / (atol + rtol |y|) is at most 1;
            None is 1e-7 and 1e-9 in double precision, and 1e-5 and 1e-7 in single.
        method: "dopri5", "tsit5", "bosh3", "dopri8"; "kvaerno5", implicit, for stiff equations; of fixed step
            "euler", "midpoint", "heun", "rk4"; or a Tableau.
        adjoint: Discrete(), the derivatives of the computed solution, which can keep fewer states or, in
            torch, all stages; or Continuous().
        jumps: (times, fn) or (times, fn, mask): at times (J,) or (B, J) the state is replaced by that which
            fn gives; at times that are NaN or masked nothing happens. An output at the time of a jump is the
            state before it.
        event: a function of the arguments of func, but args, with one number for each sample. Where it
            changes sign on the way, not by a jump, the solution ends: later outputs are NaN, and the info has
            event_time and event_state. A number that is piecewise constant makes their derivatives NaN.
        step_size: fixed steps of about this size; None steps from one output to the next where the method
            does not choose its steps.
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
