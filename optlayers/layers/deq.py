"""Deep equilibrium layers: what the two frontends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..ops import Array, MatrixFreeOps
from .fixed_point import FixedPoint, FixedPointInfo

Start = Sequence[int] | Callable[..., Any] | None


def solve_equilibrium(
    ops: MatrixFreeOps,
    settings: FixedPoint,
    cell: Callable,
    start: Start,
    z0: Any,
    unroll: int | None,
    inputs: tuple,
) -> tuple[Any, FixedPointInfo]:
    """The equilibrium of `cell` from `z0`, or where that is None from what `start` says."""
    if z0 is None:
        z0 = _start(ops, start, inputs)
    if unroll is not None:
        return settings.unrolled(ops, cell, z0, unroll, *inputs)
    return settings(ops, cell, z0, *inputs)


def _start(ops: MatrixFreeOps, start: Start, inputs: tuple) -> Any:
    if callable(start):
        return start(*inputs)
    like: Array = ops.tree_flatten(inputs)[0][0]
    return ops.full(tuple(like.shape) if start is None else (like.shape[0], *start), 0.0, like)


def equilibrium_doc():
    """A deep equilibrium layer: z with z = cell(z, x) (Bai, Kolter and Koltun 2019).

    `deq(x)` is z, and `deq.solve(x)` is z with a `FixedPointInfo`. Derivatives reach x and whatever the cell
    closes over. Both calls take further inputs of the cell after x, and

        z0=         an earlier z, to start from
        unroll=     a number of applications of the cell, to be differentiated one by one instead: for the
                    first epochs of training (Bai et al. 2020)

    Args:
        cell: (z, x) to the next z, of the same shapes; row i may depend on row i of z only, so without batch
            normalisation.
        start: where to start: the shape of z for one sample, to be filled with zeros; or a function of x; or
            None for zeros in the shape of x.

    The other arguments are those of `fixed_point`.
    """
