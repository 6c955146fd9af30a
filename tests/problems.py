"""Problems to test with: random programs with a known answer, and CVXPY problems of every polyhedral family.

Programs are

    minimise 1/2 x'Px + q'x   subject to   A x + s = b,   s = 0 on the first `zero` rows, s >= 0 on the rest,

with multipliers y: P x + q + A'y = 0, y >= 0 where s >= 0. Symbols: n variables, m inequalities.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cvxpy as cp
import numpy as np


class Program(NamedTuple):
    """A program and its only solution (x, y, s), at which s + y >= `margin` on every inequality."""

    P: np.ndarray
    q: np.ndarray
    A: np.ndarray
    b: np.ndarray
    zero: int
    x: np.ndarray
    y: np.ndarray
    s: np.ndarray


def _from_pair(rng, P, A, zero, active):
    """The program with matrices P and A that a random x, and y with `active` inequalities, solve."""
    m, n = A.shape
    x = rng.standard_normal(n)
    is_active = np.zeros(m, bool)
    is_active[zero + rng.permutation(m - zero)[:active]] = True
    y = np.where(is_active, rng.uniform(0.5, 1.5, m), 0.0)
    s = np.where(is_active, 0.0, rng.uniform(0.5, 1.5, m))
    y[:zero], s[:zero] = rng.standard_normal(zero), 0.0
    return Program(P, -P @ x - A.T @ y, A, A @ x + s, zero, x, y, s)


def _matrix(rng, rows, columns, density):
    """Random entries, of which a share `density` is not zero; the diagonals of square blocks never are."""
    keep = rng.random((rows, columns)) < density
    keep[np.arange(rows), np.arange(rows) % columns] = True
    return np.where(keep, rng.standard_normal((rows, columns)), 0.0)


def random_lp(rng, n, m, equalities=0, density=1.0):
    """A linear program solved by one vertex: as many active rows as variables, all multipliers positive."""
    A = _matrix(rng, equalities + m, n, density)
    return _from_pair(rng, np.zeros((n, n)), A, equalities, n - equalities)


def random_qp(rng, n, m, equalities=0, rank=None, active=None, density=1.0):
    """A quadratic program with P of the given rank (default n), and `active` active inequalities.

    With the equalities these must be at least n - rank rows and at most n, so that x and y are unique. The
    default is half way between.
    """
    rank = n if rank is None else rank
    least, most = max(n - rank - equalities, 0), min(n - equalities, m)
    root = _matrix(rng, n, n, density)[:, :rank]
    A = _matrix(rng, equalities + m, n, density)
    active = (least + most) // 2 if active is None else active
    return _from_pair(rng, root @ root.T / n + (rank == n) * 0.1 * np.eye(n), A, equalities, active)


@dataclass(frozen=True)
class Family:
    """A CVXPY problem for a layer, and values for its parameters.

    Attributes:
        sample: generator to one value per parameter.
        shared: positions of parameters that a batch has in common.
    """

    problem: cp.Problem
    parameters: Sequence[cp.Parameter]
    variables: Sequence[cp.Variable]
    sample: Callable[[np.random.Generator], Sequence[np.ndarray]]
    shared: tuple[int, ...] = ()

    def batch(self, rng, size):
        """Values of all parameters for `size` problems, with a batch axis in front unless shared."""
        samples = [self.sample(rng) for _ in range(size)]
        columns = zip(*samples, strict=True)
        return [
            np.asarray(column[0] if i in self.shared else np.stack(column), float)
            for i, column in enumerate(columns)
        ]


def lane(values, parameters, i):
    """Problem i of the batch: the values without their batch axis."""
    return [v[i] if v.ndim > p.ndim else v for v, p in zip(values, parameters, strict=True)]


def values_of(programs):
    """Values of the parameters of `qp` for a batch of programs of one size; those of `lp` are these but P."""
    P, q, A, b = (np.stack(data) for data in list(zip(*programs, strict=True))[:4])
    zero = programs[0].zero
    return [P, q, A[:, zero:], b[:, zero:], A[:, :zero], b[:, :zero]]


def lp(n=3, m=6, equalities=1):
    c, G, h = cp.Parameter(n, name="c"), cp.Parameter((m, n), name="G"), cp.Parameter(m, name="h")
    A, b = cp.Parameter((equalities, n), name="A"), cp.Parameter(equalities, name="b")
    x = cp.Variable(n)
    equal, below = A @ x == b, G @ x <= h
    problem = cp.Problem(cp.Minimize(c @ x), [equal, below])

    def sample(rng):
        return [v[0] for v in values_of([random_lp(rng, n, m, equalities)])[1:]]

    return Family(problem, [c, G, h, A, b], [x, equal.dual_variables[0], below.dual_variables[0]], sample)


def qp(n=4, m=5, equalities=1, rank=None):
    """All of P, q, G, h, A, b are parameters, and the multipliers are outputs."""
    P, q = cp.Parameter((n, n), PSD=True, name="P"), cp.Parameter(n, name="q")
    G, h = cp.Parameter((m, n), name="G"), cp.Parameter(m, name="h")
    A, b = cp.Parameter((equalities, n), name="A"), cp.Parameter(equalities, name="b")
    x = cp.Variable(n)
    equal, below = A @ x == b, G @ x <= h
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), [equal, below])

    def sample(rng):
        return [v[0] for v in values_of([random_qp(rng, n, m, equalities, rank)])]

    outputs = [x, equal.dual_variables[0], below.dual_variables[0]]
    return Family(problem, [P, q, G, h, A, b], outputs, sample)


def qp_low_rank():
    return qp(n=5, m=7, equalities=1, rank=2)


def qp_shared():
    """P, A and b common to the batch; only q differs."""
    n, m = 4, 6
    P, q = cp.Parameter((n, n), PSD=True, name="P"), cp.Parameter(n, name="q")
    A, b = cp.Parameter((m, n), name="A"), cp.Parameter(m, name="b")
    x = cp.Variable(n)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), [A @ x <= b])

    def sample(rng):
        root = rng.standard_normal((n, n))
        A = rng.standard_normal((m, n))
        return root @ root.T / n + 0.2 * np.eye(n), 2 * rng.standard_normal(n), A, rng.uniform(0.2, 1, m)

    return Family(problem, [P, q, A, b], [x], sample, shared=(0, 2, 3))


def least_squares():
    """No constraint at all."""
    F, g = cp.Parameter((6, 3), name="F"), cp.Parameter(6, name="g")
    x = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g) + cp.sum_squares(x)))
    return Family(problem, [F, g], [x], lambda rng: [rng.standard_normal((6, 3)), rng.standard_normal(6)])


def equality_constrained():
    F, C, d = cp.Parameter((5, 4), name="F"), cp.Parameter((2, 4), name="C"), cp.Parameter(2, name="d")
    x = cp.Variable(4)
    equal = C @ x == d
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - 1)), [equal])
    normal = np.random.Generator.standard_normal
    return Family(
        problem,
        [F, C, d],
        [x, equal.dual_variables[0]],
        lambda rng: [normal(rng, (5, 4)), normal(rng, (2, 4)), normal(rng, 2)],
    )


def nonnegative_least_squares():
    F, g = cp.Parameter((6, 4), name="F"), cp.Parameter(6, name="g")
    x = cp.Variable(4, nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g)))
    return Family(problem, [F, g], [x], lambda rng: [rng.standard_normal((6, 4)), rng.standard_normal(6)])


def lasso():
    F, g = cp.Parameter((8, 4), name="F"), cp.Parameter(8, name="g")
    weight = cp.Parameter(nonneg=True, name="weight")
    x = cp.Variable(4)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g) / 2 + weight * cp.norm1(x)))

    def sample(rng):
        return rng.standard_normal((8, 4)), 2 * rng.standard_normal(8), rng.uniform(2, 3)

    return Family(problem, [F, g, weight], [x], sample)


def chebyshev_regression():
    """The largest residual made as small as possible: a linear program."""
    F, g = cp.Parameter((7, 3), name="F"), cp.Parameter(7, name="g")
    x = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.norm_inf(F @ x - g)))
    return Family(problem, [F, g], [x], lambda rng: [rng.standard_normal((7, 3)), rng.standard_normal(7)])


def huber():
    F, g = cp.Parameter((8, 3), name="F"), cp.Parameter(8, name="g")
    x = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.huber(F @ x - g, 0.7))))
    return Family(problem, [F, g], [x], lambda rng: [rng.standard_normal((8, 3)), 2 * rng.standard_normal(8)])


def quad_form():
    """An indefinite-looking sum of terms around quad_form with a parameter."""
    n = 4
    P, q, scale = (
        cp.Parameter((n, n), PSD=True, name="P"),
        cp.Parameter(n, name="q"),
        cp.Parameter(nonneg=True, name="scale"),
    )
    x = cp.Variable(n)
    objective = cp.quad_form(x - 1, P) + q @ x + scale * cp.sum_squares(x[:2])
    problem = cp.Problem(cp.Minimize(objective), [x >= 0, cp.sum(x) <= 3])

    def sample(rng):
        root = rng.standard_normal((n, n - 1))
        return root @ root.T, 3 * rng.standard_normal(n), rng.uniform(0.5, 1)

    return Family(problem, [P, q, scale], [x], sample)


def portfolio():
    """Largest return less risk, long only, with a cap: maximised, and the caps' multipliers are outputs."""
    n = 5
    returns, factors = cp.Parameter(n, name="returns"), cp.Parameter((n, 2), name="factors")
    cap = cp.Parameter(nonneg=True, name="cap")
    w = cp.Variable(n)
    budget, capped = cp.sum(w) == 1, w <= cap
    risk = cp.sum_squares(factors.T @ w) + 0.1 * cp.sum_squares(w)
    problem = cp.Problem(cp.Maximize(returns @ w - risk), [budget, w >= 0, capped])

    def sample(rng):
        return rng.standard_normal(n) / 2, rng.standard_normal((n, 2)), rng.uniform(0.3, 0.4)

    outputs = [w, budget.dual_variables[0], capped.dual_variables[0]]
    return Family(problem, [returns, factors, cap], outputs, sample)


