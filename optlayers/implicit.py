"""Derivatives of the root y of F(y, theta) = 0, for every order and mode at once.

A solver returns the root y0 and a way to apply J0^-1, J0 = dF/dy (y0, theta0); neither is differentiated. In
JAX, but for `shard_map`, the derivative is then a linear solve, J dy = -dF, which is differentiated in turn.
Else chord steps are taken in ordinary operations,

    y <- y - J0^-1 F(y, theta),

in which only F sees theta. Since F(y0, theta0) = 0 the value stays, and need not be computed: `Ops.increment`
is J0^-1 in its derivatives alone. But if y carries the derivatives of the root up to order k, then
y - J0^-1 F(y, theta) carries them up to order k + 1, because the error of a chord step is
(I - J0^-1 dF/dy) times the error of y, and that product gains one order. Reverse and forward mode, their
nestings and vectorising maps follow from those of the framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .ops import Array, MatrixFreeOps, Ops


def attach(
    ops: Ops,
    residual: Callable[[Array], Array],
    solve: Callable[[Array], Array],
    root: Array,
    order: int,
    highest: float = math.inf,
) -> Array:
    """`root` with the derivatives that F(y, theta) = 0 implies, up to `order`; higher ones raise.

    Args:
        residual: y to F(y, theta), written in differentiable operations of theta and y.
        solve: r to J0^-1 r, linear in r, with J0^-1 constant; or what has its derivatives and value zero.
        root: y0, detached.
        order: at least 1.
        highest: beyond this order there are none.
    """
    y = ops.implied(residual, solve, root, order)
    advice = f"build the layer with order={order + 1}" if order < highest else "this layer has none"
    return ops.guard(y, order, f"derivatives of order above {order} were asked for; {advice}")


@dataclass(frozen=True)
class Implicit:
    """A layer from a solver and the equation that its result satisfies; see `implicit` of the frontends."""

    solve: Callable[..., Array]
    residual: Callable[..., Array]
    linear_solve: Callable[[Callable, Array], Array] | None = None
    order: int = 2

    def apply(self, ops: MatrixFreeOps, *theta: Any) -> Array:
        root = ops.call_detached(self.solve, *theta)
        shape = tuple(root.shape)
        if not shape:
            raise ValueError("solve(...) must give an array (B, ...), the batch axis in front, got a scalar")

        def residual(z):
            F = self.residual(z, *theta)
            if tuple(F.shape) != shape:
                raise ValueError(
                    f"residual(z, ...) must have the shape of z, {shape}, but has {tuple(F.shape)}; "
                    "return one equation for each entry of z"
                )
            return F

        return attach(ops, residual, self._inverse(ops, residual, root), root, self.order)

    def _inverse(self, ops: MatrixFreeOps, residual: Callable, root: Array) -> Callable[[Array], Array]:
        linear_solve = self.linear_solve
        if linear_solve:
            return lambda r: ops.solve_increment(residual, root, linear_solve, r)
        return dense_inverse(ops, _of_separate_rows(ops, residual, root, ops.jacobian(residual, root)))


def _of_separate_rows(ops: MatrixFreeOps, residual: Callable, root: Array, jacobian: Array) -> Array:
    """`jacobian`, found row by row. NaN for rows of the residual that depend on others, if it cannot raise.

    A number t moves each row of the root along a direction of its own, and one number is made of each row of
    the residual. The derivative in t is that which the Jacobians tell only if each row is alone.

    Raises:
        ValueError: a row of the residual depends on other rows of the root.
    """
    rows, k = root.shape[0], jacobian.shape[-1]
    if not isinstance(rows, int) or rows == 1:  # or a size that jax.export leaves open
        return jacobian
    row = ops.constant(np.arange(1.0 * rows), root)[:, None]
    index = ops.constant(np.arange(1.0, k + 1), root)[None]
    direction, weight = ops.cos(index + 0.7 * row), ops.sin(index + 1.3 * row)
    moved = lambda t: residual(root + ops.reshape(t * direction, root.shape))
    number = lambda t: ops.sum(weight * ops.reshape(moved(t), weight.shape), -1, keepdims=True)
    product = lambda w, J, d: ops.sum(w * ops.sum(J * d[:, None], -1), -1)
    derivative = ops.jacobian(number, 0 * row)[:, 0, 0]
    difference = abs(derivative - product(weight, jacobian, direction))
    size = product(abs(weight), abs(jacobian), abs(direction))
    flat = ops.reshape(jacobian, (rows, k * k))
    is_mixed = difference > ops.eps(root) ** (1 / 3) * size
    return ops.reshape(ops.reported(flat, is_mixed, _refuse_mixed_rows, is_mixed), jacobian.shape)


def _refuse_mixed_rows(is_mixed: np.ndarray) -> None:
    if is_mixed.any():
        raise ValueError(
            "rows of residual(z, ...) depend on other rows of z than their own, but the first axis of z is "
            "that of the batch; give a single problem an axis of size 1 in front, or pass linear_solve"
        )


def dense_inverse(ops: Ops, jacobian: Array) -> Callable[[Array], Array]:
    """r to zero, whose derivative in r is the inverse of the Jacobians (B, k, k)."""
    factor = ops.lu_factor(jacobian)

    def invert(r, transposed, *factor):
        column = ops.reshape(r, (r.shape[0], math.prod(r.shape[1:]), 1))
        return ops.reshape(ops.lu_solve(factor, column, transpose=transposed), r.shape)

    return lambda r: ops.increment(invert, r, *factor)


def implicit_doc():
    """A layer whose value comes from `solve` and whose derivatives from `residual(z, *theta) == 0`.

    Args:
        solve: theta to z (B, ...), by any algorithm; it is never differentiated.
        residual: (z, *theta) to an array of the shape of z that is zero at the solution, in operations of the
            framework; row i may depend on row i of z only. It may close over parameters of modules and traced
            values: their gradients arrive.
        linear_solve: (J, r) to J^-1 r, where J(dz) is the derivative of the residual in z, in reverse mode
            the transpose of that; never differentiated. By default the Jacobians (B, k, k) are formed and
            factorised, k entries of z per row.
        order: how many derivatives are right; more raise NotImplementedError.

    Returns:
        The layer, theta to z. Forward and reverse mode, their nestings and vmap work.

    Raises:
        ValueError: rows of the residual depend on other rows of z, and there is no `linear_solve`. Where that
            cannot be raised, as in traces, derivatives are NaN.
    """
