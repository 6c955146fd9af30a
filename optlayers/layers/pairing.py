"""Variables that stand in two inequalities each, or in one exponential cone, put where solvers want them.

CVXPY writes a norm |Fx - g|_1 as a sum of variables t with  Fx - g <= t  and  g - Fx <= t, and also
max(x, 0); slacks of soft constraints are such variables as well. An entropy is a sum of variables t of which
each stands in one exponential cone. Solvers eliminate them at the cost of a diagonal matrix if they come last
(see `Cones.paired` and `Cones.single`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ..canon.program import AffineMap, Output, Program
from ..cones import Cones
from .ranges import Ranges


def arranged(program: Program, ranges: Ranges | None) -> Program:
    """The program with its paired and single variables, and their rows, at their places.

    Args:
        ranges: of the program, whose rows are in no pair.
    """
    merged = np.zeros(program.m + 1, bool)
    if ranges is not None:
        merged[ranges.kept[ranges.partner < program.m]] = merged[ranges.partner] = True
    first, second, paired = _enough(program, _pairs(program, merged[:-1]))
    cone, single = _enough(program, _singles(program))
    if not len(paired) + len(single):
        return program
    cones, rows, columns = program.cones, np.arange(program.m), np.arange(program.n)
    start = _exponential_start(cones)
    linear, between, exponential, rest = np.split(
        rows, [cones.zero + cones.nonneg, start, start + 3 * cones.exp]
    )
    moved = (cone[:, None] + np.arange(3)).ravel()
    parts = [
        np.setdiff1d(linear, [*first, *second]),
        first,
        second,
        between,
        np.setdiff1d(exponential, moved),
        moved,
        rest,
    ]
    rows = np.concatenate(parts)
    columns = np.concatenate([np.setdiff1d(columns, [*single, *paired]), single, paired])
    place = {"x": np.argsort(columns), "y": np.argsort(rows)}
    return replace(
        program,
        cones=replace(cones, paired=len(paired), single=len(single)),
        P=_moved(program.P, place["x"], place["x"]),
        q=_moved(program.q, place["x"], np.zeros(1, int)),
        A=_moved(program.A, place["y"], place["x"]),
        b=_moved(program.b, place["y"], np.zeros(1, int)),
        outputs=tuple(_reading(output, place[output.source]) for output in program.outputs),
    )


FEWEST, SHARE = 24, 0.2  # number of variables of a kind, and of all, from which on it pays


def _enough(program: Program, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The parts, or nothing of them where they are few; of all variables one stays."""
    count = min(len(parts[0]), program.n - 1)
    return [part[: count if count >= max(FEWEST, SHARE * program.n) else 0] for part in parts]


def _pairs(program: Program, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First rows, second rows and paired variables, no row being one of `taken` (m,), or of two of them."""
    cones, taken, found = program.cones, taken.copy(), []
    for variable, rows in _columns(program):
        is_linear = rows[0] >= cones.zero and rows[-1] < cones.zero + cones.nonneg
        if len(rows) == 2 and is_linear and not taken[rows].any():
            taken[rows] = True
            found.append((*rows, variable))
    first, second, variables = np.array(found, int).reshape(-1, 3).T
    return first, second, variables


def _singles(program: Program) -> tuple[np.ndarray, np.ndarray]:
    """First rows of exponential cones and their single variables."""
    start, found = _exponential_start(program.cones), {}
    for variable, rows in _columns(program):
        cone = (rows - start) // 3
        if cone[0] == cone[-1] and 0 <= cone[0] < program.cones.exp:
            found.setdefault(int(cone[0]), variable)
    return start + 3 * np.array(list(found), int), np.array(list(found.values()), int)


def _exponential_start(cones: Cones) -> int:
    return cones.rows - sum(len(weights) + 1 for weights in cones.pow) - 3 * cones.exp


def _columns(program: Program) -> Iterator[tuple[int, np.ndarray]]:
    """The variables that P has at most diagonal entries of, and the rows that each stands in."""
    n = program.n
    row, column = np.divmod(program.A.positions, n)
    order = np.argsort(column, kind="stable")
    parts = np.split(row[order], np.searchsorted(column[order], np.arange(1, n)))
    i, j = np.divmod(program.P.positions, n)
    is_mixed = np.zeros(n, bool)
    is_mixed[j[i != j]] = is_mixed[i[i != j]] = True
    return ((v, rows) for v, rows in enumerate(parts) if len(rows) and not is_mixed[v])


def _moved(affine: AffineMap, rows: np.ndarray, columns: np.ndarray) -> AffineMap:
    """The matrix whose entry (rows[i], columns[j]) is that at (i, j); a vector is one column."""
    i, j = np.divmod(affine.positions, len(columns))
    positions = rows[i] * len(columns) + columns[j]
    order = np.argsort(positions)
    index = np.argsort(order)[affine.rows]
    terms = np.argsort(index, kind="stable")
    return AffineMap(
        affine.shape,
        positions[order],
        affine.constant[order],
        index[terms],
        affine.cols[terms],
        affine.coefs[terms],
    )


def _reading(output: Output, place: np.ndarray) -> Output:
    moved = lambda indices: None if indices is None else np.where(indices < 0, -1, place[indices])
    return replace(output, indices=moved(output.indices), imag_indices=moved(output.imag_indices))
