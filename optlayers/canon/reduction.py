"""CVXPY's chain of reductions, run with symbolic parameters, and ways through it in both directions.

The chain ends in a parametrised cone program: sparse tensors with one row per entry of the data, one
column per entry of CVXPY's own parameters, and a last column for the constant part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy import settings
from cvxpy.constraints.exponential import ExpCone
from cvxpy.constraints.nonpos import NonNeg
from cvxpy.constraints.power import PowCone3D, PowConeND
from cvxpy.constraints.psd import SvecPSD
from cvxpy.constraints.second_order import SOC
from cvxpy.constraints.zero import Zero
from cvxpy.lin_ops.lin_op import CONSTANT_ID
from cvxpy.reductions.chain import Chain
from cvxpy.reductions.dcp2cone.cone_matrix_stuffing import ConeMatrixStuffing, ParamConeProg
from cvxpy.reductions.dcp2cone.dcp2cone import Dcp2Cone
from cvxpy.reductions.dgp2dcp.dgp2dcp import Dgp2Dcp
from cvxpy.reductions.eliminate_zero_sized import EliminateZeroSized
from cvxpy.reductions.solution import Solution
from cvxpy.reductions.solvers.conic_solvers.conic_solver import ConicSolver
from cvxpy.reductions.solvers.solver import expand_cones
from cvxpy.reductions.solvers.solving_chain import resolve_and_build_chain
from cvxpy.reductions.solvers.utilities import extract_dual_value, get_dual_values
from cvxpy.utilities.psd_utils import TriangleKind
from cvxpy.version import version as cvxpy_version

from ..cones import Cones


@dataclass(frozen=True, eq=False)
class Reduction:
    """A problem and the cone program that CVXPY reduced it to.

    Attributes:
        problem: the user's problem.
        chain: the reductions, in order.
        cone_program: what they end in.
        inverse_data: what each reduction needs to take a solution back.
    """

    problem: cp.Problem
    chain: Chain
    cone_program: ParamConeProg
    inverse_data: list

    @property
    def n(self) -> int:
        return self.cone_program.x.size

    @property
    def m(self) -> int:
        return self.cone_program.A.shape[0] // (self.n + 1)


def reduce(problem: cp.Problem, gp: bool, canon_backend: str | None) -> Reduction:
    """Returns the reduction of a problem that `checks.check` has passed."""
    if canon_backend is None:
        # Measured: COO is the only backend that is linear in the nonzeros of a large parameter, SCIPY the
        # faster one for large constants.
        is_large = sum(p.size for p in problem.parameters()) >= settings.DPP_PARAM_THRESHOLD
        canon_backend = settings.COO_CANON_BACKEND if is_large else settings.SCIPY_CANON_BACKEND
    # Not `problem.get_problem_data`: it would replace the chain that the user's problem has cached.
    chain = resolve_and_build_chain(
        problem, _Formatter(), gp=gp, enforce_dpp=True, canon_backend=canon_backend
    )
    chain.reductions = [
        _Stuffing(r.quad_obj, r.canon_backend) if type(r) is ConeMatrixStuffing else r
        for r in chain.reductions
    ]
    # cvxpy.perspective canonicalizes its function for the solver of this name; Clarabel's cones are ours.
    chain.get(Dcp2Cone).solver_context.solver_name = settings.CLARABEL
    data, inverse_data = chain.apply(problem)
    cone_program = data[settings.PARAM_PROB]
    _refuse_unknown(data, cone_program)
    return Reduction(problem, chain, cone_program, inverse_data)


def cones(reduction: Reduction) -> Cones:
    """Returns the cones of the rows; raises if they do not make up all rows."""
    dims = reduction.cone_program.cone_dims
    pow3d = [(float(a), 1.0 - float(a)) for a in dims.p3d]
    pownd = [tuple(float(a) for a in weights) for weights in dims.pnd]
    product = Cones(dims.zero, dims.nonneg, tuple(dims.soc), tuple(dims.psd), dims.exp, (*pow3d, *pownd))
    if product.rows != reduction.m:
        raise ValueError(f"CVXPY {cvxpy_version} gives {reduction.m} rows for cones of {product.rows}.")
    return product


def pieces(reduction: Reduction, parameter: cp.Parameter) -> Iterator[tuple[str, dict[int, np.ndarray]]]:
    """Yields, per part of `parameter`, what CVXPY's own parameters take from it, by their ids.

    In each array, +k or -k stands for the k-th entry (from 1, row-major) of that part or its negative, and
    0 for no entry.
    """
    numbers = np.arange(1.0, parameter.size + 1).reshape(parameter.shape)
    reductions = reduction.chain.reductions
    yield "real", _lower(reductions, {parameter.id: numbers})
    if parameter.is_complex():
        yield "imag", _lower(reductions, {parameter.id: 1j * numbers})
    for r in reductions:
        if isinstance(r, Dgp2Dcp) and parameter in r.canon_methods._parameters:
            yield "log", _lower(reductions, {r.canon_methods._parameters[parameter].id: numbers})


def _lower(reductions: list, values: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Parameter values by id, taken through the chain. Dgp2Dcp is left out: it is not linear."""
    for r in reductions:
        if not isinstance(r, Dgp2Dcp):
            values = r.param_forward(values)
    return values


