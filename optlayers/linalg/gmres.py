"""Linear equations of which only products with the matrix are known, sample by sample."""

from __future__ import annotations

from collections.abc import Callable

from ..ops import Array, MatrixFreeOps, select
from .basis import combine, empty_rows, products


def gmres(
    ops: MatrixFreeOps, apply: Callable[[Array], Array], rhs: Array, max_iter: int, tol: float
) -> Array:
    """x of least |rhs - apply(x)| in the Krylov space, row by row (B, k), without restarts.

    Adaptive simpler GMRES (Jiranek and Rozloznik 2010): images Q = apply(P) are kept orthonormal, so there is
    no small least-squares problem; the next direction is the residual if it fell, else the last image.
    """
    start = ops.norm(rhs)
    tiny = 8 * ops.eps(rhs)

    def body(carry):
        j, x, r, p, P, Q = carry
        p = p / _or_one(ops, ops.norm(p))[:, None]
        q = apply(p)
        size = ops.norm(q)
        for _ in range(2):  # once more against rounding
            basis, images = ops.leading(P, j), ops.leading(Q, j)
            weights = products(images, q)
            p, q = p - combine(weights, basis), q - combine(weights, images)
        left = ops.norm(q)
        scale = ops.where(left > tiny * size, 1 / _or_one(ops, left), 0.0)[:, None]
        p, q = p * scale, q * scale
        step = ops.sum(q * r, -1)[:, None]
        before, x, r = ops.norm(r), x + step * p, r - step * q
        fell = ops.norm(r) < 0.9 * before
        P, Q = (ops.put_row(rows, j, row) for rows, row in ((P, p), (Q, q)))
        return j + 1, x, r, select(ops, fell, r, q), P, Q

    def unfinished(carry):
        return (carry[0] < max_iter) & ops.any_mapped(ops.norm(carry[2]) > tol * start)

    P, Q = empty_rows(ops, max_iter, rhs), empty_rows(ops, max_iter, rhs)
    return ops.while_loop(unfinished, body, (0, 0 * rhs, rhs, rhs, P, Q))[1]


def _or_one(ops: MatrixFreeOps, x: Array) -> Array:
    return ops.where(x > 0, x, 1.0)
