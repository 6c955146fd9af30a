"""Programs that layers are timed on: each (problem, parameters, variable, values with the batch in front)."""

import cvxpy as cp
import numpy as np
import scipy.sparse as sp


def dense_qp(rng, batch, n=100, m=50):
    """n = 100, 50 inequalities and 50 equalities, all data of each problem its own and differentiated."""
    q = cp.Parameter(n)
    A, b, G, h = cp.Parameter((m, n)), cp.Parameter(m), cp.Parameter((m, n)), cp.Parameter(m)
    P, x = cp.Parameter((n, n), PSD=True), cp.Variable(n)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), [A @ x == b, G @ x <= h])
    factor, A_, G_ = (rng.standard_normal((batch, k, n)) for k in (n, m, m))
    x_0 = rng.standard_normal((batch, n, 1))
    P_ = factor @ factor.swapaxes(1, 2) / n + 0.1 * np.eye(n)
    slack = rng.uniform(0, 2, (batch, m))
    values = [P_, rng.standard_normal((batch, n)), A_, (A_ @ x_0)[..., 0], G_, (G_ @ x_0)[..., 0] + slack]
    return problem, [P, q, A, b, G, h], x, values


def simplex(rng, batch, n=10):
    """The nearest point of a simplex with upper bounds, n = 10."""
    p, x = cp.Parameter(n), cp.Variable(n)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0, x <= 0.4, cp.sum(x) == 1])
    return problem, [p], x, [rng.standard_normal((batch, n))]


def predictive_control(rng, batch, horizon=10):
    """12 states and 4 inputs in boxes over a horizon of 10; the start is the parameter."""
    states, inputs = 12, 4
    dynamics = np.eye(states) + 0.05 * rng.standard_normal((states, states))
    gain = 0.3 * rng.standard_normal((states, inputs))
    start, X, U = cp.Parameter(states), cp.Variable((horizon + 1, states)), cp.Variable((horizon, inputs))
    step = dynamics @ X[:-1].T + gain @ U.T == X[1:].T
    boxes = [U <= 0.5, U >= -0.5, X[1:] <= 4, X[1:] >= -4]
    cost = cp.sum_squares(X[1:]) + 0.1 * cp.sum_squares(U)
    problem = cp.Problem(cp.Minimize(cost), [X[0] == start, step, *boxes])
    return problem, [start], U, [0.5 * rng.standard_normal((batch, states))]


def norm_fit(rng, batch, n=50, m=60):
    """min |F x - g| + 0.05 |x|_1 with |x| <= 3, n = 50, m = 60, F and g of each problem its own."""
    F, g, x = cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    objective = cp.Minimize(cp.norm(F @ x - g) + 0.05 * cp.norm1(x))
    values = [rng.standard_normal((batch, m, n)), 3 * rng.standard_normal((batch, m))]
    return cp.Problem(objective, [cp.norm(x) <= 3]), [F, g], x, values


def semidefinite(rng, batch, n=10):
    """min <C, X> with X positive semidefinite of diagonal one, 10 by 10."""
    C, X = cp.Parameter((n, n), symmetric=True), cp.Variable((n, n), PSD=True)
    C_ = rng.standard_normal((batch, n, n))
    return cp.Problem(cp.Minimize(cp.trace(C @ X)), [cp.diag(X) == 1]), [C], X, [C_ + C_.swapaxes(1, 2)]


def entropy(rng, batch, n=30, m=5):
    """min c'x - entropy(x) on a simplex with 5 more inequalities, n = 30."""
    c, A, x = cp.Parameter(n), rng.standard_normal((m, n)), cp.Variable(n)
    constraints = [cp.sum(x) == 1, A @ x <= A.mean(1) + 0.1]
    problem = cp.Problem(cp.Minimize(c @ x - cp.sum(cp.entr(x))), constraints)
    return problem, [c], x, [rng.standard_normal((batch, n))]


def portfolio(rng, batch, n=5000, k=50):
    """The portfolio of 5,000 assets with a covariance of 50 factors, half of the loadings zero."""
    loadings = sp.random_array((n, k), density=0.5, rng=rng, data_sampler=rng.standard_normal)
    variances = rng.uniform(0, k**0.5, n)
    x, y, returns = cp.Variable(n), cp.Variable(k), cp.Parameter(n)
    risk = cp.sum(cp.multiply(variances, cp.square(x))) + cp.sum_squares(y)
    constraints = [y == loadings.T @ x, cp.sum(x) == 1, x >= 0]
    problem = cp.Problem(cp.Minimize(risk / 2 - returns @ x), constraints)
    return problem, [returns], x, [rng.standard_normal((batch, n))]


def lasso(rng, batch, n=50, m=5000):
    """min |A x - b|^2 + weight |x|_1, 50 features, 5,000 samples, 15 % of A not zero; b is the parameter."""
    A = sp.random_array((m, n), density=0.15, rng=rng, data_sampler=rng.standard_normal).tocsr()
    x, residual, b = cp.Variable(n), cp.Variable(m), cp.Parameter(m)
    truth = rng.standard_normal((batch, n)) * (rng.random((batch, n)) < 0.5) / n**0.5
    values = truth @ A.T + rng.standard_normal((batch, m))
    weight = abs(values[0] @ A).max() / 5
    objective = cp.sum_squares(residual) + weight * cp.norm1(x)
    return cp.Problem(cp.Minimize(objective), [residual == A @ x - b]), [b], x, [values]


def regression(rng, batch, n=10, m=100):
    """min |F x - g|^2 + 5 |x|_1 with 100 samples of 10 features, F and g of each problem its own."""
    F, g, x = cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g) + 5 * cp.norm1(x)))
    return problem, [F, g], x, [rng.standard_normal((batch, m, n)), rng.standard_normal((batch, m))]


def logistic(rng, batch, n=5, m=60):
    """The logistic loss of 60 samples of 5 features, of each problem its own, and 6 |x|^2."""
    F, x = cp.Parameter((m, n)), cp.Variable(n)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.logistic(F @ x)) + 6 * cp.sum_squares(x)))
    return problem, [F], x, [rng.standard_normal((batch, m, n))]


WORKLOADS = {
    "W1": (dense_qp, (1, 32, 128)),
    "W2": (simplex, (1, 128, 1024)),
    "W3": (predictive_control, (1, 64, 256)),
    "W4": (norm_fit, (1, 64)),
    "W5": (semidefinite, (32,)),
    "W6": (entropy, (64,)),
    "W7": (portfolio, (1,)),
    "W8": (lasso, (1,)),
    "W9": (regression, (1, 64)),
    "W10": (logistic, (1, 64)),
}


def build(workload, batch):
    """A workload with its values, weights of a loss, and directions in which to differentiate it."""
    function, _ = WORKLOADS[workload]
    rng = np.random.default_rng(0)
    problem, parameters, variable, values = function(rng, batch)
    directions = [rng.standard_normal(value.shape[1:]) for value in values]
    directions = [
        d + d.T if p.ndim == 2 and (p.is_symmetric() or p.is_psd()) else d
        for d, p in zip(directions, parameters, strict=True)
    ]
    return problem, parameters, variable, values, rng.standard_normal(variable.shape), directions
