"""Variables that share rows with few others, put where solvers eliminate them.

CVXPY writes |F x - g|_1 as a sum of variables t with  F x - g <= t  and  g - F x <= t, |F x - g|^2 as that of
t_i^2 with  t = F x - g, an entropy as a sum of t of which each stands in one exponential cone, the logistic
function with three variables in two such cones and a row, Huber's with three in three rows. Of these each
makes a group, see `optlayers.cones.Groups`; x, which most of the rows have in common, is in none. Slacks of
soft constraints are such variables as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from ..canon.program import AffineMap, Output, Program
from ..cones import Cones, Groups
from .ranges import Ranges

MOST_VARIABLES, MOST_ROWS = 8, 32  # of a group
FEWEST, SHARE = 24, 0.2  # variables of a kind, and share of all, from which on it pays


def arranged(program: Program, ranges: Ranges | None) -> Program:
    """The program with the variables of groups and their rows at their places.

    Args:
        ranges: of the program, whose rows are in no group.
    """
    merged = np.zeros(program.m + 1, bool)
    if ranges is not None:
        merged[ranges.kept[ranges.partner < program.m]] = merged[ranges.partner] = True
    kinds = _kinds(program, merged[:-1])
    if not kinds:
        return program
    cones, m = program.cones, program.m
    start = _exponential_start(cones)
    sections = np.split(np.arange(m), [cones.zero, cones.zero + cones.nonneg, start, start + 3 * cones.exp])
    # Rows (groups, count) of each kind in each section; those of cones group by group, others row by row.
    parts = [[rows[:, np.isin(rows[0], section)] for _, rows in kinds] for section in sections]
    moved = [[rows.ravel() if i == 3 else rows.T.ravel() for rows in part] for i, part in enumerate(parts)]
    order = [
        [np.setdiff1d(all_, np.concatenate(own)), *own] for all_, own in zip(sections, moved, strict=True)
    ]
    rows = np.concatenate([rows for section in order for rows in section])
    columns = np.concatenate([variables.T.ravel() for variables, _ in kinds])
    columns = np.concatenate([np.setdiff1d(np.arange(program.n), columns), columns])
    place = {"x": np.argsort(columns), "y": np.argsort(rows)}
    groups = []
    for (variables, _), zero, nonneg, curved in zip(kinds, parts[0], parts[1], parts[3], strict=True):
        firsts = place["y"][np.concatenate([zero[0], nonneg[0]])]
        before = m - place["y"][curved[0, 0]] if curved.size else 0
        bounded = tuple(int(cones.zero + cones.nonneg - first) for first in firsts)
        groups.append(Groups(*map(int, variables.shape), bounded, (curved.shape[1], int(before))))
    return replace(
        program,
        cones=replace(cones, groups=tuple(groups)),
        P=_moved(program.P, place["x"], place["x"]),
        q=_moved(program.q, place["x"], np.zeros(1, int)),
        A=_moved(program.A, place["y"], place["x"]),
        b=_moved(program.b, place["y"], np.zeros(1, int)),
        outputs=tuple(_reading(output, place[output.source]) for output in program.outputs),
    )


def compacted(program: Program) -> Program:
    """The program with compact P and A, see `optlayers.linalg.products`."""
    cones, n = program.cones, program.n - program.cones.local
    if not cones.groups:
        return program
    which = [np.repeat(np.arange(group.variables), group.count) for group in cones.groups]
    to = np.concatenate([np.arange(n), *(n + each for each in which)])
    i, j = np.divmod(program.A.positions, program.n)
    width = n + cones.width
    A = _placed(program.A, (program.m, width), i * width + to[j])
    i, j = np.divmod(program.P.positions, program.n)
    return replace(program, A=A, P=_placed(program.P, (program.n, n), i * n + np.where(j < n, j, 0)))


def _kinds(program: Program, merged: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Variables (groups, variables) and rows (groups, rows) of each kind."""
    found = defaultdict(list)
    for variables, rows in _groups(program, merged):
        start, linear = _exponential_start(program.cones), program.cones.zero
        found[len(variables), len(rows), int(sum(rows < linear)), int(sum(rows < start))].append(
            (variables, rows)
        )
    kinds = [(np.array([v for v, _ in same]), np.array([r for _, r in same])) for same in found.values()]
    kinds = [kind for kind in kinds if kind[0].size >= max(FEWEST, SHARE * program.n)]
    if sum(variables.size for variables, _ in kinds) == program.n:  # of all variables some stay
        variables, rows = kinds[0]
        kinds[0] = variables[1:], rows[1:]
    return [(variables, rows) for variables, rows in kinds if len(variables)]


