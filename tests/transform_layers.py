"""One small problem for every kind of layer, with its solution in closed form.

Each is a function of arrays to an array (B, k): `layer` through the library, `exact` in plain operations of
the framework, whose own derivatives are the oracle for those of the layer. To put a layer under every
transform of `transforms.py`, add its entry to `LAYERS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

Function = Callable[..., Any]


@dataclass(frozen=True)
class LayerCase:
    """A layer under test.

    Args:
        layer: frontend to the function of arrays (B, ...), or without batch axis where `shared`, to (B, k).
        exact: frontend to the function of one problem, without batch axes, to its solution (k,).
        values: the arrays at which derivatives are taken.
        shared: positions of the arrays that the batch has in common.
        tolerance: of derivatives, relative; exact derivatives are right to rounding.
        refuses: for each framework, the names of transforms that raise, with a part of the message.
        on_host: solved by the process that holds all the devices, which gathers data sharded over them.
    """

    layer: Callable[[Any], Function]
    exact: Callable[[Any], Function]
    values: Sequence[np.ndarray]
    shared: tuple[int, ...] = ()
    tolerance: float = 1e-8
    refuses: dict[str, dict[str, str]] = field(default_factory=dict)
    on_host: bool = False

    @property
    def axes(self) -> tuple[int | None, ...]:
        return tuple(None if i in self.shared else 0 for i in range(len(self.values)))


def symmetric(xp, v):
    """[a b; b c] for v = (a, b, c), also for a batch of them."""
    return xp.stack([v[..., :2], v[..., 1:]], -2)


def gram(xp, R):
    """R'R + I, positive definite."""
    return (R[..., :, None] * R[..., None, :]).sum(-3) + xp.eye(2, dtype=R.dtype)


# Quadratic programs: two variables, three rows of which at most two are active.

QP_VALUES = (
    np.array([[1.0, 0.3], [0.2, 0.8]]),  # P = R'R + I
    np.array([[-3.0, 1.0], [1.0, 5.0], [-0.2, 0.1], [-4.0, -3.0]]),  # q: one row active, another, none, two
    np.array([[1.0, 0.2], [0.3, -1.0], [-1.0, 0.7]]),  # A
    np.array([[0.7, 2.0, 3.0], [0.6, 1.5, 2.0], [0.8, 2.0, 3.0], [0.5, 1.0, 0.4]]),  # b
)
QP_SHARED = (0, 2)


def cvxpy_qp(frontend):
    P, q = cp.Parameter((2, 2), PSD=True), cp.Parameter(2)
    A, b, x = cp.Parameter((3, 2)), cp.Parameter(3), cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) / 2 + q @ x), [A @ x <= b])
    layer = frontend.CvxpyLayer(problem, [P, q, A, b], [x])
    return lambda R, q, A, b: layer(gram(frontend.xp, R), q, A, b)[0]


def matrix_qp(frontend, **options):
    solve = frontend.module.solve_qp
    return lambda R, q, A, b: solve(gram(frontend.xp, R), q, A, None, b, **options).x


def sparse_qp(frontend):
    """The same with sparse P and A, which are constants."""
    R, _, A, _ = QP_VALUES
    P, A = sp.coo_array(R.T @ R + np.eye(2)), sp.coo_array(A)
    return lambda q, b: frontend.module.solve_qp(P, q, A, None, b).x


def exact_qp(frontend):
    xp = frontend.xp
    active_sets = [rows for count in range(3) for rows in itertools.combinations(range(3), count)]

    def solve(R, q, A, b):
        P, solution = gram(xp, R), 0 * q
        for rows in active_sets:
            rows = np.array(rows, int)
            zeros = xp.zeros((len(rows), len(rows)), dtype=q.dtype)
            K = xp.concatenate([xp.concatenate([P, A[rows].mT], 1), xp.concatenate([A[rows], zeros], 1)], 0)
            z = xp.linalg.solve(K, xp.concatenate([-q, b[rows]], 0))
            x, y = z[:2], z[2:]
            is_solution = (A @ x <= b + 1e-9).all() & (y >= 0).all()
            solution = solution + xp.where(is_solution, x, 0 * x)
        return solution

    return solve


def exact_sparse_qp(frontend):
    R, _, A, _ = map(frontend.array, QP_VALUES)
    return lambda q, b: exact_qp(frontend)(R, q, A, b)


# Cones


def cvxpy_socp(frontend):
    """Least q'x with |A x + b| <= r."""
    q, A, b, r = cp.Parameter(2), cp.Parameter((2, 2)), cp.Parameter(2), cp.Parameter()
    x = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(q @ x), [cp.norm(A @ x + b) <= r])
    layer = frontend.CvxpyLayer(problem, [q, A, b, r], [x])
    return lambda *values: layer(*values)[0]


