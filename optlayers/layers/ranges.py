"""Two inequalities that bound one expression from both sides, as one row: l <= a'x and a'x <= u.

CVXPY writes such a range, or a box, as the rows  a'x + s = u,  -a'x + t = -l  with s, t >= 0. They become
the row  a'x + s = u,  0 <= s <= u - l,  which halves the work and the memory of solvers. Its multiplier is
the difference of theirs, of which one is zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..canon.program import AffineMap, Program
from ..ops import Array, Ops
from .conic import ConicSolution

MOST_TIMES = 1e8  # that one side of a range may be as large as the other


@dataclass(frozen=True, eq=False)
class Ranges:
    """A program without the second row of each pair of opposite ones, and the way back to all m rows.

    Attributes:
        program: with m' rows.
        kept: which of the m rows they are (m',).
        partner: the row that each of them stands for besides, or m (m',).
        width: upper bound of its slack, infinite where it has no partner (m',).
    """

    program: Program
    kept: np.ndarray
    partner: np.ndarray
    width: np.ndarray

    def merge(self, ops: Ops, s: Array, y: Array) -> tuple[Array, Array]:
        """Slacks and multipliers (..., m) of the program with all rows, in terms of this one."""
        padded = ops.concat([y, 0 * y[..., :1]], -1)
        kept, partner = (ops.constant(rows, y) for rows in (self.kept, self.partner))
        return ops.take(s, kept), ops.take(y, kept) - ops.take(padded, partner)

    def restore(self, ops: Ops, solution: ConicSolution) -> ConicSolution:
        """The solution of the program with all rows."""
        first = np.flatnonzero(np.isfinite(self.width))
        order = ops.constant(np.argsort(np.append(self.kept, self.partner[first])), solution.y)
        width, first = ops.constant(self.width[first], solution.y), ops.constant(first, solution.y)
        is_first = ops.constant(np.isfinite(self.width) * 1.0, solution.y)[None] > 0
        s, y = solution.s, solution.y
        upper = ops.where(is_first, ops.maximum(y, 0.0), y)
        s = ops.concat([s, width[None] - ops.take(s, first)], -1)
        y = ops.concat([upper, ops.maximum(-ops.take(y, first), 0.0)], -1)
        return solution._replace(s=ops.take(s, order), y=ops.take(y, order))


def ranges(program: Program) -> Ranges | None:
    """The program with merged rows, of those without parameters; None if no two are opposite."""
    cones, (m, n) = program.cones, program.A.shape
    row, column = np.divmod(program.A.positions, n)
    constants = np.full(m, 0.0)
    constants[program.b.positions] = program.b.constant
    candidate = (np.arange(m) >= cones.zero) & (np.arange(m) < cones.zero + cones.nonneg)
    candidate &= np.isfinite(constants)
    candidate[row[program.A.rows]] = False
    candidate[program.b.positions[program.b.rows]] = False
    starts = np.searchsorted(row, np.arange(m + 1))
    partner, taken, waiting = np.full(m, m), np.zeros(m, bool), {}
    for i in np.flatnonzero(candidate):
        entries = slice(starts[i], starts[i + 1])
        key = column[entries].tobytes(), (-program.A.constant[entries]).tobytes()
        other = waiting.get(key)
        if other is not None and _are_comparable(constants[[i, other]]):
            del waiting[key]
            # The rounding of a larger side may be as large as the smaller one.
            first, second = sorted((other, i), key=lambda row: abs(constants[row]))
            partner[first], taken[second] = second, True
        else:
            waiting[key[0], program.A.constant[entries].tobytes()] = i
    if not taken.any():
        return None
    kept = np.flatnonzero(~taken)
    width = (constants + np.append(constants, np.inf)[partner])[kept]
    end = cones.zero + cones.nonneg
    behind = lambda distance: int((~taken[end - distance : end]).sum())
    groups = [replace(group, bounded=tuple(map(behind, group.bounded))) for group in cones.groups]
    merged = replace(
        program,
        cones=replace(cones, nonneg=cones.nonneg - int(taken.sum()), groups=tuple(groups)),
        A=_with_rows(program.A, kept, n),
        b=_with_rows(program.b, kept, 1),
    )
    return Ranges(merged, kept, partner[kept], width)


def _are_comparable(sides: np.ndarray) -> bool:
    """Whether rounding of the width leaves something of either side."""
    smaller, larger = sorted(abs(sides))
    return larger <= MOST_TIMES * max(1.0, smaller)


def _with_rows(affine: AffineMap, kept: np.ndarray, n: int) -> AffineMap:
    """The map of these rows of a matrix with n columns, or of a vector with n = 1."""
    row, column = np.divmod(affine.positions, n)
    new_row = np.full(affine.shape[0], -1)
    new_row[kept] = np.arange(len(kept))
    stays = new_row[row] >= 0
    index = np.cumsum(stays) - 1
    terms = stays[affine.rows]
    return AffineMap(
        (len(kept), *affine.shape[1:]),
        (new_row[row] * n + column)[stays],
        affine.constant[stays],
        index[affine.rows[terms]],
        affine.cols[terms],
        affine.coefs[terms],
    )
