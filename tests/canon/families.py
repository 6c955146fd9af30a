"""CVXPY problems of every family, each a function of a NumPy generator.

A function returns a `Case`: the problem, and a value for each of its parameters, in the order in which the
parameters are handed to the layer. The parameters themselves have no value yet.
"""

from dataclasses import dataclass, field

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.constraints import NonNeg, Zero
from cvxpy.transforms.partial_optimize import partial_optimize


@dataclass
class Case:
    """A problem and its parameter values; `backend` is the one of CVXPY to compare with.

    That is not a backend that `canonicalize` takes by itself, so that a fault in these shows; but CPP
    cannot do more than two dimensions.
    """

    problem: cp.Problem
    values: dict = field(default_factory=dict)
    gp: bool = False
    backend: str = "CPP"

    @property
    def parameters(self):
        return list(self.values)

    @property
    def outputs(self):
        """All variables and, but for a geometric program, all dual variables."""
        duals = [v for c in self.problem.constraints for v in c.dual_variables]
        return self.problem.variables() + (duals if not self.gp else [])

    def set_values(self):
        for parameter, value in self.values.items():
            if parameter.attributes["sparsity"]:
                entries = value[parameter.sparse_idx]
                parameter.value_sparse = sp.coo_array((entries, parameter.sparse_idx), parameter.shape)
            else:
                parameter.value = value


def definite(rng, n):
    root = rng.standard_normal((n, n))
    return root @ root.T / n + np.eye(n)


def symmetric(rng, n):
    root = rng.standard_normal((n, n))
    return root + root.T


def hermitian(rng, n):
    root = rng.standard_normal((n, n)) + 1j * rng.standard_normal((n, n))
    return root + root.conj().T


def lp(rng):
    x = cp.Variable(4)
    c, G, h = cp.Parameter(4), cp.Parameter((7, 4)), cp.Parameter(7)
    A = rng.standard_normal((2, 4))
    problem = cp.Problem(cp.Minimize(c @ x), [G @ x <= h, A @ x == A @ np.full(4, 0.1), x >= -1, x <= 1])
    return Case(
        problem,
        {c: rng.standard_normal(4), G: rng.standard_normal((7, 4)), h: rng.uniform(1, 2, 7)},
    )


def lp_maximize(rng):
    x = cp.Variable(3, nonneg=True)
    c, a = cp.Parameter(3), cp.Parameter(3, pos=True)
    problem = cp.Problem(cp.Maximize(c @ x + 3), [a @ x <= 1, x[0] == 0.1])
    return Case(problem, {a: rng.uniform(1, 2, 3), c: rng.standard_normal(3)})


def qp(rng):
    x, y = cp.Variable((2, 3)), cp.Variable(2)
    q, A, b, scale = cp.Parameter((2, 3)), cp.Parameter((2, 2)), cp.Parameter(2), cp.Parameter(nonneg=True)
    W = rng.standard_normal((6, 6))
    objective = (
        cp.sum_squares(W @ cp.vec(x, order="F")) + cp.sum(cp.multiply(q, x)) + scale * cp.sum_squares(y)
    )
    problem = cp.Problem(cp.Minimize(objective), [A @ y == b, x[:, 0] - y >= 1, x <= 3])
    values = {
        A: rng.standard_normal((2, 2)),
        q: rng.standard_normal((2, 3)),
        b: rng.standard_normal(2) / 5,
        scale: np.array(0.7),
    }
    return Case(problem, values)


def least_squares(rng):
    x = cp.Variable(3)
    F, g, weight = cp.Parameter((5, 3)), cp.Parameter(5), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g) + weight * cp.norm1(x)))
    return Case(problem, {F: rng.standard_normal((5, 3)), weight: np.array(0.3), g: rng.standard_normal(5)})


def weighted_squares(rng):
    x = cp.Variable(4)
    w, t = cp.Parameter(4, nonneg=True), cp.Parameter(4)
    objective = cp.sum(cp.multiply(w, cp.square(x))) / 2 + cp.square(x[0] - 1) + t @ x
    return Case(
        cp.Problem(cp.Minimize(objective), [cp.sum(x) == 1]),
        {w: rng.uniform(1, 2, 4), t: rng.standard_normal(4)},
    )


def piecewise_linear(rng):
    x = cp.Variable(3)
    a, b = cp.Parameter((4, 3)), cp.Parameter(4)
    terms = [cp.norm_inf(a @ x - b), cp.max(x), cp.norm1(x), cp.pos(x[0]), cp.sum_largest(x, 2)]
    problem = cp.Problem(cp.Minimize(sum(terms)), [cp.abs(x - 1) <= 3, cp.maximum(x, 0.5) <= 2])
    return Case(problem, {b: rng.standard_normal(4), a: rng.standard_normal((4, 3))})


