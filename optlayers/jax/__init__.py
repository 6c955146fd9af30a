"""OptLayers for JAX."""

from ..cones import Cones
from ..layers.conic import ConicSolution
from ..layers.cvxpy import Solution
from ..solvers.admm import ADMM
from ..solvers.host import OSQP, SCS, Clarabel
from ..solvers.interior_point import InteriorPoint
from ..status import SolveError, Status
from .cvxpy import CvxpyLayer
from .direct import solve_conic, solve_qp
from .implicit import implicit

__all__ = [
    "ADMM",
    "OSQP",
    "SCS",
    "Clarabel",
    "Cones",
    "ConicSolution",
    "CvxpyLayer",
    "InteriorPoint",
    "Solution",
    "SolveError",
    "Status",
    "implicit",
    "solve_conic",
    "solve_qp",
]
