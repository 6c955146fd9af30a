"""Derivatives of the solution of a cone program in its data, from the KKT equations at the solution.

`derived` has those of every order and mode (see `optlayers.implicit`); `adjoint` is the first one in reverse
mode, written out, for torch: without a tape, and in NumPy where a call is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..cones import Cones
from ..implicit import attach
from ..linalg import normal
from ..linalg.kkt import Factor, Problem
from ..linalg.products import Scaled, constraints, hessian, matvec, matvec_symmetric, spread
from ..linalg.rows import Linearization, project_linearized, spectral, unflatten
from ..linalg.sensitivity import solve_sensitivity
from ..ops import Array, Ops
from ..solvers.scaling import Scaling
from ..status import is_usable


def derived(
    ops: Ops,
    cones: Cones,
    usable: Callable[[Array], Array],
    order: int,
    data: Sequence[Array],
    constants: Sequence[Array],
) -> tuple[Array, Array, Array]:
    """x, s and y with derivatives in the data up to `order`, where `usable(status)` says so."""
    status, x_unique, y_unique, is_rough, x, v, D, E, c, e, *factors = constants
    P, q, A, b, l, u = cleaned(ops, status, usable(status), Problem(*data))
    n, is_derived, rows = q.shape[-1], usable(status)[:, None], constraints(ops, cones, A)
    singular = is_usable(status) & (x_unique * y_unique == 0)
    linearization = _linearization(cones, n, factors)
    q, b, l, u = (z[None] if z.ndim == 1 else z for z in (q, b, l, u))
    bounds = (ops.where(is_derived, bound, ops.stop_gradient(bound)) for bound in (l, u))
    bounds = tuple(E[:, : bound.shape[-1]] * bound for bound in bounds)

    def invert(r, transposed, *frozen):
        return -ops.concat(_solve(ops, cones, (r[:, :n], r[:, n:]), transposed, *frozen), -1)

    inverse = lambda r: ops.increment(invert, r, P, A, D, E, c, singular, is_rough > 0, e, *factors)

    def unscale(z):
        v = z[:, n:]
        s = project_linearized(ops, cones, bounds, linearization, v, order)
        return Scaling(D, E, c).restore(z[:, :n], s, s - v)

    def residual(z):
        x, s, y = unscale(z)
        F1 = c * D * (matvec_symmetric(hessian(ops, P), x) + q + matvec(rows.mT, y))
        F = ops.concat([F1, E * (matvec(rows, x) + s - b)], -1)
        return ops.where(is_derived, F, 0.0)

    root = ops.concat([x, v], -1)
    return unscale(attach(ops, residual, inverse, root, order, cones.highest_order))


def adjoint(
    cones: Cones,
    usable: Callable[[Array], Array],
    ops: Ops,
    needed: Sequence[bool],
    data: Sequence[Array],
    constants: Sequence[Array],
    cotangents: Sequence[Array | None],
) -> tuple[Array, ...]:
    """First derivatives of `derived` in reverse mode: cotangents of those of the data that are needed.

    With d = -J^-T (cotangents of the scaled x and v), the equations P x + q + A'y and A x + s - b have the
    cotangents a = c D d_1 and e = E d_2.
    """
    status, x_unique, y_unique, is_rough, x, v, D, E, c, regularization, *factors = constants
    P, _, A, _, l, u = data = cleaned(ops, status, usable(status), Problem(*data))
    is_derived = usable(status)[:, None]
    singular = is_usable(status) & (x_unique * y_unique == 0)
    linearization = _linearization(cones, x.shape[-1], factors)
    E_bounds = E[:, : l.shape[-1]]
    bounds = tuple(E_bounds * (z[None] if z.ndim == 1 else z) for z in (l, u))
    s = project_linearized(ops, cones, bounds, linearization, v, 0)
    x_bar, s_bar, y_bar = (
        ops.full(z.shape, 0.0, z) if bar is None else bar
        for bar, z in zip(cotangents, (x, v, v), strict=True)
    )
    slack = s_bar / E + y_bar * E / c  # of the scaled s
    v_bar = spectral(ops, cones, linearization, lambda d: d)(slack) - y_bar * E / c
    F = ops.where(is_derived, D * x_bar, 0.0), ops.where(is_derived, v_bar, 0.0)
    d = _solve(ops, cones, F, True, P, A, D, E, c, singular, is_rough > 0, regularization, *factors)
    a, e = (ops.where(is_derived, z, 0.0) for z in (c * D * d[0], E * d[1]))
    x, y = D * x, (s - v) * E / c

    def at_bound(side):
        moved = matvec(constraints(ops, cones, A), a)
        total = ops.where(is_derived, slack + e / E + E / c * moved, 0.0)[:, : side.shape[-1]]
        return E_bounds * (1 - linearization.free) * side * total

    bars = (
        lambda: _outer_hessian(ops, P, x, a),
        lambda: a,
        lambda: _outer_constraints(ops, cones, A, (e, y), (x, a)),
        lambda: -e,
        lambda: at_bound(linearization.lower),
        lambda: at_bound(1 - linearization.lower),
    )
    chosen = [(z, bar()) for z, bar, is_needed in zip(data, bars, needed, strict=True) if is_needed]
    return tuple(_summed(ops, bar, z) for z, bar in chosen)


def _solve(ops, cones, F, transposed, P, A, D, E, c, singular, is_rough, e, *factors) -> tuple[Array, Array]:
    """`solve_sensitivity` for the scaled problem, applied through the matrices of the unscaled one."""
    n = F[0].shape[-1]
    count = len(normal.shapes(cones, n))
    factor = Factor(factors[0], tuple(factors[1:count]), _linearization(cones, n, factors), e)
    P, A = Scaled(c * D, hessian(ops, P), D), Scaled(E, constraints(ops, cones, A), D)
    return solve_sensitivity(ops, cones, P, A, factor, singular, is_rough, F, transposed)


def _linearization(cones: Cones, n: int, factors: Sequence[Array]) -> Linearization:
    """The last of what the leaf returns, behind the arrays of the factor."""
    return unflatten(cones, list(factors[len(normal.shapes(cones, n)) :]))


def _outer(ops: Ops, matrix: Array, left: Sequence[Array], right: Sequence[Array]) -> Array:
    """The sum of outer products of vectors (B, k) and (B, n), over the batch where it shares the matrix."""
    is_shared = matrix.ndim == 2 or len(matrix) < len(left[0])
    join = (lambda parts: ops.concat(parts, 0)) if is_shared else (lambda parts: ops.stack(parts, -2))
    return join(left).mT @ join(right)


def _outer_hessian(ops: Ops, P: Array, x: Array, a: Array) -> Array:
    """The cotangent x a' of a compact P."""
    n, p = P.shape[-1], P.shape[-2] - P.shape[-1]
    bar = _outer(ops, P, (x[:, :n],), (a[:, :n],))
    if not p:
        return bar
    diagonal = x[:, n:] * a[:, n:]
    diagonal = ops.sum(diagonal, 0) if bar.ndim == 2 else diagonal
    rest = ops.full((*diagonal.shape, n - 1), 0.0, x)
    return ops.concat([bar, ops.concat([diagonal[..., None], rest], -1)], -2)


