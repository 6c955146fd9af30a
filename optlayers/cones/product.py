"""The product cone of a program: projection, its derivative and its margin, block by block.

Shapes: v (B, m) with m = `cones.rows`; k columns of an operand; c equal cones of d rows in a block. Every
cone family of this package has, for points (B, c, d) of c equal cones,

    rows                                d
    shapes(count)                       shapes of the arrays of a linearisation without the batch axis
    project(ops, v, start)              Pi_K(v)
    linearize(ops, v)                   spectral data of D = dPi_K(v)
    spectral(ops, lin, g, u, rotated)   g(D) u for u (B, c, d, k)
    project_linearized(ops, lin, v, order)   Pi_K(v) near the point of `lin`, differentiable

On a kink of the projection D is the smallest of its choices: the constraint counts as active.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..ops import Array, Ops
from .exponential import Exponential
from .orthant import Orthant
from .power import Power
from .second_order import SecondOrder
from .semidefinite import Semidefinite

Linearization = tuple[tuple[Array, ...], ...]


@dataclass(frozen=True)
class Groups:
    """Variables that share rows only within their group of a few, and with those that are in no group.

    All groups of a kind have equally many variables and rows. Variables lie kind by kind, and within one as
    the first variables of all groups, then the second ones; P has none but diagonal entries of them.

    Attributes:
        count: number of groups.
        variables: of each.
        bounded: for each bounded row of a group, how many rows before the end of the bounded ones those rows
            of all groups start, one after the other.
        curved: number of rows of a group in curved cones, and how many rows before the end of all rows they
            start, group by group.

    Example:
        >>> from optlayers.cones import Groups
        >>> Groups(count=3, variables=1, bounded=(6, 3)).slices(k=10, m=10)
        [slice(4, 7, 1), slice(7, 10, 1)]
    """

    count: int
    variables: int
    bounded: tuple[int, ...]
    curved: tuple[int, int] = (0, 0)

    def blocks(self, k: int, m: int) -> list[tuple[slice, tuple[int, int], int]]:
        """The rows, where k of m are bounded, with their numbers as a matrix and the axis of a group's rows.

        These are the shape (rows of a group, groups) and axis 1 of bounded rows, behind a batch axis, and the
        shape (groups, rows of a group) and axis 2 of those in cones.
        """
        blocks, (rows, before) = [], self.curved
        for first in (k - distance for distance in self.bounded):
            each = 1
            if blocks and blocks[-1][0].stop == first:
                adjacent, (each, _), _ = blocks.pop()
                first, each = adjacent.start, each + 1
            blocks.append((slice(first, first + each * self.count), (each, self.count), 1))
        if rows:
            blocks.append((slice(m - before, m - before + rows * self.count), (self.count, rows), 2))
        return blocks

    def slices(self, k: int, m: int) -> list[slice]:
        """The i-th rows of all groups for each i, where k of m rows are bounded."""
        (rows, before), count = self.curved, self.count
        starts, first = [k - distance for distance in self.bounded], m - before
        bounded = [slice(start, start + count, 1) for start in starts]
        return bounded + [slice(first + i, first + rows * count, rows) for i in range(rows)]


@dataclass(frozen=True)
class Cones:
    """The product cone K of a program, block by block in row order.

    Attributes:
        zero: rows s = 0.
        nonneg: rows s >= 0.
        soc: sizes of the second-order cones {(t, w): |w| <= t}.
        psd: orders k of the semidefinite cones, k (k + 1) / 2 rows each: the upper triangle column by
            column, off-diagonal entries times sqrt(2).
        exp: number of exponential cones, closure of {(x, y, z): y exp(x / y) <= z, y > 0}, 3 rows each.
        pow: exponents of the power cones; a tuple of k positive weights of sum 1 stands for
            {(w, z): prod w_i ** weights_i >= |z|, w >= 0}, k + 1 rows; the three-dimensional cone with
            exponent a is (a, 1 - a).
        groups: of the last variables, which solvers eliminate, see `Groups`. A CvxpyLayer arranges and counts
            them; `solve_conic` takes none.

    Example:
        >>> from optlayers.torch import Cones
        >>> Cones(zero=1, nonneg=2, soc=(3, 4)).rows
        10
    """

    zero: int = 0
    nonneg: int = 0
    soc: tuple[int, ...] = ()
    psd: tuple[int, ...] = ()
    exp: int = 0
    pow: tuple[tuple[float, ...], ...] = ()
    groups: tuple[Groups, ...] = ()
    rows: int = field(init=False, repr=False, compare=False)
    local: int = field(init=False, repr=False, compare=False)  # number of variables in groups
    width: int = field(init=False, repr=False, compare=False)  # the most of a group
    _owners: dict[int, np.ndarray] = field(init=False, repr=False, compare=False)
    layout: _Layout = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        put = functools.partial(object.__setattr__, self)
        for name, sizes in {"zero": False, "nonneg": False, "exp": False, "soc": True, "psd": True}.items():
            put(name, _whole_numbers(name, getattr(self, name), sizes))
        put("pow", _weights(self.pow))
        rows = (
            self.zero
            + self.nonneg
            + sum(self.soc)
            + sum(k * (k + 1) // 2 for k in self.psd)
            + 3 * self.exp
            + sum(len(weights) + 1 for weights in self.pow)
        )
        # Once per program: a product of thousands of cones must not cost a Python loop at every call.
        put("rows", rows)
        put("local", sum(group.count * group.variables for group in self.groups))
        put("width", max([0, *(group.variables for group in self.groups)]))
        put("_owners", {})
        put("layout", _layout(self))

    @property
    def highest_order(self) -> float:
        """Of the derivatives of a solution: of a Taylor polynomial, or of the projection itself."""
        return 2 if self.psd or self.exp or self.pow else math.inf

    def owners(self, m: int) -> np.ndarray:
        """For each of m rows which variable in a group is the first of its group, the second, ... (w, m).

        Those that a row does not have are the first of all.
        """
        if m not in self._owners:
            owners, first = np.zeros((self.width, m), int), 0
            for group in self.groups:
                for j in range(group.variables):
                    for rows in group.slices(m - self.rows, m):
                        owners[j, rows] = first + np.arange(group.count)
                    first += group.count
            self._owners[m] = owners
        return self._owners[m]


class _Block(NamedTuple):
    """`count` cones that are computed together: rows from `start` on, or those in `index`."""

    cone: Any
    count: int
    start: int
    index: np.ndarray | None


class _Layout(NamedTuple):
    """The blocks of a product of cones, and where each row of it stands in them (None: in order)."""

    blocks: tuple[_Block, ...]
    order: np.ndarray | None


def _whole_numbers(name: str, value: Any, are_sizes: bool) -> Any:
    """A count, from zero on, or a tuple of sizes, from one on."""
    try:
        numbers = tuple(map(operator.index, value if are_sizes else (value,)))
    except TypeError:
        numbers = (-1,)
    if min(numbers, default=1) < are_sizes:
        expected = "a tuple of whole numbers from 1 on" if are_sizes else "a whole number from 0 on"
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return numbers if are_sizes else numbers[0]


def _weights(value: Any) -> tuple[tuple[float, ...], ...]:
    try:
        cones = tuple(tuple(map(float, weights)) for weights in value)
    except (TypeError, ValueError):
        cones = ((),)
    for weights in cones:
        if not (weights and min(weights) > 0 and abs(sum(weights) - 1) <= 1e-6):
            raise ValueError(f"pow must be a tuple of tuples of positive weights of sum 1, got {value!r}")
    return cones


def _layout(cones: Cones) -> _Layout:
    """Cones of one family and size together, at the place of the first of them."""
    starts: dict[Any, list[int]] = {}
    row = cones.zero + cones.nonneg
    if row:
        starts[Orthant(cones.zero, cones.nonneg)] = [0]
    for cone in (*map(SecondOrder, cones.soc), *map(Semidefinite, cones.psd), *[Exponential()] * cones.exp):
        starts.setdefault(cone, []).append(row)
        row += cone.rows
    weights: dict[int, list[tuple[float, ...]]] = {}
    for a in cones.pow:
        weights.setdefault(len(a), []).append(tuple(a))
    powers = {k: Power(tuple(same)) for k, same in weights.items()}
    for a in cones.pow:
        starts.setdefault(powers[len(a)], []).append(row)
        row += len(a) + 1

    blocks, rows = [], []
    for cone, first in starts.items():
        index = [row + i for row in first for i in range(cone.rows)]
        adjacent = index[-1] - index[0] + 1 == len(index)
        blocks.append(_Block(cone, len(first), first[0], None if adjacent else np.array(index)))
        rows.extend(index)
    return _Layout(tuple(blocks), None if rows == sorted(rows) else np.argsort(rows))


def _split(ops: Ops, blocks: Sequence[_Block], u: Array) -> list[Array]:
    """Operands (B, c, d, k) of each block in u (B, m, k)."""
    parts = []
    for block in blocks:
        count, d = block.count, block.cone.rows
        if block.index is None:
            part = u[:, block.start : block.start + count * d]
        else:
            part = ops.take(u, ops.constant(block.index, u), axis=-2)
        parts.append(ops.reshape(part, (u.shape[0], count, d, u.shape[-1])))
    return parts


def _join(ops: Ops, layout: _Layout, parts: Sequence[Array]) -> Array:
    """The inverse of `_split`."""
    flat = [ops.reshape(x, (x.shape[0], x.shape[1] * x.shape[2], x.shape[3])) for x in parts]
    joined = ops.concat(flat, axis=-2) if len(flat) > 1 else flat[0]
    return joined if layout.order is None else ops.take(joined, ops.constant(layout.order, joined), axis=-2)


def _map(ops: Ops, cones: Cones, function: Callable, v: Array, *data: Sequence) -> Array:
    """`function(cone, points, *data of the block)` for the points (B, c, d) of every block of v (B, m)."""
    blocks = cones.layout.blocks
    if not blocks:
        return v
    points = [x[..., 0] for x in _split(ops, blocks, v[..., None])]
    args = zip((block.cone for block in blocks), points, *data, strict=True)
    return _join(ops, cones.layout, [function(*arg)[..., None] for arg in args])[..., 0]


def project(ops: Ops, cones: Cones, v: Array, start: Array | None = None) -> Array:
    """Pi_K(v), (B, m). Not to be differentiated: see `project_linearized`.

    From `start`, the projection of a point nearby, it takes fewer steps, and is as accurate as that is near.
    """
    blocks = cones.layout.blocks
    starts = [None] * len(blocks) if start is None else _split(ops, blocks, start[..., None])
    starts = [x if x is None else x[..., 0] for x in starts]
    return _map(ops, cones, lambda cone, x, near: cone.project(ops, x, near), v, starts)


def pooled(ops: Ops, cones: Cones, v: Array, mean: bool) -> Array:
    """v (B, m) with the entries of each cone replaced by the largest one, or by their mean."""

    def pool(cone, x):
        value = ops.sum(x, -1, keepdims=True) / cone.rows if mean else ops.amax(x, -1, keepdims=True)
        return value + 0 * x

    return _map(ops, cones, pool, v)


def linearize(ops: Ops, cones: Cones, v: Array) -> Linearization:
    """Spectral data of D = dPi_K(v), an element of the generalised Jacobian: arrays with B in front."""
    blocks = cones.layout.blocks
    parts = _split(ops, blocks, v[..., None])
    return tuple(b.cone.linearize(ops, x[..., 0]) for b, x in zip(blocks, parts, strict=True))


def linearization_shapes(cones: Cones, batch: int) -> list[tuple[tuple[int, ...], str]]:
    """Shape and kind ("float") of each array of `flatten(linearize(ops, cones, v))`."""
    return [((batch, *shape), "float") for b in cones.layout.blocks for shape in b.cone.shapes(b.count)]


def flatten(linearization: Linearization) -> list[Array]:
    """The arrays of a linearisation, in the order of `linearization_shapes`."""
    return [array for block in linearization for array in block]


def unflatten(cones: Cones, arrays: Sequence[Array]) -> Linearization:
    """The inverse of `flatten`."""
    rest = iter(arrays)
    return tuple(tuple(next(rest) for _ in b.cone.shapes(b.count)) for b in cones.layout.blocks)


def spectral(
    ops: Ops,
    cones: Cones,
    linearization: Linearization,
    g: Callable[[Array], Array],
    u: Array,
    columns: bool = False,
    rotated: bool = False,
) -> Array:
    """g(D) u for a function g of the eigenvalues of the symmetric matrix D.

    Args:
        linearization: from `linearize`.
        g: elementwise; called once per block with eigenvalues (B, anything), so that it may hold factors
            of shape (B, 1).
        u: (B, m); with `columns` (B, m, k), or (m, k) shared by the batch.
        columns: `u` is a matrix.
        rotated: the result may be multiplied by an orthogonal matrix, the same for all columns and every g.
            Cheaper, and enough where only inner products of columns are used, as in u' g(D)^2 u.

    Returns:
        (B, m), or (B, m, k).
    """
    blocks = cones.layout.blocks
    if not blocks:
        return u
    if not columns:
        u = u[..., None]
    elif u.ndim == 2:
        u = u[None]
    args = zip(blocks, linearization, _split(ops, blocks, u), strict=True)
    product = _join(ops, cones.layout, [b.cone.spectral(ops, lin, g, x, rotated) for b, lin, x in args])
    return product if columns else product[..., 0]


def project_linearized(
    ops: Ops, cones: Cones, linearization: Linearization, v: Array, order: int = 2
) -> Array:
    """Pi_K(v) with derivatives in `v` that are right up to `order` at the point of linearisation, 0 to 2.

    Differentiable in every mode and nesting: the branch, the eigenvectors and the roots that the projection
    depends on are taken from `linearization`, which must be constant and built at the value of `v`.
    """

    def near(cone, x, lin):
        return cone.project_linearized(ops, lin, x, order)

    return _map(ops, cones, near, v, linearization)


def margin(ops: Ops, cones: Cones, s: Array) -> Array:
    """Distance |s - Pi_K(s)| of each row of `s` to K in the largest entry, (B,)."""
    return ops.amax(abs(s - project(ops, cones, s)), axis=-1)


def dual_margin(ops: Ops, cones: Cones, y: Array) -> Array:
    """Distance of each row of `y` to the dual cone in the largest entry, (B,).

    y - Pi_{K*}(y) = -Pi_K(-y) by Moreau's decomposition.
    """
    return ops.amax(abs(project(ops, cones, -y)), axis=-1)
