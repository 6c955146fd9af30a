"""Every problem that cannot become a layer is refused with what is wrong, what was expected, and a remedy."""

import cvxpy as cp
import numpy as np
import pytest
from cvxpy.constraints import FiniteSet
from cvxpy.reductions.dcp2cone.cone_matrix_stuffing import ConeDims
from cvxpy.transforms.partial_optimize import partial_optimize

from optlayers.canon import reduction
from optlayers.canon.cvxpy import canonicalize

x = cp.Variable(3, name="x")
y = cp.Variable(3, pos=True, name="y")
p, q = cp.Parameter(3, name="p"), cp.Parameter(3, name="q")
s = cp.Parameter(pos=True, name="s")
P = cp.Parameter((3, 3), PSD=True, name="P")


def minimize(objective, *constraints):
    return cp.Problem(cp.Minimize(objective), list(constraints))


def refusal(problem, parameters=None, variables=(), **options):
    """The message with which `canonicalize` refuses."""
    if parameters is None:
        parameters = problem.parameters()
    with pytest.raises(ValueError) as caught:
        canonicalize(problem, parameters, list(variables), **options)
    return str(caught.value)


def assert_says(message, *parts):
    for part in parts:
        assert part in message, message


def test_problem_of_another_type():
    assert_says(refusal(cp.Minimize(cp.norm(x)), []), "`problem` must be a cvxpy.Problem, got Minimize")


def test_list_of_another_type():
    assert_says(
        refusal(minimize(p @ x), p), "`parameters` must be a list of cvxpy.Parameter, got", "Parameter"
    )


def test_entry_of_another_type():
    problem = minimize(cp.norm(p - x))
    message = refusal(problem, [p, np.ones(2)])
    assert_says(message, "parameters[1] must be a cvxpy.Parameter, got numpy.ndarray: [1. 1.]")
    message = refusal(problem, [p], [x, -x])
    assert_says(message, "variables[1] must be a cvxpy.Variable, got cvxpy.", "NegExpression: -x")


def test_duplicates():
    problem = minimize(cp.norm(p - x))
    assert_says(refusal(problem, [p, p]), "parameters[1] (p) is a duplicate of parameters[0]")
    assert_says(refusal(problem, [p], [x, x]), "variables[1] (x) is a duplicate of variables[0]")


def test_no_variables():
    assert_says(refusal(minimize(cp.norm(p))), "has no variables")


@pytest.mark.parametrize("attribute", ["boolean", "integer"])
def test_discrete_variable(attribute):
    k = cp.Variable(name="k", **{attribute: True})
    assert_says(refusal(minimize(k * s)), "Variable k is boolean or integer", "relaxation")


def test_finite_set():
    assert_says(refusal(minimize(p @ x, FiniteSet(x, [1, 2, 3]))), "FiniteSet", "discrete")


def test_parameter_not_in_the_problem():
    message = refusal(minimize(cp.norm(p - x)), [p, q])
    assert_says(message, "parameters[1] (q) is not a parameter of the problem", "are p.")


def test_parameter_not_listed():
    message = refusal(minimize(cp.norm(p - x), x <= q), [q])
    assert_says(message, "parameters that `parameters` does not list: p.", "Add them")


def test_variable_not_in_the_problem():
    message = refusal(minimize(cp.norm(p - x)), [p], [x, y])
    assert_says(
        message, "variables[1] (y) is not in the problem", "one of its variables, x,", "dual_variables"
    )


def test_dual_variable_of_another_problem():
    other = x >= 0
    assert_says(refusal(minimize(cp.norm(p - x)), [p], other.dual_variables), "is not in the problem")


def test_dual_variable_of_a_geometric_program():
    constraint = y >= s
    message = refusal(minimize(cp.sum(y), constraint), [s], constraint.dual_variables, gp=True)
    assert_says(message, "is a dual variable", "geometric program")


def test_dual_variable_that_cvxpy_does_not_recover():
    z = cp.Variable(2, complex=True)
    constraint = cp.SOC(s, z)
    message = refusal(minimize(cp.real(z[0]), constraint), [s], constraint.dual_variables[1:])
    assert_says(message, "dual variable", "SOC constraint SOC(", "complex second-order cones", "Leave it out")


def test_not_dcp():
    message = refusal(minimize(cp.norm(x), cp.norm(cp.sqrt(x) + p) <= 1))
    assert_says(message, "not DCP", "in constraint 0, ", "+ p, 2) does not follow the rules")


def test_not_dgp():
    assert_says(refusal(minimize(cp.sum(y) - s * y[0]), gp=True), "not DGP", "in the objective")


def test_quad_form_with_an_undeclared_matrix():
    message = refusal(minimize(cp.quad_form(x, cp.Parameter((3, 3), name="M", symmetric=True))))
    assert_says(message, "not DCP", "QuadForm(x, M)", "PSD=True")


def test_parameter_of_unknown_sign():
    message = refusal(minimize(cp.Parameter(name="c") * cp.norm(x)))
    assert_says(message, "not DCP", "c * PnormApprox(x, 2) does not", "nonneg=True")


def test_geometric_program_without_gp():
    assert_says(refusal(minimize(y[0] * y[1] * y[2])), "not DCP", "pass gp=True")


