"""Hard quadratic programs of the kinds that public test sets hold, seeded and solvable by construction.

Every family is a function (rng, n) to a `QP`

    minimise 1/2 x'Px + q'x   subject to   lo <= A x <= hi

Families with random data are built around a primal-dual point (`around`); the others are feasible and
bounded by their form. Bounds of 1e20 and more mean infinity, as in the files of Maros and Meszaros (1999).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

INFINITY = 1e20


class QP(NamedTuple):
    """P (n, n), q (n,), A (m, n), lo and hi (m,)."""

    P: np.ndarray
    q: np.ndarray
    A: np.ndarray
    lo: np.ndarray
    hi: np.ndarray


def around(rng, P, A, x, equal=0.2, active=0.3, weak=0.0, free=0.05, two_sided=0.3, y_scale=1.0):
    """A QP whose solution is x, with multipliers drawn here.

    Args:
        equal, active, weak, free: fractions of the rows that are equalities, active with a multiplier,
            active without one (degenerate), and without any bound; the others are inactive.
        two_sided: fraction of the remaining rows with both bounds.
        y_scale: size of the multipliers, a number or (m,).
    """
    m = A.shape[0]
    z = A @ x
    kind = rng.choice(5, m, p=[equal, active, weak, free, 1 - equal - active - weak - free])
    sign = rng.choice([-1.0, 1.0], m)
    size = y_scale * rng.uniform(0.1, 1.0, m)
    y = np.where(kind == 0, sign * size, np.where(kind == 1, sign * size, 0.0))
    width = (1 + abs(z)) * 10.0 ** rng.uniform(-2, 1, m)
    near = np.where(np.isin(kind, (0, 1, 2)), 0.0, (1 + abs(z)) * 10.0 ** rng.uniform(-2, 1, m))
    other = np.where(rng.random(m) < two_sided, width, np.inf)
    hi = np.where(sign > 0, z + near, z + other)
    lo = np.where(sign > 0, z - other, z - near)
    lo, hi = np.where(kind == 0, z, lo), np.where(kind == 0, z, hi)
    lo, hi = np.where(kind == 3, -np.inf, lo), np.where(kind == 3, np.inf, hi)
    return QP(P, -(P @ x + A.T @ y), A, lo, hi)


def gram(rng, n, rank, decades=0.0):
    """A positive semidefinite matrix of this rank whose eigenvalues spread over `decades`."""
    factor = rng.standard_normal((n, rank)) * 10.0 ** (rng.uniform(-decades / 2, 0, rank))
    P = factor @ factor.T / max(rank, 1)
    return (P + P.T) / 2


def sparse(rng, m, n, density=0.1):
    """Random rows with at least two entries each, as network and planning models have."""
    A = np.where(rng.random((m, n)) < density, rng.standard_normal((m, n)), 0.0)
    for row in A:
        row[rng.choice(n, min(n, 2), replace=False)] = rng.choice([-1.0, 1.0], min(n, 2))
    return A


def boxed(qp: QP, lower, upper) -> QP:
    """`qp` with rows lower <= x <= upper."""
    n = qp.q.size
    rows = np.broadcast_to(lower, n), np.broadcast_to(upper, n)
    return QP(qp.P, qp.q, np.vstack([qp.A, np.eye(n)]), np.append(qp.lo, rows[0]), np.append(qp.hi, rows[1]))


# Data around a known solution.


def eight_decades(rng, n):
    """Rows, columns and multipliers with scales from 1e-4 to 1e4."""
    m = n
    columns, rows = 10.0 ** rng.uniform(-4, 4, n), 10.0 ** rng.uniform(-4, 4, m)
    P = gram(rng, n, n) * columns * columns[:, None]
    A = rows[:, None] * sparse(rng, m, n, 0.3) * columns
    return around(rng, P, A, rng.standard_normal(n) / columns, y_scale=1 / rows)


def eight_decades_linear(rng, n):
    """The same without a quadratic term: as many active rows as variables."""
    columns, rows = 10.0 ** rng.uniform(-4, 4, n), 10.0 ** rng.uniform(-4, 4, 2 * n)
    A = rows[:, None] * sparse(rng, 2 * n, n, 0.3) * columns
    x = rng.standard_normal(n) / columns
    return around(rng, np.zeros((n, n)), A, x, 0.2, 0.3, y_scale=1 / rows)


def entries_over_decades(rng, n):
    """Every nonzero with its own scale, so that no scaling of rows and columns helps."""
    A = sparse(rng, n, n, 0.1) * 10.0 ** rng.uniform(-4, 4, (n, n))
    P = np.diag(10.0 ** rng.uniform(-4, 4, n))
    return around(rng, P, A, rng.standard_normal(n), y_scale=1 / abs(A).max(1))


def low_rank(rng, n):
    """P of rank n / 10, more variables than active rows: a face of solutions."""
    return around(rng, gram(rng, n, max(n // 10, 1)), sparse(rng, n, n), rng.standard_normal(n))


def low_rank_spread(rng, n):
    """P of rank n / 2 with eigenvalues over six decades."""
    return around(rng, gram(rng, n, n // 2, 6.0), rng.standard_normal((n, n)), rng.standard_normal(n))


def degenerate_vertex(rng, n):
    """A linear program with twice as many active rows as variables, most without a multiplier."""
    A = sparse(rng, 3 * n, n)
    return around(rng, np.zeros((n, n)), A, rng.integers(-2, 3, n) * 1.0, 0.1, 0.2, 0.4, 0.0)


def weakly_active(rng, n):
    """A quadratic program in which half of the active rows have a zero multiplier."""
    return around(rng, gram(rng, n, n), sparse(rng, 2 * n, n), rng.standard_normal(n), 0.05, 0.2, 0.3)


def dependent_equalities(rng, n):
    """Equalities of rank n / 4, each stated twice in other words, beside inequalities."""
    k = max(n // 4, 1)
    base = sparse(rng, k, n)
    A_eq = np.vstack([base, rng.integers(-3, 4, (k, k)) @ base])
    x = rng.standard_normal(n)
    rest = around(rng, gram(rng, n, n // 2 + 1), sparse(rng, n, n), x, equal=0.0)
    z = A_eq @ x
    q = rest.q - A_eq.T @ rng.standard_normal(2 * k)
    return QP(rest.P, q, np.vstack([A_eq, rest.A]), np.append(z, rest.lo), np.append(z, rest.hi))


def redundant_rows(rng, n):
    """Every inequality stated again, some scaled, some slightly looser."""
    once = around(rng, gram(rng, n, n // 3 + 1), sparse(rng, n, n), rng.standard_normal(n), equal=0.1)
    scale = 10.0 ** rng.integers(-2, 3, n)
    loose = np.where(np.isclose(once.lo, once.hi), 0.0, rng.choice([0.0, 1e-3], n))
    lo, hi = scale * (once.lo - loose), scale * (once.hi + loose)
    A = np.vstack([once.A, scale[:, None] * once.A])
    return QP(once.P, once.q, A, np.append(once.lo, lo), np.append(once.hi, hi))


def nearly_parallel(rng, n):
    """Active rows in bundles whose directions differ by 1e-5."""
    base = rng.standard_normal((max(n // 3, 1), n))
    A = np.repeat(base, 3, axis=0)
    A = A + 1e-5 * rng.standard_normal(A.shape)
    return around(rng, gram(rng, n, n), A, rng.standard_normal(n), 0.1, 0.5)


def fixed_and_free(rng, n):
    """Fixed, free, one-sided and boxed variables, bounds of 1e20 and 1e30, free rows."""
    A = np.vstack([sparse(rng, n // 2, n), np.eye(n)])
    qp = around(rng, gram(rng, n, n // 2), A, rng.standard_normal(n), 0.15, 0.3, 0.05, 0.2)
    big = rng.choice([1e20, 1e30], A.shape[0])
    lo, hi = np.where(np.isinf(qp.lo), -big, qp.lo), np.where(np.isinf(qp.hi), big, qp.hi)
    return qp._replace(lo=lo, hi=hi)


def large_multipliers(rng, n):
    """Multipliers and solutions from 1 to 1e6 in the same problem."""
    A, x = sparse(rng, n, n), rng.standard_normal(n) * 10.0 ** rng.uniform(0, 3, n)
    return around(rng, gram(rng, n, n), A, x, y_scale=10.0 ** rng.uniform(0, 6, n))


def thin_boxes(rng, n):
    """Intervals of width 1e-5 beside ordinary rows."""
    qp = around(rng, gram(rng, n, n // 2), sparse(rng, n, n), rng.standard_normal(n), 0.0, 0.4)
    thin = (rng.random(n) < 0.3) & (np.isfinite(qp.lo) | np.isfinite(qp.hi))
    base = np.where(np.isfinite(qp.lo), qp.lo, qp.hi - 1e-5)
    lo, hi = np.where(thin, base, qp.lo), np.where(thin, base + 1e-5, qp.hi)
    return qp._replace(lo=lo, hi=hi)


def tall(rng, n):
    """Fifteen rows for each variable, as in discretised semi-infinite programs."""
    n = max(n // 10, 2)
    grid = np.linspace(0, 1, 15 * n)
    A = np.cos(np.pi * grid[:, None] * np.arange(n))
    return around(rng, np.diag(1.0 / (1 + np.arange(n))), A, rng.standard_normal(n), 0.0, 0.1, 0.1, 0.0, 0.0)


# No constraints.


def unconstrained(rng, n):
    """A condition number of 1e8 and no row at all."""
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    P = (Q * 10.0 ** rng.uniform(-4, 4, n)) @ Q.T
    P = (P + P.T) / 2
    return QP(P, -P @ rng.standard_normal(n), np.zeros((0, n)), np.zeros(0), np.zeros(0))


def equalities_only(rng, n):
    """A grid of differences, as in the AUG problems: equalities and a singular P."""
    A = np.zeros((n // 2, n))
    for i, row in enumerate(A):
        row[[i, i + 1, n // 2 + i]] = 1.0, -1.0, 0.5
    weights = np.where(rng.random(n) < 0.7, 1.0, 0.0)
    return around(rng, np.diag(weights), A, rng.standard_normal(n), equal=1.0, active=0, free=0)


# Models with a meaning, feasible and bounded by their form.


def box_least_squares(rng, n):
    """min |Cx - d|^2 in a box, with fewer equations than unknowns."""
    C = rng.standard_normal((n // 2, n)) * 10.0 ** rng.uniform(-2, 2, n)
    d = C @ rng.uniform(-2, 2, n)
    return boxed(QP(C.T @ C, -C.T @ d, np.zeros((0, n)), np.zeros(0), np.zeros(0)), -1.0, 1.0)


def portfolio(rng, n):
    """Markowitz with a factor model; variables are the weights and the exposures to the factors."""
    k = max(n // 10, 1)
    F = np.where(rng.random((n, k)) < 0.5, rng.standard_normal((n, k)), 0.0)
    P = np.diag(np.append(rng.uniform(0, np.sqrt(k), n), np.ones(k)))
    q = np.append(-rng.standard_normal(n) / 0.5, np.zeros(k))
    A = np.block([[np.ones((1, n)), np.zeros((1, k))], [F.T, -np.eye(k)], [np.eye(n), np.zeros((n, k))]])
    lo = np.concatenate([[1.0], np.zeros(k), np.zeros(n)])
    return QP(P, q, A, lo, np.concatenate([[1.0], np.zeros(k), np.full(n, np.inf)]))


def support_vectors(rng, n):
    """Support vector machine, primal with slack variables: P is zero on most of the variables."""
    d, k = max(n // 5, 1), n
    labels = rng.choice([-1.0, 1.0], k)
    X = rng.standard_normal((k, d)) + labels[:, None] / d
    P = np.diag(np.append(np.ones(d), np.zeros(k)))
    A = np.block([[labels[:, None] * X, np.eye(k)], [np.zeros((k, d)), np.eye(k)]])
    lo = np.append(np.ones(k), np.zeros(k))
    return QP(P, np.append(np.zeros(d), np.full(k, 10.0)), A, lo, np.full(2 * k, np.inf))


def support_vectors_dual(rng, n):
    """Its dual: a dense P of low rank, a box and one equality."""
    labels = rng.choice([-1.0, 1.0], n)
    X = labels[:, None] * (rng.standard_normal((n, max(n // 8, 1))) + labels[:, None] / 3)
    qp = QP(X @ X.T, -np.ones(n), labels[None], np.zeros(1), np.zeros(1))
    return boxed(qp, 0.0, 10.0)


def lasso(rng, n):
    """l1-regularised least squares with |x| <= t as two rows for each variable."""
    k = max(n // 4, 1)
    C = np.where(rng.random((k, n)) < 0.3, rng.standard_normal((k, n)), 0.0)
    d = C @ np.where(rng.random(n) < 0.2, rng.standard_normal(n), 0.0) + 0.01 * rng.standard_normal(k)
    weight = 0.2 * abs(C.T @ d).max()
    P = np.block([[C.T @ C, np.zeros((n, n))], [np.zeros((n, 2 * n))]])
    A = np.block([[np.eye(n), np.eye(n)], [-np.eye(n), np.eye(n)]])
    q = np.append(-C.T @ d, np.full(n, weight))
    return QP(P, q, A, np.zeros(2 * n), np.full(2 * n, np.inf))


def huber(rng, n):
    """Huber regression: residual r = u + (r+) - (r-), with outliers of size 1e3."""
    d, k = max(n // 4, 1), n
    C = rng.standard_normal((k, d))
    b = C @ rng.standard_normal(d) + np.where(rng.random(k) < 0.1, 1e3, 0.1) * rng.standard_normal(k)
    P = np.diag(np.concatenate([np.zeros(d), np.ones(k), np.zeros(2 * k)]))
    q = np.concatenate([np.zeros(d + k), np.ones(2 * k)])
    eye, zero = np.eye(k), np.zeros((k, d + k))
    A = np.block([[C, -eye, -eye, eye], [zero, eye, 0 * eye], [zero, 0 * eye, eye]])
    return QP(P, q, A, np.append(b, np.zeros(2 * k)), np.append(b, np.full(2 * k, np.inf)))


def control(rng, n):
    """Linear optimal control of an unstable system, states and inputs bounded, one state without a cost."""
    nx, nu = 6, 2
    T = max(n // (nx + nu), 2)
    F = np.eye(nx) + 0.15 * rng.standard_normal((nx, nx))
    G = rng.standard_normal((nx, nu))
    # A known trajectory with inputs inside their bounds makes the problem feasible.
    gain = np.linalg.lstsq(G, F, rcond=None)[0]
    states, inputs = [0.1 * rng.standard_normal(nx)], []
    for _ in range(T):
        inputs.append(np.clip(-gain @ states[-1], -1, 1))
        states.append(F @ states[-1] + G @ inputs[-1])
    bound = 1.01 * np.maximum(abs(np.array(states[1:])), 0.5)
    Q = np.diag([0.0, *10.0 ** rng.uniform(-3, 3, nx - 1)])
    P = np.kron(np.eye(T), np.block([[Q, np.zeros((nx, nu))], [np.zeros((nu, nx)), 0.1 * np.eye(nu)]]))
    A = np.zeros((T * nx, T * (nx + nu)))
    for t in range(T):  # x_{t+1} - F x_t - G u_t = 0, variables (x_{t+1}, u_t)
        rows = slice(t * nx, (t + 1) * nx)
        A[rows, t * (nx + nu) : t * (nx + nu) + nx] = np.eye(nx)
        A[rows, t * (nx + nu) + nx : (t + 1) * (nx + nu)] = -G
        if t:
            A[rows, (t - 1) * (nx + nu) : (t - 1) * (nx + nu) + nx] = -F
    b = np.append(F @ states[0], np.zeros((T - 1) * nx))
    upper = np.hstack([bound, np.ones((T, nu))]).ravel()
    return boxed(QP(P, np.zeros(A.shape[1]), A, b, b), -upper, upper)


def transport(rng, n):
    """Transport of integer supplies to integer demands: a degenerate linear program, one row redundant."""
    k = max(int(np.sqrt(n)), 2)
    supply = rng.integers(1, 6, k) * 1.0
    demand = rng.permutation(supply)
    A = np.vstack([np.kron(np.eye(k), np.ones(k)), np.kron(np.ones(k), np.eye(k))])
    b = np.append(supply, demand)
    cost = rng.integers(1, 20, k * k) * 1.0
    return boxed(QP(np.zeros((k * k, k * k)), cost, A, b, b), 0.0, np.inf)


def network_flow(rng, n):
    """Minimum-cost flow on a random graph with integer capacities and costs; node balances sum to zero."""
    nodes = max(n // 5, 2)
    tail, head = rng.integers(0, nodes, n), rng.integers(0, nodes, n)
    head = np.where(head == tail, (head + 1) % nodes, head)
    tail[:nodes], head[:nodes] = np.arange(nodes), (np.arange(nodes) + 1) % nodes
    A = np.zeros((nodes, n))
    A[tail, np.arange(n)] = 1.0
    A[head, np.arange(n)] -= 1.0
    capacity = rng.integers(1, 10, n) * 1.0
    balance = A @ np.floor(capacity * rng.random(n))
    return boxed(QP(np.zeros((n, n)), rng.integers(1, 30, n) * 1.0, A, balance, balance), 0.0, capacity)


def planning(rng, n):
    """Multi-period production and storage: units and money, coefficients from 1e-3 to 1e5."""
    products = 5
    T = max(n // (3 * products), 2)
    size, price = products * T, 10.0 ** rng.uniform(0, 3, products)
    make, store, sell = np.eye(size), np.eye(size), np.eye(size)
    carried = np.eye(size, k=-products) * 0.98  # stock of the period before
    use = np.kron(np.eye(T), 10.0 ** rng.uniform(-3, 2, (3, products)))
    A = np.block([[make, carried - store, -sell], [use, np.zeros((3 * T, 2 * size))]])
    limit = np.full(3 * T, 1e4)
    demand = rng.integers(0, 2000, size) * 1.0
    q = np.concatenate([np.tile(0.5 * price, T), np.full(size, 0.01), -np.tile(price, T)])
    lo = np.concatenate([np.zeros(size), np.full(3 * T, -np.inf)])
    qp = QP(np.zeros((3 * size, 3 * size)), q, A, lo, np.append(np.zeros(size), limit))
    return boxed(qp, 0.0, np.concatenate([np.full(size, 1e5), np.full(size, INFINITY), demand]))


def quadratic_planning(rng, n):
    """The same with a quadratic cost on a tenth of the variables."""
    qp = planning(rng, n)
    k = max(qp.q.size // 10, 1)
    chosen = rng.choice(qp.q.size, k, replace=False)
    P = qp.P.copy()
    P[np.ix_(chosen, chosen)] = gram(rng, k, k) * 1e-2
    return qp._replace(P=P)


def smooth_fit(rng, n):
    """Nearest series with nonnegative third differences, as in the LISWET problems."""
    A = np.diff(np.eye(n), 3, axis=0)
    t = np.linspace(0, 1, n)
    q = -(np.exp(t) + 0.1 * np.sin(20 * t) + 0.01 * rng.standard_normal(n))
    return QP(np.eye(n), q, A, np.zeros(len(A)), np.full(len(A), np.inf))


def chebyshev(rng, n):
    """l-infinity regression by polynomials: a linear program with an ill-conditioned matrix."""
    degree = min(max(n // 10, 2), 12)
    t = np.linspace(-1, 1, n)
    C = t[:, None] ** np.arange(degree)
    d = np.sin(5 * t) + 0.1 * rng.standard_normal(n)
    A = np.block([[C, np.ones((n, 1))], [C, -np.ones((n, 1))]])
    q = np.append(np.zeros(degree), 1.0)
    lo, hi = np.append(d, np.full(n, -np.inf)), np.append(np.full(n, np.inf), d)
    return QP(np.zeros((degree + 1, degree + 1)), q, A, lo, hi)


def least_absolute(rng, n):
    """l1 regression with dependent columns: a linear program with a face of solutions."""
    d = max(n // 6, 2)
    C = rng.standard_normal((n, d))
    C[:, -1] = C[:, 0] + C[:, 1 % d]
    b = C @ rng.standard_normal(d) + np.where(rng.random(n) < 0.5, 0.0, rng.standard_normal(n))
    A = np.block([[C, -np.eye(n), np.eye(n)], [np.zeros((2 * n, d)), np.eye(2 * n)]])
    q = np.append(np.zeros(d), np.ones(2 * n))
    P = np.zeros((d + 2 * n, d + 2 * n))
    return QP(P, q, A, np.append(b, np.zeros(2 * n)), np.append(b, np.full(2 * n, np.inf)))


def big_m(rng, n):
    """Rows x_i <= 1e6 w_i with 0 <= w <= 1 and a budget: relaxed indicator constraints."""
    k = n // 2
    P = np.block([[gram(rng, k, k), np.zeros((k, k))], [np.zeros((k, 2 * k))]])
    q = np.append(-rng.uniform(1, 100, k), rng.uniform(0, 1, k))
    M = 10.0 ** rng.uniform(2, 6, k)
    A = np.vstack([np.hstack([np.eye(k), -np.diag(M)]), np.append(np.zeros(k), np.ones(k))[None]])
    qp = QP(P, q, A, np.full(k + 1, -np.inf), np.append(np.zeros(k), 0.1))
    return boxed(qp, 0.0, np.append(np.full(k, INFINITY), np.ones(k)))


FAMILIES = (
    eight_decades,
    eight_decades_linear,
    entries_over_decades,
    low_rank,
    low_rank_spread,
    degenerate_vertex,
    weakly_active,
    dependent_equalities,
    redundant_rows,
    nearly_parallel,
    fixed_and_free,
    large_multipliers,
    thin_boxes,
    tall,
    unconstrained,
    equalities_only,
    box_least_squares,
    portfolio,
    support_vectors,
    support_vectors_dual,
    lasso,
    huber,
    control,
    transport,
    network_flow,
    planning,
    quadratic_planning,
    smooth_fit,
    chebyshev,
    least_absolute,
    big_m,
)
SIZES = (10, 30, 60, 100)
FULL_SIZES = (30, 100, 300, 1000)


def residuals(qp: QP, x, y) -> np.ndarray:
    """How far (x, y) is from solving `qp`: primal residual, dual residual and duality gap, each relative.

    With P x + q + A'y = 0 and y > 0 where A x is at its upper bound. Each is divided by 1 plus the largest of
    the terms that it sums. A multiplier of a bound that is infinite counts as zero.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    bound = np.where(y > 0, qp.hi, qp.lo)
    y, bound = np.where(np.isinf(bound), 0.0, y), np.where(np.isinf(bound), 0.0, bound)
    Ax, Px, Aty = qp.A @ x, qp.P @ x, qp.A.T @ y
    nearest = np.clip(Ax, qp.lo, qp.hi)
    gap = x @ Px, qp.q @ x, bound @ y
    sums = ((Ax, -nearest), (Px, qp.q, Aty), gap)
    result = [_largest(sum(terms)) / (1 + max(map(_largest, terms))) for terms in sums]
    return np.where(np.isfinite(result), result, np.inf)


