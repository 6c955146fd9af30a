"""Refinement of an approximate solution by semismooth Newton steps on the KKT residual map.

On a QP a step solves for the rows that are active at the current point: a primal-dual active-set method
(Hintermueller, Ito and Kunisch 2003). Steps are not damped: the residual may rise before it falls, so the
best point seen is kept. The factor of the step that led to it is kept too, for the derivative.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from ..cones import Cones
from ..linalg.kkt import Factor, Problem, factorize_at, inverse, solve_refined
from ..linalg.products import constraints, hessian, matvec, matvec_symmetric, norm
from ..linalg.rows import linearize, project_linearized, whole_cones
from ..ops import Array, Ops, select
from .scaling import Scaling

ROUNDING = 5e10  # 50 times what rounding leaves of a sum of numbers of size one, in units of 1e-9


class Point(NamedTuple):
    """A primal-dual point (B, n), (B, m), its relative residual (B,) and the factor of J.

    That is of the point before, and on curved cones has the linearisation of this one; with e = 1 it is none.
    """

    x: Array
    v: Array
    residual: Array
    factor: Factor


class Units(NamedTuple):
    """What residuals are relative to.

    dual (B, n) and primal (B, m) bring F_1 and F_2 to the units of the user's problem, where q and b have the
    sizes of `given` (B, 2) and 1 stands for `one` (B, 2): for the size where it is smaller and not zero, so
    that tiny data are as accurate as others.
    """

    dual: Array
    primal: Array
    given: Array
    one: Array

    ndims = 1, 1, 1, 1  # without a batch axis


def units(ops: Ops, problem: Problem, scaling: Scaling) -> Units:
    dual, primal = 1 / (scaling.c * scaling.D), 1 / scaling.E
    given = ops.stack([norm(ops, problem.q * dual), norm(ops, problem.b * primal)], -1)
    one = ops.where(given > 0, ops.minimum(ops.maximum(given, 1e-12), 1.0), 1.0)
    return Units(dual, primal, given, one)


def evaluate(ops: Ops, cones: Cones, problem: Problem, units: Units, x: Array, v: Array):
    """F at (x, v), the largest of its relative residuals, whether that may be relied on, and D at v.

    That of a row, or of a curved cone, is relative to the larger of b and A x there, plus one; that of a
    column to the larger of q and A'y. So a large number hides no error elsewhere, but for what rounding may
    leave beside x and y.
    """
    linearization = linearize(ops, cones, problem.bounds, v)
    # As `project`, but with the roots and eigenvectors that were found just now.
    s = project_linearized(ops, cones, problem.bounds, linearization, v, 0)
    Px = matvec_symmetric(hessian(ops, problem.P), x)
    A = constraints(ops, cones, problem.A)
    Aty, Ax = matvec(A.mT, s - v), matvec(A, x)
    F = Px + problem.q + Aty, Ax + s - problem.b
    rounding = min(ROUNDING * ops.eps(x), 1.0)
    Px_size, x_size, y_size = (rounding * norm(ops, z)[:, None] for z in (Px, x, s - v))
    columns = ops.maximum(abs(problem.q), abs(Aty)) + Px_size + y_size
    rows = whole_cones(ops, cones, ops.maximum(abs(problem.b), abs(Ax)) + x_size)
    triples = (F[0], columns, units.dual), (F[1], rows, units.primal)
    errors = [
        norm(ops, part * unit / (units.one[:, i, None] + size * unit))
        for i, (part, size, unit) in enumerate(triples)
    ]
    is_resolved = _is_resolved(ops, problem, units, s, F[1]) if cones.rows else errors[0] == errors[0]
    return F, ops.maximum(*errors), is_resolved, linearization


def _is_resolved(ops: Ops, problem: Problem, units: Units, s: Array, F2: Array) -> Array:
    """Whether the curved cones still see the data (B,).

    Beside a slack of size t, data of size 1 move the boundary by 1 / t. As |(1, x)| <= x fails by 1 / 2x, a
    large x would pass for its solution, if errors were only compared with x. In single precision rounding
    alone is as large from t = 100 on: there only a slack of size 1 / sqrt(eps), which hides all data, is not.
    """
    limit = max(0.01, 2**23 * ops.eps(s))
    size, error = (norm(ops, (z * units.primal)[:, problem.l.shape[-1] :]) for z in (s, F2))
    return ops.maximum(error, ops.eps(s) * size) * size <= limit * (1 + units.given[:, 1]) ** 2


def smallest_regularization(ops: Ops, x: Array) -> float:
    """Balances the error of the regularisation, e, against that of rounding, eps / e."""
    return ops.eps(x) ** 0.5


def refine(
    ops: Ops,
    cones: Cones,
    problem: Problem,
    scaling: Scaling,
    best: Point,
    start: tuple[Array, Array],
    steps: int,
    target: float,
    active: Array,
) -> Point:
    """The better of `best` and of Newton's iterates from `start` = (x, v), per problem.

    Args:
        steps: so many, and more where each makes the residual ten times smaller.
        target: relative residual at which a problem needs no further step.
        active: (B,) the problems that count: the others keep `best`, and when all of them have reached the
            target, iteration stops.
    """
    floor = smallest_regularization(ops, problem.q)

    def step(k, data, state):
        best, needed, point, (F, last, linearization) = state
        problem, units = Problem(*data[:6]), Units(*data[6:])

        def newton(x, v):
            # Between bounds F is linear: a step on the right active set is exact but for the regularisation.
            # On curved cones a step from far away with little of it goes astray, and D changes by more than
            # refinement would gain.
            e = ops.maximum(0.01 * last, floor) if cones.rows else ops.full(last.shape, floor, last)
            factor = factorize_at(ops, cones, problem, linearization, ops.minimum(e, 0.01)[:, None])
            P, A = hessian(ops, problem.P), constraints(ops, cones, problem.A)
            refined = partial(solve_refined, ops, cones, P, A, factor)
            dx, dv = (inverse(ops, cones, A, factor) if cones.rows else refined)(F)
            return x + dx, v + dv, factor

        # The start is looked at without a step, here and not before, as `evaluate` takes long to compile.
        none = best.factor._replace(e=0 * best.factor.e + 1)
        x, v, factor = ops.cond(k > 1, newton, lambda x, v: (x, v, none), *point)
        F, error, is_resolved, linearization = evaluate(ops, cones, problem, units, x, v)
        if cones.rows:  # where D is not that of the step even at the solution
            factor = factor._replace(linearization=linearization)
        # A problem that has reached the target stays as it is, whatever the rest of the batch still needs.
        better = needed & is_resolved & (error < best.residual)
        best = select(ops, better, Point(x, v, error, factor), best)
        needed = needed & (best.residual > target) & ((k <= steps) | (error < 0.1 * last))
        return best, needed, (x, v), (F, error, linearization)

    relative_to = units(ops, problem, scaling)
    nothing = (0 * problem.q, 0 * problem.b), 0 * best.x[:, 0], best.factor.linearization
    state = best, active & (best.residual > target), start, nothing
    data, ndims = (*problem, *relative_to), (*Problem.ndims, *Units.ndims)
    return ops.repeat_on_rows(lambda state: state[1], step, data, ndims, state)[0]