def huber(rng):
    x = cp.Variable(2)
    F, g, M = cp.Parameter((6, 2)), cp.Parameter(6), cp.Parameter(pos=True)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.huber(F @ x - g, M)) + cp.sum_squares(x)), [x >= 0])
    return Case(
        problem,
        {F: rng.standard_normal((6, 2)), g: 3 * rng.standard_normal(6), M: np.array(0.8)},
    )


def quad_form(rng):
    x = cp.Variable(3)
    P, q = cp.Parameter((3, 3), PSD=True), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), [cp.sum(x) == 1, x >= 0])
    return Case(problem, {q: rng.standard_normal(3), P: definite(rng, 3)})


def quad_form_maximize(rng):
    x, y = cp.Variable(3), cp.Variable(2)
    N, P = cp.Parameter((3, 3), NSD=True), cp.Parameter((2, 2), PSD=True)
    objective = cp.quad_form(x, N) - 2 * cp.quad_form(2 * y - 1, 3 * P + np.eye(2)) - cp.norm(x)
    problem = cp.Problem(cp.Maximize(objective), [cp.sum(x) >= 1, y == x[:2]])
    return Case(problem, {N: -definite(rng, 3), P: definite(rng, 2)})


def quad_form_wrapped(rng):
    x = cp.Variable(3)
    P = cp.Parameter((3, 3))
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P, assume_PSD=True) - cp.sum(x)), [x <= 1])
    return Case(problem, {P: definite(rng, 3)})


def bounds(rng):
    low, high = cp.Parameter(3), cp.Parameter()
    x = cp.Variable(3, bounds=[low, high])
    y = cp.Variable((2, 2), bounds=[-1, np.array([[1.0, np.inf], [2.0, 3.0]])])
    c = cp.Parameter((2, 2))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + cp.sum(cp.multiply(c, y)) + y[0, 1] ** 2))
    return Case(problem, {low: rng.uniform(-1, 1, 3), c: rng.standard_normal((2, 2)), high: np.array(2.0)})


def signs(rng):
    u, v = cp.Variable(2, nonneg=True), cp.Variable(2, nonpos=True)
    w, z = cp.Variable(2, pos=True), cp.Variable(neg=True)
    a, b = cp.Parameter(2, nonneg=True), cp.Parameter(2, neg=True)
    objective = cp.sum_squares(u - a) + cp.sum_squares(v - b) + cp.sum_squares(w - b) + (z - 1) ** 2
    problem = cp.Problem(cp.Minimize(objective), [cp.sum(u) + cp.sum(v) + z <= 5])
    return Case(problem, {a: rng.uniform(1, 2, 2), b: -rng.uniform(1, 2, 2)})


def symmetric_leaves(rng):
    X = cp.Variable((3, 3), symmetric=True)
    S, t = cp.Parameter((3, 3), symmetric=True), cp.Parameter((3, 3))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - t) + cp.sum(cp.multiply(S, X))), [S @ X[0] <= 4])
    return Case(problem, {S: symmetric(rng, 3), t: rng.standard_normal((3, 3))})


def diagonal_leaves(rng):
    X = cp.Variable((3, 3), diag=True)
    D, t = cp.Parameter((3, 3), diag=True), cp.Parameter((3, 3))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - t)), [cp.trace(D @ X) <= 0.5, D @ np.ones(3) >= X[0]])
    return Case(problem, {D: np.diag(rng.uniform(1, 2, 3)), t: rng.standard_normal((3, 3))})


def sparse_leaves(rng):
    index = (np.array([0, 2, 1, 1]), np.array([3, 1, 0, 2]))
    X = cp.Variable((3, 4), sparsity=index)
    M, t = cp.Parameter((3, 4), sparsity=index), cp.Parameter((3, 4))
    value = np.zeros((3, 4))
    value[index] = rng.uniform(1, 2, 4)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - t)), [cp.sum(cp.multiply(M, X)) <= 0.5])
    return Case(problem, {M: value, t: rng.standard_normal((3, 4))})


def three_dimensional(rng):
    x = cp.Variable((2, 3, 4))
    t, w = cp.Parameter((2, 3, 4)), cp.Parameter((3, 4))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [x[0] <= w, cp.sum(x, axis=2) >= -9])
    values = {t: rng.standard_normal((2, 3, 4)), w: rng.standard_normal((3, 4))}
    return Case(problem, values, backend="SCIPY")


