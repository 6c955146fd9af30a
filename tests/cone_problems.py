"""Small, well-posed CVXPY problems over every cone: one solution, generically strictly complementary.

Each function returns a `ConeFamily`. The samplers keep clear of points where the solution has a kink, so that
differences over a step of 1e-5 tell the derivative.
"""

from dataclasses import dataclass

import cvxpy as cp
import numpy as np

from problems import Family


@dataclass(frozen=True)
class ConeFamily(Family):
    """A `Family` that may be a geometric program, and whose values may be complex."""

    gp: bool = False

    def batch(self, rng, size):
        samples = [self.sample(rng) for _ in range(size)]
        return [np.stack([np.asarray(value) for value in column]) for column in zip(*samples, strict=True)]


def _symmetric(rng, n):
    root = rng.standard_normal((n, n))
    return (root + root.T) / 2


def _definite(rng, n):
    root = rng.standard_normal((n, n))
    return root @ root.T / n + 0.5 * np.eye(n)


def _complex(rng, *shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


# Second-order cones.


def norm_fit():
    """A norm, not its square, with l1 regularisation."""
    F, g, weight = cp.Parameter((6, 3), name="F"), cp.Parameter(6, name="g"), cp.Parameter(pos=True, name="w")
    x = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.norm(F @ x - g) + weight * cp.norm1(x)))

    def sample(rng):
        return rng.standard_normal((6, 3)), 2 * rng.standard_normal(6), rng.uniform(0.3, 0.5)

    return ConeFamily(problem, [F, g, weight], [x], sample)


def norm_ball():
    """A linear objective over an ellipsoid; the multiplier is an output."""
    c, F, g = cp.Parameter(3, name="c"), cp.Parameter((4, 3), name="F"), cp.Parameter(4, name="g")
    r = cp.Parameter(pos=True, name="r")
    x = cp.Variable(3)
    ball = cp.norm(F @ x - g) <= r
    problem = cp.Problem(cp.Minimize(c @ x), [ball])

    def sample(rng):
        F = np.eye(4, 3) + 0.3 * rng.standard_normal((4, 3))
        g = F @ rng.standard_normal(3) + 0.1 * rng.standard_normal(4)
        return rng.standard_normal(3), F, g, rng.uniform(1, 2)

    return ConeFamily(problem, [c, F, g, r], [x, ball.dual_variables[0]], sample)


def group_lasso():
    """Some groups of variables are zero: those cones are at their apex."""
    F, g, weight = cp.Parameter((8, 6), name="F"), cp.Parameter(8, name="g"), cp.Parameter(pos=True, name="w")
    x = cp.Variable(6)
    norms = sum(cp.norm(x[i : i + 2]) for i in (0, 2, 4))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g) / 2 + weight * norms))

    def sample(rng):
        F = rng.standard_normal((8, 6))
        x = np.array([1.0, -1.0, 0.0, 0.0, 0.5, 1.0])
        return F, F @ x + 0.2 * rng.standard_normal(8), rng.uniform(1, 1.5)

    return ConeFamily(problem, [F, g, weight], [x], sample)


def robust_lp():
    """|Q_i x| + a_i'x <= b_i: linear constraints that hold for ellipsoids of coefficients."""
    c, Q = cp.Parameter(2, name="c"), cp.Parameter((6, 2), name="Q")
    A, b = cp.Parameter((3, 2), name="A"), cp.Parameter(3, name="b")
    x = cp.Variable(2)
    constraints = [cp.norm(Q[2 * i : 2 * i + 2] @ x) + A[i] @ x <= b[i] for i in range(3)]
    problem = cp.Problem(cp.Minimize(c @ x), constraints)

    def sample(rng):
        angle = np.array([0.0, 2.0, 4.0]) + rng.uniform(-0.3, 0.3, 3)
        A = np.stack([np.cos(angle), np.sin(angle)], 1)
        Q = 0.4 * rng.standard_normal((6, 2))
        return rng.standard_normal(2), Q, A, rng.uniform(0.5, 1.5, 3)

    outputs = [x, *(constraint.dual_variables[0] for constraint in constraints)]
    return ConeFamily(problem, [c, Q, A, b], outputs, sample)


