"""The continuous adjoint of initial value problems, with memory that does not grow with the number of
steps."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from ..solvers.initial_value import Grid, System
from ..status import Status, from_code

NEVER = 2**31 - 1


@dataclass(frozen=True)
class Continuous:
    """The derivatives of the exact solution, approximated: a(t) = dL/dy(t) solves an equation of its own,

        da/dt = -(df/dy)' a,    dL/dtheta = integral of (df/dtheta)' a dt,

    backwards in time together with y (Chen et al. 2018). Memory does not grow with the number of steps; the
    error is that of the tolerances, and where y itself cannot be integrated backwards, much larger. Where the
    solve fails, a warning says so and derivatives are NaN; JAX cannot warn while it differentiates. First
    derivatives in reverse mode; not for jumps nor for implicit methods.

    Example:
        >>> from optlayers.torch import Continuous
        >>> Continuous().checkpoint_every > 10**9  # no state is kept
        True
    """

    checkpoint_every: int = NEVER

    def __call__(self, solved, order):
        if solved.grid.jumps.shape[1] > 0 or solved.method.tableau.diagonal or order > 1:
            raise ValueError("adjoint=Continuous() takes no jumps, no implicit method, and order=1 only")
        values = [solved.results, solved.end]
        backward = lambda values, inputs, cotangents: self._backward(solved, values, inputs, cotangents)
        return solved.ops.surrogate_gradient(values, solved.inputs, backward)

    def _backward(self, solved, values, inputs, cotangents):
        """Cotangents of the inputs: a solve in negated time, in which each output is a jump of (y, a)."""
        ops, grid, (_, times, jumps, *theta) = solved.ops, solved.grid, inputs
        (results, end), (results_bar, end_bar) = values, cotangents
        width, first = end.shape[1], -grid.outputs[:, 0]
        # Nothing of what nobody asks for, as of samples that failed: backwards it might fail again.
        is_idle = ops.all(ops.all(results_bar == 0, -1), -1) & ops.all(end_bar == 0, -1)
        start = ops.where(is_idle, first, -solved.outcome.time)
        index = ops.constant(np.arange(times.shape[1])[None], grid.count)
        reached = (index < grid.count[:, None]) & (grid.outputs <= solved.outcome.time[:, None])
        moments = ops.where(reached, -grid.outputs, ops.inf)
        order = ops.argsort(moments)

        def field(t, state, theta):
            y, a = state[:, :width], state[:, width:]
            (slope,), pull = ops.vjp(lambda y, _: (solved.system.field(-t, y, theta),), y, [])
            return ops.concat([-slope, pull((a,))[0]], 1)

        def jump(t, state, j, theta):
            row = ops.take_rows(order, j[:, None])
            y, more = (ops.take_rows(x, row)[:, 0] for x in (results, results_bar))
            return ops.concat([y, state[:, width:] + more], 1)

        def quadrature(t, h, state, K):
            add = lambda: self._gather(solved, theta, t, h, state, K)
            return ops.cond(ops.any_mapped(h > 0), add, lambda: [ops.full(x.shape, 0.0, x) for x in theta])

        interval = ops.stack([start, first], 1)
        backward = Grid(interval, ops.to_int(0 * start) + 2, ops.take_rows(moments, order))
        nothing = [ops.full(x.shape, 0.0, x) for x in theta]
        _, state, _, outcome, totals = solved.method.integrate(
            ops, System(field, jump), ops.concat([end, end_bar], 1), backward, theta, quadrature, nothing
        )
        failed = outcome.status != Status.SOLVED.code
        y_bar = ops.where(failed[:, None], ops.nan, state[:, width:])
        y_bar = ops.reported(y_bar, failed, _warn_of_unsolved, outcome.status)
        totals = [ops.where(ops.any(failed), ops.nan, x) for x in totals]
        times_bar = self._times(solved, theta, results, results_bar)
        return [y_bar, times_bar, ops.full(jumps.shape, 0.0, jumps), *totals]

    def _gather(self, solved, theta, t, h, state, K):
        """The integral of (df/dtheta)' a over a step, by the weights of the method."""
        ops, tableau, width = solved.ops, solved.method.tableau, solved.end.shape[1]
        totals = [ops.full(x.shape, 0.0, x) for x in theta]
        for s, weight in enumerate(tableau.a[-1]):
            if weight == 0:
                continue
            stage = state if s == 0 else ops.weighted_sum(tableau.a[s], K[:s], state)
            field = lambda y, theta, s=s: (solved.system.field(-t - tableau.c[s] * h, y, theta),)
            _, pull = ops.vjp(field, stage[:, :width], theta)
            _, more = pull((weight * h[:, None] * stage[:, width:],))
            totals = [a if b is None else a + b for a, b in zip(totals, more, strict=True)]
        return totals

    def _times(self, solved, theta, results, results_bar):
        """y(t) moves by f with its time."""
        ops, outputs = solved.ops, solved.grid.outputs
        if ops.is_constant(solved.inputs[1]):
            return ops.full(outputs.shape, 0.0, outputs)

        def body(carry):
            j, bars = carry
            slope = solved.system.field(outputs[:, j], results[:, j], theta)
            bar = ops.where(results_bar[:, j] != 0, results_bar[:, j] * slope, 0.0)
            return j + 1, ops.put_rows(bars, 0 * solved.grid.count[:, None] + j, ops.sum(bar, 1)[:, None])

        return ops.repeat(outputs.shape[1], body, (0, ops.full(outputs.shape, 0.0, outputs)))[1]


def _warn_of_unsolved(status: np.ndarray) -> None:
    failed = status != Status.SOLVED.code
    if failed.any():
        first = np.flatnonzero(failed)[0]
        why = from_code(int(status[first])).value
        warnings.warn(
            f"the adjoint equation was not solved for {failed.sum()} of {failed.size} samples: their "
            f"gradients are NaN, and those of all weights; sample {first}: {why}. Use "
            "adjoint=Discrete(), which goes back along the steps of the solution",
            stacklevel=2,
        )