def scalars(rng):
    x = cp.Variable()
    a, b = cp.Parameter(), cp.Parameter((1,))
    problem = cp.Problem(cp.Minimize((x - a) ** 2), [x + b == 0.3, 2 * x <= 5])
    return Case(problem, {b: rng.standard_normal(1), a: np.array(rng.standard_normal())})


def constants_folded(rng):
    x = cp.Variable(3)
    a, b = cp.Parameter(3), cp.Parameter()
    B = rng.standard_normal((3, 3))
    objective = cp.sum_squares(x) + (2 * a + B @ a - 1) @ x + b * 7 + 4
    problem = cp.Problem(cp.Minimize(objective), [B @ x + (3 * b - 1) / 2 <= cp.sum(a) + 4])
    return Case(problem, {a: rng.standard_normal(3), b: np.array(0.4)})


def without_parameters(rng):
    x = cp.Variable(3)
    return Case(cp.Problem(cp.Minimize(cp.sum_squares(x - rng.standard_normal(3))), [x >= 0]))


def without_constraints(rng):
    x = cp.Variable(3)
    t = cp.Parameter(3)
    return Case(cp.Problem(cp.Minimize(cp.sum_squares(x - t))), {t: rng.standard_normal(3)})


def empty_leaf(rng):
    x, e = cp.Variable(3), cp.Variable((0, 2))
    t = cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t) + cp.sum(e)), [x >= 0, e >= 1])
    return Case(problem, {t: rng.standard_normal(3)})


def cone_constraints(rng):
    x = cp.Variable(3)
    t = cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [NonNeg(x[:2] - 0.3), Zero(x[1] - x[2])])
    return Case(problem, {t: rng.standard_normal(3)})


def second_order(rng):
    x, s = cp.Variable(3), cp.Variable()
    F, g, r = cp.Parameter((4, 3)), cp.Parameter(4), cp.Parameter(pos=True)
    problem = cp.Problem(cp.Minimize(s + cp.sum(x)), [cp.SOC(s, F @ x - g), cp.norm(x, 2) <= r])
    return Case(problem, {F: rng.standard_normal((4, 3)), g: rng.standard_normal(4), r: np.array(2.0)})


def second_order_rows(rng):
    X, Y, t = cp.Variable((3, 2)), cp.Variable((2, 3)), cp.Variable(2)
    C = cp.Parameter((3, 2))
    objective = cp.sum(cp.multiply(C, X)) + cp.sum(cp.multiply(C.T, Y)) + cp.sum_squares(t)
    problem = cp.Problem(cp.Minimize(objective), [cp.SOC(t, X), cp.SOC(1 - t, Y, axis=1), t <= 0.8])
    return Case(problem, {C: rng.standard_normal((3, 2))})


def semidefinite(rng):
    X = cp.Variable((3, 3), PSD=True)
    C, b = cp.Parameter((3, 3), symmetric=True), cp.Parameter()
    A = symmetric(rng, 3)
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), [cp.trace(A @ X) <= b, cp.trace(X) == 2])
    return Case(problem, {b: np.array(1.0), C: symmetric(rng, 3)})


def matrix_inequality(rng):
    x, N = cp.Variable(2), cp.Variable((2, 2), NSD=True)
    A = [cp.Parameter((3, 3), symmetric=True) for _ in range(2)]
    C = cp.Parameter((3, 3), PSD=True)
    constraints = [A[0] * x[0] + A[1] * x[1] << C, N >> -np.eye(2), x[0] >= N[0, 1]]
    objective = cp.sum_squares(x - 3) - cp.trace(N @ np.array([[2.0, 1.0], [1.0, 3.0]]))
    values = {A[1]: symmetric(rng, 3), C: definite(rng, 3), A[0]: symmetric(rng, 3)}
    return Case(cp.Problem(cp.Minimize(objective), constraints), values)


def spectral(rng):
    X = cp.Variable((2, 3))
    C, Q = cp.Parameter((2, 3)), cp.Parameter((2, 2), PSD=True)
    terms = [cp.norm(X - C, "nuc"), cp.sigma_max(X), cp.lambda_max(X[:, :2] + X[:, :2].T)]
    problem = cp.Problem(cp.Minimize(sum(terms) + cp.matrix_frac(X[:, 0], Q)), [X <= 1])
    return Case(problem, {C: rng.standard_normal((2, 3)), Q: definite(rng, 2)})


def exponential(rng):
    x = cp.Variable(3)
    a, b = cp.Parameter(3), cp.Parameter(pos=True)
    objective = cp.sum(cp.exp(x)) + cp.log_sum_exp(x - a) + cp.sum(cp.kl_div(x + 3, 2))
    problem = cp.Problem(cp.Minimize(objective), [cp.sum(cp.log(x + 2)) >= b, cp.sum(x) == 0.5])
    return Case(problem, {a: rng.standard_normal(3), b: np.array(0.2)})


