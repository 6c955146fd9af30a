"""`canonicalize` against CVXPY itself: the data of the cone program, and the solution it leads to."""

import subprocess
import sys
from pathlib import Path

import clarabel
import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp

from canon import families
from optlayers.canon.cvxpy import canonicalize

ROOT = Path(__file__).parents[2]

# CVXPY advises against reading `.value` of sparse leaves; the tests have no other way to see it whole.
pytestmark = pytest.mark.filterwarnings("ignore:Reading from a sparse CVXPY expression:RuntimeWarning")


def theta_of(program, case):
    """theta for the values of the case's parameters."""
    values = [np.asarray(v) for v in case.values.values()]
    part = {"real": np.real, "imag": np.imag, "log": np.log}
    blocks = [np.ravel(part[block.part](values[block.parameter])) for block in program.blocks]
    assert [v.size for v in blocks] == [block.stop - block.start for block in program.blocks]
    return np.concatenate([np.zeros(0), *blocks])


def evaluate(affine_map, theta):
    """The vector or matrix that an AffineMap is at theta, dense."""
    entries = affine_map.constant.copy()
    np.add.at(entries, affine_map.rows, affine_map.coefs * theta[affine_map.cols])
    dense = np.zeros(int(np.prod(affine_map.shape)))
    dense[affine_map.positions] = entries
    return dense.reshape(affine_map.shape)


def read(output, x, y):
    """The value of an Output at a solution."""

    def part(indices, coefs):
        source = np.append({"x": x, "y": y}[output.source], 0.0)
        return (coefs * source[indices]).reshape(output.shape)

    value = part(output.indices, output.coefs)
    if output.imag_indices is not None:
        value = value + 1j * part(output.imag_indices, output.imag_coefs)
    return np.exp(value) if output.exp else value


def clarabel_cones(cones):
    blocks = [clarabel.ZeroConeT(cones.zero), clarabel.NonnegativeConeT(cones.nonneg)]
    blocks += [clarabel.SecondOrderConeT(size) for size in cones.soc]
    blocks += [clarabel.PSDTriangleConeT(order) for order in cones.psd]
    blocks += [clarabel.ExponentialConeT()] * cones.exp
    return blocks + [power_cone(weights) for weights in cones.pow]


def power_cone(weights):
    is_3d = len(weights) == 2
    return clarabel.PowerConeT(weights[0]) if is_3d else clarabel.GenPowerConeT(list(weights), 1)


def solve(program, theta):
    """x and y of the program at theta, by Clarabel."""
    P, q, A, b = (evaluate(m, theta) for m in (program.P, program.q, program.A, program.b))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    matrices = sp.csc_array(np.triu(P)), q, sp.csc_array(A), b
    solution = clarabel.DefaultSolver(*matrices, clarabel_cones(program.cones), settings).solve()
    assert str(solution.status) == "Solved"
    return np.array(solution.x), np.array(solution.z)


@pytest.fixture(params=families.FAMILIES, ids=lambda family: family.__name__)
def case(request, rng):
    return request.param(rng)


@pytest.mark.parametrize("backend", ["COO", "SCIPY"])
def test_data_equal_those_of_cvxpy(case, backend):
    program = canonicalize(case.problem, case.parameters, [], gp=case.gp, canon_backend=backend)
    theta = theta_of(program, case)
    case.set_values()
    data, _, _ = case.problem.get_problem_data("CLARABEL", gp=case.gp, canon_backend=case.backend)
    P = data["P"].toarray() if "P" in data else np.zeros((program.n, program.n))
    np.testing.assert_allclose(np.triu(evaluate(program.P, theta)), np.triu((P + P.T) / 2), atol=1e-12)
    np.testing.assert_allclose(evaluate(program.q, theta), data["c"], atol=1e-12)
    np.testing.assert_allclose(evaluate(program.A, theta), data["A"].toarray(), atol=1e-12)
    np.testing.assert_allclose(evaluate(program.b, theta), data["b"], atol=1e-12)


def test_solution_equals_that_of_cvxpy(case):
    outputs = case.outputs
    program = canonicalize(case.problem, case.parameters, outputs, gp=case.gp)
    x, y = solve(program, theta_of(program, case))
    case.set_values()
    case.problem.solve(solver="CLARABEL", gp=case.gp, canon_backend=case.backend)
    for variable, output in zip(outputs, program.outputs, strict=True):
        value = variable.value.toarray() if sp.issparse(variable.value) else variable.value
        assert output.shape == np.shape(value)
        np.testing.assert_allclose(read(output, x, y), value, rtol=1e-6, atol=1e-6)


def test_maps_are_in_normal_form(case):
    program = canonicalize(case.problem, case.parameters, [], gp=case.gp)
    used = np.zeros(theta_of(program, case).size, dtype=bool)
    for m in (program.P, program.q, program.A, program.b):
        assert m.positions.size == m.constant.size and m.rows.size == m.cols.size == m.coefs.size
        assert {a.dtype for a in (m.positions, m.rows, m.cols)} == {np.dtype(np.int64)}
        assert np.all(np.diff(m.positions) > 0)
        assert np.all(np.diff(m.rows * used.size + m.cols) > 0), "sorted, and no term twice"
        assert np.all(m.coefs != 0)
        assert np.all((m.constant != 0) | np.isin(np.arange(m.positions.size), m.rows))
        used[m.cols] = True
    assert all(used[block.start : block.stop].any() for block in program.blocks)
    P = program.P
    row, column = np.divmod(P.positions, program.n)
    np.testing.assert_array_equal(np.sort(column * program.n + row), P.positions)


