"""The fixed point z = f(z, *args) as a differentiable function of args and of all that f closes over.

z is a matrix (B, k) here, its samples in rows, into which the arrays of the user's state are flattened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..ops import Array, MatrixFreeOps
from ..solvers.fixed_point import Anderson, FixedPointSolver, Problem, run
from ..status import FAILURE_POLICIES, Status, check
from .adjoint import Adjoint, Call, Exact, is_usable


class FixedPointInfo(NamedTuple):
    """What became of each sample of a batch.

    Attributes:
        status: code of `Status`: `list(Status)[code]` (B,).
        iterations: steps taken (B,).
        residual: |f(z) - z| / max(|f(z)|, tol) at the result (B,).
        history: that residual after each step (B, max_iter); a finished sample repeats its last one.
        trajectory: f(z) of the iterates z that `record` asks for, with the derivatives of this f alone.

    Example:
        >>> import torch
        >>> from optlayers.torch import Picard, fixed_point
        >>> half = lambda z: z / 2 + 1
        >>> z, info = fixed_point(half, torch.zeros(1, 1), solver=Picard(), tol=0.01, return_info=True)
        >>> info.iterations.item(), [round(r, 3) for r in info.history[0, :6].tolist()]
        (6, [0.333, 0.143, 0.067, 0.032, 0.016, 0.008])
    """

    status: Array
    iterations: Array
    residual: Array
    history: Array
    trajectory: tuple[Any, ...] = ()


@dataclass(frozen=True)
class FixedPoint:
    """The settings of `fixed_point`, and the map from f and a start to the solution."""

    solver: FixedPointSolver = Anderson()
    adjoint: Adjoint = Exact()
    tol: float | None = None
    max_iter: int = 50
    order: int = 1
    on_failure: str = "raise"
    record: tuple[int, ...] = ()

    def __post_init__(self):
        if self.on_failure not in FAILURE_POLICIES:
            raise ValueError(f"on_failure must be one of {FAILURE_POLICIES}, got {self.on_failure!r}")
        if self.order < 1 or self.max_iter < 1:
            raise ValueError(f"order and max_iter must be at least 1, got {self.order} and {self.max_iter}")

        if not all(1 <= steps <= self.max_iter for steps in self.record):
            raise ValueError(
                f"record must hold numbers from 1 to max_iter = {self.max_iter}, got {self.record}"
            )

    def __call__(self, ops: MatrixFreeOps, f: Callable, z0: Any, *args: Any) -> tuple[Any, FixedPointInfo]:
        value, start, unflatten = flatten_map(ops, f, z0, args)
        start, tol = ops.stop_gradient(start), self._tolerance(ops, start)
        problem = Problem(ops.frozen(value, start), lambda z: ops.tangent_map(value, z))
        solution = run(ops, self.solver, problem, start, tol, self.max_iter, tuple(self.record), True)
        if self.on_failure == "raise":
            ops.on_host(check, solution.status, solution.residual)
        usable = is_usable(solution.status)
        is_masked = self.on_failure != "ignore" and not ops.holds(ops.all(usable))
        z = self.adjoint(ops, Call(value, self.solver, tol, self.max_iter, self.order, is_masked), solution)
        if is_masked and self.on_failure != "mask":
            z = ops.where(usable[:, None], z, ops.nan)
        trajectory = tuple(unflatten(value(z)) for z in solution.trajectory)
        return unflatten(z), FixedPointInfo(*solution[1:5], trajectory)

    def unrolled(
        self, ops: MatrixFreeOps, f: Callable, z0: Any, steps: int, *args: Any
    ) -> tuple[Any, FixedPointInfo]:
        """`steps` applications of f to `z0`, differentiated one by one; nothing is asked of the residual.

        That of the last application is reported.
        """
        if steps < 1:
            raise ValueError(f"unroll must be at least 1, got {steps}")
        value, start, unflatten = flatten_map(ops, f, z0, args)
        before = ops.repeat(steps - 1, value, start)
        z = value(before)
        tol = self._tolerance(ops, z)
        last, change = ops.stop_gradient(z), ops.stop_gradient(z - before)
        residual = ops.norm(change) / ops.maximum(ops.norm(last), tol)
        status = ops.where(residual <= tol, Status.SOLVED.code, Status.ITERATION_LIMIT.code)
        return unflatten(z), FixedPointInfo(status, 0 * status + steps, residual, residual[:, None])

    def _tolerance(self, ops, z):
        return self.tol if self.tol is not None else 1e-10 if ops.eps(z) < 1e-10 else 1e-6


def flatten_map(
    ops: MatrixFreeOps, f: Callable, z: Any, args: Sequence[Any]
) -> tuple[Callable[[Array], Array], Array, Callable[[Array], Any]]:
    """f as a map of matrices (B, k), z as one, and the way back to states like z."""
    flat, unflatten = flatten_state(ops, z)
    return lambda z: _evaluate(ops, f, unflatten, z, args), flat, unflatten


def flatten_state(ops: MatrixFreeOps, tree: Any) -> tuple[Array, Callable[[Array], Any]]:
    """The arrays (B, ...) of a state as one matrix (B, k), and the way back.

    Raises:
        ValueError: the arrays have no batch axis in common, or several dtypes, or none of real floats.
    """
    leaves, rebuild = ops.tree_flatten(tree)
    shapes = [tuple(x.shape) for x in leaves]
    if not leaves or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"z0 must hold arrays with one batch axis in front, the same in all; got {shapes}")
    if len({x.dtype for x in leaves}) > 1:
        raise ValueError(f"all arrays of z0 must have one dtype, got {[str(x.dtype) for x in leaves]}")
    check_floats(leaves[0], "the state")
    ends = np.cumsum([math.prod(shape[1:]) for shape in shapes]).tolist()

    def unflatten(z):
        parts = zip([0, *ends], ends, shapes, strict=False)
        return rebuild([ops.reshape(z[:, i:j], shape) for i, j, shape in parts])

    return _join(ops, leaves), unflatten


def check_floats(x: Array, name: str) -> None:
    if "float" not in str(x.dtype):
        raise ValueError(
            f"{name} must hold real floating-point numbers, got {x.dtype}; convert integers, and hold "
            "complex numbers by their real and imaginary parts, one more axis of size 2"
        )


def _join(ops: MatrixFreeOps, leaves: Sequence[Array]) -> Array:
    flat = [ops.reshape(x, (x.shape[0], math.prod(x.shape[1:]))) for x in leaves]
    return flat[0] if len(flat) == 1 else ops.concat(flat, 1)


def _evaluate(ops: MatrixFreeOps, f: Callable, unflatten: Callable, z: Array, args: Sequence[Any]) -> Array:
    state = unflatten(z)
    expected, values = (ops.tree_flatten(tree)[0] for tree in (state, f(state, *args)))
    kinds = [[(tuple(x.shape), x.dtype) for x in leaves] for leaves in (expected, values)]
    if kinds[0] != kinds[1]:
        wanted, got = ([f"{shape} {dtype}" for shape, dtype in kind] for kind in kinds)
        raise ValueError(f"f(z, ...) must have the shapes and dtype of z, {wanted}, but has {got}")
    return _join(ops, values)


def fixed_point_doc():
    """z with z = f(z, *args), differentiable in args and in all that f closes over.

    The solver is not differentiated: memory does not grow with its iterations. Every sample of the batch
    converges by itself.

    Args:
        f: (z, *args) to the next z, of the same shapes; row i is to depend on row i of z only, as solvers
            take each row by itself and may not converge where it does not. It is called many times and must
            give the same result each time.
        z0: where to start: an array (B, ...), or nested containers of such arrays.
        args: whatever f takes besides z.
        solver: Picard, Anderson, Broyden or NewtonKrylov.
        adjoint: Exact, or one of the approximations Neumann, OneStep, Phantom and Shine.
        tol: for the residual |f(z) - z| / max(|f(z)|, tol), which is relative; None is 1e-10 in double
            precision and 1e-6 in single.
        max_iter: steps of the solver.
        order: how many derivatives are right; more raise NotImplementedError. Each costs one more linear
            solve.
        on_failure: for samples that did not converge: "raise", or "nan", "mask" (the best iterate, with zero
            derivatives) or "ignore" (the best iterate, derived as if it were the solution).
        record: numbers of steps; `info.trajectory` holds z after each of them, for losses on the way to the
            solution (Bai et al. 2022).
        return_info: return (z, info), with info a `FixedPointInfo`.

    Raises:
        SolveError: some samples did not converge, and `on_failure` is "raise".
    """
