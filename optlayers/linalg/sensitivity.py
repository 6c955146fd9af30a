"""The inverse of J that the derivative of a solution uses, also where J is singular.

Where the solution is regular this is J^-1, with one step of refinement, or as many as an ill-conditioned J
takes. Where solution or multipliers are not unique (redundant active rows, linear programs with an edge of
solutions), J is singular and the derivative becomes the minimum-norm least-squares one. With
M = (J + e S)^-1, S the sign of the regularisation, M r grows like 1 / e in the null space, but M J M r has no
part there and is J^+ r up to O(e) on the rest; two iterations on its residual make the order e^3.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..cones import Cones
from ..ops import Array, Ops, select
from .kkt import Factor, Problem, apply, factorize, inverse, solve_refined
from .products import constraints, hessian, norm
from .rows import inward, spectral

# Power of the rounding unit: M J M amplifies rounding by 1 / e twice, and its bias is of order e^3. With
# 1 / 3 derivatives of the multipliers of redundant rows had three times the rounding.
SINGULAR_REGULARIZATION = 0.32


class Regularity(NamedTuple):
    """Whether x and the multipliers are locally unique, (B,)."""

    x: Array
    y: Array


def prepare(
    ops: Ops, cones: Cones, problem: Problem, v: Array, factor: Factor, usable: Array
) -> tuple[Factor, Regularity, Array]:
    """A factor at v fit for `solve_sensitivity`, made anew only where `factor` is not.

    Problems that are not `usable` (B,) have no derivative, and nothing is done for their sake.

    Rows at a bound without multiplier are open: x is unique if it is so where they are free, the multipliers
    if they are so where they are held. The derivative is that with them held, or free if x is not unique.

    Returns:
        The factor; the regularity; and whether one step of refinement is too few (B,).
    """
    regularized = lambda power: ops.full((v.shape[0], 1), ops.eps(v) ** power, v)

    def mend(lanes, v, e, factor):
        refactor = lambda old: select(ops, lanes, factorize(ops, cones, problem, v, e), old)
        return ops.cond(ops.any(lanes), refactor, lambda old: old, factor)

    def attempt(carry):
        k, errors, was_rough, factor, most, e = carry
        freed, held = is_open & (k == 2), is_open & (k == 3)
        moved = freed | held
        lanes = moved | (inaccurate(errors) & ~(factor.e <= most)[:, 0])
        at = ops.where(freed[:, None], v + step, ops.where(held[:, None], v - step, v))
        new = mend(lanes, at, ops.where(moved[:, None], factor.e, e), factor)
        found, is_rough = _probe(ops, cones, problem, new)
        is_better = ops.maximum(*found) < ops.maximum(*errors)
        better = select(ops, is_better, (found, is_rough, new), (errors, was_rough, factor))
        worse = tuple(map(ops.maximum, errors, found)), was_rough | is_rough, factor
        return k + 1, *select(ops, moved, worse, better), least, least

    # A Newton step from far out leaves more regularisation than is good for a derivative, and the usual one
    # is too much for what is close to singular, as the entropy of sums of 1e5 is. Where it leaves an error of
    # the fixed z0, that of the solution's derivative may be ten times as large. Then the open rows are freed,
    # and at last held.
    inaccurate = lambda errors: ~(ops.maximum(*errors) < min(1e-3, ops.eps(v) ** 0.4))
    singular, usual, least = map(regularized, (SINGULAR_REGULARIZATION, 0.5, 0.7))
    step = inward(ops, problem.bounds, v)
    is_open = usable & ops.any(step != 0, -1)
    unknown = ops.inf + 0 * v[:, 0]
    first = 0, (unknown, unknown), unknown > 0, factor, singular, usual
    unfinished = lambda carry: (
        ((carry[0] < 2) & ops.any(usable & inaccurate(carry[1]))) | ((carry[0] < 4) & ops.any(is_open))
    )
    _, errors, is_rough, factor, _, _ = ops.while_loop(unfinished, attempt, first)
    regularity = Regularity(*(error < 1e-3 for error in errors))
    is_singular = usable & ~(regularity.x & regularity.y)
    chosen = v + ops.where(regularity.x[:, None], -step, step)
    e = ops.where(is_singular[:, None], singular, factor.e)
    return mend(is_open | is_singular, chosen, e, factor), regularity, usable & is_rough


def _probe(ops: Ops, cones: Cones, problem: Problem, factor: Factor) -> tuple[tuple[Array, Array], Array]:
    """Errors (B,) of x and y when J z = J z0 is solved for a fixed random z0: the part in the null space.

    And whether they were not small after one step of refinement.
    """
    batch, n = problem.q.shape
    m = problem.b.shape[-1]
    z0 = np.random.default_rng(0).standard_normal(n + m)
    z0 = ops.broadcast_to(ops.constant(z0, problem.q), (batch, n + m))
    P, A = hessian(ops, problem.P), constraints(ops, cones, problem.A)
    dy = spectral(ops, cones, factor.linearization, lambda d: 1 - d)  # of dv, with the other sign

    def errors(z0, rough=None):
        dx, dv = z0[:, :n], z0[:, n:]
        r = apply(ops, cones, P, A, factor.linearization, dx, dv)
        x, v = solve_refined(ops, cones, P, A, factor, r, rough=rough)
        return norm(ops, x + dx), norm(ops, dy(v + dv))

    found = errors(z0)
    is_rough = ~(ops.maximum(*found) <= ops.eps(z0) ** 0.5)

    def more(z0, _):
        # One z0 in a thousand has next to no part in a null space: no part of two is not by chance.
        def again(state):
            z0, largest = state
            largest = tuple(map(ops.maximum, largest, errors(z0, is_rough)))
            return ops.concat([z0[:, 1:], z0[:, :1]], -1), largest

        none = 0 * ops.cast(is_rough, z0)  # which in JAX differs by device if the data do
        return ops.repeat(2, again, (z0, (none, none)))[1]

    return ops.cond(ops.any(is_rough), more, lambda _, found: found, z0, found), is_rough


def solve_sensitivity(
    ops: Ops,
    cones: Cones,
    P: Any,
    A: Any,
    factor: Factor,
    singular: Array,
    is_rough: Array,
    F: tuple[Array, Array],
    transposed: bool = False,
) -> tuple[Array, Array]:
    """(dx, dv) with J (dx, dv) = -F, in the sense of least squares for the `singular` problems (B,).

    With `transposed`, the transpose of that map. One step of refinement serves where none `is_rough` (B,).
    """
    M = inverse(ops, cones, A, factor, transposed)
    J = lambda d: apply(ops, cones, P, A, factor.linearization, *d, transposed)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])

    refined = partial(solve_refined, ops, cones, P, A, factor, transposed=transposed)

    def least_squares(F):
        # With the residual in the state one body serves the first solve and the iterations on its residual.
        def improve(state):
            d, residual = state
            first = J(M(residual))
            d = add(d, M((-first[0], -first[1])))
            return d, add(F, J(d))

        return ops.repeat(3, improve, ((0 * F[0], 0 * F[1]), F))[0]

    def both(F):
        return select(ops, singular, least_squares(F), refined(F, rough=is_rough))

    return ops.cond_or_both(ops.any(singular | is_rough), both, refined, F)