def _groups(program: Program, merged: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The variables and rows of each group, in order.

    Of variables that rows or exponential cones connect to more than a few, those in most rows are left out,
    until only few are connected.
    """
    cones, (m, n) = program.cones, program.A.shape
    row, column = np.divmod(program.A.positions, n)
    start = _exponential_start(cones)
    stop = start + 3 * cones.exp
    is_fit = np.ones(m, bool)
    is_fit[cones.zero + cones.nonneg : start] = is_fit[stop:] = False
    is_fit[: cones.zero] = np.isin(np.arange(cones.zero), row[program.A.rows])  # others are eliminated
    is_fit &= ~merged
    count = np.bincount(column, minlength=n)
    i, j = np.divmod(program.P.positions, n)
    is_free = (count > 0) & (np.bincount(column[~is_fit[row]], minlength=n) == 0)
    is_free[i[i != j]] = is_free[j[i != j]] = False
    # One number for the rows of a cone.
    link = np.where((row >= start) & (row < stop), row - (row - start) % 3, row)
    while True:
        kept = is_free[column]
        ends = link[kept], m + column[kept]
        graph = sp.coo_array((np.ones(kept.sum()), ends), (m + n, m + n))
        label = connected_components(graph, directed=False)[1]
        free = np.flatnonzero(is_free)
        sizes = np.bincount(label[m + free], minlength=m + n)
        links = np.unique(link[kept])
        weight = np.where((links >= start) & (links < stop), 3, 1)
        rows = np.bincount(label[links], weight, minlength=m + n)
        is_large = (sizes > MOST_VARIABLES) | (rows > MOST_ROWS)
        if not is_large[label[m + free]].any():
            break
        most = np.zeros(m + n, int)
        np.maximum.at(most, label[m + free], count[free])
        is_free[free] = ~is_large[label[m + free]] | (count[free] < most[label[m + free]])
    order = np.argsort(label[m + free], kind="stable")
    variables = (
        np.split(free[order], np.flatnonzero(np.diff(label[m + free][order])) + 1) if len(free) else []
    )
    members = defaultdict(list)
    for first, size in zip(links, weight, strict=True):
        members[label[first]].extend(range(first, first + size))
    for part in sorted(variables, key=lambda part: part[0]):
        yield part, np.array(members[label[m + part[0]]])


def _exponential_start(cones: Cones) -> int:
    return cones.rows - sum(len(weights) + 1 for weights in cones.pow) - 3 * cones.exp


def _moved(affine: AffineMap, rows: np.ndarray, columns: np.ndarray) -> AffineMap:
    """The matrix whose entry (rows[i], columns[j]) is that at (i, j); a vector is one column."""
    i, j = np.divmod(affine.positions, len(columns))
    return _placed(affine, affine.shape, rows[i] * len(columns) + columns[j])


def _placed(affine: AffineMap, shape: tuple[int, int], positions: np.ndarray) -> AffineMap:
    """The map with its entries at other positions."""
    order = np.argsort(positions)
    index = np.argsort(order)[affine.rows]
    terms = np.argsort(index, kind="stable")
    return AffineMap(
        shape,
        positions[order],
        affine.constant[order],
        index[terms],
        affine.cols[terms],
        affine.coefs[terms],
    )


def _reading(output: Output, place: np.ndarray) -> Output:
    moved = lambda indices: None if indices is None else np.where(indices < 0, -1, place[indices])
    return replace(output, indices=moved(output.indices), imag_indices=moved(output.imag_indices))