def box_projection():
    """Bounds are an attribute of the variable, and parameters."""
    point = cp.Parameter(4, name="point")
    low, high = cp.Parameter(4, name="low"), cp.Parameter(name="high")
    x = cp.Variable(4, bounds=[low, high])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - point)))

    def sample(rng):
        return 2 * rng.standard_normal(4), rng.uniform(-1, -0.5, 4), rng.uniform(0.5, 1)

    return Family(problem, [point, low, high], [x], sample)


def simplex_projection():
    point = cp.Parameter(5, name="point")
    x = cp.Variable(5)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - point)), [x >= 0, cp.sum(x) == 1])
    return Family(problem, [point], [x], lambda rng: [rng.standard_normal(5)])


def support_vector_machine():
    """Soft margin, with an offset that its cost makes unique; a row of `data` is a point times its label."""
    count, n = 8, 2
    data, labels = cp.Parameter((count, n), name="data"), np.repeat([1.0, -1.0], count // 2)
    penalty = cp.Parameter(nonneg=True, name="penalty")
    w, offset, slack = cp.Variable(n), cp.Variable(), cp.Variable(count, nonneg=True)
    margins = data @ w + cp.multiply(labels, offset) >= 1 - slack
    norm = cp.sum_squares(w) / 2 + cp.square(offset) / 10
    problem = cp.Problem(cp.Minimize(norm + penalty * cp.sum(slack)), [margins])

    def sample(rng):
        points = rng.standard_normal((count, n)) + 0.3 * labels[:, None]
        return labels[:, None] * points, rng.uniform(0.5, 1.5)

    return Family(problem, [data, penalty], [w, offset, margins.dual_variables[0]], sample)


def model_predictive_control():
    """Double integrator, horizon 6, bounded input; the only parameter is where it starts."""
    horizon, dynamics, gain = 6, np.array([[1.0, 0.3], [0.0, 1.0]]), np.array([[0.04], [0.3]])
    start = cp.Parameter(2, name="start")
    x, u = cp.Variable((horizon + 1, 2)), cp.Variable((horizon, 1))
    constraints = [x[0] == start, dynamics @ x[:-1].T + gain @ u.T == x[1:].T, cp.abs(u) <= 0.4]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + 0.1 * cp.sum_squares(u)), constraints)
    return Family(problem, [start], [u, x], lambda rng: [rng.choice([-1, 1]) * rng.uniform(0.3, 0.7, 2)])


