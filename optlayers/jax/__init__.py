"""OptLayers for JAX."""

from ..cones import Cones
from ..layers.conic import ConicSolution
from ..layers.cvxpy import Solution
from ..solvers.admm import ADMM
from ..status import SolveError, Status
from .cvxpy import CvxpyLayer
from .direct import solve_conic, solve_qp
from .implicit import implicit

__all__ = [
    "ADMM",
    "Cones",
    "ConicSolution",
    "CvxpyLayer",
    "Solution",
    "SolveError",
    "Status",
    "implicit",
    "solve_conic",
    "solve_qp",
]
