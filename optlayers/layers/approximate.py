"""Derivatives for problems whose exact one is zero or jumps, such as linear programs.

`Smoothed` differentiates a point of the central path in place of the solution; `LPGD` compares solutions of
two perturbed problems. Both leave the value of the layer alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..cones import Cones
from ..implicit import attach
from ..linalg.kkt import Factor, Problem, factorize_at, solve_refined
from ..linalg.products import matvec
from ..linalg.rows import Linearization
from ..ops import Array, Leaf, Ops, select
from ..solvers.refinement import smallest_regularization
from ..status import is_usable


@dataclass(frozen=True)
class Smoothed:
    """The derivative of the solution at which s y = mu on every bound, in place of s y = 0.

    The slack becomes s = l + h(v - l) - h(v - u) with h(t) = (t + sqrt(t^2 + 4 mu)) / 2, which is the central
    path of one-sided rows. Linear constraints only. Any order and mode of differentiation.

    Args:
        mu: in units of objective; larger is smoother and further from the exact derivative.

    Example:
        >>> import torch
        >>> from optlayers.torch import Smoothed, solve_qp
        >>> q, I = torch.tensor([2.0], requires_grad=True), torch.eye(1)
        >>> x = solve_qp(None, q, I, torch.zeros(1), gradient=Smoothed(mu=0.1)).x  # 0 for every q > 0
        >>> x.backward()
        >>> round(q.grad.item(), 4)  # of mu / q, the point of the central path
        -0.025
    """

    mu: float = 1e-3

    def __post_init__(self):
        if not 0 < self.mu < math.inf:
            raise ValueError(f"mu must be positive and finite, got {self.mu}; gradient='exact' has none")


@dataclass(frozen=True)
class LPGD:
    """The difference of the Lagrangian's gradients at two perturbed solutions (Paulus et al. 2024).

    With the cotangents x_bar, y_bar the problem is solved with q + t x_bar, b - t y_bar for t = tau and
    t = -tau. As tau falls this becomes the exact gradient; a large tau sees the vertices beyond. Reverse
    mode, first order.

    Args:
        tau: size of the perturbation, in units of q per unit of x_bar.

    Example:
        >>> import torch
        >>> from optlayers.torch import LPGD, solve_qp
        >>> q, I, one = torch.tensor([1.0], requires_grad=True), torch.eye(1), torch.ones(1)
        >>> x = solve_qp(None, q, I, 0 * one, one, gradient=LPGD(tau=2.0)).x
        >>> x.backward()
        >>> q.grad.item()  # with q - tau the solution is 1, with q + tau it is 0: (0 - 1) / (2 tau)
        -0.25
    """

    tau: float = 0.1

    def __post_init__(self):
        if not 0 < abs(self.tau) < math.inf:
            raise ValueError(f"tau must be finite and not zero, got {self.tau}")


@dataclass(frozen=True)
class _CentralPoint:
    """Leaf: Newton's method for the smoothed KKT residual from the exact solution (x, s, y)."""

    mu: float
    steps: int = 40

    in_numpy = True

    @property
    def input_ndims(self) -> tuple[int, ...]:
        return (2, 1, 2, 1, 1, 1, 1, 1, 1)

    def output_shapes(self, inputs):
        (batch, n), m = inputs[6], inputs[3][-1]
        return [((batch, *shape), "float") for shape in [(n,), (m,), (n, n), (1,), (m,)]]

    def __call__(self, ops: Ops, P, q, A, b, l, u, x, s, y) -> list[Array]:
        batch = x.shape[0]
        q, b, l, u = (ops.broadcast_to(z, (batch, z.shape[-1])) for z in (q, b, l, u))
        # Not equilibrated: on two-sided rows the smoothed slack would depend on the scaling.
        problem = Problem(P, q, A, b, l, u)
        mu, e = self.mu, ops.full((batch, 1), smallest_regularization(ops, x), x)

        def evaluate(x, v):
            s = smooth_clip(ops, problem.bounds, v, mu)
            F = matvec(P, x) + q + matvec(A.mT, s - v), matvec(A, x) + s - b
            return F, ops.sum(F[0] * F[0], -1) + ops.sum(F[1] * F[1], -1)

        def factor_at(v):
            d = smooth_derivative(ops, problem.bounds, v, mu)
            return factorize_at(ops, Cones(), problem, Linearization(d, 0 * d, ()), e)

        def step(state):
            x, v = state
            F, merit = evaluate(x, v)
            dx, dv = solve_refined(ops, Cones(), problem.P, problem.A, factor_at(v), F)

            def shorten(trial):
                length, best = trial
                worse = ~(evaluate(x + length * dx, v + length * dv)[1] < merit)[:, None]
                return ops.where(worse, length / 2, length), best

            length = ops.repeat(8, shorten, (ops.full((batch, 1), 1.0, x), merit))[0]
            better = evaluate(x + length * dx, v + length * dv)[1] < merit
            return select(ops, better, (x + length * dx, v + length * dv), (x, v))

        x, v = ops.repeat(self.steps, step, (x, s - y))
        factor = factor_at(v)
        return [x, v, factor.cholesky, factor.e, factor.linearization.free]


