"""OptLayers for JAX."""

from ..cones import Cones
from ..layers.adjoint import Exact, Neumann, OneStep, Phantom, Shine
from ..layers.approximate import LPGD, Smoothed
from ..layers.conic import ConicSolution
from ..layers.control_path import ControlPath
from ..layers.cvxpy import Solution
from ..layers.fixed_point import FixedPointInfo
from ..layers.ode import ODEInfo
from ..layers.ode_adjoint import Discrete
from ..layers.ode_continuous import Continuous
from ..layers.sat import SATSolution
from ..plot import plot_convergence
from ..solvers.admm import ADMM
from ..solvers.fixed_point import Anderson, Broyden, NewtonKrylov, Picard
from ..solvers.host import OSQP, SCS, Clarabel
from ..solvers.interior_point import InteriorPoint
from ..status import SolveError, Status
from .cvxpy import CvxpyLayer
from .deq import DEQ
from .direct import solve_conic, solve_qp
from .fixed_point import fixed_point
from .implicit import implicit
from .jacobian import jacobian_norm, spectral_radius
from .ode import ODE, cdeint, control_path, odeint
from .sat import SATLayer

__all__ = [
    "ADMM",
    "LPGD",
    "Anderson",
    "Broyden",
    "Clarabel",
    "Cones",
    "ConicSolution",
    "Continuous",
    "ControlPath",
    "CvxpyLayer",
    "DEQ",
    "Discrete",
    "Exact",
    "FixedPointInfo",
    "InteriorPoint",
    "Neumann",
    "NewtonKrylov",
    "ODE",
    "ODEInfo",
    "OSQP",
    "OneStep",
    "Phantom",
    "Picard",
    "SATLayer",
    "SATSolution",
    "SCS",
    "Shine",
    "Solution",
    "Smoothed",
    "SolveError",
    "Status",
    "cdeint",
    "control_path",
    "fixed_point",
    "implicit",
    "odeint",
    "jacobian_norm",
    "plot_convergence",
    "solve_conic",
    "solve_qp",
    "spectral_radius",
]
