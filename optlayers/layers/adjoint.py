"""How derivatives are attached to a fixed point z = f(z), exactly or approximately.

With the residual z - f(z) of `optlayers.implicit` and A = df/dz at the solution, a derivative needs solutions
of w = r + A w, and of the transposed equation. Matrices (B, k) hold the flattened states, samples in rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from ..implicit import attach
from ..ops import Array, MatrixFreeOps
from ..solvers.fixed_point import Broyden, FixedPointSolver, Problem, Solution, inverse_product, run
from ..status import Status, warn_of_inexact_gradients

_UNSOLVED = partial(
    warn_of_inexact_gradients,
    "samples (relative residual",
    "raise max_iter or tol of adjoint=Exact(...), or use Exact(NewtonKrylov())",
)


class Adjoint(Protocol):
    """How derivatives are attached to a solution: `call` has the live f, and what was asked of the solve."""

    def __call__(self, ops: MatrixFreeOps, call: Call, solution: Solution) -> Array: ...


@dataclass(frozen=True)
class Call:
    """One call of a layer, for its adjoint.

    Args:
        value: f, differentiable, of matrices (B, k).
        solver: of the fixed point.
        tol: relative residual asked of the solution.
        max_iter: steps of the solver.
        order: how many derivatives are asked for.
        is_masked: whether there are failed samples that get zero derivatives.
    """

    value: Callable[[Array], Array]
    solver: FixedPointSolver
    tol: float
    max_iter: int
    order: int
    is_masked: bool


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
        solver = self.solver or call.solver
        tol = call.tol if self.tol is None else self.tol
        max_iter = 2 * call.max_iter if self.max_iter is None else self.max_iter

        def solve(A, r):
            # Of unit size, since squares of small cotangents would vanish in single precision.
            size = ops.amax(abs(r), -1, keepdims=True)
            size = ops.where(size > 0, size, 1.0)
            unit = r / size
            scaled = lambda w: A(size * w) / size
            problem = Problem(lambda w: unit + scaled(w), lambda w: scaled)
            result = run(ops, solver, problem, unit, tol, max_iter)
            failed = result.residual > max(tol**0.5, 50 * ops.eps(r))
            return ops.reported(size * result.z, failed, _UNSOLVED, result.status, result.residual)

        return _attach(ops, call, solution, solve, call.order)


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

    def __post_init__(self):
        if self.terms < 1:
            raise ValueError(f"terms must be at least 1, got {self.terms}")

    def __call__(self, ops, call, solution):
        def solve(A, r):
            return ops.repeat(self.terms - 1, lambda w: r + A(w), r)

        return _attach(ops, call, solution, solve, 1)


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
        return attach(ops, _increment(ops, call, solution), lambda r: r, solution.z, 1)


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

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def __call__(self, ops, call, solution):
        residual, z = _residual(ops, call, solution), solution.z
        for _ in range(self.steps):
            z = z - self.tau * residual(z)
        z = solution.z + (z - ops.stop_gradient(z))
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
        if not isinstance(call.solver, Broyden):
            raise ValueError(f"adjoint=Shine() needs solver=Broyden(...), got {call.solver!r}")
        state = solution.state
        U, V = (ops.stop_gradient(rows) for rows in (state.U, state.V))
        solve = lambda r: -inverse_product(ops, U, V, state.used[:, None], r)
        return attach(ops, _increment(ops, call, solution), solve, solution.z, 1)


def _increment(ops: MatrixFreeOps, call: Call, solution: Solution) -> Callable[[Array], Array]:
    """The residual as zero, with its derivatives: the solution may be a mere iterate, and stays as it is."""
    residual = _residual(ops, call, solution)

    def increment(z):
        r = residual(z)
        return r - ops.stop_gradient(r)

    return increment


def _residual(ops: MatrixFreeOps, call: Call, solution: Solution) -> Callable[[Array], Array]:
    """z to z - f(z), zero for failed samples unless they are derived as if they were solutions."""
    return lambda z: _masked(ops, call, solution, z - call.value(z))


def _masked(ops: MatrixFreeOps, call: Call, solution: Solution, x: Array) -> Array:
    return ops.where(is_usable(solution.status)[:, None], x, 0.0) if call.is_masked else x


def _attach(ops: MatrixFreeOps, call: Call, solution: Solution, solve: Callable, order: int) -> Array:
    """The solution with the derivatives that `solve`, (A, r) to about (I - A)^-1 r, implies."""
    call = replace(call, value=ops.recorded_at(call.value, solution.z))
    # Masked on both sides: a failed sample's equations, which may have no solution, are never posed.
    inverse = lambda r: _masked(ops, call, solution, ops.solve_increment(call.value, solution.z, solve, r))
    return attach(ops, _residual(ops, call, solution), inverse, solution.z, order)


def is_usable(status: Array) -> Array:
    """Whether a sample has converged."""
    return status == Status.SOLVED.code
