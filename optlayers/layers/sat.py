"""The relaxation of MAXSAT as a differentiable layer: what the two frontends share.

Shapes: B problems of n variables, with the truth in front and auxiliary variables behind N = 1 + n + aux unit
vectors of k entries; S (m, N) for m clauses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from ..implicit import attach
from ..ops import Array, MatrixFreeOps
from ..solvers.fixed_point import Anderson, FixedPointSolver, NewtonKrylov, Picard
from ..solvers.mixing import Mixing, MixingAdjoint
from ..status import FAILURE_POLICIES, Status, batch_axes, warn_of_inexact_gradients
from .fixed_point import check_floats

_UNSOLVED = partial(
    warn_of_inexact_gradients,
    "problems (relative change in the last sweep",
    "raise max_iter or tol, or accept them with on_failure='ignore'",
)


class SATSolution(NamedTuple):
    """What became of each problem of a batch.

    Attributes:
        z: probability that each variable is true (B, n).
        vectors: unit vectors of the truth, the variables and the auxiliary variables (B, N, k). Only their
            inner products have derivatives: all solutions that differ by a rotation are equally good.
        status: code of `Status`: `list(Status)[code]` (B,).
        iterations: sweeps taken (B,).
        residual: relative change of the vectors in a last sweep (B,).

    Example:
        >>> import torch
        >>> from optlayers.torch import SATLayer
        >>> layer = SATLayer(variables=2, clauses=1)
        >>> solution = layer.solve(torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]))
        >>> solution.vectors.shape  # the truth and two variables, each a vector of length 4
        torch.Size([1, 3, 4])
    """

    z: Array
    vectors: Array
    status: Array
    iterations: Array
    residual: Array


@dataclass(frozen=True)
class SAT:
    """The settings of `SATLayer`, and the map from clauses and inputs to the solution."""

    variables: int
    clauses: int
    aux: int = 0
    rank: int | None = None
    solver: FixedPointSolver = Picard()
    adjoint_solver: FixedPointSolver = Anderson()
    tol: float | None = None
    max_iter: int = 2000
    order: int = 1
    on_failure: str = "raise"

    def __post_init__(self):
        if self.variables < 1 or self.clauses < 1 or self.aux < 0:
            raise ValueError(
                "a layer needs at least one variable and one clause, and no fewer than zero auxiliary ones; "
                f"got {self.variables}, {self.clauses} and {self.aux}"
            )
        if self.vector_size < 2:
            raise ValueError(f"rank must be at least 2, got {self.rank}")
        if self.order < 1 or self.max_iter < 1:
            raise ValueError(f"order and max_iter must be at least 1, got {self.order} and {self.max_iter}")
        if self.on_failure not in FAILURE_POLICIES:
            raise ValueError(f"on_failure must be one of {FAILURE_POLICIES}, got {self.on_failure!r}")
        if isinstance(self.solver, NewtonKrylov) or isinstance(self.adjoint_solver, NewtonKrylov):
            raise ValueError(
                "sweeps can be repeated by Picard(), Anderson() or Broyden(), not NewtonKrylov()"
            )

    @property
    def size(self) -> int:
        return 1 + self.variables + self.aux

    @property
    def vector_size(self) -> int:
        """k; the default is large enough for the low-rank program to be as good as the full one."""
        return math.ceil(math.sqrt(2 * self.size)) + 1 if self.rank is None else self.rank

    @property
    def scale(self) -> float:
        """Standard deviation of the entries of S at the start."""
        return math.sqrt(0.5 / (self.size + self.clauses))

    def directions(self, seed: int) -> np.ndarray:
        """Random unit vectors (N, k): free vectors start there, inputs are turned towards them."""
        x = np.random.default_rng(seed).standard_normal((self.size, self.vector_size))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def __call__(
        self, ops: MatrixFreeOps, S: Array, directions: Array, z: Array, is_input: Array
    ) -> SATSolution:
        """The solution for z with any batch axes in front, and `is_input` with the same or none."""
        lead, n = tuple(z.shape[:-1]), self.variables
        self._check_inputs(S, z, is_input)
        batch = math.prod(lead)
        is_input = ops.reshape(ops.broadcast_to(is_input, (*lead, n)), (batch, n))
        with batch_axes(lead):
            solution = self._solve(ops, S, directions, ops.reshape(z, (batch, n)), is_input)
        return SATSolution(*(ops.reshape(x, (*lead, *x.shape[1:])) for x in solution))

    def _check_inputs(self, S: Array, z: Array, is_input: Array) -> None:
        expected = (self.clauses, self.size)
        if tuple(S.shape) != expected:
            raise ValueError(
                f"S must have the shape (clauses, 1 + variables + aux), {expected}; got {tuple(S.shape)}"
            )
        shape, own = tuple(z.shape), (self.variables,)
        if shape[-1:] != own or tuple(is_input.shape) not in (shape, own):
            raise ValueError(
                f"z must have the shape (..., {self.variables}) and is_input the same or {own}; "
                f"got {shape} and {tuple(is_input.shape)}"
            )
        check_floats(z, "z")

    def _solve(
        self, ops: MatrixFreeOps, S: Array, directions: Array, z: Array, is_input: Array
    ) -> SATSolution:
        C = S.mT @ S * (1 - ops.eye(self.size, S))
        one = ops.full((z.shape[0], 1), 1.0, z)
        free = ops.concat([0 * one, ops.where(is_input, 0 * one, one), *[one] * self.aux], -1)
        start = ops.where(free[..., None] > 0, directions[None], _fixed_vectors(ops, directions, z))
        tol = self.tol if self.tol is not None else 1e-8 if ops.eps(z) < 1e-10 else 1e-6
        settings = Mixing(self.solver, tol, self.max_iter, self.on_failure == "raise")
        V, multipliers, residual, status, iterations = ops.leaf(settings, (C, start, free))
        is_usable = status == Status.SOLVED.code
        if self.on_failure == "ignore":
            is_usable = status != Status.NON_FINITE.code
        # Numbers for NaN, which would reach the gradient of the shared S as 0 * NaN.
        fixed = _fixed_vectors(ops, directions, ops.where(is_input & ops.isfinite(z), z, 0.5))
        root = ops.concat([free[..., None] * V, multipliers[..., None]], -1)
        root = ops.where(is_usable[:, None, None], root, 0.0)
        V = self._attach(ops, settings, C, free, fixed, root, is_usable)
        probability = ops.where(is_input, z, _probability(ops, V[:, 1 : 1 + self.variables]))
        if self.on_failure != "mask":
            probability = ops.where(is_usable[:, None], probability, ops.nan)
        return SATSolution(probability, V, status, iterations, residual)

    def _attach(
        self,
        ops: MatrixFreeOps,
        settings: Mixing,
        C: Array,
        free: Array,
        fixed: Array,
        root: Array,
        is_usable: Array,
    ) -> Array:
        """All vectors, the free ones from `root` = (V, lambda) with the derivatives of their conditions.

        sum_j C_ij v_j + lambda_i v_i = 0,     (|v_i|^2 - 1) / 2 = 0        for free i
        """
        is_free, k = free[..., None] > 0, self.vector_size
        vectors = lambda y: ops.where(is_free, y[..., :k], fixed)
        adjoint = MixingAdjoint(replace(settings, solver=self.adjoint_solver))
        masked = lambda r: ops.where(is_usable[:, None, None], r, 0.0)

        def conditions(y):
            V, multipliers = y[..., :k], y[..., k:]
            stationary = C @ vectors(y) + multipliers * V
            unit = (ops.sum(V * V, -1, keepdims=True) - 1) / 2
            return ops.where(is_free, ops.concat([stationary, unit], -1), y)

        def solve(_, r, C, root, free):  # J is symmetric: there is no need to know whether it is transposed
            w, residual, status = ops.leaf(adjoint, (r, C, root, free))
            if self.on_failure == "ignore":
                return w
            flat, failed = ops.reshape(w, (w.shape[0], math.prod(w.shape[1:]))), residual > settings.tol**0.5
            return ops.reshape(ops.reported(flat, failed, _UNSOLVED, status, residual), w.shape)

        inverse = lambda r: masked(ops.solve_increment(conditions, root, solve, r, C, root, free))
        return vectors(attach(ops, lambda y: masked(conditions(y)), inverse, root, self.order))


def _fixed_vectors(ops: MatrixFreeOps, directions: Array, z: Array) -> Array:
    """v_T, inputs -cos(pi z) v_T + sin(pi z) r with unit vectors r orthogonal to v_T, zeros (B, N, k)."""
    (batch, n), (size, k) = z.shape, directions.shape
    r = directions[1 : n + 1, 1:]
    r = r / ops.sqrt(ops.sum(r * r, -1, keepdims=True))
    angle = math.pi * z[..., None]
    inputs = ops.concat([-ops.cos(angle), ops.sin(angle) * r[None]], -1)
    truth = ops.broadcast_to(ops.eye(k, z)[None, :1], (batch, 1, k))
    return ops.concat([truth, inputs, ops.full((batch, size - n - 1, k), 0.0, z)], 1)


def _probability(ops: MatrixFreeOps, V: Array) -> Array:
    """arccos(-v'v_T) / pi, the chance that a random hyperplane parts v from -v_T; accurate near 0 and 1."""
    squared = ops.sum(V[..., 1:] * V[..., 1:], -1)
    is_integral = squared == 0  # there the angle has no derivative in v, and it is zero in all else
    length = ops.where(is_integral, 0.0, ops.sqrt(ops.where(is_integral, 1.0, squared)))
    return ops.arctan2(length, -V[..., 0]) / math.pi


def sat_doc():
    """Truth values that satisfy learned clauses as well as the inputs allow (SATNet, Wang et al. 2019).

        minimise |S V|^2   subject to  |v_i| = 1,   v_i = -cos(pi z_i) v_T + sin(pi z_i) r_i  for inputs i,

    the semidefinite relaxation of MAXSAT, in unit vectors v_T of the truth, v_i of each variable and of
    auxiliary variables, the rows of V. What comes out for a variable is z_i = arccos(-v_i'v_T) / pi, the
    probability that it is true after random rounding. It is solved by the mixing method, sweeps of coordinate
    descent (Wang, Chang and Kolter 2017); derivatives in S and in the inputs come from the conditions of
    optimality, whose linear equations the same sweeps solve.

    `layer(z, is_input)` takes z (..., n), of which only inputs are read, and a boolean mask of its shape or
    (n,); `layer.solve` takes the same and returns a `SATSolution`. S (clauses, 1 + variables + aux) has a
    column for the truth, negative, then one for each variable, positive where a clause holds it, negative
    where it holds its negation.

    Args:
        variables: n.
        clauses: rows of S.
        aux: auxiliary variables, which let few clauses say more.
        rank: k, the length of the vectors; None is sqrt(2 N) + 1 or more, where the problem with short
            vectors is as good as the semidefinite program.
        solver: repeats the sweeps: Picard, with which each lowers the objective; or Anderson, which takes
            about a tenth of them to high accuracy, but may be drawn to a saddle.
        adjoint_solver: the same for the sweeps of the linear equations, which have no saddles.
        tol: relative change of V in one sweep; None is 1e-8 in double precision and 1e-6 in single.
        max_iter: most sweeps, for the solution and again for its derivative.
        order: how many derivatives are right; more raise NotImplementedError.
        on_failure: for problems that did not converge: "raise", or "nan", "mask" (the last iterate, with zero
            derivatives) or "ignore" (the last iterate, derived as if it were the solution, which is what
            training with few sweeps needs).
        seed: of the random directions r_i and of the vectors that sweeps start from.

    Raises:
        ValueError: arguments or shapes that do not fit.
        SolveError: some problems did not converge, and `on_failure` is "raise".
    """