def matrix_socp(frontend):
    """The same with (r, b) - (0, -A) x in the cone."""
    xp, cones = frontend.xp, frontend.module.Cones(soc=(3,))

    def call(q, A, b, r):
        rows, b = xp.concatenate([0 * A[:1], -A], 0), xp.broadcast_to(b, (*r.shape, 2))
        return frontend.module.solve_conic(None, q, rows, xp.concatenate([r[:, None], b], 1), cones).x

    return call


def exact_socp(frontend):
    solve = frontend.xp.linalg.solve

    def at(q, A, b, r):
        direction = solve(A.mT, q)
        y = -r * direction / (direction**2).sum() ** 0.5
        return solve(A, y - b)

    return at


def cvxpy_sdp(frontend):
    """The matrix X nearest to C with X - L positive semidefinite."""
    C, L = (cp.Parameter((2, 2), symmetric=True) for _ in range(2))
    X = cp.Variable((2, 2), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [X - L >> 0])
    layer = frontend.CvxpyLayer(problem, [C, L], [X])

    def call(c, l):
        (X,) = layer(symmetric(frontend.xp, c), symmetric(frontend.xp, l))
        return X.reshape(-1, 4)

    return call


def exact_sdp(frontend):
    """L plus the positive part of D = C - L: from mean m and radius r of its eigenvalues m + r and m - r."""
    xp = frontend.xp

    def at(c, l):
        a, b, d = c - l
        m, r = (a + d) / 2, xp.sqrt(((a - d) / 2) ** 2 + b**2)
        identity = xp.eye(2, dtype=c.dtype)
        direction = (symmetric(xp, c - l) - m * identity) / r
        ahead, behind = (abs(l) + l for l in (m + r, m - r))  # twice the positive parts
        X = symmetric(xp, l) + ahead / 4 * (identity + direction) + behind / 4 * (identity - direction)
        return X.reshape(4)

    return at


def cvxpy_entropy(frontend):
    """Least q'x - w entropy(x) with x of sum t, on exponential cones."""
    q, w, t, x = cp.Parameter(3), cp.Parameter(nonneg=True), cp.Parameter(), cp.Variable(3)
    problem = cp.Problem(cp.Minimize(q @ x - w * cp.sum(cp.entr(x))), [cp.sum(x) == t])
    layer = frontend.CvxpyLayer(problem, [q, w, t], [x])
    return lambda *values: layer(*values)[0]


def exact_entropy(frontend):
    def at(q, w, t):
        weights = frontend.xp.exp(-q / w)
        return t * weights / weights.sum()

    return at


def geometric(frontend):
    """Greatest x y^e with a x + b y <= c."""
    a, b, c, e = (cp.Parameter(pos=True) for _ in range(4))
    x, y = cp.Variable(pos=True), cp.Variable(pos=True)
    problem = cp.Problem(cp.Maximize(x * y**e), [a * x + b * y <= c])
    layer = frontend.CvxpyLayer(problem, [a, b, c, e], [x, y], gp=True)
    return lambda *values: frontend.xp.stack(layer(*values), -1)


def exact_geometric(frontend):
    def at(a, b, c, e):
        return frontend.xp.stack([c / (a * (1 + e)), c * e / (b * (1 + e))])

    return at


# Equilibria and a user's own layer

TIGHT = {"tol": 1e-13, "max_iter": 100, "order": 2}
CELL_VALUES = (
    np.array([[0.2, -0.3, 0.1], [0.1, 0.25, 0.2], [-0.2, 0.1, 0.15]]),
    np.array([[0.5, -1.0, 0.3], [1.2, 0.4, -0.7]]),
)


def linear_fixed_point(frontend):
    """z = A z + x, with A in the closure of the map."""
    solve = frontend.module.fixed_point
    return lambda A, x: solve(lambda z, x: z @ A.mT + x, 0 * x, x, **TIGHT)


def exact_linear(frontend):
    xp = frontend.xp
    return lambda A, x: xp.linalg.solve(xp.eye(3, dtype=A.dtype) - A, x)


def tanh_deq(frontend):
    deq = frontend.module.DEQ(lambda z, x, A: frontend.xp.tanh(z @ A.mT + x), **TIGHT)
    return lambda A, x: deq(x, A)


def unrolled_tanh(frontend):
    def at(A, x):
        z = 0 * x
        for _ in range(50):
            z = frontend.xp.tanh(A @ z + x)
        return z

    return at


def cube_root(frontend):
    solve = lambda a, s: (a * s) ** (1 / 3)
    layer = frontend.implicit(solve, lambda z, a, s: z**3 - a * s)
    return lambda a, s: layer(a, s[None])


def exact_cube_root(frontend):
    return lambda a, s: (a * s) ** (1 / 3)


# Differential equations and satisfiability


