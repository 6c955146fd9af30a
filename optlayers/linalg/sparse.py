"""One sparse factorisation of the KKT system of a large problem, on the host.

With dy = (D - I) dv and ds = -F_2 - A dx, J (dx, dv) = -F of `optlayers.linalg.kkt` is a symmetric system in
(dx, dy). In the eigenbasis V of D, with dy = V R w, R^2 = min(1, (1 - D) / D) and W = R V'A,

    K [dx; w] = -[F_1; R V'F_2],        K = [ P  W' ;  W  -C ],        C = R^2 D / (1 - D), 0 <= C <= 1.

Rows where D = 1, the inactive constraints, have dy = 0 and leave the system. K is scaled so that the largest
entry of each row is about 1, and K + e diag(I, -I) is factorised without regard to values: such a
quasi-definite matrix can be factorised in any order of the rows (Vanderbei 1995). Refinement with the exact
K removes e. The inverse stays a symmetric matrix, so that one function serves Newton steps, tangents and
cotangents.

Shapes: x (n,), rows (m,), P (n, n), A (m, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from ..cones import Cones
from ..cones import spectral as cone_spectral
from ..ops import numpy as host
from .rows import Linearization, flatten
from .sensitivity import SINGULAR_REGULARIZATION

HOST: Any = host  # the part of `Ops` that is needed
REGULARIZATION = np.finfo(float).eps ** 0.5
_NEARLY_ONE = 1 - 1e-13


class HostMatrix:
    """A SciPy matrix as `optlayers.linalg.products.matvec` takes a shared one."""

    ndim = 2
    __array_ufunc__ = None  # so that `array @ self` comes here

    def __init__(self, matrix: Any):
        self.matrix = matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    @property
    def mT(self) -> HostMatrix:
        return HostMatrix(self.matrix.T)

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        return (self.matrix.T @ x.T).T


def eigenbasis(cones: Cones, linearization: Linearization) -> tuple[np.ndarray, Any]:
    """Eigenvalues (m,) of D, and its eigenvectors (m, m) as a sparse matrix, None if D is diagonal.

    Args:
        linearization: of one problem, with a batch axis of length 1.
    """
    free = linearization.free[0]
    if not cones.rows:
        return free, None
    k = free.size
    values, blocks, start = [free], [sp.eye_array(k)], 0
    D = _cone_blocks(cones, linearization)
    for size in cone_sizes(cones):
        block = D[start : start + size, :size]
        d, V = np.linalg.eigh((block + block.T) / 2)
        values.append(np.clip(d, 0.0, 1.0))
        blocks.append(V)
        start += size
    return np.concatenate(values), sp.block_diag(blocks, format="csr")


def cone_sizes(cones: Cones) -> list[int]:
    """Number of rows of each curved cone, in the order of the rows."""
    psd = [order * (order + 1) // 2 for order in cones.psd]
    return [*cones.soc, *psd, *[3] * cones.exp, *(len(weights) + 1 for weights in cones.pow)]


def _cone_blocks(cones: Cones, linearization: Linearization) -> np.ndarray:
    """D of every cone, its rows in their place and its columns from the first on: (rows, largest size)."""
    sizes = cone_sizes(cones)
    columns = np.concatenate([np.arange(size) for size in sizes])
    # Every cone gets an identity of its own: one product gives all blocks.
    identities = np.zeros((1, columns.size, max(sizes)))
    identities[0, np.arange(columns.size), columns] = 1.0
    return cone_spectral(HOST, cones, linearization.cones, lambda d: d, identities, columns=True)[0]


class SparseFactor:
    """The factorised K of one problem at one linearisation of the projection.

    Args:
        cones: the curved cones, in the last rows.
        P, A: SciPy matrices; P symmetric.
        linearization: of one problem, with a batch axis of length 1.
        e: the regularisation, relative to the scaled K.
        singular: K is singular; solutions are those of least norm in the scaled unknowns.
    """

    def __init__(
        self, cones: Cones, P: Any, A: Any, linearization: Linearization, e: float, singular: bool = False
    ):
        self.linearization, self.e, self.singular = linearization, e, singular
        self.n = P.shape[0]
        d, self.basis = eigenbasis(cones, linearization)
        self.kept = np.flatnonzero(d < _NEARLY_ONE)
        d = d[self.kept]
        self.R = np.sqrt(np.where(d > 0.5, (1 - d) / np.maximum(d, 0.5), 1.0))
        C = np.where(d > 0.5, 1.0, d / (1 - np.minimum(d, 0.5)))
        rotated = A if self.basis is None else self.basis.T @ A
        W = sp.diags_array(self.R) @ sp.csr_array(rotated)[self.kept]
        self.K = sp.block_array([[P, W.T], [W, -sp.diags_array(C)]], format="csc")
        rows, columns = self.K.indices, np.repeat(np.arange(self.K.shape[0]), np.diff(self.K.indptr))
        self.scale = equilibrate(self.K.data, rows, columns, self.K.shape[0], passes=5)
        self.K.data *= self.scale[rows] * self.scale[columns]
        sign = np.concatenate([np.ones(self.n), -np.ones(self.kept.size)])
        self.inverse = _factorize(self.K, e * sign)

    def is_at(self, linearization: Linearization) -> bool:
        return same(flatten(self.linearization), flatten(linearization))

    def solve(self, F1: np.ndarray, F2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dx, dy) with K (dx, w) = (F_1, R V'F_2): a symmetric matrix times (F_1, F_2)."""
        rotated = F2 if self.basis is None else self.basis.T @ F2
        z = self.scale * self._solve(self.scale * np.concatenate([F1, self.R * rotated[self.kept]]))
        dy = np.zeros(F2.size)
        dy[self.kept] = self.R * z[self.n :]
        return z[: self.n], dy if self.basis is None else self.basis @ dy

    def regularity(self) -> tuple[bool, bool]:
        """Whether x and y are locally unique; see `optlayers.linalg.sensitivity`."""
        z0 = np.random.default_rng(0).standard_normal(self.scale.size)
        error = self._error(z0)
        if not (error <= REGULARIZATION).all():
            error = np.maximum(error, self._error(np.roll(z0, -1)))
        x, y = error[: self.n], error[self.n :]
        return bool(x.max(initial=0.0) < 1e-3), bool(y.max(initial=0.0) < 1e-3)

    def _error(self, z: np.ndarray) -> np.ndarray:
        return abs(self._solve(self.K @ z) - z)

    def _solve(self, r: np.ndarray) -> np.ndarray:
        step = self._projected if self.singular else self.inverse
        z = step(r)
        for _ in range(2):
            z = z + step(r - self.K @ z)
        return z

    def _projected(self, r: np.ndarray) -> np.ndarray:
        """The pseudo-inverse up to O(e), as in `optlayers.linalg.sensitivity`."""
        return self.inverse(self.K @ self.inverse(r))


