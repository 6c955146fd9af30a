"""The data P, q, A, b of a program from the values of its parameters, by few operations on whole arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..canon.program import AffineMap, Program
from ..ops import Array, Ops


class _Terms(NamedTuple):
    """Part of an affine map: entry `positions[k]` of the flat matrix gets `coefs[k] * theta[cols[k]]`.

    Without positions there is one term for each entry in turn, which is much faster than scattering them.
    Here theta is made of `pieces` (block, start, stop) one after the other; without cols all of it is read:
    in turn, or as a matrix of so many `columns` column by column. Equal coefficients are one number.
    """

    pieces: tuple[tuple[int, int, int], ...]
    positions: np.ndarray | None
    cols: np.ndarray | None
    columns: int | None
    coefs: np.ndarray | float


class _Split(NamedTuple):
    """An affine map for one choice of batched parameters: a constant and the terms of either kind."""

    shape: tuple[int, ...]
    constant: np.ndarray | None
    shared: tuple[_Terms, ...]
    batched: tuple[_Terms, ...]


def _terms(positions: np.ndarray, cols: np.ndarray, coefs: np.ndarray, size: int, edges: np.ndarray):
    """The terms, in layers of one for each of `size` entries if few layers are at least half full.

    `edges` are the columns where blocks of theta start, and their end.
    """
    if not len(cols):
        return ()
    # Of several terms of an entry first the one that continues a range, as in a matrix and its transpose.
    order = np.lexsort((cols - cols.min() != positions, positions))
    positions, cols, coefs = positions[order], cols[order], coefs[order]
    layer = np.arange(len(cols)) - np.searchsorted(positions, positions)
    count = 1 + layer.max()
    if count * size > 2 * len(cols):
        return (_from_pieces(positions, cols, coefs, edges),)
    layers_of_cols, layers_of_coefs = np.full((count, size), cols[0]), np.zeros((count, size))
    # A term that is alone is split over the layers, so that all of (Q + Q') / 2 is halved.
    alone = np.bincount(positions, minlength=size)[positions] == 1
    layers_of_cols[:, positions[alone]] = cols[alone]
    layers_of_coefs[:, positions[alone]] = coefs[alone] / count
    layer, positions, cols, coefs = (x[~alone] for x in (layer, positions, cols, coefs))
    layers_of_cols[layer, positions], layers_of_coefs[layer, positions] = cols, coefs
    return tuple(
        _from_pieces(None, *pair, edges) for pair in zip(layers_of_cols, layers_of_coefs, strict=True)
    )


MOST_PIECES = 8  # more are read entry by entry


def _from_pieces(
    positions: np.ndarray | None, cols: np.ndarray, coefs: np.ndarray, edges: np.ndarray
) -> _Terms:
    equal = float(coefs[0]) if (coefs == coefs[0]).all() else coefs
    ends = np.append(np.flatnonzero((np.diff(cols) != 1) | np.isin(cols[1:], edges)) + 1, len(cols))
    if len(ends) <= MOST_PIECES:
        starts = np.append(0, ends[:-1])
        return _Terms(_pieces(cols[starts], cols[ends - 1] + 1, edges), positions, None, None, equal)
    first, last = np.searchsorted(edges, [cols.min(), cols.max()], "right")
    start, whole = edges[first - 1], _pieces(edges[first - 1 : last], edges[first : last + 1], edges)
    size, columns = edges[last] - start, cols[1] - cols[0]
    if columns > 1 and size % columns == 0:
        by_columns = np.arange(start, edges[last]).reshape(-1, columns).T.ravel()
        if np.array_equal(cols, by_columns):
            return _Terms(whole, positions, None, int(columns), equal)
    return _Terms(whole, positions, cols - start, None, equal)


def _pieces(starts: np.ndarray, stops: np.ndarray, edges: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """(block, start, stop) within their block, for ranges of theta that each lie in one."""
    blocks = np.searchsorted(edges, starts, "right") - 1
    ranges = zip(blocks, starts - edges[blocks], stops - edges[blocks], strict=True)
    return tuple((int(block), int(start), int(stop)) for block, start, stop in ranges)


def _split(
    affine: AffineMap, is_batched: np.ndarray, column: np.ndarray, edges: Sequence[np.ndarray]
) -> _Split:
    """Split the terms of a map by whether their entry of theta is batched; `column` renumbers theta."""
    constant = np.zeros(math.prod(affine.shape))
    # An infinite right-hand side is expressed by the bounds of its row.
    constant[affine.positions] = np.where(np.isinf(affine.constant), 0.0, affine.constant)
    positions, cols = affine.positions[affine.rows], affine.cols

    def terms(mask, edges):
        return _terms(positions[mask], column[cols[mask]], affine.coefs[mask], constant.size, edges)

    batched = is_batched[cols]
    parts = terms(~batched, edges[0]), terms(batched, edges[1])
    return _Split(affine.shape, constant if constant.any() or not any(parts) else None, *parts)


@lru_cache(maxsize=64)
def splits(program: Program, batched: tuple[bool, ...]) -> tuple[_Split, ...]:
    """P, q, A, b for parameters of which `batched` tells which carry a batch axis."""
    sizes = np.array([block.stop - block.start for block in program.blocks], int)
    kinds = np.array([batched[block.parameter] for block in program.blocks], bool)
    is_batched = np.repeat(kinds, sizes)
    column = np.where(is_batched, np.cumsum(is_batched) - 1, np.cumsum(~is_batched) - 1)
    edges = [np.append(0, np.cumsum(sizes[kinds == kind])) for kind in (False, True)]
    return tuple(_split(m, is_batched, column, edges) for m in (program.P, program.q, program.A, program.b))


def _theta(ops: Ops, program: Program, values: Sequence[Array], keep: Sequence[bool]) -> list[Array]:
    """The blocks (..., size) of the parameters marked by `keep`; values have flat last axes."""
    # That of zero has an infinite derivative, which times zero is NaN also where it is masked.
    log = lambda x: ops.log(ops.where(x > 0, x, ops.nan))
    part = {"real": ops.real, "imag": ops.imag, "log": log}
    return [part[b.part](values[b.parameter]) for b in program.blocks if keep[b.parameter]]


def assemble(
    ops: Ops, program: Program, splits: Sequence[_Split | None], values: Sequence[Array], like: Array
) -> list[Array | None]:
    """P, q, A, b of the program for flat parameter values (size,) or (B, size).

    A matrix or vector that no batched parameter enters has no batch axis; None stays None.
    """
    batched = [value.ndim == 2 for value in values]
    shared_theta = _theta(ops, program, values, [not b for b in batched])
    batched_theta = _theta(ops, program, values, batched)

    def build(split: _Split) -> Array:
        total = None
        if split.constant is not None:
            total = ops.reshape(ops.constant(split.constant, like), split.shape)
        for terms, theta in ((split.shared, shared_theta), (split.batched, batched_theta)):
            if terms:
                total = _add_terms(ops, total, terms, theta, split.shape)
        return total

    return [None if split is None else build(split) for split in splits]


def _add_terms(
    ops: Ops, total: Array | None, terms: Sequence[_Terms], theta: Sequence[Array], shape: tuple[int, ...]
) -> Array:
    """`total`, if there is one, and the terms (..., *shape)."""
    if terms[0].positions is not None:  # then it is the only one
        values = _contribution(ops, terms[0], terms[0].coefs, theta, terms[0].positions.shape)
        size, positions = math.prod(shape), ops.constant(terms[0].positions, values)
        start = None if total is None else ops.reshape(total, (*total.shape[: total.ndim - len(shape)], size))
        return ops.reshape(ops.scatter_add(values, positions, size, start), (*values.shape[:-1], *shape))
    # A coefficient that all have in common is applied at last.
    first, *others = (part.coefs for part in terms)
    is_common = isinstance(first, float) and all(isinstance(c, float) and c == first for c in others)
    contributions = (_contribution(ops, x, 1.0 if is_common else x.coefs, theta, shape) for x in terms)
    added = _add([*contributions])
    added = first * added if is_common and first != 1 else added
    return added if total is None else _add([total, added])


def _contribution(
    ops: Ops, terms: _Terms, coefs: np.ndarray | float, theta: Sequence[Array], shape: tuple[int, ...]
) -> Array:
    """The values (..., *shape) of the terms in the order of their positions, or of all entries in turn."""
    pieces, _, cols, columns, _ = terms
    blocks = [theta[block][..., start:stop] for block, start, stop in pieces]
    picked = blocks[0] if len(blocks) == 1 else ops.concat(blocks, -1)
    lead, count = picked.shape[:-1], picked.shape[-1]
    flat = lambda x: ops.reshape(x, (*lead, count))
    if cols is not None:
        count = len(cols)
        picked = ops.take(picked, ops.constant(cols, picked))
    if columns is not None:
        picked = ops.reshape(picked, (*lead, count // columns, columns)).mT
        if (*lead, *shape) != tuple(picked.shape):  # a matrix as a whole need not be copied
            picked = flat(picked)
    if isinstance(coefs, np.ndarray):
        picked = flat(picked)
        picked = picked * _row(ops.constant(coefs, picked), picked)
    elif coefs != 1:
        picked = coefs * picked
    return ops.reshape(picked, (*lead, *shape))


def _add(parts: Sequence[Array]) -> Array:
    total, *others = parts
    for part in others:
        total = _row(total, part) + part
    return total


def _row(x: Array, like: Array) -> Array:
    """The vector `x` with as many axes as `like`, which JAX can be told to insist on."""
    return x[None] if x.ndim < like.ndim else x
