"""Matrices that are shared by a batch or not, scaled or with parts that are zero, and their products.

Shapes: x (B, n), or (B, k, n) for k vectors a problem; a matrix (m, n) or (1, m, n), shared by the batch, or
(B, m, n). The last p of n variables may be in groups of at most w (see `optlayers.cones.Groups`). Then A is
compact, (m, n - p + w): behind the columns of the others it has for each row its coefficients of the first
variable of its group, of the second, and so on, zero where there is none. And P is (n, n - p): of the
variables in groups it has the diagonal, in its first column.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..cones import Cones, Groups
from ..ops import Array, Ops


class Scaled(NamedTuple):
    """The matrix diag(left) M diag(right), never formed; left (B, m), right (B, n)."""

    left: Array
    matrix: Any
    right: Array

    @property
    def mT(self) -> Scaled:
        return Scaled(self.right, self.matrix.mT, self.left)

    def times(self, x: Array) -> Array:
        return self.left * matvec(self.matrix, self.right * x)


class Hessian(NamedTuple):
    """A compact P for products."""

    ops: Ops
    matrix: Array

    @property
    def mT(self) -> Hessian:
        return self

    def times(self, x: Array) -> Array:
        P, diagonal = split_hessian(self.matrix)
        n = P.shape[-1]
        diagonal = diagonal[:, None] if x.ndim == 3 else diagonal
        return self.ops.concat([matvec_symmetric(P, x[..., :n]), diagonal * x[..., n:]], -1)


class Constraints(NamedTuple):
    """A compact A for products: the columns of variables in no group, and the others as rows (B, w, m)."""

    ops: Ops
    cones: Cones
    main: Array
    own: Array
    is_transposed: bool = False

    @property
    def mT(self) -> Constraints:
        return self._replace(is_transposed=not self.is_transposed)

    def times(self, x: Array) -> Array:
        ops, cones, main = self.ops, self.cones, self.main
        own = self.own[:, None] if x.ndim == 3 else self.own
        if self.is_transposed:
            forces = collect(ops, cones, own * x[..., None, :])
            return ops.concat([matvec(main.mT, x), forces], -1)
        m, n = main.shape[-2:]
        return matvec(main, x[..., :n]) + followed(ops, own, spread(ops, cones, x[..., n:], m))


def hessian(ops: Ops, P: Array) -> Any:
    """P for products."""
    return P if P.shape[-1] == P.shape[-2] else Hessian(ops, P)


def constraints(ops: Ops, cones: Cones, A: Array) -> Any:
    """A for products."""
    if not cones.groups:
        return A
    return Constraints(ops, cones, A[..., : A.shape[-1] - cones.width], own_rows(cones, A))


def split_hessian(P: Array) -> tuple[Array, Array]:
    """P of the variables in no group, and its diagonal (B, p) for the others."""
    n = P.shape[-1]
    return P[..., :n, :], batched(P)[..., n:, 0]


def own_rows(cones: Cones, A: Array) -> Array:
    """The coefficients (B, w, m) in a compact A of the first variables of groups, the second ones, ..."""
    return batched(A)[..., A.shape[-1] - cones.width :].mT


def variables(cones: Cones) -> Iterator[tuple[Groups, list[slice]]]:
    """Each kind of groups, and where its first variables, its second ones, ... lie among all in groups."""
    first = 0
    for group in cones.groups:
        starts = [first + j * group.count for j in range(group.variables)]
        yield group, [slice(start, start + group.count) for start in starts]
        first += group.count * group.variables


def spread(ops: Ops, cones: Cones, x: Array, m: int) -> Array:
    """What each of m rows has as the first variable of its group, the second and so on, of x (..., p).

    That is (..., w, m), with the first entry of x in the place of what a row does not have.
    """
    owners = ops.constant(cones.owners(m).ravel(), x)
    return ops.reshape(ops.take(x, owners), (*x.shape[:-1], cones.width, m))


def followed(ops: Ops, own: Array, x: Array) -> Array:
    """The product (..., m) of coefficients with what `spread` makes of variables in groups."""
    return own[..., 0, :] * x[..., 0, :] if x.shape[-2] == 1 else ops.sum(own * x, -2)


def collect(ops: Ops, cones: Cones, forces: Array) -> Array:
    """The transpose of `spread` on rows that have such variables: (..., p) of (..., w, m)."""
    parts, m = [], forces.shape[-1]
    for group in cones.groups:
        first, *rest = (forces[..., : group.variables, rows] for rows in group.slices(m - cones.rows, m))
        parts.append(ops.reshape(sum(rest, first), (*forces.shape[:-2], -1)))
    return ops.concat(parts, -1)


def whole(ops: Ops, cones: Cones, P: Array, A: Array) -> tuple[Array, Array]:
    """Compact P and A as matrices (..., n, n) and (..., m, n)."""
    if not cones.groups:
        return P, A
    each = ops.eye(P.shape[-2], P)[None]
    wholes = matvec(hessian(ops, P), each), matvec(constraints(ops, cones, A), each).mT
    P, A = (whole[0] if M.ndim == 2 else whole for M, whole in zip((P, A), wholes, strict=True))
    return P, A


def batched(matrix: Array) -> Array:
    """The matrix (k, n) or (B, k, n) with a batch axis; JAX can be told to insist on it."""
    return matrix[None] if matrix.ndim == 2 else matrix


def matvec(matrix: Any, x: Array) -> Array:
    """The product with each vector."""
    if isinstance(matrix, (Scaled, Hessian, Constraints)):
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