def same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def derivative_factor(
    cones: Cones, P: Any, A: Any, linearization: Linearization, singular: bool
) -> SparseFactor:
    """The factor that a derivative uses."""
    e = np.finfo(float).eps ** SINGULAR_REGULARIZATION if singular else REGULARIZATION
    return SparseFactor(cones, P, A, linearization, e, singular)


def equilibrate(
    values: np.ndarray, rows: np.ndarray, columns: np.ndarray, size: int, passes: int
) -> np.ndarray:
    """S for which S K S, of a symmetric K with these entries, is about 1 at most in each row (Ruiz 2001)."""
    scale, values = np.ones(size), abs(values)
    for _ in range(passes):
        largest = np.zeros(size)
        np.maximum.at(largest, rows, values)
        step = 1 / np.sqrt(np.where(largest > 0, largest, 1.0))
        values *= step[rows] * step[columns]
        scale *= step
    return scale


def is_convex(P: Any) -> bool:
    """Whether an equilibrated P is positive semidefinite, up to the rounding of data computed in float32."""
    shift = 1e-6 * (abs(P.diagonal()).max(initial=0.0) or 1.0)
    lu = _pivots_on_diagonal(P + sp.diags_array(np.full(P.shape[0], shift)))
    return lu is not None and np.array_equal(lu.perm_r, lu.perm_c) and bool((lu.U.diagonal() > 0).all())


def _factorize(K: Any, shift: np.ndarray):
    """The function r to (K + diag(shift))^-1 r."""
    for growth in (1.0, 1e2, 1e4):
        lu = _pivots_on_diagonal(K + sp.diags_array(growth * shift))
        if lu is not None:
            return lu.solve
    return lambda r: np.full_like(r, np.nan)


def _pivots_on_diagonal(matrix: Any) -> Any:
    """LU factors of a symmetric matrix without regard to values; None where a pivot cancels to zero."""
    matrix = sp.csc_matrix(matrix)
    # Minimum degree fills less, but a dense row takes it ten times as long as the factorisation.
    has_dense_row = np.diff(matrix.indptr).max(initial=0) > 10 * matrix.shape[0] ** 0.5
    order = "COLAMD" if has_dense_row else "MMD_AT_PLUS_A"
    try:
        return splu(matrix, permc_spec=order, diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    except RuntimeError:
        return None
