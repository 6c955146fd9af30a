"""What a CVXPY problem must satisfy to become a layer; every message names the offender and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import cvxpy as cp
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression
from cvxpy.atoms.elementwise.power import Power
from cvxpy.atoms.quad_form import QuadForm
from cvxpy.constraints.finite_set import FiniteSet
from cvxpy.constraints.power import PowCone3D, PowConeND
from cvxpy.reductions.dcp2cone.canonicalizers import CANON_METHODS
from cvxpy.transforms.partial_optimize import PartialProblem
from cvxpy.utilities.scopes import dpp_scope, quad_form_dpp_scope

# An expression, a constraint, an objective or a problem: CVXPY has no type that these share.
Node = Any

_QUAD_FORM_REMEDY = (
    "A parameter P is possible in quad_form(x, P) only where it is a term of the objective and x has no "
    "parameter. Elsewhere write sum_squares(L @ x) with a parameter L such that P = L.T @ L."
)


def check(problem: cp.Problem, parameters: Sequence, variables: Sequence, gp: bool) -> None:
    """Returns nothing if `problem` can become a layer with these parameters and outputs.

    Raises:
        ValueError: it cannot; the message says what is wrong, what was expected and what to do.
    """
    if not isinstance(problem, cp.Problem):
        raise ValueError(f"`problem` must be a cvxpy.Problem, got {type(problem).__name__}.")
    _check_entries("parameters", parameters, cp.Parameter)
    _check_entries("variables", variables, cp.Variable)
    _check_continuous(problem)
    _check_disciplined(problem, gp)
    _check_baked_in(problem, gp)
    _check_parameters(problem, parameters)
    _check_variables(problem, variables, gp)


def _check_entries(argument: str, entries: Sequence, kind: type) -> None:
    """Refuses entries of another type, and entries given twice."""
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"`{argument}` must be a list of cvxpy.{kind.__name__}, got {_type_name(entries)}.")
    first = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, kind):
            raise ValueError(
                f"{argument}[{i}] must be a cvxpy.{kind.__name__}, got {_type_name(entry)}: {text(entry)}."
            )
        if entry.id in first:
            raise ValueError(
                f"{argument}[{i}] ({text(entry)}) is a duplicate of {argument}[{first[entry.id]}]: "
                "list each once."
            )
        first[entry.id] = i


def _check_continuous(problem: cp.Problem) -> None:
    """Refuses a problem without variables, or with discrete ones."""
    if not problem.variables():
        raise ValueError("The problem has no variables, so there is nothing to solve for.")
    for variable in problem.variables():
        if variable.attributes["boolean"] or variable.attributes["integer"]:
            raise ValueError(
                f"Variable {variable} is boolean or integer: its solution has no derivative. "
                "Use a continuous relaxation."
            )
    for constraint in problem.constraints:
        if isinstance(constraint, FiniteSet):
            raise ValueError(
                f"The constraint {text(constraint)} is a FiniteSet, which makes the problem discrete: its "
                "solution has no derivative. Use a continuous relaxation."
            )


def _check_disciplined(problem: cp.Problem, gp: bool) -> None:
    """Refuses a problem that is not DCP, or not DPP; DGP takes the place of DCP if `gp`."""
    rule = "DGP" if gp else "DCP"
    if not (problem.is_dgp() if gp else problem.is_dcp()):
        place, offender = _find_offender(problem, gp, dpp=False)
        is_other = not gp and problem.is_dgp()
        raise ValueError(
            f"The problem is not {rule}: {place}, {text(offender)} does not follow the rules. "
            + ("It is a geometric program: pass gp=True." if is_other else _curvature_remedy(offender))
        )
    is_dpp: Callable[..., bool] = problem.is_dpp
    if not (is_dpp("dgp") if gp else is_dpp("dcp", quad_form_dpp="qp")):
        place, offender = _find_offender(problem, gp, dpp=True)
        raise ValueError(
            f"The problem is {rule}, but not DPP (its data must be affine in the parameters): {place}, "
            f"the sub-expression {text(offender)} is the smallest that breaks the rule. {_remedy(offender)}"
        )


def _find_offender(problem: cp.Problem, gp: bool, dpp: bool) -> tuple[str, Node]:
    """Where the problem breaks the rules, in words, and the smallest expression that does."""
    roots = [("in the objective", problem.objective)]
    roots += [(f"in constraint {i}, {text(c)}", c) for i, c in enumerate(problem.constraints)]
    for place, root in roots:
        is_relaxed = dpp and not gp and root is problem.objective
        holds = partial(_holds, "is_dgp" if gp else "is_dcp", dpp, is_relaxed)
        if holds(root):
            continue
        offender = _smallest(root.args, holds)
        if offender is None and dpp:
            is_affine = partial(_holds, "is_log_log_affine" if gp else "is_affine", dpp, is_relaxed)
            offender = next(_curved_parameters(root, is_affine), None)
        return place, root if offender is None else offender
    bounded = [v for v in problem.variables() if not v.is_dpp("dgp" if gp else "dcp")]
    return "in the bounds of a variable", bounded[0]


def _holds(rule: str, dpp: bool, is_relaxed: bool, node: Node) -> bool:
    """Whether `node` follows the rule, with its parameters taken as affine if `dpp`, else as constants.

    With `is_relaxed`, quad_form may have a parameter as its matrix, as CVXPY allows in the objective of a
    solver with a native quadratic term.
    """
    with ExitStack() as scopes:
        if dpp:
            scopes.enter_context(dpp_scope())
        if is_relaxed:
            scopes.enter_context(quad_form_dpp_scope())
        return getattr(node, rule)()


def _smallest(expressions: Iterable[Node], holds: Callable[[Node], bool]) -> Node | None:
    """The first expression that does not hold and whose arguments all do, or None."""
    for expression in expressions:
        if not holds(expression):
            inner = _smallest(_arguments(expression), holds)
            return expression if inner is None else inner
    return None


def _arguments(node: Node) -> list[Node]:
    """The arguments of a node; of a problem (as partial_optimize has it), its objective and constraints."""
    return [node.objective, *node.constraints] if isinstance(node, cp.Problem) else node.args


def _curved_parameters(root: Node, is_affine: Callable[[Node], bool]) -> Iterator:
    """The largest sub-expressions of parameters alone that are not affine in them.

    They are what is wrong where every sub-expression has a curvature, but not the one that its place
    needs, as in x <= exp(p).
    """
    for expression in _arguments(root):
        if not expression.variables() and expression.parameters() and not is_affine(expression):
            yield expression
        else:
            yield from _curved_parameters(expression, is_affine)


def _curvature_remedy(offender: Node) -> str:
    """How to rewrite an expression that is not DCP, or not DGP."""
    if isinstance(offender, QuadForm) and offender.args[1].parameters():
        return "Declare the parameter positive or negative semidefinite: cvxpy.Parameter((n, n), PSD=True)."
    return (
        "Rewrite it with atoms of known curvature; a parameter or variable may need a declared sign, such as "
        "nonneg=True, or pos=True in a geometric program."
    )


def _remedy(offender: Node) -> str:
    """How to rewrite an expression that is not DPP."""
    if isinstance(offender, QuadForm):
        return _QUAD_FORM_REMEDY
    if not offender.variables():
        return "Make its value one new cvxpy.Parameter, and compute it outside of the problem."
    if isinstance(offender, Power):
        return (
            "An exponent can be a parameter only in a geometric program (gp=True), and only on a base "
            "without parameters: make it a constant."
        )
    if isinstance(offender, DivExpression):
        return "Multiply by a new cvxpy.Parameter that stands for the reciprocal of the denominator."
    if isinstance(offender, MulExpression):
        return (
            "A factor with parameters must be affine in them, and the other factor free of parameters: make "
            "a product of parameters one new cvxpy.Parameter, or introduce a variable y, the constraint "
            "y == factor, and use y in place of that factor."
        )
    return (
        "Introduce a variable y, the constraint y == argument for an argument with parameters, and use y; or "
        "make a function of parameters one new cvxpy.Parameter. See "
        "https://www.cvxpy.org/tutorial/dpp/index.html."
    )


def _check_baked_in(problem: cp.Problem, gp: bool) -> None:
    """Refuses parameters whose current value CVXPY would freeze into the data without a word."""
    for constraint in problem.constraints:
        if isinstance(constraint, (PowCone3D, PowConeND)) and constraint.alpha.parameters():
            raise ValueError(
                f"The exponent of the power cone {text(constraint)} has a parameter: make it a constant."
            )
    if gp:
        return
    # CVXPY's own DPP check lets quad_form pass anywhere in the objective, yet only the affine head of the
    # objective becomes P; everywhere else quad_form is factored with the value that its matrix has now.
    for form in _conic_quad_forms(problem.objective, is_head=True):
        raise ValueError(
            f"In the objective, {text(form)} is not a plain term of the sum. {_QUAD_FORM_REMEDY}"
        )


def _conic_quad_forms(node: Node, is_head: bool) -> Iterator[QuadForm]:
    """The quad_forms with a parameter as matrix that will not become a part of P."""
    if isinstance(node, QuadForm) and node.args[1].parameters() and not is_head:
        yield node
    is_head = is_head and not isinstance(node, PartialProblem) and type(node) not in CANON_METHODS
    for arg in _arguments(node):
        yield from _conic_quad_forms(arg, is_head)


def _check_parameters(problem: cp.Problem, parameters: Sequence[cp.Parameter]) -> None:
    """Refuses a list that is not exactly the parameters of the problem."""
    expected = {p.id: p for p in problem.parameters()}
    for i, parameter in enumerate(parameters):
        if parameter.id not in expected:
            raise ValueError(
                f"parameters[{i}] ({text(parameter)}) is not a parameter of the problem, whose parameters "
                f"are {_names(expected.values())}. Leave it out of the list."
            )
    given = {p.id for p in parameters}
    missing = [p for p in expected.values() if p.id not in given]
    if missing:
        raise ValueError(
            f"The problem has parameters that `parameters` does not list: {_names(missing)}. Add them, or "
            "make them constants."
        )


def _check_variables(problem: cp.Problem, variables: Sequence[cp.Variable], gp: bool) -> None:
    """Refuses outputs that are neither variables nor dual variables of the problem."""
    primal = {v.id for v in problem.variables()}
    dual = {v.id for c in problem.constraints for v in c.dual_variables}
    for i, variable in enumerate(variables):
        if variable.id in primal or (variable.id in dual and not gp):
            continue
        if variable.id in dual:
            raise ValueError(
                f"variables[{i}] ({variable}) is a dual variable: those of a geometric program (gp=True) are "
                "the duals of its logarithmic form, and are not available."
            )
        raise ValueError(
            f"variables[{i}] ({variable}) is not in the problem: expected one of its variables, "
            f"{_names(problem.variables())}, or a dual variable of one of its constraints "
            "(constraint.dual_variables[i])."
        )


def _type_name(entry: object) -> str:
    return f"{type(entry).__module__}.{type(entry).__qualname__}"


def _names(leaves: Iterable) -> str:
    return ", ".join(str(leaf) for leaf in leaves) or "none"


def text(node: Node, limit: int = 200) -> str:
    """Returns `node` as CVXPY writes it, cut to a length that a message can hold."""
    written = " ".join(str(node).split())
    return written if len(written) <= limit else written[: limit - 3] + "..."
