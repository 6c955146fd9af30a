"""Variables that stand in two inequalities each: those of |x|, of max(x, 0), slacks of soft constraints.

CVXPY writes a norm |Fx - g|_1 as a sum of variables t with  Fx - g <= t  and  g - Fx <= t. Solvers eliminate
such variables at the cost of a diagonal matrix if they come last (see `Cones.paired`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..canon.program import AffineMap, Output, Program
from .ranges import Ranges


def arranged(program: Program, ranges: Ranges | None) -> Program:
    """The program with its paired variables, and their rows, where `Cones.paired` wants them.

    Args:
        ranges: of the program, whose rows are in no pair.
    """
    merged = np.zeros(program.m + 1, bool)
    if ranges is not None:
        merged[ranges.kept[ranges.partner < program.m]] = merged[ranges.partner] = True
    first, second, variables = (part[: program.n - 1] for part in _pairs(program, merged[:-1]))
    if len(variables) < max(FEWEST, SHARE * program.n):
        return program
    linear = program.cones.zero + program.cones.nonneg
    rows, columns = np.arange(program.m), np.arange(program.n)
    chosen = np.concatenate([first, second])
    rows = np.concatenate([np.setdiff1d(rows[:linear], chosen), chosen, rows[linear:]])
    columns = np.append(np.setdiff1d(columns, variables), variables)
    place = {"x": np.argsort(columns), "y": np.argsort(rows)}
    return replace(
        program,
        cones=replace(program.cones, paired=len(variables)),
        P=_moved(program.P, place["x"], place["x"]),
        q=_moved(program.q, place["x"], np.zeros(1, int)),
        A=_moved(program.A, place["y"], place["x"]),
        b=_moved(program.b, place["y"], np.zeros(1, int)),
        outputs=tuple(_reading(output, place[output.source]) for output in program.outputs),
    )


FEWEST, SHARE = 24, 0.2  # number of paired variables, and of all, from which on it pays


def _pairs(program: Program, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First rows, second rows and paired variables, no row being one of `taken` (m,), or of two of them."""
    n, cones = program.n, program.cones
    row, column = np.divmod(program.A.positions, n)
    order = np.argsort(column, kind="stable")
    ends = np.searchsorted(column[order], np.arange(n + 1))
    i, j = np.divmod(program.P.positions, n)
    is_mixed = np.zeros(n, bool)
    is_mixed[j[i != j]] = is_mixed[i[i != j]] = True
    taken, pairs = taken.copy(), []
    for variable in np.flatnonzero((np.diff(ends) == 2) & ~is_mixed):
        rows = row[order[ends[variable] : ends[variable + 1]]]
        if rows[0] >= cones.zero and rows[1] < cones.zero + cones.nonneg and not taken[rows].any():
            taken[rows] = True
            pairs.append((*rows, variable))
    first, second, variables = np.array(pairs, int).reshape(-1, 3).T
    return first, second, variables


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