def _finite(ops: Ops, bound: Array) -> tuple[Array, Array]:
    finite = ops.isfinite(bound)
    return finite, ops.where(finite, bound, 0.0)


def smooth_clip(ops: Ops, bounds: tuple[Array, Array], v: Array, mu: float) -> Array:
    """The smoothed projection of v (B, m) onto the bounds."""
    (has_l, l), (has_u, u) = (_finite(ops, bound) for bound in bounds)
    h = lambda t: (t + ops.sqrt(t * t + 4 * mu)) / 2
    return ops.where(has_l, l + h(v - l), v) - ops.where(has_u, h(v - u), 0.0)


def smooth_derivative(ops: Ops, bounds: tuple[Array, Array], v: Array, mu: float) -> Array:
    """d smooth_clip / dv (B, m), between 0 and 1."""
    (has_l, l), (has_u, u) = (_finite(ops, bound) for bound in bounds)
    slope = lambda t: (1 + t / ops.sqrt(t * t + 4 * mu)) / 2
    return ops.where(has_l, slope(v - l), 1.0) - ops.where(has_u, slope(v - u), 0.0)


def smoothed(
    ops: Ops, gradient: Smoothed, data: Problem, point: Sequence[Array], usable: Array, order: int
) -> tuple[Array, Array, Array]:
    """x, s, y of `point`, with the derivatives of the central point; zero where not `usable`."""
    P, q, A, b, l, u = data
    n = q.shape[-1]
    x, v, cholesky, e, d = ops.leaf(_CentralPoint(gradient.mu), (*data, *point))
    q, b, l, u = (z[None] if z.ndim == 1 else z for z in (q, b, l, u))

    def unpack(z):
        s = smooth_clip(ops, (l, u), z[:, n:], gradient.mu)
        return z[:, :n], s, s - z[:, n:]

    def residual(z):
        x, s, y = unpack(z)
        F = ops.concat([matvec(P, x) + q + matvec(A.mT, y), matvec(A, x) + s - b], -1)
        return ops.where(usable, F, 0.0)

    def invert(r, transposed, P, A, cholesky, e, d):
        factor = Factor(cholesky, (), Linearization(d, 0 * d, ()), e)
        F = r[:, :n], r[:, n:]
        return -ops.concat(solve_refined(ops, Cones(), P, A, factor, F, transposed), -1)

    inverse = lambda r: ops.increment(invert, r, P, A, cholesky, e, d)
    central = unpack(attach(ops, residual, inverse, ops.concat([x, v], -1), order))
    return tuple(value + (z - ops.stop_gradient(z)) for value, z in zip(point, central, strict=True))


def lpgd(
    ops: Ops, gradient: LPGD, solve: Leaf, data: Problem, point: Sequence[Array], usable: Array
) -> tuple[Array, Array, Array]:
    """x, s, y of `point`, with LPGD's gradient; zero where not `usable` or where a perturbed solve fails.

    `solve` is the leaf that returned the point; it is asked again for each cotangent.
    """

    def backward(values, data, cotangents):
        # All arrays come as arguments: JAX forbids a rule to close over traced ones.
        *start, usable = values
        x_bar, y_bar, data = cotangents[0], cotangents[2], Problem(*data)
        q, b = (z[None] if z.ndim == 1 else z for z in (data.q, data.b))
        ends = []
        for t in (gradient.tau, -gradient.tau):
            shifted = data._replace(q=q + t * x_bar, b=b - t * y_bar)
            ends.append(_lagrangian_gradients(ops, solve, shifted, start))
        solved = ((usable > 0) & ends[0][0] & ends[1][0])[:, 0]
        halves = (select(ops, solved, end[1], tuple(0 * g for g in end[1])) for end in ends)
        result = [(plus - minus) / (2 * gradient.tau) for plus, minus in zip(*halves, strict=True)]
        return [g if g.ndim == z.ndim else g.sum(0) for g, z in zip(result, data, strict=True)]

    x, s, y = point
    values = x, s, y, ops.cast(usable, x)
    x, _, y, _ = ops.surrogate_gradient(values, tuple(data), backward)
    b = data.b[None] if data.b.ndim == 1 else data.b
    return x, b - matvec(data.A, x), y


def _lagrangian_gradients(
    ops: Ops, solve: Leaf, data: Problem, start: Sequence[Array]
) -> tuple[Array, tuple[Array, ...]]:
    """Which problems (B, 1) were solved, and dL / d(P, q, A, b, l, u) of each at its solution.

    L = 1/2 x'Px + q'x + y'(Ax - b) + (the least s'y over the set of s).
    """
    x, _, y, _, status = ops.leaf(solve, (*data, *start))[:5]
    outer = lambda a, b: a[:, :, None] * b[:, None, :]
    head = y[:, : data.l.shape[-1]]
    gradients = outer(x, x) / 2, x, outer(y, x), -y, ops.maximum(head, 0.0), ops.minimum(head, 0.0)
    return is_usable(status)[:, None], gradients