def _largest(x) -> float:
    return np.abs(x).max(initial=0.0)


def primal_infeasible(rng, n):
    """2 n inequalities that nonnegative multipliers combine to 0'x <= something negative."""
    A, y = rng.standard_normal((2 * n, n)), np.where(rng.random(2 * n) < 0.3, rng.uniform(0.1, 1, 2 * n), 0.0)
    A[-1], y[-1] = -A[:-1].T @ y[:-1], 1.0
    hi = A @ rng.standard_normal(n) + rng.uniform(0, 1, 2 * n)
    hi[-1] = -(hi[:-1] @ y[:-1]) - 10.0 ** rng.uniform(-2, 0)
    return QP(gram(rng, n, rng.integers(0, n)), rng.standard_normal(n), A, np.full(2 * n, -np.inf), hi)


def dual_infeasible(rng, n):
    """A feasible program with a direction along which nothing bounds the falling objective."""
    d = rng.standard_normal(n)
    d /= np.linalg.norm(d)
    across = np.eye(n) - np.outer(d, d)
    P = across @ gram(rng, n, rng.integers(0, n)) @ across
    loose = rng.uniform(0, 1, 2 * n) * (rng.random(2 * n) < 0.7)
    A = rng.standard_normal((2 * n, n)) @ across - np.outer(loose, d)
    q = across @ rng.standard_normal(n) - rng.uniform(0.1, 1) * d
    hi = A @ rng.standard_normal(n) + rng.uniform(0, 1, 2 * n)
    equal = (loose == 0) & (rng.random(2 * n) < 0.3)
    return QP((P + P.T) / 2, q, A, np.where(equal, hi, -np.inf), hi)


def problems(sizes=SIZES, families=FAMILIES) -> Iterator[tuple[str, QP]]:
    """Named problems, the same at every call, with bounds of 1e20 turned into infinities."""
    for number, family in enumerate(families):
        for size in sizes:
            qp = family(np.random.default_rng([number, size]), size)
            lo = np.where(qp.lo <= -INFINITY, -np.inf, qp.lo)
            hi = np.where(qp.hi >= INFINITY, np.inf, qp.hi)
            yield f"{family.__name__}-{size}", qp._replace(lo=lo, hi=hi)