def exponential_cones(rng):
    x, y, z = cp.Variable((2, 2)), cp.Variable((2, 2)), cp.Variable((2, 2))
    a = cp.Parameter((2, 2), pos=True)
    problem = cp.Problem(cp.Minimize(cp.sum(z) - cp.sum(cp.multiply(a, x))), [cp.ExpCone(x, y, z), y == a])
    return Case(problem, {a: rng.uniform(1, 2, (2, 2))})


def entropy_maximize(rng):
    p = cp.Variable(4)
    f, t = cp.Parameter((2, 4)), cp.Parameter(2)
    problem = cp.Problem(cp.Maximize(cp.sum(cp.entr(p))), [cp.sum(p) == 1, f @ p <= t])
    return Case(problem, {f: rng.standard_normal((2, 4)), t: rng.uniform(0, 1, 2)})


def power_cones(rng):
    x, y, z = cp.Variable(2), cp.Variable(2), cp.Variable(2)
    a = cp.Parameter(2, pos=True)
    cone = cp.PowCone3D(x, y, z, np.array([0.3, 0.6]))
    problem = cp.Problem(cp.Maximize(cp.sum(z) - cp.sum_squares(x - 1)), [cone, x + y <= a])
    return Case(problem, {a: rng.uniform(1, 2, 2)})


def generalised_power_cones(rng):
    W, z, V, y = cp.Variable((3, 2)), cp.Variable(2), cp.Variable((1, 3)), cp.Variable(1)
    a = cp.Parameter(2, pos=True)
    alpha = np.array([[0.2, 0.5], [0.3, 0.1], [0.5, 0.4]])
    constraints = [cp.PowConeND(W, z, alpha), cp.sum(W, axis=0) <= a, cp.sum(V) == 2]
    constraints += [cp.PowConeND(V, y, np.array([[0.25, 0.25, 0.5]]), axis=1)]
    return Case(cp.Problem(cp.Maximize(cp.sum(z) + y[0]), constraints), {a: rng.uniform(1, 2, 2)})


def powers(rng):
    x = cp.Variable(3)
    t = cp.Parameter(3)
    options = {"approx": False}
    terms = [
        cp.sum(cp.power(x, 1.7, **options)),
        cp.pnorm(x - t, 3.5, **options),
        -cp.geo_mean(x + 1, **options),
    ]
    return Case(cp.Problem(cp.Minimize(sum(terms)), [x <= 2]), {t: rng.standard_normal(3)})


def geometric(rng):
    x, y = cp.Variable(3, pos=True), cp.Variable(pos=True)
    a, b, e = cp.Parameter(3, pos=True), cp.Parameter(pos=True), cp.Parameter()
    objective = cp.sum(cp.multiply(a, x)) + b / y
    constraints = [cp.prod(x) * y**e >= b, y <= 3, x[0] == x[1] ** 2]
    values = {e: np.array(0.7), b: np.array(1.3), a: rng.uniform(1, 2, 3)}
    return Case(cp.Problem(cp.Minimize(objective), constraints), values, gp=True)


def geometric_shared(rng):
    x, e = cp.Variable((2, 2), pos=True), cp.Parameter(pos=True)
    S = cp.Parameter((2, 2), pos=True, symmetric=True)
    problem = cp.Problem(cp.Maximize(cp.geo_mean(x[0])), [cp.multiply(S, x) ** 2 <= e, x[0, 0] ** e >= 0.1])
    value = rng.uniform(1, 2, (2, 2))
    return Case(problem, {e: np.array(1.2), S: value + value.T}, gp=True)


def complex_least_squares(rng):
    x, u = cp.Variable(2, complex=True), cp.Variable(2, imag=True)
    F, g = cp.Parameter((3, 2), complex=True), cp.Parameter(3, imag=True)
    c = rng.standard_normal(3) + 1j * rng.standard_normal(3)
    objective = cp.sum_squares(F @ x - g - c) + cp.sum_squares(u - x)
    problem = cp.Problem(cp.Minimize(objective), [x[0] + u[1] == 1 + 2j, cp.real(x[1]) >= 0.2])
    values = {
        g: 1j * rng.standard_normal(3),
        F: rng.standard_normal((3, 2)) + 1j * rng.standard_normal((3, 2)),
    }
    return Case(problem, values)


