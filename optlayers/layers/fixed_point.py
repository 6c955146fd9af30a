"""The fixed point z = f(z, *args) as a differentiable function of args and of all that f closes over.

With the residual z - f(z) of `optlayers.implicit` and A = df/dz at the solution, a derivative needs solutions
of w = r + A w, and of the transposed equation. How, is the choice of the adjoint; z is a matrix (B, k) here,
its samples in rows, into which the arrays of the user's state are flattened.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..implicit import attach
from ..ops import Array, MatrixFreeOps
from ..solvers.fixed_point import (
    Anderson,
    Broyden,
    FixedPointSolver,
    Problem,
    Solution,
    inverse_product,
    run,
)
from ..status import Status, check

FAILURE_POLICIES = ("raise", "nan", "mask", "ignore")


class FixedPointInfo(NamedTuple):
    """What became of each sample of a batch.

    Attributes:
        status: code of `Status`: `list(Status)[code]` (B,).
        iterations: steps taken (B,).
        residual: |f(z) - z| / max(|f(z)|, tol) at the result (B,).
        history: that residual after each step (B, max_iter); a finished sample repeats its last one.
    """

    status: Array
    iterations: Array
    residual: Array
    history: Array


class Adjoint(Protocol):
    """How derivatives are attached to a solution: `call` has the live f, and what was asked of the solve."""

    def __call__(self, ops: MatrixFreeOps, call: Call, solution: Solution) -> Array: ...


@dataclass(frozen=True)
class Call:
    """One call of a layer, for its adjoint.

    Args:
        value: f, differentiable, of matrices (B, k).
        layer: the settings.
        tol: relative residual asked of the solution.
    """

    value: Callable[[Array], Array]
    layer: FixedPoint
    tol: float


@dataclass(frozen=True)
class Exact:
    """The derivative of the implicit function theorem: w = r + A w is solved to `tol` (Bai et al. 2019).

    Memory does not grow with the number of iterations. Where the solve does not converge, a warning says so;
    in JAX, which cannot warn while it differentiates, derivatives are NaN for samples whose residual exceeds
    sqrt(tol).

    Args:
        solver: for w; None takes the solver of the fixed point.
        tol: relative residual; None takes that of the fixed point.
        max_iter: iterations; None takes twice those of the fixed point.

    Example:
        >>> from optlayers.torch import Exact, NewtonKrylov
        >>> Exact(NewtonKrylov(krylov=30), tol=1e-8).tol
        1e-08
    """

    solver: FixedPointSolver | None = None
    tol: float | None = None
    max_iter: int | None = None

    def __call__(self, ops, call, solution):
        layer = call.layer
        solver = self.solver or layer.solver
        tol = call.tol if self.tol is None else self.tol
        max_iter = 2 * layer.max_iter if self.max_iter is None else self.max_iter

        def solve(J, r):
            A = lambda w: w - J(w)
            linear = Problem(lambda w: r + A(w), lambda w: A)
            result = run(ops, solver, linear, r, tol, max_iter)
            failed = result.residual > tol**0.5
            return ops.reported(result.z, failed, _warn_of_unsolved, result.status, result.residual)

        return _attach(ops, call, solution, solve)


@dataclass(frozen=True)
class Neumann:
    """An approximation: the first `terms` of (I - A)^-1 = I + A + A^2 + ... (Geng et al. 2021).

    It has the error A^terms (I - A)^-1, small for strong contractions only. First derivatives.

    Example:
        >>> from optlayers.torch import Neumann
        >>> Neumann(terms=8)
        Neumann(terms=8)
    """

    terms: int = 5

    def __call__(self, ops, call, solution):
        def solve(J, r):
            return ops.repeat(self.terms - 1, lambda w: r + w - J(w), r)

        return _attach(ops, call, solution, solve)


@dataclass(frozen=True)
class OneStep:
    """An approximation: A is taken as zero, so that z = f(z*, *args) (Jacobian-free, Fung et al. 2022).

    A descent direction where A is small; there is nothing to solve. First derivatives.

    Example:
        >>> from optlayers.torch import OneStep
        >>> OneStep()
        OneStep()
    """

    def __call__(self, ops, call, solution):
        return attach(ops, _residual(ops, call, solution), lambda r: r, solution.z, 1)


@dataclass(frozen=True)
class Phantom:
    """An approximation: the derivative of the last `steps` damped iterations (Geng et al. 2021).

        z <- (1 - tau) z + tau f(z, *args),    unrolled from the solution

    Memory grows with `steps`. First derivatives.

    Example:
        >>> from optlayers.torch import Phantom
        >>> Phantom(steps=3, tau=0.8).tau
        0.8
    """

    steps: int = 5
    tau: float = 1.0

    def __call__(self, ops, call, solution):
        residual, z = _residual(ops, call, solution), solution.z
        for _ in range(self.steps):
            z = z - self.tau * residual(z)
        return ops.guard(z, 1, "the derivative of Phantom() is of first order; use Exact() and order=2")


@dataclass(frozen=True)
class Shine:
    """An approximation: (I - A)^-1 is what Broyden's method has learnt of it (Ramzi et al. 2022).

    There is nothing to solve; it needs `solver=Broyden(...)`. First derivatives.

    Example:
        >>> from optlayers.torch import Shine
        >>> Shine()
        Shine()
    """

    def __call__(self, ops, call, solution):
        if not isinstance(call.layer.solver, Broyden):
            raise ValueError(f"adjoint=Shine() needs solver=Broyden(...), got {call.layer.solver!r}")
        state = solution.state
        U, V = (ops.stop_gradient(rows) for rows in (state.U, state.V))
        solve = lambda r: -inverse_product(ops, U, V, state.used[:, None], r)
        return attach(ops, _residual(ops, call, solution), solve, solution.z, 1)


def _residual(ops: MatrixFreeOps, call: Call, solution: Solution) -> Callable[[Array], Array]:
    """z to z - f(z), zero for failed samples under the policy "mask"."""
    return lambda z: _masked(ops, call, solution, z - call.value(z))


def _masked(ops: MatrixFreeOps, call: Call, solution: Solution, x: Array) -> Array:
    if call.layer.on_failure != "mask":
        return x
    return ops.where(_is_usable(solution.status)[:, None], x, 0.0)


def _attach(ops: MatrixFreeOps, call: Call, solution: Solution, solve: Callable) -> Array:
    """The solution with the derivatives that `solve`, (J, r) to about J^-1 r, implies."""
    order = call.layer.order if isinstance(call.layer.adjoint, Exact) else 1
    F = lambda z: z - call.value(z)
    # Masked on both sides: a failed sample's equations, which may have no solution, are never posed.
    inverse = lambda r: _masked(ops, call, solution, ops.solve_increment(F, solution.z, solve, r))
    return attach(ops, _residual(ops, call, solution), inverse, solution.z, order)


def _is_usable(status: Array) -> Array:
    return status == Status.SOLVED.code


def _warn_of_unsolved(status: np.ndarray, residual: np.ndarray) -> None:
    failed = status != Status.SOLVED.code
    if failed.any():
        warnings.warn(
            f"the linear equations of the derivative were not solved for {failed.sum()} of {failed.size} "
            f"samples (relative residual up to {residual[failed].max():.1e}): these gradients are inexact; "
            "raise max_iter or tol of adjoint=Exact(...), or use Exact(NewtonKrylov())",
            stacklevel=2,
        )


@dataclass(frozen=True)
class FixedPoint:
    """The settings of `fixed_point`, and the map from f and a start to the solution."""

    solver: FixedPointSolver = Anderson()
    adjoint: Adjoint = Exact()
    tol: float | None = None
    max_iter: int = 50
    order: int = 1
    on_failure: str = "raise"

    def __post_init__(self):
        if self.on_failure not in FAILURE_POLICIES:
            raise ValueError(f"on_failure must be one of {FAILURE_POLICIES}, got {self.on_failure!r}")
        if self.order < 1 or self.max_iter < 1:
            raise ValueError(f"order and max_iter must be at least 1, got {self.order} and {self.max_iter}")

    def __call__(self, ops: MatrixFreeOps, f: Callable, z0: Any, *args: Any) -> tuple[Any, FixedPointInfo]:
        start, unflatten = flatten_state(ops, z0)
        value = lambda z: _evaluate(ops, f, unflatten, z, args)
        start = ops.stop_gradient(start)
        tol = self.tol if self.tol is not None else 1e-10 if ops.eps(start) < 1e-10 else 1e-6
        problem = Problem(ops.frozen(value, start), lambda z: ops.tangent_map(value, z))
        solution = run(ops, self.solver, problem, start, tol, self.max_iter)
        info = FixedPointInfo(*solution[1:5])
        if self.on_failure == "raise":
            ops.on_host(check, info.status, info.residual)
        z = self.adjoint(ops, Call(value, self, tol), solution)
        if self.on_failure in ("raise", "nan"):
            z = ops.where(_is_usable(info.status)[:, None], z, ops.nan)
        return unflatten(z), info


def flatten_state(ops: MatrixFreeOps, tree: Any) -> tuple[Array, Callable[[Array], Any]]:
    """The arrays (B, ...) of a state as one matrix (B, k), and the way back.

    Raises:
        ValueError: the arrays have no batch axis in common, or several dtypes.
    """
    leaves, rebuild = ops.tree_flatten(tree)
    shapes = [tuple(x.shape) for x in leaves]
    if not leaves or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"z0 must hold arrays with one batch axis in front, the same in all; got {shapes}")
    if len({x.dtype for x in leaves}) > 1:
        raise ValueError(f"all arrays of z0 must have one dtype, got {[str(x.dtype) for x in leaves]}")
    ends = np.cumsum([math.prod(shape[1:]) for shape in shapes]).tolist()

    def unflatten(z):
        parts = zip([0, *ends], ends, shapes, strict=False)
        return rebuild([ops.reshape(z[:, i:j], shape) for i, j, shape in parts])

    return _join(ops, leaves), unflatten


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
        f: (z, *args) to the next z, of the same shapes; row i may depend on row i of z only. It is called
            many times and must give the same result each time.
        z0: where to start: an array (B, ...), or nested containers of such arrays.
        args: whatever f takes besides z.
        solver: Picard, Anderson, Broyden or NewtonKrylov.
        adjoint: Exact, or one of the approximations Neumann, OneStep, Phantom and Shine.
        tol: relative residual |f(z) - z| / max(|f(z)|, tol); None is 1e-10 in double precision and 1e-6 in single.
        max_iter: steps of the solver.
        order: how many derivatives are right; more raise NotImplementedError. Each costs one more linear
            solve.
        on_failure: for samples that did not converge: "raise", or "nan", "mask" (the best iterate, with zero
            derivatives) or "ignore" (the best iterate, derived as if it were the solution).
        return_info: return (z, info), with info a `FixedPointInfo`.

    Raises:
        SolveError: some samples did not converge, and `on_failure` is "raise".
    """