def chance_constraint():
    """The portfolio nearest to a given one that loses more than `floor` with a probability of 5 percent."""
    n, quantile = 4, 1.645
    prior, mean = cp.Parameter(n, name="prior"), cp.Parameter(n, name="mean")
    root, floor = cp.Parameter((n, n), name="root"), cp.Parameter(name="floor")
    w = cp.Variable(n)
    chance = mean @ w - quantile * cp.norm(root @ w) >= floor
    problem = cp.Problem(cp.Minimize(cp.sum_squares(w - prior)), [chance, cp.sum(w) == 1, w >= 0])

    def sample(rng):
        mean, root = rng.standard_normal(n), 0.3 * rng.standard_normal((n, n))
        value = lambda w: mean @ w - quantile * np.linalg.norm(root @ w)
        a, b = sorted((rng.dirichlet(np.ones(n)) for _ in range(2)), key=value)
        return a, mean, root, (value(a) + value(b)) / 2

    return ConeFamily(problem, [prior, mean, root, floor], [w, chance.dual_variables[0]], sample)


def second_order_cones():
    """Two cones in one constraint, with their multipliers."""
    T, c = cp.Parameter((3, 2), name="T"), cp.Parameter(2, name="c")
    X, t = cp.Variable((3, 2)), cp.Variable(2)
    cone = cp.SOC(t, X)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - T) + c @ t), [cone])

    def sample(rng):
        return rng.standard_normal((3, 2)), rng.uniform(0.5, 1.0, 2)

    return ConeFamily(problem, [T, c], [X, t, *cone.dual_variables], sample)


# Semidefinite cones.


def sdp():
    """Generic cost, two equalities; the solution has deficient rank. All multipliers are outputs."""
    C, A, b = (
        cp.Parameter((3, 3), symmetric=True, name="C"),
        cp.Parameter((3, 3), symmetric=True, name="A"),
        cp.Parameter(2, name="b"),
    )
    X = cp.Variable((3, 3), symmetric=True)
    psd, first, second = X >> 0, cp.trace(A @ X) == b[0], cp.trace(X) == b[1]
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X) + cp.sum_squares(X) / 2), [psd, first, second])

    def sample(rng):
        A, X = _symmetric(rng, 3), _definite(rng, 3)
        return 3 * _symmetric(rng, 3), A, np.array([np.trace(A @ X), np.trace(X)])

    outputs = [X, psd.dual_variables[0], first.dual_variables[0], second.dual_variables[0]]
    return ConeFamily(problem, [C, A, b], outputs, sample)


def lambda_max():
    A, B, C = (cp.Parameter((3, 3), symmetric=True, name=name) for name in "ABC")
    x = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.lambda_max(A + x[0] * B + x[1] * C) + cp.sum_squares(x) / 2))
    return ConeFamily(problem, [A, B, C], [x], lambda rng: [_symmetric(rng, 3) for _ in range(3)])


def nuclear_norm():
    """Soft thresholding of singular values, one of which becomes zero."""
    Y, weight = cp.Parameter((2, 3), name="Y"), cp.Parameter(pos=True, name="w")
    X = cp.Variable((2, 3))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - Y) / 2 + weight * cp.normNuc(X)))

    def sample(rng):
        u, v = np.linalg.qr(rng.standard_normal((2, 2)))[0], np.linalg.qr(rng.standard_normal((3, 2)))[0]
        return u @ np.diag([rng.uniform(2, 3), rng.uniform(0.2, 0.5)]) @ v.T, rng.uniform(0.8, 1.2)

    return ConeFamily(problem, [Y, weight], [X], sample)


def matrix_frac():
    p, T = cp.Parameter(3, name="p"), cp.Parameter((3, 3), symmetric=True, name="T")
    S = cp.Variable((3, 3), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.matrix_frac(p, S) + cp.sum_squares(S - T) / 2))
    return ConeFamily(problem, [p, T], [S], lambda rng: [rng.standard_normal(3), _symmetric(rng, 3)])


def log_det():
    """Sparse inverse covariance: semidefinite and exponential cones."""
    C, weight = cp.Parameter((3, 3), symmetric=True, name="C"), cp.Parameter(pos=True, name="w")
    X = cp.Variable((3, 3), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X) - cp.log_det(X) + weight * cp.sum(cp.abs(X))))
    return ConeFamily(problem, [C, weight], [X], lambda rng: [_definite(rng, 3), rng.uniform(0.1, 0.3)])


# Exponential cones.


def entropy():
    """Of largest entropy; the multipliers of equality and inequalities are outputs."""
    F, t = cp.Parameter((2, 4), name="F"), cp.Parameter(2, name="t")
    p = cp.Variable(4)
    total, below = cp.sum(p) == 1, F @ p <= t
    problem = cp.Problem(cp.Maximize(cp.sum(cp.entr(p))), [total, below])

    def sample(rng):
        F, p = rng.standard_normal((2, 4)), rng.dirichlet(3 * np.ones(4))
        return F, F @ p + rng.uniform(-0.02, 0.1, 2)

    return ConeFamily(problem, [F, t], [p, total.dual_variables[0], below.dual_variables[0]], sample)


