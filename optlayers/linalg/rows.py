"""The set that the slack s of a program lies in: bounds l <= s <= u on the first rows, then curved cones.

Bounds cover every polyhedral row in one form: equality (l = u = 0), inequality (l = 0, u infinite),
two-sided, free. They are data, may differ over the batch and have derivatives; a row with l = u counts as
an equality.
Multipliers follow v = s - y: y >= 0 where s is at its lower bound, y <= 0 at the upper one. The functions
have the meaning of those of the same name in `optlayers.cones`, with the bounds before the cones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .. import cones as curved
from ..cones import Cones
from ..ops import Array, Ops


class Linearization(NamedTuple):
    """D of the bounded rows (B, k), which are 1 where free; 1 where at the lower bound; data of the cones."""

    free: Array
    lower: Array
    cones: tuple


def _clip(ops: Ops, x: Array, bounds: tuple[Array, Array]) -> Array:
    return ops.minimum(ops.maximum(x, bounds[0]), bounds[1])


def project(
    ops: Ops, cones: Cones, bounds: tuple[Array, Array], v: Array, start: Array | None = None
) -> Array:
    """The projection Pi(v) of v (B, m) onto the set; for `start` see `optlayers.cones.project`."""
    k = bounds[0].shape[-1]
    if not cones.rows:
        return _clip(ops, v, bounds)
    start = None if start is None else start[:, k:]
    return ops.concat([_clip(ops, v[:, :k], bounds), curved.project(ops, cones, v[:, k:], start)], -1)


def linearize(ops: Ops, cones: Cones, bounds: tuple[Array, Array], v: Array) -> Linearization:
    """Spectral data of D = dPi(v)."""
    k = bounds[0].shape[-1]
    head = v[:, :k]
    below = head <= bounds[0]
    free = ops.cast(~below & (head < bounds[1]), v)
    return Linearization(free, ops.cast(below, v), curved.linearize(ops, cones, v[:, k:]))


def inward(ops: Ops, bounds: tuple[Array, Array], v: Array) -> Array:
    """A step of v (B, m) that frees the rows at a bound with no multiplier, up to rounding; else zero.

    The opposite step makes them active. Beside those, D is the same at v and behind either step.
    """
    k = bounds[0].shape[-1]
    head, rest = v[:, :k], v[:, k:]
    rounding = 100 * ops.eps(v) * (1 + abs(head))
    near = [ops.cast(abs(head - bound) <= rounding, v) for bound in bounds]
    return ops.concat([2 * rounding * (near[0] - near[1]), 0 * rest], -1)


def shapes(cones: Cones, batch: int, k: int) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and kinds of the arrays of `flatten(linearize(...))`."""
    return [((batch, k), "float")] * 2 + curved.linearization_shapes(cones, batch)


def flatten(linearization: Linearization) -> list[Array]:
    return [linearization.free, linearization.lower, *curved.flatten(linearization.cones)]


def unflatten(cones: Cones, arrays: list[Array]) -> Linearization:
    return Linearization(arrays[0], arrays[1], curved.unflatten(cones, arrays[2:]))


def spectral(
    ops: Ops, cones: Cones, lin: Linearization, g: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """The map from u (B, m) to g(D) u."""
    k, weights = lin.free.shape[-1], g(lin.free)
    if not cones.rows:
        return lambda u: weights * u
    tail = lambda u: curved.spectral(ops, cones, lin.cones, g, u)
    return lambda u: ops.concat([weights * u[:, :k], tail(u[:, k:])], -1)


def curved_half(ops: Ops, cones: Cones, lin: Linearization, g: Callable[[Array], Array], A: Array) -> Array:
    """Rows H (B, m, n) with H'H = A' g(D) A on the curved cones, for g >= 0 and their rows A."""
    return curved.spectral(ops, cones, lin.cones, lambda d: ops.sqrt(g(d)), A, columns=True, rotated=True)


def project_linearized(
    ops: Ops, cones: Cones, bounds: tuple[Array, Array], lin: Linearization, v: Array, order: int
) -> Array:
    """Pi(v) with derivatives in v and in the bounds up to `order`, 0 to 2, at the point of `lin`."""
    k = lin.free.shape[-1]
    at_bound = ops.where(lin.lower > 0, bounds[0], bounds[1])
    head = ops.where(lin.free > 0, v[:, :k], at_bound)
    if not cones.rows:
        return head
    return ops.concat([head, curved.project_linearized(ops, cones, lin.cones, v[:, k:], order)], -1)


def whole_cones(ops: Ops, cones: Cones, rows: Array, mean: bool = False) -> Array:
    """`rows` (B, m) with the entries of each curved cone replaced by the largest one, or by their mean."""
    if not cones.rows:
        return rows
    k = rows.shape[-1] - cones.rows
    return ops.concat([rows[:, :k], curved.pooled(ops, cones, rows[:, k:], mean)], -1)


def unboundedness(
    ops: Ops, cones: Cones, bounds: tuple[Array, Array], y: Array, s: Array
) -> tuple[Array, Array, Array]:
    """What tells for y and s (B, m) whether s'y is bounded below on the set, and the set along s.

    The infimum of s'y (B,); the parts of y (B, m) for which it would be minus infinity; the projection of s
    (B, m) onto the directions in which the set is unbounded.
    """
    k = bounds[0].shape[-1]
    bound = ops.where(y[:, :k] > 0, bounds[0], bounds[1])
    finite = ops.isfinite(bound)
    least = ops.sum(ops.where(finite, bound, 0.0) * y[:, :k], -1)
    outside = ops.where(finite, 0.0, y[:, :k])
    low, high = (ops.where(ops.isfinite(bound), 0.0, bound) for bound in bounds)
    inside = _clip(ops, s[:, :k], (low, high))
    if not cones.rows:
        return least, outside, inside
    # Projected together, as a projection takes long to compile, and side by side: the batch may be sharded.
    pairs = ops.stack([-y[:, k:], s[:, k:]], 1)
    both = ops.reshape(curved.project(ops, cones, ops.reshape(pairs, (-1, cones.rows))), pairs.shape)
    return least, ops.concat([outside, both[:, 0]], -1), ops.concat([inside, both[:, 1]], -1)