def recover_primal(reduction: Reduction, x: np.ndarray) -> dict[int, np.ndarray]:
    """Returns the user's variables, by id, at a solution x; their logarithms in a geometric program."""
    values = reduction.cone_program.split_solution(x)
    for r, inverse_data in reversed(
        list(zip(reduction.chain.reductions, reduction.inverse_data, strict=True))
    ):
        if isinstance(r, Dgp2Dcp):
            for original, log in r.canon_methods._variables.items():
                values[original.id] = values.pop(log.id)
        else:
            values = r.var_forward(values)
        if isinstance(r, EliminateZeroSized) and inverse_data:
            eliminated = inverse_data["eliminated_vars"]
            values |= {i: np.zeros(v.shape) for i, v in eliminated.items()}
    return {i: v.toarray() if sp.issparse(v) else np.asarray(v) for i, v in values.items()}


def recover_dual(reduction: Reduction, y: np.ndarray) -> dict[int, np.ndarray]:
    """Returns the user's dual variables, by id, as `problem.solve` would leave them at multipliers y."""
    solution = reduction.chain.invert(y, reduction.inverse_data)
    values = {}
    for constraint in reduction.problem.constraints:
        if constraint.id in solution.dual_vars:
            saved = constraint.copy()  # a copy has dual variables of its own: the user's keep their values
            saved.save_dual_value(solution.dual_vars[constraint.id])
            for own, other in zip(constraint.dual_variables, saved.dual_variables, strict=True):
                if other.value is not None:
                    values[own.id] = np.asarray(other.value)
    return values


class _Formatter(ConicSolver):
    """A "solver" that ends CVXPY's chain by arranging the rows, and leaves the parameters symbolic."""

    SUPPORTED_CONSTRAINTS = [Zero, NonNeg, SOC, ExpCone, PowCone3D, PowConeND, SvecPSD]
    PSD_TRIANGLE_KIND = TriangleKind.UPPER
    PSD_SQRT2_SCALING = True
    EXP_CONE_ORDER = [0, 1, 2]

    def name(self) -> str:
        return "OPTLAYERS"

    def import_solver(self) -> None:
        """Returns nothing: there is nothing to import."""

    def supports_quad_obj(self) -> bool:
        return True

    def can_solve(self, problem_form) -> bool:
        """Returns True, or raises with the names of the cones that stand in the way."""
        needed = problem_form.cones(quad_obj=problem_form.has_quadratic_objective()).copy()
        expand_cones(needed, frozenset(self.SUPPORTED_CONSTRAINTS))
        self._refuse_cones(needed)
        return True

    @classmethod
    def format_constraints(cls, problem: ParamConeProg, exp_cone_order: list[int]) -> ParamConeProg:
        """Returns `problem` with its rows in the order of the cones.

        CVXPY's version multiplies by a matrix of variables x parameters columns, 16 GB for a parameter
        (1000, 1000) in a second-order cone. Here it only arranges the numbers of the rows.
        """
        rows = problem.A.shape[0] // (problem.x.size + 1)
        numbered = copy.copy(problem)
        numbered.x, numbered.A = cp.Variable(0), sp.eye_array(rows, format="csc")
        arranged = sp.coo_array(super().format_constraints(numbered, exp_cone_order).A)
        place, sign = np.empty(rows, np.int64), np.empty(rows)
        place[arranged.col], sign[arranged.col] = arranged.row, arranged.data
        entries = sp.coo_array(problem.A)
        column, row = np.divmod(entries.row.astype(np.int64), max(rows, 1))
        formatted = copy.copy(problem)
        formatted.A = sp.coo_array(
            (entries.data * sign[row], (column * rows + place[row], entries.col)), entries.shape
        )
        formatted.formatted = True
        return formatted

    def apply(self, problem: ParamConeProg) -> tuple[dict, dict]:
        self._refuse_cones({type(c) for c in problem.constraints})
        _, data, inverse_data = self._prepare_data_and_inv_data(problem)
        return data, inverse_data | {"n": problem.x.size}

    def invert(self, solution: np.ndarray, inverse_data: dict) -> Solution:
        """Returns the solution of the cone program with multipliers `solution`, and x = 0."""
        zero = inverse_data[self.DIMS].zero
        duals = get_dual_values(solution[:zero], extract_dual_value, inverse_data[self.EQ_CONSTR])
        duals |= get_dual_values(solution[zero:], extract_dual_value, inverse_data[self.NEQ_CONSTR])
        primal = {inverse_data[self.VAR_ID]: np.zeros(inverse_data["n"])}
        return Solution(settings.OPTIMAL, 0.0, primal, duals, {})

    def solve_via_data(self, *args, **kwargs):
        raise NotImplementedError("OptLayers solves the program itself.")

    def cite(self, data) -> str:
        return ""

    def _refuse_cones(self, needed: set[type]) -> None:
        unknown = sorted(cone.__name__ for cone in needed - set(self.SUPPORTED_CONSTRAINTS))
        if unknown:
            raise ValueError(f"The problem needs cones that OptLayers does not have: {', '.join(unknown)}.")