NOT_DPP = {
    "product of parameters": (minimize(cp.norm(x), cp.multiply(p, q) + x <= 1), "p * q", "one new cvxpy.Par"),
    "product with a variable": (minimize(cp.sum(cp.multiply(p, x + q))), "p * (x + q)", "y == factor"),
    "quotient": (minimize(cp.norm(x), x[0] / s <= 1), "x[0] / s", "the reciprocal"),
    "curved function": (minimize(cp.norm(x), x <= cp.exp(p) + 1), "exp(p)", "outside of the problem"),
    "quad_form in a constraint": (minimize(p @ x, cp.quad_form(x, P) + s <= 1), "QuadForm(x, P)", "L.T @ L"),
    "quad_form of a parameter": (minimize(cp.quad_form(x - p, P)), "QuadForm(x + -p, P)", "L.T @ L"),
    "bounds": (minimize(cp.sum(cp.Variable(3, name="z", bounds=[cp.exp(p), None]))), "z", "bounds"),
    "any other": (minimize(cp.quad_over_lin(x, s)), "quad_over_lin(x, s", "y == argument"),
}


@pytest.mark.parametrize("name", NOT_DPP)
def test_not_dpp(name):
    problem, offender, remedy = NOT_DPP[name]
    assert problem.is_dcp()
    assert_says(refusal(problem), "not DPP", f"the sub-expression {offender}", remedy)


def test_not_dpp_inside_a_partial_problem():
    inner = partial_optimize(minimize(cp.norm(x - y), cp.multiply(p, q) + x <= 1), opt_vars=[x])
    assert_says(refusal(minimize(inner)), "not DPP", "the sub-expression p * q is")


def test_not_dpp_as_a_geometric_program():
    message = refusal(minimize(y[0], (s * y[1]) ** s >= 1), gp=True)
    assert_says(message, "is DGP, but not DPP", "in constraint 0", "(s * y[1], None) is", "base without")


def test_only_the_offending_part_of_a_long_expression_is_named():
    long = cp.sum(cp.multiply(p, cp.multiply(q, x))) + cp.norm(x - p) + cp.exp(x[0])
    message = refusal(minimize(cp.norm(x), x >= 0, long <= s))
    assert_says(message, "in constraint 1", "sub-expression p * q * x is")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_constant_that_is_not_finite(value):
    assert_says(refusal(minimize(cp.Constant([1, 1, value]) @ x)), "constant in the objective is infinite or")
    assert_says(refusal(minimize(cp.norm(x), value * x <= 1)), "constant in the constraints is infinite or")


def test_infinite_bound_is_no_mistake():
    program = canonicalize(minimize(cp.norm(x), x <= np.array([1, np.inf, 2])), [], [x])
    assert np.isposinf(program.b.constant).sum() == 1


def test_parameter_in_the_exponent_of_a_power_cone():
    s.value = 0.5
    try:
        message = refusal(minimize(x[0], cp.PowCone3D(x[0], x[1], x[2], s), s * x[1] <= 1))
    finally:
        s.value = None
    assert_says(message, "exponent of the power cone", "make it a constant")


INNER = partial_optimize(minimize(cp.quad_form(x, P), x >= y), opt_vars=[x])


@pytest.mark.parametrize(
    "objective",
    [cp.maximum(cp.quad_form(x, P), 1), cp.exp(cp.quad_form(x, P)) + cp.quad_form(x, P), INNER],
)
def test_quad_form_that_would_be_frozen(objective):
    """CVXPY counts these as DPP, and then takes a factor of the value that P has at set-up."""
    problem = minimize(objective)
    assert problem.is_dpp(quad_form_dpp="qp")
    assert_says(refusal(problem), "QuadForm(", ", P) is not a plain term of the sum", "L.T @ L")


def test_unknown_constraint_in_the_cone_program(monkeypatch):
    known = [c for c in reduction._Formatter.SUPPORTED_CONSTRAINTS if c.__name__ != "ExpCone"]
    monkeypatch.setattr(reduction._Formatter, "SUPPORTED_CONSTRAINTS", known)
    assert_says(refusal(minimize(cp.sum(cp.exp(x)))), "cones that OptLayers does not have: ExpCone")


def test_unknown_attribute_of_the_cone_program(monkeypatch):
    """As when CVXPY 1.9.3 moved cone constraints to a new place."""
    apply = reduction._Stuffing.apply

    def apply_and_add(self, problem):
        program, inverse_data = apply(self, problem)
        program.dir_cones = [("nonneg", [0])]
        program.lower_bounds = np.zeros(3)
        return program, inverse_data

    monkeypatch.setattr(reduction._Stuffing, "apply", apply_and_add)
    assert_says(refusal(minimize(cp.norm(x))), "in lower_bounds, dir_cones, which OptLayers does not read")


def test_unknown_key_of_the_data(monkeypatch):
    apply = reduction._Formatter.apply

    def apply_and_add(self, problem):
        data, inverse_data = apply(self, problem)
        return data | {"new_cones": [1]}, inverse_data

    monkeypatch.setattr(reduction._Formatter, "apply", apply_and_add)
    assert_says(refusal(minimize(cp.norm(x))), "a part of this problem in new_cones,")


def test_unknown_cone_sizes(monkeypatch):
    init = ConeDims.__init__

    def init_and_add(self, constr_map):
        init(self, constr_map)
        self.quantum = [4]

    monkeypatch.setattr(ConeDims, "__init__", init_and_add)
    assert_says(refusal(minimize(cp.norm(x))), "a part of this problem in quantum,")


def test_rows_outside_of_the_cones(monkeypatch):
    init = ConeDims.__init__

    def init_and_forget(self, constr_map):
        init(self, constr_map)
        self.soc = []

    monkeypatch.setattr(ConeDims, "__init__", init_and_forget)
    assert_says(refusal(minimize(cp.norm(x))), "gives 4 rows for cones of 0")