def symmetric_variable():
    target, total = cp.Parameter((3, 3), name="target"), cp.Parameter(name="total")
    weight = cp.Parameter((3, 3), symmetric=True, name="weight")
    X = cp.Variable((3, 3), symmetric=True)
    objective = cp.sum_squares(X - target) + cp.sum(cp.multiply(weight, X))
    problem = cp.Problem(cp.Minimize(objective), [X >= 0, cp.trace(X) == total])

    def sample(rng):
        weight = rng.standard_normal((3, 3))
        return rng.standard_normal((3, 3)), rng.uniform(1, 2), weight + weight.T

    return Family(problem, [target, total, weight], [X], sample)


def scalars():
    a, b, c = cp.Parameter(name="a"), cp.Parameter(name="b"), cp.Parameter((1,), name="c")
    x, y = cp.Variable(), cp.Variable((1,))
    problem = cp.Problem(cp.Minimize((x - a) ** 2 + (y[0] - b * 2) ** 2), [x + y >= c, x <= 0.4])
    return Family(problem, [a, b, c], [x, y], lambda rng: [*rng.standard_normal(2), rng.uniform(1, 2, 1)])


def three_dimensional():
    target, ceiling = cp.Parameter((2, 3, 2), name="target"), cp.Parameter((3, 2), name="ceiling")
    x = cp.Variable((2, 3, 2))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - target)), [x[0] <= ceiling, cp.sum(x, axis=2) >= -1])

    def sample(rng):
        return 2 * rng.standard_normal((2, 3, 2)), rng.uniform(-0.4, 1, (3, 2))

    return Family(problem, [target, ceiling], [x], sample)