def complex_norm(rng):
    x = cp.Variable(2, complex=True)
    F, r = cp.Parameter((3, 2), complex=True), cp.Parameter(pos=True)
    problem = cp.Problem(cp.Minimize(cp.norm(F @ x - 1) + cp.norm1(x)), [cp.abs(x) <= r])
    values = {r: np.array(0.5), F: rng.standard_normal((3, 2)) + 1j * rng.standard_normal((3, 2))}
    return Case(problem, values)


def hermitian_leaves(rng):
    X = cp.Variable((3, 3), hermitian=True)
    H, c = cp.Parameter((3, 3), hermitian=True), cp.Parameter((2, 2))
    constraints = [X >> 0, cp.real(cp.trace(X)) == 1, cp.real(X[:2, :2]) <= c]
    problem = cp.Problem(cp.Minimize(cp.real(cp.trace(H @ X)) + cp.sum_squares(cp.real(X))), constraints)
    return Case(problem, {c: rng.uniform(1, 2, (2, 2)), H: hermitian(rng, 3)})


def partially_optimised(rng):
    x, z = cp.Variable(3), cp.Variable(3)
    w, t = cp.Parameter(3), cp.Parameter()
    inner = partial_optimize(cp.Problem(cp.Minimize(cp.norm(x - z) + w @ z), [z <= t, z >= -1]), opt_vars=[z])
    problem = cp.Problem(cp.Minimize(inner + cp.norm1(x - 2)), [x >= 1])
    return Case(problem, {w: rng.standard_normal(3) / 3, t: np.array(0.5)})


def perspective(rng):
    x, s = cp.Variable(2), cp.Variable(pos=True)
    r, t = cp.Parameter(pos=True), cp.Parameter(2)
    objective = cp.perspective(cp.sum_squares(x) + cp.norm1(x), s) + r * s
    return Case(cp.Problem(cp.Minimize(objective), [x >= t]), {r: np.array(1.5), t: rng.uniform(1, 2, 2)})


def batched_cones(rng):
    X, Y = cp.Variable((2, 3, 3)), cp.Variable((2, 2, 2), symmetric=True)
    t, w = cp.Parameter((2, 3, 3)), cp.Parameter((2, 2, 2))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - t) + cp.sum_squares(Y - w)), [cp.PSD(X), Y >= 0])
    values = {t: rng.standard_normal((2, 3, 3)), w: rng.standard_normal((2, 2, 2))}
    return Case(problem, values, backend="SCIPY")


def imaginary(rng):
    z, b = cp.Variable(2, imag=True), cp.Parameter(2, imag=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(cp.imag(z))), [cp.sum(z) == b[0], 1j * z >= -2])
    return Case(problem, {b: 1j * rng.uniform(1, 2, 2)})


def feasibility(rng):
    x = cp.Variable(3)
    a, unused = cp.Parameter(3), cp.Parameter()
    return Case(
        cp.Problem(cp.Minimize(unused), [x == 2 * a]), {a: rng.standard_normal(3), unused: np.array(1.0)}
    )


def geometric_bounds(rng):
    low, b = cp.Parameter(2, pos=True), cp.Parameter(pos=True)
    x = cp.Variable(2, pos=True, bounds=[low, 8])
    problem = cp.Problem(cp.Minimize(x[0] * x[1]), [x[0] ** 0.5 * x[1] >= b])
    return Case(problem, {low: rng.uniform(1, 2, 2), b: np.array(5.0)}, gp=True)


def many_parameters(rng):
    x = cp.Variable(30)
    F, q, c = cp.Parameter((40, 30)), cp.Parameter(30), cp.Parameter((30, 30), PSD=True)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, c) + q @ x), [F @ x <= 1, cp.norm(F[:5] @ x) <= 2])
    values = {F: rng.standard_normal((40, 30)), q: rng.standard_normal(30), c: definite(rng, 30)}
    return Case(problem, values)


FAMILIES = [
    *(lp, lp_maximize, qp, least_squares, weighted_squares, piecewise_linear, huber),
    *(quad_form, quad_form_maximize, quad_form_wrapped, bounds, signs),
    *(symmetric_leaves, diagonal_leaves, sparse_leaves, three_dimensional, scalars, constants_folded),
    *(without_parameters, without_constraints, empty_leaf, cone_constraints),
    *(second_order, second_order_rows, semidefinite, matrix_inequality, spectral),
    *(exponential, exponential_cones, entropy_maximize, power_cones, generalised_power_cones, powers),
    *(geometric, geometric_shared, complex_least_squares, complex_norm, hermitian_leaves),
    *(partially_optimised, perspective, batched_cones, imaginary, feasibility, geometric_bounds),
    many_parameters,
]
