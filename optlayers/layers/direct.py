"""Programs given as matrices, without CVXPY: what `solve_qp` and `solve_conic` of both frameworks share.

The docstrings are those of the public functions; each frontend adds its example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..cones import Cones
from ..linalg.kkt import Problem
from ..ops import Array, Ops
from ..solvers.host import INFINITE
from ..status import batch_axes
from .conic import ConicLayer, ConicSolution, flatten_batch, flatten_warm, restore_batch


def solve_box(
    ops: Ops, layer: ConicLayer, data: Sequence[Array | None], warm: Sequence[Array], like: Array
) -> ConicSolution:
    """Solve  minimise 1/2 x'Px + q'x  subject to  l <= A x <= u  for a batch, differentiably.

    Args:
        P: positive semidefinite (..., n, n), of which the symmetric part counts; None for a linear program.
        q: (..., n).
        A: (..., m, n); None for a problem without constraints.
        l, u: (..., m); None for infinite. Entries beyond 1e20 count as infinite, l = u is an equality.
        solver: None or "auto" chooses; or a record such as `ADMM(...)`, or a name such as "CLARABEL".
        eps: relative residual of a solution.
        order: highest derivative order, from 1 on, and at most 2 beside semidefinite, exponential and power
            cones; beyond it NotImplementedError is raised.
        on_failure: "raise", "nan", "mask" or "ignore"; see `CvxpyLayer`.
        rescue: hand problems that stay unfinished to Clarabel on the host, if `solver` was not given.
        gradient: "exact"; or, where that is zero or jumps as for linear programs, "smoothed" (`Smoothed(mu)`)
            or "lpgd" (`LPGD(tau)`).
        warm_start: an earlier solution to start from; problems whose entries are NaN start anew.

    Each argument has the same batch axes in front, or none if the batch shares it. Results have the widest
    floating type of the arguments.

    Returns:
        x (..., n); s = A x and the multipliers y (..., m), with P x + q + A'y = 0, y > 0 where A x is at its
        upper bound; status codes, iterations and relative residuals (...).

    Raises:
        ValueError: shapes that do not fit together.
        SolveError: some problems were not solved, and `on_failure` is "raise".
    """
    (P, q, A, l, u), lead = _prepare(ops, ["P", "q", "A", "l", "u"], data, ["nn", "n", "mn", "m", "m"], like)
    upper = ops.where(l <= -INFINITE, ops.inf, -l)
    lower = ops.where(u >= INFINITE, -ops.inf, -u)
    zero = ops.full((A.shape[-2],), 0.0, q)
    warm = flatten_warm(ops, warm, lead, q.shape[-1], A.shape[-2])
    warm = [-z if i == 1 else z for i, z in enumerate(warm)]
    with batch_axes(lead):
        solution = layer(ops, Problem(P, q, A, zero, lower, upper), *warm)
    return restore_batch(ops, solution._replace(s=-solution.s), lead, like)


def solve_cone(
    ops: Ops,
    layer: ConicLayer,
    cones: Cones,
    data: Sequence[Array | None],
    warm: Sequence[Array],
    like: Array,
) -> ConicSolution:
    """Solve  minimise 1/2 x'Px + q'x  subject to  A x + s = b, s in K  for a batch, differentiably.

    Args:
        P: positive semidefinite (..., n, n), of which the symmetric part counts; or None.
        q: (..., n).
        A: (..., m, n).
        b: (..., m).
        cones: the cone K, in the order of the rows; see `Cones`.

    The other arguments, batch axes and errors are those of `solve_qp`.

    Returns:
        x (..., n), s in K and the multipliers y in K* (..., m), with P x + q + A'y = 0; status codes,
        iterations and relative residuals (...).
    """
    (P, q, A, b), lead = _prepare(ops, ["P", "q", "A", "b"], data, ["nn", "n", "mn", "m"], like)
    if b.shape[-1] != cones.rows:
        raise ValueError(f"the cones have {cones.rows} rows, but A and b have {b.shape[-1]}: {cones}")
    if cones.groups:
        raise ValueError(f"only a CvxpyLayer puts variables in groups; leave them out, got {cones}")
    lower, upper = polyhedral_bounds(ops, cones, q)
    warm = flatten_warm(ops, warm, lead, q.shape[-1], A.shape[-2])
    with batch_axes(lead):
        solution = layer(ops, Problem(P, q, A, b, lower, upper), *warm)
    return restore_batch(ops, solution, lead, like)


def solve_matrices(ops: Ops, layer: ConicLayer, cones: Cones | None, *args: Any) -> ConicSolution:
    """`solve_cone`, or `solve_box` where there are no cones."""
    return solve_box(ops, layer, *args) if cones is None else solve_cone(ops, layer, cones, *args)


def curved_part(cones: Cones) -> Cones:
    """The cones without their polyhedral rows, which the solver takes as bounds."""
    if not isinstance(cones, Cones):
        raise ValueError(f"cones must be Cones(...), got {cones!r}")
    return replace(cones, zero=0, nonneg=0)


def polyhedral_bounds(ops: Ops, cones: Cones, like: Array) -> tuple[Array, Array]:
    """Bounds of the slack on the zero and nonnegative rows."""
    # Not constants of NumPy: torch.export cannot save those that are empty.
    upper = ops.concat([ops.full([cones.zero], 0.0, like), ops.full([cones.nonneg], ops.inf, like)], 0)
    return ops.full(upper.shape, 0.0, like), upper


def _prepare(ops: Ops, names: Sequence[str], data: Sequence[Array | None], axes: Sequence[str], like: Array):
    """The data with one batch axis or none, zeros or no rows for None, and the batch axes as given.

    Raises:
        ValueError: shapes that do not fit together, naming the argument.
    """
    without_A = [name for name, x in zip(names, data, strict=True) if x is not None and name in "blu"]
    if "A" in names and data[names.index("A")] is None and without_A:
        raise ValueError(f"{without_A[0]} is given, but A is None; to bound x itself let A be the identity")
    sizes: dict[str, int] = {}
    lead: tuple[int, ...] = ()
    for name, x, own in zip(names, data, axes, strict=True):
        if x is None:
            continue
        batch = tuple(x.shape[: max(x.ndim - len(own), 0)])
        shape = tuple(x.shape[len(batch) :])
        expected = tuple(sizes.setdefault(axis, size) for axis, size in zip(own, shape, strict=False))
        if shape != expected or len(shape) != len(own):
            known = ", ".join(str(sizes.get(axis, axis)) for axis in own)
            raise ValueError(f"{name} must have shape (..., {known}), got {tuple(x.shape)}")
        if batch and lead and batch != lead:
            raise ValueError(f"{name} has batch axes {batch}, but an earlier argument has {lead}")
        lead = lead or batch
    if not sizes["n"]:
        raise ValueError("q has no entries, so there is nothing to solve for")
    sizes.setdefault("m", 0)
    missing = {"l": -np.inf, "u": np.inf}
    arrays = []
    for name, x, own in zip(names, data, axes, strict=True):
        if x is None:
            x = ops.full([sizes[axis] for axis in own], missing.get(name, 0.0), like)
        x = ops.widest(flatten_batch(ops, x, len(own)))
        arrays.append((x + x.mT) / 2 if name == "P" else x)
    return arrays, lead