def several_variables():
    """Three variables of different shapes, listed in another order than the problem has them."""
    F, g, budget = cp.Parameter((2, 3), name="F"), cp.Parameter(2, name="g"), cp.Parameter(name="budget")
    x, Y, t = cp.Variable(3), cp.Variable((2, 2)), cp.Variable()
    objective = cp.sum_squares(x - 1) + cp.sum_squares(Y - t) + 0.5 * t**2 + cp.sum(Y @ g)
    problem = cp.Problem(cp.Minimize(objective), [F @ x == Y[0], cp.norm1(x) <= budget, Y - t <= 0.5])

    def sample(rng):
        return rng.standard_normal((2, 3)), rng.standard_normal(2), rng.uniform(0.5, 1)

    return Family(problem, [F, g, budget], [t, Y, x], sample)


def redundant_rows():
    """Every constraint twice: the multipliers are not unique, the solution and its derivative are."""
    A, b, q = cp.Parameter((4, 3), name="A"), cp.Parameter(4, name="b"), cp.Parameter(3, name="q")
    C, x = np.array([[1.0, 2.0, -1.0]]), cp.Variable(3)
    constraints = [A @ x <= b, 2 * A @ x <= 2 * b, C @ x == 1, C @ x == 1]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 + q @ x), constraints)

    def sample(rng):
        A = rng.standard_normal((4, 3))
        return A, A @ np.linalg.pinv(C)[:, 0] + rng.uniform(0.1, 0.3, 4), 2 * rng.standard_normal(3)

    return Family(problem, [A, b, q], [x], sample)


FAMILIES = {
    family.__name__: family
    for family in (
        *(lp, chebyshev_regression, qp, qp_low_rank, qp_shared, quad_form),
        *(least_squares, equality_constrained, nonnegative_least_squares, lasso, huber),
        *(portfolio, box_projection, simplex_projection, support_vector_machine, model_predictive_control),
        *(symmetric_variable, scalars, three_dimensional, several_variables, redundant_rows),
    )
}
