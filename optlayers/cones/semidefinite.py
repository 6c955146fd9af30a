"""The positive semidefinite cone in scaled half-vectorisation. Symbols: see `optlayers.cones.product`.

With mat(v) = W = U diag(lam) U' the projection is U diag(lam^+) U' and its derivative (Malick and Sendov
2006; Zhao, Sun and Toh 2010)

    dPi(W)[E] = U (D o (U' E U)) U',        D_ij = (lam_i^+ + lam_j^+) / (|lam_i| + |lam_j|).

Near W the projection is (W + S) / 2 with S = |W|, the root of S S = W W. Writing the change of W and of S in
the eigenbasis as E and H, that equation is

    (|lam_i| + |lam_j|) H_ij + (H H)_ij = (lam_i + lam_j) E_ij + (E E)_ij.

It is solved for H by a chord step per order, which divides by |lam_i| + |lam_j| and never by a difference of
eigenvalues: repeated ones need no care, and no eigendecomposition is differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Semidefinite:
    """Semidefinite cones of one order. The linearisation is (U, lam): (B, c, order, order), (B, c, order)."""

    order: int

    @property
    def rows(self) -> int:
        return self.order * (self.order + 1) // 2

    def shapes(self, count):
        return ((count, self.order, self.order), (count, self.order))

    def project(self, ops, v):
        U, lam = self.linearize(ops, v)
        return self._svec(ops, (U * ops.maximum(lam, 0.0)[..., None, :]) @ U.mT)

    def linearize(self, ops, v):
        # LAPACK refuses a whole batch for one NaN.
        finite = ops.all(ops.isfinite(v), axis=-1)[..., None]
        lam, U = ops.eigh(self._mat(ops, ops.where(finite, v, 0.0)))
        return U, ops.where(finite, lam, float("nan"))

    def spectral(self, ops, lin, g, u):
        U, lam = lin
        n = self.order
        derivative, _ = self._weights(ops, lam)
        _, count, k, _ = u.shape
        weights = g(ops.reshape(derivative, (derivative.shape[0], -1)))
        weights = ops.reshape(weights, (-1, count, 1, n, n))

        def rotate(M, U):
            """U' M U for symmetric matrices M (B, c, k, n, n), as two products that take all k at once."""
            for _ in range(2):
                stacked = ops.reshape(M, (M.shape[0], count, k * n, n)) @ U
                M = ops.reshape(stacked, (stacked.shape[0], count, k, n, n)).mT
            return M

        return self._svec(ops, rotate(weights * rotate(self._mat(ops, u), U), U.mT))

    def project_linearized(self, ops, lin, v, order):
        U, lam = lin
        derivative, inverse = self._weights(ops, lam)
        diagonal = ops.eye(self.order, v)[None, None]
        E = U.mT @ self._mat(ops, v) @ U - lam[..., None] * diagonal
        change = derivative * E
        if order > 1:
            H = 2 * change - E
            change = change + inverse * (E @ E - H @ H) / 2
        return self._svec(ops, U @ (ops.maximum(lam, 0.0)[..., None] * diagonal + change) @ U.mT)

    def _weights(self, ops, lam):
        """D_ij and 1 / (|lam_i| + |lam_j|), with 0 / 0 and 1 / 0 taken as 0.

        The inverse multiplies squares of changes. Below sqrt(eps) of the largest eigenvalue it is dropped:
        there the projection has a kink to working precision and rounding in E would dominate.
        """
        size = abs(lam)
        total = size[..., None] + size[..., None, :]
        positive = ops.maximum(lam, 0.0)
        zero = total <= 0
        safe = ops.where(zero, 1.0, total)
        derivative = ops.where(zero, 0.0, (positive[..., None] + positive[..., None, :]) / safe)
        kink = total <= ops.eps(lam) ** 0.5 * ops.amax(size, axis=-1)[..., None, None]
        return derivative, ops.where(kink, 0.0, 1 / safe)

    def _mat(self, ops, v):
        """Symmetric matrices (..., n, n) of half-vectors (..., n (n + 1) / 2)."""
        n = self.order
        i, j = np.indices((n, n))
        low, high = np.minimum(i, j), np.maximum(i, j)
        scale = ops.constant(np.where(i == j, 1.0, 0.5**0.5), v)
        full = ops.take(v, ops.constant((high * (high + 1) // 2 + low).ravel(), v))
        shape = (*v.shape[:-1], n, n)
        return ops.reshape(full, shape) * ops.reshape(scale, (1,) * (len(shape) - 2) + (n, n))

    def _svec(self, ops, M):
        """Half-vectors (..., n (n + 1) / 2) of matrices (..., n, n): upper triangle, column by column."""
        n = self.order
        j, i = np.tril_indices(n)
        scale = ops.constant(np.where(i == j, 1.0, 2**0.5), M)
        flat = ops.reshape(M, (*M.shape[:-2], n * n))
        half = ops.take(flat, ops.constant(i * n + j, M))
        return half * ops.reshape(scale, (1,) * (half.ndim - 1) + (-1,))