def kl_divergence():
    q, A, b = cp.Parameter(4, pos=True, name="q"), cp.Parameter((2, 4), name="A"), cp.Parameter(2, name="b")
    x = cp.Variable(4)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.kl_div(x, q))), [A @ x == b])

    def sample(rng):
        A = rng.standard_normal((2, 4))
        return rng.uniform(0.5, 1.5, 4), A, A @ rng.uniform(0.5, 1.5, 4)

    return ConeFamily(problem, [q, A, b], [x], sample)


def logistic_regression():
    data, weight = cp.Parameter((6, 2), name="data"), cp.Parameter(pos=True, name="w")
    x = cp.Variable(2)
    loss = cp.sum(cp.logistic(-data @ x)) + weight * cp.sum_squares(x)

    def sample(rng):
        return rng.standard_normal((6, 2)) + 0.5, rng.uniform(0.1, 0.5)

    return ConeFamily(cp.Problem(cp.Minimize(loss)), [data, weight], [x], sample)


def log_sum_exp():
    F, g = cp.Parameter((5, 3), name="F"), cp.Parameter(5, name="g")
    x = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.log_sum_exp(F @ x + g) + cp.sum_squares(x) / 2))
    return ConeFamily(problem, [F, g], [x], lambda rng: [rng.standard_normal((5, 3)), rng.standard_normal(5)])


def exponential_cones():
    """The constraint itself, with its multipliers."""
    c, T = cp.Parameter(2, name="c"), cp.Parameter((2, 2), name="T")
    x, y, z = cp.Variable(2), cp.Variable(2), cp.Variable(2)
    cone = cp.ExpCone(x, y, z)
    squares = cp.sum_squares(x - T[0]) / 2 + cp.sum_squares(y - T[1]) / 2
    problem = cp.Problem(cp.Minimize(c @ z + squares), [cone])

    def sample(rng):
        return rng.uniform(0.2, 1, 2), np.stack([rng.standard_normal(2), rng.uniform(0.5, 1.5, 2)])

    return ConeFamily(problem, [c, T], [x, y, z, *cone.dual_variables], sample)


# Power cones.


def cubes():
    t, F = cp.Parameter(3, name="t"), cp.Parameter((2, 3), name="F")
    x = cp.Variable(3)
    objective = cp.sum(cp.power(x, 3, approx=False)) - t @ x
    problem = cp.Problem(cp.Minimize(objective), [F @ x <= 1])
    return ConeFamily(problem, [t, F], [x], lambda rng: [rng.uniform(1, 3, 3), rng.uniform(0.2, 1.5, (2, 3))])


def _pnorm(p):
    F, g = cp.Parameter((5, 3), name="F"), cp.Parameter(5, name="g")
    x = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.pnorm(F @ x - g, p, approx=False) + cp.sum_squares(x) / 2))

    def sample(rng):
        return rng.standard_normal((5, 3)), 2 * rng.standard_normal(5)

    return ConeFamily(problem, [F, g], [x], sample)


def pnorm_one_and_a_half():
    return _pnorm(1.5)


def pnorm_three():
    return _pnorm(3)


def geometric_mean():
    t, a = cp.Parameter(3, name="t"), cp.Parameter(3, pos=True, name="a")
    x = cp.Variable(3)
    objective = cp.geo_mean(x, approx=False) - cp.sum_squares(x - t) / 4
    problem = cp.Problem(cp.Maximize(objective), [a @ x <= 1])
    return ConeFamily(problem, [t, a], [x], lambda rng: [rng.standard_normal(3), rng.uniform(0.2, 1, 3)])


def power_cones():
    """Three-dimensional cones, with their multipliers."""
    T, c = cp.Parameter((2, 2), name="T"), cp.Parameter(2, name="c")
    x, y, z = cp.Variable(2), cp.Variable(2), cp.Variable(2)
    cone = cp.PowCone3D(x, y, z, np.array([0.3, 0.6]))
    squares = cp.sum_squares(x - T[0]) / 2 + cp.sum_squares(y - T[1]) / 2
    problem = cp.Problem(cp.Minimize(squares - c @ z), [cone])

    def sample(rng):
        return rng.uniform(0.2, 1.5, (2, 2)), rng.choice([-1.0, 1.0], 2) * rng.uniform(0.5, 1, 2)

    return ConeFamily(problem, [T, c], [x, y, z, *cone.dual_variables], sample)


