"""Convex cones: sizes, projections and their derivatives, written once for every framework.

Rows of a program are ordered as CVXPY orders them: zero, nonnegative, second order, positive
semidefinite (scaled half-vectorisation), exponential, power.
"""

from .product import (
    Cones,
    Groups,
    Linearization,
    dual_margin,
    flatten,
    linearization_shapes,
    linearize,
    margin,
    pooled,
    project,
    project_linearized,
    spectral,
    unflatten,
)

__all__ = [
    "Cones",
    "Groups",
    "Linearization",
    "dual_margin",
    "flatten",
    "linearization_shapes",
    "linearize",
    "margin",
    "pooled",
    "project",
    "project_linearized",
    "spectral",
    "unflatten",
]