class _Stuffing(ConeMatrixStuffing):
    """CVXPY's last step but one, with only the objective's parameters in sight while it reads the objective.

    CVXPY (1.9.3, `CoeffExtractor.extract_quadratic_coeffs`) makes a dense array of variables x parameters
    there, 8 GB for a parameter (1000, 1000) even if only a constraint has it.
    """

    def stuffed_objective(self, problem, extractor):
        sizes = {p.id: p.size for p in problem.objective.parameters()} | {CONSTANT_ID: 1}
        stops = np.cumsum(list(sizes.values()))
        narrow = copy.copy(extractor)
        narrow.param_to_size = sizes
        narrow.param_id_map = {
            i: int(stop) - size for (i, size), stop in zip(sizes.items(), stops, strict=True)
        }
        P, q, x = super().stuffed_objective(problem, narrow)
        columns = np.concatenate([extractor.param_id_map[i] + np.arange(size) for i, size in sizes.items()])
        width = sum(extractor.param_to_size.values())
        return None if P is None else _widen(P, columns, width), _widen(q, columns, width), x


def _widen(tensor: sp.sparray, columns: np.ndarray, width: int) -> sp.coo_array:
    """`tensor` with column j moved to `columns[j]` of `width`."""
    entries = sp.coo_array(tensor)
    return sp.coo_array((entries.data, (entries.row, columns[entries.col])), (entries.shape[0], width))


_KNOWN_DATA = {settings.PARAM_PROB, ConicSolver.DIMS}
_KNOWN_DIMS = {"zero", "nonneg", "soc", "psd", "exp", "p3d", "pnd"}
_KNOWN_PROGRAM = {
    *("q", "A", "P", "x", "reduced_A", "reduced_P", "formatted"),
    *("constraints", "constr_size", "constr_map", "cone_dims"),
    *("parameters", "param_id_to_col", "id_to_param", "param_id_to_size", "total_param_size"),
    *("variables", "var_id_to_col", "id_to_var"),
}


def _refuse_unknown(data: dict, cone_program: ParamConeProg) -> None:
    """Refuses, by name, whatever might hold a part of the problem that is not read here.

    CVXPY 1.9.3 added direct cone constraints in a place of their own; whoever does not look there solves
    a problem without them.
    """
    found = {k: v for k, v in data.items() if k not in _KNOWN_DATA}
    found |= {k: v for k, v in vars(cone_program).items() if k not in _KNOWN_PROGRAM}
    found |= {k: v for k, v in vars(cone_program.cone_dims).items() if k not in _KNOWN_DIMS}
    names = [k for k, v in found.items() if not (v is None or (isinstance(v, (list, tuple, dict)) and not v))]
    if names:
        raise ValueError(
            f"CVXPY {cvxpy_version} puts a part of this problem in {', '.join(names)}, which OptLayers does "
            "not read. Use a version of CVXPY that OptLayers was tested with."
        )