def generalised_power_cones():
    T, c = cp.Parameter((3, 2), name="T"), cp.Parameter(2, name="c")
    W, z = cp.Variable((3, 2)), cp.Variable(2)
    cone = cp.PowConeND(W, z, np.array([[0.2, 0.5], [0.3, 0.1], [0.5, 0.4]]))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(W - T) / 2 - c @ z), [cone])

    def sample(rng):
        return rng.uniform(0.2, 1.5, (3, 2)), rng.choice([-1.0, 1.0], 2) * rng.uniform(0.5, 1, 2)

    return ConeFamily(problem, [T, c], [W, z, *cone.dual_variables], sample)


# Geometric programs, complex numbers, several cones at once.


def geometric():
    x, y = cp.Variable(2, pos=True), cp.Variable(pos=True)
    a, b = cp.Parameter(2, pos=True, name="a"), cp.Parameter(pos=True, name="b")
    objective = a @ x + b / y + x[0] / x[1]
    problem = cp.Problem(cp.Minimize(objective), [x[0] * x[1] * y >= b, y <= 3, x[0] <= 2])
    return ConeFamily(problem, [a, b], [x, y], lambda rng: [rng.uniform(1, 2, 2), rng.uniform(1, 2)], gp=True)


def geometric_exponent():
    """A parameter is an exponent."""
    x, y = cp.Variable(3, pos=True), cp.Variable(pos=True)
    a, b = cp.Parameter(3, pos=True, name="a"), cp.Parameter(pos=True, name="b")
    power = cp.Parameter(name="power")
    objective = cp.sum(cp.multiply(a, x)) + b / y
    problem = cp.Problem(cp.Minimize(objective), [cp.prod(x) * y**power >= b, y <= 3, x[0] == x[1] ** 2])

    def sample(rng):
        return rng.uniform(1, 2, 3), rng.uniform(1, 2), rng.uniform(0.4, 0.8)

    return ConeFamily(problem, [a, b, power], [x, y], sample, gp=True)


def complex_fit():
    """A norm of complex residuals, moduli bounded."""
    F, g = cp.Parameter((3, 2), complex=True, name="F"), cp.Parameter(3, complex=True, name="g")
    r = cp.Parameter(pos=True, name="r")
    z = cp.Variable(2, complex=True)
    problem = cp.Problem(cp.Minimize(cp.norm(F @ z - g) + cp.sum_squares(z) / 4), [cp.abs(z) <= r])

    def sample(rng):
        return _complex(rng, 3, 2), _complex(rng, 3), rng.uniform(0.3, 0.5)

    return ConeFamily(problem, [F, g, r], [z], sample)


def hermitian():
    H, total = cp.Parameter((2, 2), hermitian=True, name="H"), cp.Parameter(pos=True, name="total")
    X = cp.Variable((2, 2), hermitian=True)
    objective = cp.real(cp.trace(H @ X)) + (cp.sum_squares(cp.real(X)) + cp.sum_squares(cp.imag(X))) / 4
    problem = cp.Problem(cp.Minimize(objective), [X >> 0, cp.real(cp.trace(X)) == total])

    def sample(rng):
        root = _complex(rng, 2, 2)
        return 2 * (root + root.conj().T), rng.uniform(0.5, 1)

    return ConeFamily(problem, [H, total], [X], sample)


def mixture():
    """Linear, second-order, semidefinite and exponential constraints on one variable."""
    C, t, r = (
        cp.Parameter((2, 2), symmetric=True, name="C"),
        cp.Parameter(3, name="t"),
        cp.Parameter(pos=True, name="r"),
    )
    x, X = cp.Variable(3), cp.Variable((2, 2), symmetric=True)
    ball, total = cp.norm(x - t) <= r, cp.sum(x) + cp.trace(X) == 2
    objective = cp.log_sum_exp(x) + cp.trace(C @ X) + cp.sum_squares(X) / 2
    problem = cp.Problem(cp.Minimize(objective), [ball, X >> 0, total, X[0, 0] <= 1.5 + x[0]])

    def sample(rng):
        return 2 * _symmetric(rng, 2), rng.standard_normal(3) / 2, rng.uniform(0.4, 0.8)

    outputs = [x, X, ball.dual_variables[0], total.dual_variables[0]]
    return ConeFamily(problem, [C, t, r], outputs, sample)


CONE_FAMILIES = {
    family.__name__: family
    for family in (
        *(norm_fit, norm_ball, group_lasso, robust_lp, chance_constraint, second_order_cones),
        *(sdp, lambda_max, nuclear_norm, matrix_frac, log_det),
        *(entropy, kl_divergence, logistic_regression, log_sum_exp, exponential_cones),
        *(cubes, pnorm_one_and_a_half, pnorm_three, geometric_mean, power_cones, generalised_power_cones),
        *(geometric, geometric_exponent, complex_fit, hermitian, mixture),
    )
}
