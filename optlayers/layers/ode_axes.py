"""Between the containers and axes of a user's state, and the arrays (B, k) and (B, T) of the solver."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..ops import Array, MatrixFreeOps
from .fixed_point import flatten_state


class Axes:
    """The axes that a state y0 has with times t: of a batch if t is (B, T), of one system if it is (T,)."""

    def __init__(self, ops: MatrixFreeOps, y0: Any, t: Array):
        if t.ndim not in (1, 2) or t.shape[-1] == 0:
            raise ValueError(f"t must have the axes (T,) or (B, T), at least one time; got {tuple(t.shape)}")
        self.ops, self.is_single = ops, t.ndim == 1
        leaves, self._rebuild = ops.tree_flatten(y0)
        self._shapes = [tuple(x.shape) for x in leaves]
        if self.is_single:
            rows = self._rebuild([x[None] for x in leaves])
        else:
            rows = y0
            if any(shape[:1] != (t.shape[0],) for shape in self._shapes):
                raise ValueError(
                    f"t has a batch axis of size {t.shape[0]}, which all arrays of y0 must have in front; "
                    f"got {self._shapes}"
                )
        self.start = flatten_state(ops, rows)[0]
        # Read once: what the user's functions touch, start included, counts as what they depend on.
        self._batch, self._dtype = self.start.shape[0], self.start.dtype
        self._is_array = len(leaves) == 1 and leaves[0] is y0
        self._own = self._shapes if self.is_single else [shape[1:] for shape in self._shapes]

    def times(self, t: Array) -> Array:
        """(B, T), of the dtype of the state.

        Raises:
            ValueError: this dtype cannot tell the times apart.
        """
        given, t = t, self.ops.cast(t, self.start)
        if given.dtype != t.dtype:
            self.ops.on_host(_check_precision, *map(self.ops.stop_gradient, (given, t)))
        return self.rows(t)

    def rows(self, x: Array) -> Array:
        """(B, ...), of an array that may lack the batch axis."""
        return x[None] if self.is_single else x

    def lane(self, x: Array) -> Array:
        """As the user sees what is (B, ...)."""
        return x[0] if self.is_single else x

    def state(self, y: Array) -> Any:
        """The user's state, of y (B, ..., k)."""
        lead = tuple(y.shape[1:-1] if self.is_single else y.shape[:-1])
        if self._is_array:
            return self.ops.reshape(y, (*lead, *self._own[0]))
        y = self.lane(y)
        parts, place = [], 0
        for shape in self._own:
            size = math.prod(shape)
            parts.append(self.ops.reshape(y[..., place : place + size], (*lead, *shape)))
            place += size
        return self._rebuild(parts)

    def scalar(self, t: Array) -> Array:
        """Times (B,) as the user's functions get them: in the rank of the state, or of its first array."""
        return t[0] if self.is_single else self.ops.reshape(t, (-1,) + (1,) * (len(self._shapes[0]) - 1))

    def matrix(self, tree: Any, name: str) -> Array:
        """(B, k), of a state that a function of the user has given."""
        leaves = [tree] if self._is_array else self.ops.tree_flatten(tree)[0]
        shapes = [tuple(x.shape) for x in leaves]
        if shapes != self._shapes or any(x.dtype != self._dtype for x in leaves):
            kinds = [f"{tuple(x.shape)} {x.dtype}" for x in leaves]
            raise ValueError(f"{name} must be like y, {self._shapes} {self._dtype}, but is {kinds}")
        flat = [self.ops.reshape(x, (self._batch, -1)) for x in leaves]
        return flat[0] if len(flat) == 1 else self.ops.concat(flat, 1)

    def vector(self, x: Array, name: str) -> Array:
        """(B,), of one number for each sample that a function of the user has given."""
        if math.prod(x.shape) != self._batch or x.shape[:1] not in ((), (self._batch,)):
            raise ValueError(f"{name} must have one number for each sample, but has shape {tuple(x.shape)}")
        return self.ops.reshape(x, (self._batch,))


def ascending(ops: MatrixFreeOps, t: Array) -> tuple[Array, Array, Array, Array]:
    """Times (B, T) in ascending order, how many of each row are asked for, the sign that they now have, and
    whether they were in order.

    Behind the last time of a row it is repeated.

    Raises:
        ValueError: a row is out of order, if that can be told now.
    """
    asked = ops.isfinite(t)
    count = ops.to_int(ops.sum(ops.where(asked, 1, 0), 1))
    t = ops.where(asked, t, 0.0)
    last = ops.take_rows(t, ops.maximum(count - 1, 0)[:, None])
    t = ops.where(asked, t, last)
    sign = ops.stop_gradient(ops.cast(ops.where(last < t[:, :1], -1.0, 1.0), t))
    ops.on_host(_check_times, asked, ops.stop_gradient(t * sign))
    t = t * sign
    is_ordered = ops.all(asked[:, :-1] & (t[:, 1:] >= t[:, :-1]) | ~asked[:, 1:], 1)
    return t, count, sign[:, 0], is_ordered


def _check_precision(given: np.ndarray, t: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):  # infinite times, of which nothing is asked
        wanted, got = (x.astype(float) - x.astype(float)[..., :1] for x in (given, t))
        if (abs(got - wanted) > 0.01 * abs(wanted)).any():
            raise ValueError(
                f"times are turned into {t.dtype}, the dtype of the state, which is too coarse for them; "
                "subtract the first one, or take a state of double precision"
            )


def _check_times(asked: np.ndarray, t: np.ndarray) -> None:
    if (asked[:, 1:] & ~asked[:, :-1]).any():
        raise ValueError("times that are not finite may only stand at the end of a row of t")
    if (np.diff(t, axis=1) < 0).any():
        raise ValueError("each row of t must ascend, or descend")