def decay(frontend):
    """y' = rate y on [0, 1], by 50 steps of order four."""
    field = lambda t, y, rate: rate[None] * y
    if frontend.name == "jax":
        field = lambda y, t, rate: rate[None] * y
    ode = frontend.module.ODE(field, method="rk4", step_size=0.02, order=2)
    return lambda y, rate: ode(y, frontend.xp.arange(2, dtype=y.dtype), rate)[-1]


def exact_decay(frontend):
    return lambda y, rate: y * frontend.xp.exp(rate)


def satisfiability(frontend):
    """Two clauses on an input and an output, of which the second vector follows from the first."""
    layer = frontend.module.SATLayer(variables=2, clauses=2, tol=1e-13, order=2)
    is_input = frontend.array([True, False], "bool")
    if frontend.name == "jax":
        return lambda S, z: layer(S, z, is_input)
    call = frontend.framework.func.functional_call

    def evaluate(S, z):
        return call(layer, {"S": S, "directions": layer.directions.to(S.dtype)}, (z, is_input))

    return evaluate


def exact_satisfiability(frontend):
    """v_2 points away from C_20 v_T + C_21 v_1, at the angle pi z_2 from -v_T."""
    xp = frontend.xp

    def at(S, z):
        truth, known, unknown = S.mT
        along, across = unknown @ truth, unknown @ known
        angle = np.pi * z[0]
        adjacent = along - across * xp.cos(angle)
        return xp.stack([z[0], xp.arctan2(abs(across) * xp.sin(angle), adjacent) / np.pi])

    return at


SOCP_VALUES = (
    np.array([[1.0, -0.5], [0.3, 2.0]]),
    np.array([[1.5, 0.2], [-0.4, 1.0]]),
    np.array([0.3, -0.6]),
    np.array([1.0, 2.0]),
)
SOCP_SHARED = (1, 2)

# What torch's compiler and export cannot do, and JAX's account of which values differ by device.
TRACING = "compile(fullgraph=True)", "export"
NOT_TRACED = dict.fromkeys(TRACING, "cannot be traced")
ON_THE_HOST = dict.fromkeys(TRACING, "give P and A as dense tensors")
NOT_EXPORTED = {"export": "cannot trace the derivative of a residual"}

LAYERS = {
    "CvxpyLayer, QP": LayerCase(cvxpy_qp, exact_qp, QP_VALUES, QP_SHARED),
    "CvxpyLayer, SOCP": LayerCase(cvxpy_socp, exact_socp, SOCP_VALUES, SOCP_SHARED),
    "CvxpyLayer, SDP": LayerCase(
        cvxpy_sdp,
        exact_sdp,
        (np.array([[1.0, 2.0, -0.5], [-1.0, 0.4, -2.0]]), np.array([0.1, -0.2, 0.3])),
        (1,),
    ),
    "CvxpyLayer, exponential cone": LayerCase(
        cvxpy_entropy,
        exact_entropy,
        (np.array([[0.5, -1.0, 0.2], [1.5, 0.3, 0.0]]), np.array([0.7, 1.2]), np.array(1.3)),
        (2,),
    ),
    "CvxpyLayer, geometric program": LayerCase(
        geometric,
        exact_geometric,
        (np.array([1.0, 2.0]), np.array(0.7), np.array([3.0, 1.5]), np.array([0.8, 1.4])),
        (1,),
    ),
    "solve_qp": LayerCase(matrix_qp, exact_qp, QP_VALUES, QP_SHARED),
    "solve_qp, sparse": LayerCase(
        sparse_qp, exact_sparse_qp, QP_VALUES[1::2], refuses={"torch": ON_THE_HOST}, on_host=True
    ),
    "solve_conic": LayerCase(matrix_socp, exact_socp, SOCP_VALUES, SOCP_SHARED),
    "fixed_point": LayerCase(
        linear_fixed_point, exact_linear, CELL_VALUES, (0,), refuses={"torch": NOT_TRACED}
    ),
    "DEQ": LayerCase(tanh_deq, unrolled_tanh, CELL_VALUES, (0,), refuses={"torch": NOT_TRACED}),
    "ODE": LayerCase(
        decay,
        exact_decay,
        (np.array([[1.0, -0.5, 0.3], [0.2, 0.8, -1.1]]), np.array([-1.0, 0.5, 0.3])),
        (1,),
        tolerance=1e-6,
        refuses={"torch": NOT_TRACED},
    ),
    "SATLayer": LayerCase(
        satisfiability,
        exact_satisfiability,
        (np.array([[-1.0, 0.6, 0.8], [-0.5, -0.7, 0.9]]), np.array([[0.3, 0.0], [0.8, 0.0]])),
        (0,),
        refuses={"torch": NOT_TRACED, "jax": {"shard_map": "check_vma=False"}},
    ),
    "implicit": LayerCase(
        cube_root,
        exact_cube_root,
        (np.array([[8.0, 1.5], [2.0, 27.0]]), np.array([1.0, 0.7])),
        (1,),
        refuses={"torch": NOT_EXPORTED},
    ),
}
