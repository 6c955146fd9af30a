"""Vectors (B, k), one of each sample, and their storage (B, m, k): m rows of a sample, written one by one."""

from __future__ import annotations

from ..ops import Array, MatrixFreeOps


def empty_rows(ops: MatrixFreeOps, count: int, like: Array) -> Array:
    """Zeros (B, count, k), made of `like` (B, k): under a vectorising map they are mapped from the start."""
    return ops.concat([0 * like[:, None]] * count, 1)


def products(rows: Array, x: Array) -> Array:
    """Inner products (B, m) of x (B, k) with each row."""
    # Four times as fast in torch as rows @ x[..., None].
    return (x[:, None] @ rows.mT)[:, 0]


def combine(weights: Array, rows: Array) -> Array:
    """The sum (B, k) of the rows times their weights (B, m)."""
    return (weights[:, None] @ rows)[:, 0]
