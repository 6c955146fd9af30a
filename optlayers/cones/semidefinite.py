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

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Semidefinite:
    """Semidefinite cones of one order. The linearisation is (U, lam): (B, c, order, order), (B, c, order)."""

    order: int
    places: _Places = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        # Once per cone: of small matrices they take longer than the product that they are for.
        object.__setattr__(self, "places", _places(self.order))

    @property
    def rows(self) -> int:
        return self.order * (self.order + 1) // 2

    def shapes(self, count):
        return ((count, self.order, self.order), (count, self.order))

    def project(self, ops, v, start=None):
        return self.project_linearized(ops, self.linearize(ops, v), v, 0)

    def linearize(self, ops, v):
        scale = ops.amax(abs(v), axis=-1, keepdims=True)
        scale = ops.where(scale > 0, scale, 1.0)
        v = v / scale
        # LAPACK may fail on denormal entries, which an iteration that converges to zero produces.
        lam, U = ops.eigh(self._matrix(ops, ops.where(abs(v) < ops.eps(v) ** 2, 0.0, v)))
        return U, scale * lam

    def spectral(self, ops, lin, g, u, rotated):
        U, lam = lin
        n, (_, count, _, k) = self.order, u.shape
        derivative = self._weights(ops, lam)
        weights = g(ops.reshape(derivative, (derivative.shape[0], count * n * n)))
        weights = ops.reshape(weights, (weights.shape[0], count, n, n, 1))

        def rotate(U, M):
            """U M U' for matrices M (B, c, n, n, k), with products that take all k at once."""
            if k == 1:
                return (U @ M[..., 0] @ U.mT)[..., None]
            M = U @ ops.reshape(M, (M.shape[0], count, n, n * k))
            return U[:, :, None] @ ops.reshape(M, (M.shape[0], count, n, n, k))

        product = weights * rotate(U.mT, self._mat(ops, u))
        return self._svec(ops, product if rotated else rotate(U, product))

    def project_linearized(self, ops, lin, v, order):
        U, lam = lin
        if order == 0:
            return self._vector(ops, (U * ops.maximum(lam, 0.0)[..., None, :]) @ U.mT)
        diagonal = ops.eye(self.order, v)[None, None]
        E = U.mT @ self._matrix(ops, v) @ U - lam[..., None] * diagonal
        change = self._weights(ops, lam) * E
        if order > 1:
            H = 2 * change - E
            change = change + self._inverse(ops, lam) * (E @ E - H @ H) / 2
        return self._vector(ops, U @ (ops.maximum(lam, 0.0)[..., None] * diagonal + change) @ U.mT)

    def _weights(self, ops, lam):
        """D_ij, with 0 / 0 taken as 0."""
        total, positive = _pairwise(abs(lam)), ops.maximum(lam, 0.0)
        return _pairwise(positive) / ops.where(total > 0, total, 1.0)

    def _inverse(self, ops, lam):
        """1 / (|lam_i| + |lam_j|), which multiplies squares of changes.

        Below sqrt(eps) of the largest eigenvalue it is dropped: there the projection has a kink to working
        precision and rounding in E would dominate.
        """
        total = _pairwise(abs(lam))
        kink = total <= ops.eps(lam) ** 0.5 * ops.amax(abs(lam), axis=-1)[..., None, None]
        return ops.where(kink, 0.0, 1 / ops.where(kink, 1.0, total))

    def _matrix(self, ops, v):
        return self._mat(ops, v[..., None])[..., 0]

    def _vector(self, ops, M):
        return self._svec(ops, M[..., None])[..., 0]

    def _mat(self, ops, u):
        """Symmetric matrices (B, c, n, n, k) of half-vectors (B, c, n (n + 1) / 2, k)."""
        n, (batch, count, _, k) = self.order, u.shape
        full = ops.take(u, ops.constant(self.places.full, u), axis=-2)
        return ops.reshape(full, (batch, count, n, n, k)) * ops.constant(self.places.shrink, u)

    def _svec(self, ops, M):
        """Half-vectors (B, c, n (n + 1) / 2, k) of matrices (B, c, n, n, k): upper triangle by columns."""
        n, (batch, count, _, _, k) = self.order, M.shape
        half = ops.take(ops.reshape(M, (batch, count, n * n, k)), ops.constant(self.places.half, M), axis=-2)
        return half * ops.constant(self.places.stretch, M)


class _Places(NamedTuple):
    """Where the entries of a matrix stand in its half-vector and the reverse, with their scales."""

    full: np.ndarray
    shrink: np.ndarray
    half: np.ndarray
    stretch: np.ndarray


def _places(n: int) -> _Places:
    i, j = np.indices((n, n))
    low, high = np.minimum(i, j), np.maximum(i, j)
    column, row = np.tril_indices(n)
    shrink, stretch = np.where(i == j, 1.0, 0.5**0.5), np.where(row == column, 1.0, 2**0.5)
    full, half = (high * (high + 1) // 2 + low).ravel(), row * n + column
    return _Places(full, shrink[None, None, :, :, None], half, stretch[None, None, :, None])


def _pairwise(x):
    """x_i + x_j (B, c, n, n)."""
    return x[..., None] + x[..., None, :]
