"""Quadratic and cone programs given as matrices, in JAX."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from scipy.sparse import issparse

from ..cones import Cones
from ..docstring import continues
from ..layers.approximate import LPGD, Smoothed
from ..layers.conic import ConicSolution, conic_layer, point_of
from ..layers.direct import curved_part, solve_box, solve_cone, solve_matrices
from ..ops import jax as ops
from . import sparse
from .arguments import common
from .checked import run_checked


@continues(solve_box)
def solve_qp(
    P: Array | None,
    q: Array,
    A: Array | None = None,
    l: Array | None = None,
    u: Array | None = None,
    *,
    solver: Any = None,
    eps: float = 1e-9,
    order: int = 2,
    on_failure: str = "raise",
    rescue: bool = False,
    gradient: str | Smoothed | LPGD = "exact",
    warm_start: ConicSolution | None = None,
) -> ConicSolution:
    """
    P and A may also be sparse; see `optlayers.layers.sparse`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from optlayers.jax import solve_qp
        >>> I, one = jnp.eye(2), jnp.ones(2)
        >>> total = lambda q: solve_qp(I, q, I, -one, one).x.sum()
        >>> jax.grad(total)(jnp.array([-3.0, 0.5])).round(6).tolist()
        [0.0, -1.0]
    """
    data, choices = {"P": P, "q": q, "A": A, "l": l, "u": u}, (solver, eps, order, on_failure, gradient)
    return _solve(None, Cones(), data, warm_start, choices, rescue)


@continues(solve_cone)
def solve_conic(
    P: Array | None,
    q: Array,
    A: Array,
    b: Array,
    cones: Cones,
    *,
    solver: Any = None,
    eps: float = 1e-9,
    order: int = 2,
    on_failure: str = "raise",
    rescue: bool = False,
    gradient: str | Smoothed | LPGD = "exact",
    warm_start: ConicSolution | None = None,
) -> ConicSolution:
    """
    P and A may also be sparse; see `optlayers.layers.sparse`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from optlayers.jax import Cones, solve_conic
        >>> A, b = -jnp.eye(2), jnp.zeros(2)
        >>> solution = solve_conic(jnp.eye(2), jnp.array([1.0, -2.0]), A, b, Cones(nonneg=2))
        >>> abs(solution.x).round(6).tolist()
        [0.0, 2.0]
    """
    data, choices = {"P": P, "q": q, "A": A, "b": b}, (solver, eps, order, on_failure, gradient)
    return _solve(cones, curved_part(cones), data, warm_start, choices, rescue)


def _solve(
    cones: Cones | None,
    curved: Cones,
    data: Mapping[str, Any],
    warm_start: ConicSolution | None,
    choices: tuple[Any, ...],
    rescue: bool,
) -> ConicSolution:
    """`solve_conic`, or `solve_qp` where there are no cones."""
    is_kept = lambda key, x: sparse.is_sparse(x) or (x is None and key != "q")
    arrays = {key: x if is_kept(key, x) else jnp.asarray(x) for key, x in data.items()}
    typed = {key: x for key, x in arrays.items() if not (x is None or issparse(x))}
    like, warm = common([*typed.values()], [*typed].__getitem__, lambda i: False), point_of(warm_start)
    P, q, A, *vectors = arrays.values()
    if sparse.is_sparse(P) or sparse.is_sparse(A):
        return sparse.solve(cones, curved, P, A, (q, *vectors), warm, like, *choices)
    solver, eps, order, on_failure, gradient = choices
    layer = conic_layer(curved, P is None, solver, {"eps": eps}, order, on_failure, rescue, gradient)
    solve = functools.partial(_solve_dense, cones)
    return run_checked(solve, layer, (P, q, A, *vectors), warm, like)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve_dense(cones, layer, data, warm, like):
    return solve_matrices(ops, layer, cones, data, warm, like)
