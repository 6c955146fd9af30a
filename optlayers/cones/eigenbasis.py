"""Functions of symmetric matrices that are given by an orthonormal basis and eigenvalues."""

from __future__ import annotations


def apply_spectral(ops, basis, eigenvalues, g, u, rotated):
    """g(D) u for D = basis diag(eigenvalues) basis', cone by cone.

    Args:
        basis: eigenvectors in columns (B, c, d, d).
        eigenvalues: (B, c, d).
        g: elementwise, called once with eigenvalues (B, c * d).
        u: (B, c, d, k) or (1, c, d, k).
        rotated: return basis' g(D) u.
    """
    batch, count, d = eigenvalues.shape
    values = g(ops.reshape(eigenvalues, (batch, count * d)))
    values = ops.reshape(values, (values.shape[0], count, d, 1))
    # The smaller of the two is weighted.
    product = (values * basis.mT) @ u if u.shape[-1] > d else values * (basis.mT @ u)
    return product if rotated else basis @ product
