"""The zero cone {0} and the nonnegative orthant, row by row. Symbols: see `optlayers.cones.product`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Orthant:
    """{0}^zero x {s >= 0}^nonneg, as one cone. Its linearisation is the 0/1 diagonal of D, (B, 1, rows)."""

    zero: int
    nonneg: int

    @property
    def rows(self) -> int:
        return self.zero + self.nonneg

    def shapes(self, count):
        return ((count, self.rows),)

    def project(self, ops, v, start=None):
        return ops.concat([0.0 * v[..., : self.zero], ops.maximum(v[..., self.zero :], 0.0)], axis=-1)

    def linearize(self, ops, v):
        free = ops.cast(v[..., self.zero :] > 0, v)
        zero = ops.full((*v.shape[:-1], self.zero), 0.0, v)
        return (ops.concat([zero, free], axis=-1),)

    def spectral(self, ops, lin, g, u, rotated):
        (diagonal,) = lin
        return g(diagonal[:, 0])[:, None, :, None] * u

    def project_linearized(self, ops, lin, v, order):
        (diagonal,) = lin
        # Not `diagonal * v`: XLA makes a choice of the product with a mask and loses NaN.
        return ops.where(diagonal > 0, v, 0.0 * v)
