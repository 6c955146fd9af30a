"""The relaxation of MAXSAT with learned clauses, in JAX."""

from __future__ import annotations

import jax

from ..docstring import continues
from ..layers.sat import SAT, SATSolution, sat_doc
from ..ops import jax as ops
from ..solvers.fixed_point import Anderson, FixedPointSolver, Picard
from .calling import in_full_precision


@continues(sat_doc)
class SATLayer:
    """
    `S` goes before the other arguments: `layer(S, z, is_input)`; `layer.init(key)` draws one at random.

    Example:
        >>> import jax.numpy as jnp
        >>> from optlayers.jax import SATLayer
        >>> layer = SATLayer(variables=2, clauses=1)
        >>> S = jnp.array([[-1.0, -1.0, -1.0]])  # the clause "not both", for columns truth, first, second
        >>> z = layer(S, jnp.array([[1.0, 0.0]]), jnp.array([[True, False]]))
        >>> z.round().tolist()
        [[1.0, 0.0]]
    """

    def __init__(
        self,
        variables: int,
        clauses: int,
        aux: int = 0,
        rank: int | None = None,
        *,
        solver: FixedPointSolver = Picard(),
        adjoint_solver: FixedPointSolver = Anderson(),
        tol: float | None = None,
        max_iter: int = 2000,
        order: int = 1,
        on_failure: str = "raise",
        seed: int = 0,
    ):
        self.settings = SAT(
            variables, clauses, aux, rank, solver, adjoint_solver, tol, max_iter, order, on_failure
        )
        self.directions = self.settings.directions(seed)

    def init(self, key: jax.Array, dtype=float) -> jax.Array:
        """A random S (clauses, 1 + variables + aux)."""
        shape = (self.settings.clauses, self.settings.size)
        return self.settings.scale * jax.random.normal(key, shape, dtype)

    @in_full_precision
    def solve(self, S: jax.Array, z: jax.Array, is_input: jax.Array) -> SATSolution:
        """As calling the layer, with the vectors, status and statistics; see `SATSolution`."""
        return self.settings(ops, S, ops.constant(self.directions, z), z, is_input)

    def __call__(self, S: jax.Array, z: jax.Array, is_input: jax.Array) -> jax.Array:
        """Probabilities (..., n) that the variables are true; those of inputs are z itself."""
        return self.solve(S, z, is_input).z
