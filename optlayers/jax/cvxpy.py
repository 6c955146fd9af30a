"""A CVXPY problem as a JAX function."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..docstring import continues
from ..layers.approximate import LPGD, Smoothed
from ..layers.conic import ConicLayer, point_of
from ..layers.cvxpy import CvxpyProgram, Solution
from ..ops import jax as ops
from ..status import SolveError
from .arguments import common
from .checked import run_checked


@continues(CvxpyProgram)
class CvxpyLayer:
    """Inside `jax.jit`, `grad`, `vmap` and the like nothing can be raised: "raise" acts as "nan" there.

    Example:
        >>> import cvxpy as cp, jax
        >>> from optlayers.jax import CvxpyLayer
        >>> x, p = cp.Variable(2), cp.Parameter(2)
        >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0])
        >>> layer = CvxpyLayer(problem, parameters=[p], variables=[x])
        >>> point = jax.numpy.array([[1.0, -2.0], [3.0, 4.0]])
        >>> jax.grad(lambda p: layer(p)[0].sum())(point).round(6).tolist()
        [[1.0, 0.0], [1.0, 1.0]]
    """

    def __init__(
        self,
        problem,
        parameters: Sequence,
        variables: Sequence,
        solver: Any = None,
        gp: bool = False,
        verbose: bool = False,
        canon_backend: str | None = None,
        solver_args: Mapping[str, Any] | None = None,
        *,
        order: int = 2,
        on_failure: str = "raise",
        rescue: bool = False,
        gradient: str | Smoothed | LPGD = "exact",
    ):
        self._program = CvxpyProgram(
            problem,
            parameters,
            variables,
            gp,
            canon_backend,
            solver_args,
            {
                "solver": solver,
                "order": order,
                "on_failure": on_failure,
                "rescue": rescue,
                "gradient": gradient,
            },
        )
        if verbose:
            print(self)

    def __call__(self, *params: Array, solver_args: Mapping[str, Any] | None = None) -> tuple[Array, ...]:
        """The variables for these parameter values, each with their batch axes in front.

        Args:
            params: one array per parameter, of its shape, with the same leading batch axes or none.
            solver_args: settings for this call, in place of those of the constructor.

        Raises:
            ValueError: values of the wrong number, shape or type.
            SolveError: some problems were not solved, and `on_failure` is "raise".
        """
        return self.solve(*params, solver_args=solver_args).variables

    def solve(
        self,
        *params: Array,
        solver_args: Mapping[str, Any] | None = None,
        warm_start: Solution | None = None,
    ) -> Solution:
        """As a call, with the multipliers, status and statistics; see `Solution`.

        Args:
            warm_start: an earlier solution of this layer for the same batch, to start from; problems
                whose entries are NaN start anew.
        """
        program = self._program
        values = [jnp.asarray(value) for value in params]
        like, warm = program.like(common, values), point_of(warm_start)
        try:
            return run_checked(self._compiled, program.layer(solver_args), values, warm, like)
        except SolveError as error:
            if not any(isinstance(value, jax.core.Tracer) for value in values):
                for fault in program.faults([np.asarray(value) for value in values]):
                    error.add_note(fault)
            raise

    @functools.cached_property
    def _compiled(self):
        def solve(layer: ConicLayer, values, warm, like) -> Solution:
            solution = self._program.solve(ops, layer, values, warm, like)
            # Else XLA computes at compile time what becomes of a constant cotangent, by an interpreter.
            variables = jax.tree.map(jax.lax.optimization_barrier, solution.variables)
            return solution._replace(variables=variables)

        return jax.jit(solve, static_argnums=0)

    def __getstate__(self):
        return {"_program": self._program}

    def summary(self) -> str:
        """Parameters, sizes, cones, outputs, solvers and set-up time, one a line."""
        return self._program.summary()

    def __repr__(self) -> str:
        return f"CvxpyLayer({self._program.headline()})"
