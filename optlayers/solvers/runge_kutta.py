"""One step of a Runge-Kutta method, for a batch whose samples have times and step sizes of their own.

Shapes: t, h (B,); y, slopes and increments, which are h times slopes, (B, k). A field is a function (t, y) to
y'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..implicit import attach, dense_inverse
from ..ops import Array, MatrixFreeOps
from ..status import Status
from .fixed_point import NewtonKrylov, Problem, run
from .tableaux import Tableau

Field = Callable[[Array, Array], Array]
DENSE = 32


@dataclass(frozen=True)
class Newton:
    """Newton's method with matrices: the problem's tangent is the derivative of its map (B, k, k)."""

    def init(self, ops, z, g):
        return ()

    def step(self, ops, problem, k, z, g, state, running):
        factor = ops.lu_factor(ops.eye(z.shape[1], z)[None] - problem.tangent(z))
        return z + ops.lu_solve(factor, g[..., None])[..., 0], state


@dataclass(frozen=True)
class Stages:
    """How the stages of one step are computed.

    Args:
        tableau: the method.
        tol: of implicit stages, relative.
        order: derivatives that implicit stages have.
        newton: solver of implicit stages of more than `DENSE` numbers; others are solved with matrices.
        max_iter: its steps; a stage that needs more is NaN, which rejects the step.
    """

    tableau: Tableau
    tol: float
    order: int = 0
    newton: NewtonKrylov = NewtonKrylov()
    max_iter: int = 10

    def __call__(
        self, ops: MatrixFreeOps, field: Field, t: Array, h: Array, y: Array, first: Array, end: Array
    ) -> tuple[list[Array], Array, Array | int]:
        """The increments, without the last one if the method is explicit; the result; evaluations of field.

        Args:
            first: the slope at t.
            end: t + h, or a little less where field jumps at it.
        """
        tableau, work, stage, step = self.tableau, 0, y, h[:, None]
        K = [step * first]
        for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
            time = end if c == 1 else ops.weighted_sum((c,), (h,), t)
            base = ops.weighted_sum(row, K, y)
            if tableau.diagonal == 0:
                if len(K) < len(tableau.c) - 1:
                    K.append(step * field(time, base))
                stage = base
                continue
            scale = tableau.diagonal * step
            stage, evaluations = self._solve(ops, lambda z, time=time: field(time, z), base, scale, stage)
            work = work + evaluations
            K.append((stage - base) / tableau.diagonal)
        return K, stage, work if tableau.diagonal else len(tableau.c) - 2

    def complete(
        self,
        ops: MatrixFreeOps,
        field: Field,
        h: Array,
        K: list[Array],
        y_new: Array,
        first: Array,
        end: Array,
    ) -> tuple[list[Array], Array]:
        """The increments, with the last; and the slope at the end."""
        step = h[:, None]
        if len(K) < len(self.tableau.c):
            last = field(end, y_new)
            return [*K, step * last], last
        return K, ops.where(step != 0, K[-1] / ops.where(step != 0, step, 1.0), first)

    def _solve(self, ops, field, base, scale, guess):
        """z = base + scale field(z), differentiable up to `order`."""
        value = lambda z: base + scale * field(z)
        is_dense = base.shape[1] <= DENSE
        tangent = ops.jacobian if is_dense else ops.tangent_map
        problem = Problem(ops.frozen(value, guess), lambda z: tangent(value, z))
        solver = Newton() if is_dense else self.newton
        solution = run(ops, solver, problem, ops.stop_gradient(guess), self.tol, self.max_iter)
        solved = (solution.status == Status.SOLVED.code)[:, None]
        z = ops.where(solved, solution.z, ops.nan)
        if self.order > 0:
            F = lambda z: z - value(z)
            if is_dense:
                inverse = dense_inverse(ops, ops.jacobian(F, z))
            else:
                inverse = lambda r: ops.solve_increment(value, z, self._solve_linear(ops), r)
            z = attach(ops, F, inverse, z, self.order)
        return z, solution.iterations + 1

    def _solve_linear(self, ops):
        def solve(A, r):
            result = run(
                ops, self.newton, Problem(lambda w: r + A(w), lambda w: A), r, self.tol, self.max_iter
            )
            return ops.where((result.residual > self.tol**0.5)[:, None], ops.nan, result.z)

        return solve


def interpolate(
    ops: MatrixFreeOps, tableau: Tableau, t: Array, h: Array, y: Array, K: list[Array], times: Array
) -> Array:
    """States (B, W, k) at `times` (B, W) within a step of which all increments are known."""
    fraction = (times - t[:, None]) / ops.where(h > 0, h, 1.0)[:, None]
    weights = tableau.weights
    powers = [fraction]
    for _ in weights[1:]:
        powers.append(powers[-1] * fraction)
    return y[:, None] + ops.stack(powers, -1) @ ops.constant(weights, y)[None] @ ops.stack(K, 1)


def flow(field: Field, t: Array, y: Array, d: Array) -> Array:
    """The state at t + d where that at t is y, for small d: the error is of third order."""
    half = d[:, None] / 2
    return y + 2 * half * field(t + d / 2, y + half * field(t, y))
