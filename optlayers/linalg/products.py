"""Matrices that are shared by a batch or not, scaled or with parts that are zero, and their products.

Shapes: x (B, n), or (B, k, n) for k vectors a problem; a matrix (m, n) or (1, m, n), shared by the batch, or
(B, m, n).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..cones import Cones
from ..ops import Array, Ops


class Scaled(NamedTuple):
    """The matrix diag(left) M diag(right), never formed; left (B, m), right (B, n)."""

    left: Array
    matrix: Array
    right: Array

    @property
    def mT(self) -> Scaled:
        return Scaled(self.right, self.matrix.mT, self.left)

    def times(self, x: Array) -> Array:
        return self.left * matvec(self.matrix, self.right * x)


class Compact(NamedTuple):
    """The matrix A of a program whose paired variables (see `Cones`) have one column in all.

    Attributes:
        matrix: the columns of the other variables, and one with the coefficients in the rows of the pairs.
    """

    ops: Ops
    cones: Cones
    matrix: Array
    is_transposed: bool = False

    @property
    def mT(self) -> Compact:
        return self._replace(is_transposed=not self.is_transposed)

    def times(self, x: Array) -> Array:
        p, rows = self.cones.paired, _pairs(self.cones, self.matrix)
        main, own = self.matrix[..., :-1], batched(self.matrix)[..., -1]
        own = own[:, None] if x.ndim == 3 else own
        if self.is_transposed:
            forces = own[..., rows] * x[..., rows]
            return self.ops.concat([matvec(main.mT, x), forces[..., :p] + forces[..., p:]], -1)
        zeros = lambda count: self.ops.full((*x.shape[:-1], count), 0.0, x)
        e, behind = x[..., -p:], own.shape[-1] - rows.stop
        return matvec(main, x[..., :-p]) + own * self.ops.concat([zeros(rows.start), e, e, zeros(behind)], -1)


def compacted(ops: Ops, cones: Cones, A: Array) -> Array:
    """The array of `Compact` for A; A itself where no variables are paired."""
    p = cones.paired
    if not p:
        return A
    rows = _pairs(cones, A)
    first, second = (slice(start, start + p) for start in (rows.start, rows.start + p))
    own = [ops.diagonal(A[..., part, -p:])[..., None] for part in (first, second)]
    own = [0 * A[..., : rows.start, :1], *own, 0 * A[..., rows.stop :, :1]]
    return ops.concat([A[..., :-p], ops.concat(own, -2)], -1)


def expanded(ops: Ops, cones: Cones, A: Array) -> Array:
    """The matrix that `compacted` was given."""
    if not cones.paired:
        return A
    eye, own, rows = ops.eye(cones.paired, A), A[..., -1:], _pairs(cones, A)
    eye = eye if A.ndim == 2 else eye[None]
    nothing = 0 * eye[..., :1, :]
    parts = own[..., : rows.start, :] * nothing, own[..., rows, :] * ops.concat([eye, eye], -2)
    columns = ops.concat([*parts, own[..., rows.stop :, :] * nothing], -2)
    return ops.concat([A[..., :-1], columns], -1)


def constraints(ops: Ops, cones: Cones, A: Array) -> Any:
    """What `compacted` has made of a matrix, for products."""
    return Compact(ops, cones, A) if cones.paired else A


def _pairs(cones: Cones, A: Array) -> slice:
    """The rows that paired variables stand in: the last before curved cones."""
    k = A.shape[-2] - cones.rows
    return slice(k - 2 * cones.paired, k)


def batched(matrix: Array) -> Array:
    """The matrix (k, n) or (B, k, n) with a batch axis; JAX can be told to insist on it."""
    return matrix[None] if matrix.ndim == 2 else matrix


def matvec(matrix: Any, x: Array) -> Array:
    """The product with each vector."""
    if isinstance(matrix, (Scaled, Compact)):
        return matrix.times(x)
    if x.ndim == 3:
        return x @ matrix.mT
    if matrix.ndim == 3 and matrix.shape[0] == 1:
        matrix = matrix[0]
    if matrix.ndim == 2:
        return x @ matrix.mT  # one GEMM for the whole batch
    # As a row vector from the left: torch is 4 times slower on (matrix @ x[..., None]).
    return (x[..., None, :] @ matrix.mT)[..., 0, :]


def matvec_symmetric(matrix: Any, x: Array) -> Array:
    """As `matvec`, along the rows of the matrix: torch is 2.5 times faster on x'M than on M x."""
    return matvec(matrix.mT, x)


def norm(ops: Ops, x: Array) -> Array:
    """Largest absolute entry of each row: (B, k) to (B,)."""
    return ops.amax(abs(x), -1)
