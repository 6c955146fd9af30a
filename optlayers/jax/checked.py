"""Running a solve eagerly with errors, or inside a trace without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..layers.conic import ConicLayer
from ..status import check


def run_checked(solve: Callable, layer: ConicLayer, data: Any, warm: Any, like: jax.Array) -> Any:
    """`solve(layer, data, warm, like)`; raises for failed problems as the layer's policy says.

    Nothing can be raised while tracing: there the policy "raise" acts as "nan".
    """
    if layer.on_failure != "raise":
        return solve(layer, data, warm, like)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((data, warm))):
        return solve(dataclasses.replace(layer, on_failure="nan"), data, warm, like)
    solution = solve(layer, data, warm, like)
    check(np.asarray(solution.status), np.asarray(solution.residual))
    return solution