def arrays(program):
    """Everything in a Program that is a number, in a fixed order."""
    maps = [program.P, program.q, program.A, program.b]
    found = [getattr(m, f) for m in maps for f in ("positions", "constant", "rows", "cols", "coefs")]
    for output in program.outputs:
        found += [output.indices, output.coefs]
    return found


def test_values_are_not_used(case):
    before = canonicalize(case.problem, case.parameters, case.outputs, gp=case.gp)
    case.set_values()
    case.problem.solve(solver="CLARABEL", gp=case.gp, canon_backend=case.backend)
    after = canonicalize(case.problem, case.parameters, case.outputs, gp=case.gp)
    assert (before.cones, before.blocks) == (after.cones, after.blocks)
    for one, other in zip(arrays(before), arrays(after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_problem_is_left_alone(rng):
    case = families.matrix_inequality(rng)
    leaves = case.outputs + case.parameters
    canonicalize(case.problem, case.parameters, case.outputs)
    assert all(leaf.value is None for leaf in leaves)
    case.set_values()
    case.problem.solve(solver="CLARABEL")
    values = [np.copy(leaf.value) for leaf in leaves]
    chain = case.problem._cache.solving_chain
    canonicalize(case.problem, case.parameters, case.outputs)
    assert case.problem._cache.solving_chain is chain
    for leaf, value in zip(leaves, values, strict=True):
        np.testing.assert_array_equal(leaf.value, value)
    case.problem.solve(solver="CLARABEL")
    for leaf, value in zip(leaves, values, strict=True):  # warm-started, so not to the last digit
        np.testing.assert_allclose(leaf.value, value, atol=1e-5)


@pytest.mark.parametrize("attribute", ["symmetric", "PSD", "NSD"])
def test_symmetric_parameter_enters_by_its_mean(attribute, rng):
    x = cp.Variable(3)
    S = cp.Parameter((3, 3), **{attribute: True})
    program = canonicalize(cp.Problem(cp.Minimize(cp.norm(x)), [S @ x == 1]), [S], [x])
    skewed = rng.standard_normal((3, 3))
    A = evaluate(program.A, skewed.ravel())
    np.testing.assert_allclose(np.abs(A[:3, 1:]), np.abs(skewed + skewed.T) / 2)


def test_hermitian_parameter_enters_by_its_mean(rng):
    x = cp.Variable(3)
    H = cp.Parameter((3, 3), hermitian=True)
    constraints = [cp.real(H) @ x == 1, cp.imag(H) @ x == 1]
    program = canonicalize(cp.Problem(cp.Minimize(cp.norm(x)), constraints), [H], [x])
    real, imag = rng.standard_normal((2, 3, 3))
    A = evaluate(program.A, np.concatenate([real.ravel(), imag.ravel()]))
    expected = np.concatenate([(real + real.T) / 2, (imag - imag.T) / 2])
    np.testing.assert_allclose(np.abs(A[:6, 1:4]), np.abs(expected), atol=1e-15)


def test_quad_form_gradient_is_symmetric(rng):
    """Entry (i, j) of P depends on theta_ij and theta_ji alike, and by 2 in all: x'Px is half of it."""
    case = families.quad_form_wrapped(rng)
    P = canonicalize(case.problem, case.parameters, []).P
    jacobian = np.zeros((9, 9))
    jacobian[P.positions[P.rows], P.cols] = P.coefs
    mirror = np.arange(9).reshape(3, 3).T.ravel()
    np.testing.assert_array_equal(jacobian, np.eye(9) + np.eye(9)[mirror])


def test_blocks_follow_the_list_and_leave_out_what_has_no_influence():
    x = cp.Variable(2, pos=True)
    exponent, both, factor, offset = (cp.Parameter(pos=True) for _ in range(4))
    objective = factor * x[0] ** exponent * x[1] ** both * both
    problem = cp.Problem(cp.Minimize(offset * objective), [x >= 1, x[0] * x[1] >= factor])
    program = canonicalize(problem, [offset, exponent, both, factor], [x], gp=True)
    blocks = [(b.parameter, b.part, b.start, b.stop) for b in program.blocks]
    # The objective's constant, log(offset * both), does not move the solution.
    assert blocks == [(1, "real", 0, 1), (2, "real", 1, 2), (3, "log", 2, 3)]


def test_large_parameter_needs_memory_for_its_nonzeros_only():
    """A (1000, 1000) parameter in rows and in a cone, beside a quadratic objective: below 1.5 GB."""
    result = subprocess.run([sys.executable, "-c", LARGE], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kilobytes, nonzeros = (int(word) for word in result.stdout.split())
    assert nonzeros == 2 * 1000**2 + 1
    assert kilobytes < 1.5e6


LARGE = """
import cvxpy as cp
from optlayers.canon.cvxpy import canonicalize
n = 1000
A, b, c, x = cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter(n), cp.Variable(n)
objective = cp.Minimize(cp.sum_squares(x) + c @ x + cp.norm(A @ x - b))
program = canonicalize(cp.Problem(objective, [A @ x <= b]), [A, b, c], [x])
# Not ru_maxrss, in which Linux counts what the process that started this one had.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(status["VmHWM"].split()[0], program.A.positions.size)
"""
