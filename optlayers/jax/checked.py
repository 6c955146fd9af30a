"""Running a solve eagerly with errors, or inside a trace without."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

from ..layers.conic import ConicLayer
from ..status import check
from .calling import in_full_precision


@in_full_precision
def run_checked(solve: Callable, layer: ConicLayer, data: Any, warm: Any, like: jax.Array) -> Any:
    """`solve(layer, data, warm, like)`; raises for failed problems as the layer's policy says.

    Nothing can be raised while tracing: there the policy "raise" acts as "nan".
    """
    if layer.on_failure != "raise":
        return _run(solve, layer, data, warm, like)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((data, warm, like))):
        return _run(solve, dataclasses.replace(layer, on_failure="nan"), data, warm, like)
    solution = _run(solve, layer, data, warm, like)
    check(np.asarray(solution.status), np.asarray(solution.residual))
    return solution


def _run(solve: Callable, layer: ConicLayer, data: Any, warm: Any, like: jax.Array) -> Any:
    """`solve(...)`; over a mesh with explicit axes the compiler places what is computed inside.

    There JAX asks each operation for the sharding of its result. That of the solution is the one of the data:
    batch axes come first in both.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(data)]
    placed = [s for s in shardings if any(s.spec) and AxisType.Explicit in s.mesh.axis_types]
    if not placed:
        return solve(layer, data, warm, like)
    last = max(i for i, axis in enumerate(placed[0].spec) if axis is not None)
    batch = NamedSharding(placed[0].mesh, PartitionSpec(*placed[0].spec[: last + 1]))
    return auto_axes(functools.partial(solve, layer), out_sharding=batch)(data, warm, like)