def _outer_constraints(
    ops: Ops, cones: Cones, A: Array, left: Sequence[Array], right: Sequence[Array]
) -> Array:
    """The cotangent of a compact A from a sum of outer products of left (B, m) and right (B, n)."""
    n = right[0].shape[-1] - cones.local
    bar = _outer(ops, A, left, [vector[:, :n] for vector in right])
    if not cones.groups:
        return bar
    local = [spread(ops, cones, vector[:, n:], A.shape[-2]) for vector in right]
    own = sum(x[:, None] * y for x, y in zip(left, local, strict=True)).mT
    return ops.concat([bar, ops.sum(own, 0) if bar.ndim == 2 else own], -1)


def _summed(ops: Ops, bar: Array, like: Array) -> Array:
    """The cotangent with the axes of `like`, summed over the batch where that has none of its own."""
    if bar.ndim > like.ndim or len(bar) > len(like):
        bar = ops.sum(bar, 0)
    return ops.reshape(bar, like.shape)


def cleaned(ops: Ops, status: Array, is_derived: Array, data: Problem) -> Problem:
    """The data with zeros for the problems (B,) without derivative, and for what is infinite and must not be.

    Times zero it would reach shared parameters as NaN.
    """

    def clean(data):
        parts = []
        for z, good, own in zip(data, finite_entries(ops, data), Problem.ndims, strict=True):
            if z.ndim > own:
                good = good & ops.reshape(is_derived, (-1,) + (1,) * own)
            parts.append(ops.where(good, z, 0.0))
        return tuple(parts)

    return Problem(*ops.cond_or_both(ops.any(~is_usable(status)), clean, tuple, tuple(data)))


def finite_entries(ops: Ops, data: Sequence[Array]) -> list[Array]:
    """Which entries of data with l and u at the end are finite; bounds may be infinite to their side."""
    *finite, l, u = data
    return [*(ops.isfinite(z) for z in finite), l < ops.inf, u > -ops.inf]
