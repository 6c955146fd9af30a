"""Sparse P and A: against the dense path and finite differences, entry forms, statuses, large ones."""

from concurrent.futures import ThreadPoolExecutor
from threading import get_ident
from typing import NamedTuple

import numpy as np
import pytest
import scipy.sparse as sp

from checks import assert_close
from optlayers.cones import Cones
from optlayers.linalg import sparse as linalg
from optlayers.solvers.host import Clarabel
from optlayers.solvers.sparse import SparseSolve
from optlayers.status import Status

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse (invariant|CSR)", "ignore:.*Sparse invariant checks", "ignore:Sparse CSR tensor support"
)


class Sparse(NamedTuple):
    """minimise 1/2 x'Px + q'x subject to l <= A x <= u, with matrices as `scipy.sparse.coo_array`."""

    P: sp.coo_array
    q: np.ndarray
    A: sp.coo_array
    l: np.ndarray
    u: np.ndarray

    @property
    def values(self):
        """What is differentiated: entries of P, q, entries of A, l, u."""
        return [self.P.data, self.q, self.A.data, self.l, self.u]


def around(rng, P, A, equal=5):
    """The program with these matrices and random vectors; the first `equal` rows are equalities."""
    center = A @ rng.standard_normal(A.shape[1])
    l, u = (center + sign * rng.uniform(0.05, 0.3, A.shape[0]) for sign in (-1, 1))
    u[:equal] = l[:equal]
    return Sparse(P.tocoo(), rng.standard_normal(P.shape[0]), A.tocoo(), l, u)


def random_sparse(rng, n=60, m=40, equal=5):
    P = sp.random_array((n, n), density=min(3 / n, 1.0), rng=rng)
    A = sp.random_array((m, n), density=min(5 / n, 1.0), rng=rng) + sp.eye_array(m, n)
    return around(rng, P @ P.T + sp.eye_array(n), A, equal)


def banded(rng, n, width):
    """P (n, n) of half bandwidth `width` and A (n / 2, n) with 2 `width` neighbouring entries a row."""
    offsets = list(range(width + 1))
    root = sp.diags_array([rng.standard_normal(n - k) for k in offsets], offsets=offsets, shape=(n, n))
    rows = np.repeat(np.arange(n // 2), 2 * width)
    columns = (2 * rows + np.tile(np.arange(2 * width), n // 2)) % n
    A = sp.coo_array((rng.standard_normal(rows.size), (rows, columns)), shape=(n // 2, n))
    return around(rng, root.T @ root / width + 0.1 * sp.eye_array(n), A)


def sparse_matrix(frontend, values, like):
    """The matrix with the pattern of `like`: COO in torch, BCOO in JAX."""
    if frontend.name == "torch":
        indices = frontend.framework.tensor(np.stack([like.row, like.col]))
        return frontend.framework.sparse_coo_tensor(indices, values, like.shape)
    from jax.experimental.sparse import BCOO

    return BCOO((values, frontend.array(np.stack([like.row, like.col], -1), "int32")), shape=like.shape)


def dense_matrix(frontend, values, like):
    matrix = sparse_matrix(frontend, values, like)
    return matrix.to_dense() if frontend.name == "torch" else matrix.todense()


def solver_of(frontend, program, make=sparse_matrix, **options):
    """The function of `program.values` to (x, s, y)."""

    def solve(P, q, A, l, u):
        P, A = make(frontend, P, program.P), make(frontend, A, program.A)
        P = P if make is sparse_matrix else (P + P.mT) / 2
        return tuple(frontend.module.solve_qp(P, q, A, l, u, **{"order": 1, **options})[:3])

    return solve


def directions_of(rng, program):
    """One direction per value; the bounds of an equality stay as they are, since they must move together."""
    directions = [rng.standard_normal(v.shape) for v in program.values]
    for d in directions[3:]:
        d[program.l == program.u] = 0.0
    return directions


def assert_differences(frontend, solve, program, cotangents, gradients, rng, tolerance, step=1e-5):
    """The gradient in each value agrees with a central difference in a random direction."""

    def total(values):
        z = [frontend.numpy(z) for z in solve(*map(frontend.array, values))]
        return sum((c * z).sum() for c, z in zip(cotangents, z, strict=True))

    values = program.values
    for i, d in enumerate(directions_of(rng, program)):
        ahead, behind = (total([*values[:i], values[i] + h * d, *values[i + 1 :]]) for h in (step, -step))
        expected = (ahead - behind) / (2 * step)
        assert abs((gradients[i] * d).sum() - expected) <= tolerance * (1 + abs(expected))


def test_agrees_with_the_dense_path_and_with_differences(frontend, rng):
    program = random_sparse(rng)
    cotangents = [rng.standard_normal(k) for k in (60, 40, 40)]
    both = [solver_of(frontend, program, make) for make in (sparse_matrix, dense_matrix)]
    (z, gradients), (expected, dense_gradients) = (
        frontend.differentiable(solve)(program.values, cotangents) for solve in both
    )
    for a, b in zip(z, expected, strict=True):
        assert_close(a, b, 1e-8)
    for a, b in zip(gradients, dense_gradients, strict=True):
        assert_close(a, b, 1e-6)
    assert_differences(frontend, both[0], program, cotangents, gradients, rng, 1e-6)


def cone_program(rng, cones, n=12):
    """P, q, A, b of a strictly feasible program with rows on the boundary of their cones."""
    m = cones.rows
    A = sp.coo_array(sp.random_array((m, n), density=0.4, rng=rng) + sp.eye_array(m, n))
    s, y = interior_points(cones)
    root = sp.random_array((n, n), density=0.2, rng=rng)
    P = sp.coo_array(root @ root.T + sp.eye_array(n))
    x = rng.standard_normal(n)
    return P, -P @ x - A.T @ y - 3 * rng.standard_normal(n), A, A @ x + s


def interior_points(cones):
    """A point inside K and one inside K*."""
    soc = [np.eye(k)[0] for k in cones.soc]
    psd = [np.eye(k)[np.tril_indices(k)] for k in cones.psd]
    both = [np.zeros(cones.zero), np.ones(cones.nonneg), *soc, *psd]
    s = [*both, *[np.array([0.0, 1.0, 2.0])] * cones.exp, *[np.ones(len(a) + 1) * 0.5 for a in cones.pow]]
    y = [*both, *[np.array([-1.0, 0.5, 1.0])] * cones.exp, *[np.ones(len(a) + 1) * 0.5 for a in cones.pow]]
    return np.concatenate(s), np.concatenate(y)


CONES = {
    "soc": Cones(soc=(3, 5)),
    "mixed": Cones(zero=1, nonneg=2, soc=(4,)),
    "psd": Cones(nonneg=1, psd=(3,)),
    "exp": Cones(nonneg=1, exp=2),
    "pow": Cones(nonneg=1, pow=((0.3, 0.7),)),
}


@pytest.mark.parametrize("name", CONES)
def test_curved_cones_agree_with_the_dense_path(frontend, rng, name):
    cones = CONES[name]
    P, q, A, b = cone_program(rng, cones)

    def solver(make):
        def solve(Pv, q, Av, b):
            P_, A_ = make(frontend, Pv, P), make(frontend, Av, A)
            P_ = P_ if make is sparse_matrix else (P_ + P_.mT) / 2
            return tuple(frontend.module.solve_conic(P_, q, A_, b, cones, order=1, solver="CLARABEL")[:3])

        return solve

    values = [P.data, q, A.data, b]
    cotangents = [rng.standard_normal(k) for k in (q.size, b.size, b.size)]
    results = [
        frontend.differentiable(solver(make))(values, cotangents) for make in (sparse_matrix, dense_matrix)
    ]
    for a, expected in zip(results[0][0], results[1][0], strict=True):
        assert_close(a, expected, 1e-8)
    for a, expected in zip(results[0][1], results[1][1], strict=True):
        assert_close(a, expected, 1e-6)


def test_derivatives_of_both_orders_and_modes_in_torch(rng):
    """Forward mode of the vectors only: torch cannot make a sparse tensor of dual numbers."""
    autograd = pytest.importorskip("torch").autograd
    from frontends import FRONTENDS

    frontend = FRONTENDS["torch"]()
    program = random_sparse(rng, 4, 3, equal=0)
    values = [frontend.array(v).requires_grad_() for v in program.values]
    solve = solver_of(frontend, program, order=2)
    tolerance = {"eps": 1e-5, "atol": 1e-6, "rtol": 1e-5}
    assert autograd.gradcheck(solve, values, **tolerance)
    assert autograd.gradgradcheck(solve, values, **tolerance)
    vectors = [values[i] for i in (1, 3, 4)]
    solve = lambda q, l, u: tuple(frontend.module.solve_qp(program.P, q, program.A, l, u)[:3])
    assert autograd.gradcheck(solve, vectors, check_forward_ad=True, **tolerance)
    assert autograd.gradgradcheck(solve, vectors, check_fwd_over_rev=True, **tolerance)


@pytest.mark.slow
def test_second_derivatives_in_jax(rng):
    jax = pytest.importorskip("jax")
    from frontends import FRONTENDS

    frontend = FRONTENDS["jax"]()
    program = random_sparse(rng, 5, 4, equal=0)
    values = [frontend.array(v) for v in program.values]

    def second(make):
        solve = solver_of(frontend, program, make, order=2)
        total = lambda P, q: (solve(P, q, *values[2:])[0] ** 2).sum()
        along = lambda q: jax.grad(total)(values[0], q)
        return jax.jit(jax.jacfwd(along))(values[1])

    assert_close(second(sparse_matrix), second(dense_matrix), 1e-8)


def test_batch_of_vectors_equals_its_problems(frontend, rng):
    program = random_sparse(rng, 20, 12)
    q = program.q + 0.3 * rng.standard_normal((3, 20))
    cotangents = [rng.standard_normal((3, k)) for k in (20, 12, 12)]
    solve = solver_of(frontend, program)
    P, _, A, l, u = program.values
    z, gradients = frontend.differentiable(solve)([P, q, A, l, u], cotangents)
    single = frontend.differentiable(solve)
    alone = [single([P, q[i], A, l, u], [c[i] for c in cotangents]) for i in range(3)]
    for k in range(3):
        assert_close(z[k], np.stack([one[0][k] for one in alone]), 1e-12)
    assert_close(gradients[1], np.stack([one[1][1] for one in alone]), 1e-10)
    for k in (0, 2, 3, 4):
        assert_close(gradients[k], sum(one[1][k] for one in alone), 1e-10)


def test_vmap_equals_the_batch(frontend, rng):
    program = random_sparse(rng, 10, 6)
    P, _, A, l, u = (frontend.array(v) for v in program.values)
    q = frontend.array(program.q + 0.3 * rng.standard_normal((3, 10)))
    # torch.func cannot map a sparse tensor, so that the matrices are constants.
    solve = lambda q: frontend.module.solve_qp(program.P, q, program.A, l, u, order=1).x
    assert_close(frontend.transforms.vmap(solve)(q), solve(q), 1e-12)
    gradient = frontend.transforms.grad(lambda q: (solve(q) ** 2).sum())
    assert_close(frontend.transforms.vmap(gradient)(q), gradient(q), 1e-10)


def test_scipy_matrices_are_constants_and_may_stand_beside_dense_ones(frontend, rng):
    program = random_sparse(rng, 12, 8)
    P, q, A, l, u = (frontend.array(v) for v in program.values)
    expected = solver_of(frontend, program)(P, q, A, l, u)[0]
    for form in ("csr", "csc", "coo"):
        x = frontend.module.solve_qp(program.P.asformat(form), q, program.A.asformat(form), l, u).x
        assert_close(frontend.numpy(x), frontend.numpy(expected), 1e-12)
    x = frontend.module.solve_qp(frontend.array(program.P.toarray()), q, program.A, l, u).x
    assert_close(frontend.numpy(x), frontend.numpy(expected), 1e-12)


def test_linear_programs_and_missing_arguments(frontend, rng):
    solve_qp = frontend.module.solve_qp
    q = np.array([1.0, -2.0, 0.5])
    ones = frontend.array(np.ones(3))
    box = solve_qp(None, frontend.array(q), sp.eye_array(3), -ones, ones)
    assert_close(frontend.numpy(box.x), -np.sign(q), 1e-10)
    for A in (None, sp.coo_array((0, 3)), sp.coo_array((2, 3))):
        free = solve_qp(sp.eye_array(3), frontend.array(q), A)
        assert_close(frontend.numpy(free.x), -q, 1e-10)
        assert free.s.shape == free.y.shape == (0 if A is None else A.shape[0],)


def test_redundant_rows_give_the_least_norm_derivative(frontend, rng):
    P, A = sp.eye_array(3), sp.coo_array(np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))
    program = Sparse(sp.coo_array(P), np.array([1.0, 2.0, 3.0]), A, np.ones(2), np.ones(2))
    cotangents = [rng.standard_normal(k) for k in (3, 2, 2)]
    cotangents[2][:] = 0.0
    both = [
        frontend.differentiable(solver_of(frontend, program, make))(program.values, cotangents)
        for make in (sparse_matrix, dense_matrix)
    ]
    assert_close(both[0][0][0], both[1][0][0], 1e-8)
    assert_close(both[0][1][1], both[1][1][1], 1e-6)
    arrays = [frontend.array(v) for v in (program.q, program.l, program.u)]
    solution = frontend.module.solve_qp(program.P, arrays[0], program.A, *arrays[1:])
    assert bool(solution.regularity.x) and not bool(solution.regularity.y)


@pytest.mark.parametrize("a", [1.0, 128.0])
def test_redundant_rows_that_move_together(frontend, rng, a):
    """Equations of t of which one is a multiple of the other: scaled they are equal, and so are dy / dt."""
    rows, d = sp.coo_array(np.array([[1.0, 1.0], [a, a]])), np.array([1.0, a])
    program = Sparse(sp.eye_array(2).tocoo(), np.array([1.0, 0.3]), rows, d, d)
    cotangents = [np.zeros(2), np.zeros(2), rng.standard_normal(2)]
    _, gradients = frontend.differentiable(solver_of(frontend, program))(program.values, cotangents)
    assert_close((gradients[3] + gradients[4]) @ d, cotangents[2] @ (-0.25 / d), 1e-7)


def test_outcomes(frontend):
    solve_qp, eye = frontend.module.solve_qp, sp.eye_array(2)
    q = frontend.array(np.array([[1.0, 1.0], [np.nan, 1.0]]))
    ones = frontend.array(np.ones(2))
    codes = lambda s: frontend.numpy(s.status).tolist()
    some = solve_qp(eye, q, eye, -ones, ones, on_failure="nan")
    assert codes(some) == [Status.SOLVED.code, Status.NON_FINITE.code]
    assert np.isnan(frontend.numpy(some.x)).tolist() == [[False, False], [True, True]]
    infeasible = solve_qp(
        eye,
        q[0],
        sp.coo_array(np.ones((2, 2))),
        ones * frontend.array([2.0, -2.0]),
        ones * frontend.array([3.0, -1.0]),
        on_failure="mask",
    )
    assert codes(infeasible) == Status.PRIMAL_INFEASIBLE.code
    unbounded = solve_qp(None, q[0], eye, None, ones, on_failure="mask")
    assert codes(unbounded) == Status.DUAL_INFEASIBLE.code
    with pytest.raises(frontend.module.SolveError, match="NaN"):
        solve_qp(eye, q, eye, -ones, ones)


@pytest.mark.parametrize(
    "P", [np.diag([1.0, -0.5, 2.0]), np.diag([1e6, -0.5, 0]), np.array([[1.0, 2, 0], [2, 1, 0], [0, 0, 0]])]
)
def test_not_convex(frontend, P):
    eye, ones = sp.eye_array(3), frontend.array(np.ones(3))
    for solver in (None, "OSQP"):
        solution = frontend.module.solve_qp(
            sp.coo_array(P), ones, eye, -ones, ones, solver=solver, on_failure="mask"
        )
        assert frontend.numpy(solution.status) == Status.NON_CONVEX.code


@pytest.mark.parametrize("l, u", [(1.0, 1 - 1e-12), (np.inf, np.inf), (-np.inf, -np.inf), (np.inf, -np.inf)])
def test_bounds_that_no_point_is_between(frontend, l, u):
    eye, bounds = sp.eye_array(2), (frontend.array(np.array([z, 0.0])) for z in (l, u))
    q = frontend.array(np.ones(2))
    solution = frontend.module.solve_qp(eye, q, eye, *bounds, eps=1e-3, on_failure="mask")
    assert frontend.numpy(solution.status) == Status.PRIMAL_INFEASIBLE.code


def test_failed_problems_have_no_derivative(frontend, rng):
    eye = sp.eye_array(2)

    def solve(q, l):
        return tuple(frontend.module.solve_qp(eye, q, eye, l, 0 * l + 0.5, on_failure="mask", order=1)[:3])

    values = [rng.standard_normal((2, 2)), np.array([[-1.0, -1.0], [1.0, -1.0]])]
    _, gradients = frontend.differentiable(solve)(values, rng.standard_normal((3, 2, 2)))
    assert np.isfinite(gradients[0]).all() and not gradients[0][1].any() and not gradients[1][1].any()


def test_nan_in_a_vector_does_not_reach_shared_matrices(frontend, rng):
    program = random_sparse(rng, 12, 8)._replace(l=-np.ones(8), u=np.ones(8))
    gradient = frontend.differentiable(solver_of(frontend, program, on_failure="mask"))
    vectors, cotangents = (1, 3, 4), [rng.standard_normal(k) for k in (12, 8, 8)]
    _, expected = gradient(program.values, cotangents)
    together = [np.stack([v, v]) if i in vectors else v for i, v in enumerate(program.values)]
    for i in vectors:
        values = [v.copy() for v in together]
        values[i][1] = np.nan
        _, gradients = gradient(values, [np.stack([c, c]) for c in cotangents])
        for k in (0, 2):
            assert_close(gradients[k], expected[k], 1e-10)


def test_ignored_failures_are_differentiated_like_solutions(frontend):
    eye, one = sp.eye_array(2), frontend.array(np.ones(2))
    hasty = {"solver": Clarabel(max_iter=1, refine=0), "order": 1}
    for policy, expected in (("mask", 0.0), ("ignore", -1.0)):
        options = {**hasty, "on_failure": policy}
        solve = lambda q, options=options: (frontend.module.solve_qp(eye, q, eye, -one, one, **options).x,)
        values = [np.array([[-0.3, 0.5], [np.nan, 0.5]])]
        _, (gradient,) = frontend.differentiable(solve)(values, [np.ones((2, 2))])
        assert_close(gradient, np.array([[expected, expected], [0.0, 0.0]]), 1e-7)


class NeverCalled(Clarabel):
    def _solve(self, program, made=None):
        raise AssertionError("the solver was called")


def test_units_do_not_matter(frontend):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        program = random_sparse(rng, 12, 8, equal=2)
        x = frontend.numpy(solver_of(frontend, program)(*map(frontend.array, program.values))[0])
        rows, columns = (10 ** rng.uniform(-d, d, k) for d, k in ((6, 8), (3, 12)))
        P, A = (
            sp.diags_array(left) @ M @ sp.diags_array(columns)
            for left, M in ((columns, program.P), (rows, program.A))
        )
        vectors = (columns * program.q, rows * program.l, rows * program.u)
        q, l, u = map(frontend.array, vectors)
        solution = frontend.module.solve_qp(P, q, A, l, u, on_failure="mask")
        assert frontend.numpy(solution.status) == Status.SOLVED.code
        assert_close(columns * frontend.numpy(solution.x), x, 1e-7)


def test_warm_start_spares_the_solver(frontend, rng):
    program = random_sparse(rng, 20, 12)
    P, q, A, l, u = program
    q, l, u = (frontend.array(v) for v in (q, l, u))
    solve = lambda q, **options: frontend.module.solve_qp(P, q, A, l, u, **options)
    again = solve(1.001 * q, warm_start=solve(q), solver=NeverCalled())
    assert frontend.numpy(again.status) == Status.SOLVED.code
    assert_close(frontend.numpy(again.x), frontend.numpy(solve(1.001 * q).x), 1e-9)


def test_results_do_not_depend_on_earlier_ones(rng, monkeypatch):
    """Solvers of Clarabel are used again, by one thread at a time, unless the structure changes."""
    made, set_up = [], Clarabel._set_up
    count = lambda *args, **options: made.append(1) or set_up(*args, **options)
    monkeypatch.setattr(Clarabel, "_set_up", count)
    P, q, A, l, u = random_sparse(rng, 20, 12)

    def problem(scale, curvature=1.0, has_upper=True):
        bound = u if has_upper else np.where(l == u, u, np.inf)
        entries = (curvature * scale * P.data, P.row, P.col, A.data / scale, A.row, A.col)
        return [x[None] for x in (*entries, scale**2 * q, 0 * l, -bound, -l)]

    problems = [problem(1.0), problem(30.0), problem(1.0, 0.0), problem(0.1), problem(1.0, has_upper=False)]
    new = lambda: SparseSolve(12, 20, Cones(), (Clarabel(),), 1e-9)
    expected = [new().solve(*data) for data in problems]
    assert [int(results[6][0]) for results in expected] == [0, 0, Status.DUAL_INFEASIBLE.code, 0, 0]

    solve, made[:] = new(), []
    for _ in range(2):
        for data, results in zip(problems, expected, strict=True):
            for a, b in zip(solve.solve(*data), results, strict=True):
                np.testing.assert_array_equal(a, b)
    assert len(made) == 8  # in both rounds all but the second problem

    def concurrently(i):
        return all(map(np.array_equal, solve.solve(*problems[i % 2]), expected[i % 2]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(concurrently, range(40)))


def test_derivatives_do_not_depend_on_earlier_calls(rng):
    """Not either where few Newton steps were enough, whose factors have more regularisation."""
    P, q, A, l, u = random_sparse(rng, 20, 12)
    entries = P.data, P.row, P.col, A.data, A.row, A.col
    data = [x[None] for x in (*entries, q, 0 * l, -u, -l)]
    solve = SparseSolve(12, 20, Cones(), (Clarabel(),), 1e-3)
    x, v, *_, D, E, c, _, _ = solve.solve(*data)
    s = np.clip(v, -E * u, -E * l)
    start = D * x + 1e-3 * rng.standard_normal(x.shape), s / E, (s - v) * E / c
    _, _, _, steps, x_unique, y_unique, _, *rest = solve.solve(*data, *start)
    assert steps == 1
    frozen = *data[:6], x_unique, y_unique, np.ones(1), *rest
    r = rng.standard_normal((1, 32))
    expected = SparseSolve(12, 20, Cones(), (Clarabel(),), 1e-3).invert(r, *frozen)
    np.testing.assert_array_equal(solve.invert(r, *frozen), expected)


def test_factorisations_are_freed_in_the_thread_that_made_them(frontend, rng, monkeypatch):
    """In another one SciPy would not give their memory back."""
    freed, count = [], []

    class Tracked:
        def __init__(self, lu):
            self.lu, self.U, self.perm_r, self.perm_c = lu, lu.U, lu.perm_r, lu.perm_c
            self.thread = get_ident()
            count.append(1)

        def solve(self, r):
            return self.lu.solve(r)

        def __del__(self):
            freed.append(get_ident() == self.thread)

    splu = linalg.splu
    monkeypatch.setattr(linalg, "splu", lambda *args, **options: Tracked(splu(*args, **options)))
    program = random_sparse(rng, 20, 12)
    q = program.q + 0.3 * rng.standard_normal((3, 20))
    P, _, A, l, u = program.values
    cotangents = [np.ones((3, k)) for k in (20, 12, 12)]
    frontend.differentiable(solver_of(frontend, program))([P, q, A, l, u], cotangents)
    assert len(freed) == len(count) > 0 and all(freed)


@pytest.mark.parametrize("far", [1e12, 1e20, 1e30])
def test_far_bounds_are_as_good_as_none(far):
    P, q, A, l, u = banded(np.random.default_rng(0), 200, 3)

    def solve(bound):
        upper = np.where((l == u) | (np.arange(l.size) % 2 == 0), u, bound)
        data = (P.data, P.row, P.col, A.data, A.row, A.col, q, 0 * l, -upper, -l)
        return SparseSolve(*A.shape, Cones(), (Clarabel(),), 1e-9).solve(*(x[None] for x in data))

    results, expected = solve(far), solve(np.inf)
    assert results[6] == expected[6] == Status.SOLVED.code
    assert_close(results[0], expected[0], 1e-9)


@pytest.mark.parametrize("solver", ["OSQP", "SCS"])
def test_other_host_solvers(frontend, rng, solver):
    program = random_sparse(rng, 20, 12)
    values = [frontend.array(v) for v in program.values]
    expected = solver_of(frontend, program)(*values)
    for a, b in zip(solver_of(frontend, program, solver=solver)(*values), expected, strict=True):
        assert_close(frontend.numpy(a), frontend.numpy(b), 1e-8)


def test_single_precision_stays(frontend, rng):
    program = random_sparse(rng, 20, 12)
    solve = solver_of(frontend, program)
    z, gradients = frontend.differentiable(solve, "float32")(
        program.values, [np.ones(k) for k in (20, 12, 12)]
    )
    exact, exact_gradients = frontend.differentiable(solve)(
        program.values, [np.ones(k) for k in (20, 12, 12)]
    )
    assert {x.dtype for x in (*z, *gradients)} == {np.dtype("float32")}
    for a, b in zip((*z, *gradients), (*exact, *exact_gradients), strict=True):
        assert_close(a, b, 1e-4)


def test_errors_say_what_to_do(frontend, rng):
    solve_qp, eye = frontend.module.solve_qp, sp.eye_array(3)
    q = frontend.array(np.ones(3))
    with pytest.raises(ValueError, match=r"P must have shape \(3, 3\)"):
        solve_qp(sp.eye_array(2), q)
    with pytest.raises(ValueError, match=r"A must have shape \('m', 3\)"):
        solve_qp(eye, q, sp.eye_array(2), None, None)
    for bounds in ((q[:2], q), (q[:2], q[:2])):
        with pytest.raises(ValueError, match=r"l must have shape \(..., 3\)"):
            solve_qp(eye, q, eye, *bounds)
    with pytest.raises(ValueError, match="Clarabel, OSQP or SCS"):
        solve_qp(eye, q, solver="ADMM")
    with pytest.raises(ValueError, match="gradient must be 'exact'"):
        solve_qp(eye, q, gradient="lpgd")
    with pytest.raises(ValueError, match="the cones have 2 rows"):
        frontend.module.solve_conic(eye, q, eye, q, Cones(nonneg=2))
    with pytest.raises(ValueError, match="linear constraints only"):
        frontend.module.solve_conic(eye, q, eye, q, Cones(soc=(3,)), solver="OSQP")


def test_one_triangle_of_P_is_refused(frontend, rng):
    triangle, q = sp.coo_array(np.triu(np.ones((3, 3)))), frontend.array(np.ones(3))
    for P in (triangle, sparse_matrix(frontend, frontend.array(triangle.data), triangle)):
        with pytest.raises(ValueError, match="both triangles"):
            frontend.module.solve_qp(P, q)


def test_places_that_make_no_matrix(frontend, rng):
    q = frontend.array(np.ones(2))
    if frontend.name == "torch":
        torch = frontend.framework
        P, message = torch.sparse_coo_tensor([[0, 1]], torch.eye(2), (2, 2)), "must be sparse, got 1 dense"
    else:
        like = sp.coo_array(([1.0, 1.0], ([0, 1], [0, 1])), shape=(2, 2))
        P, message = sparse_matrix(frontend, q, like), "must not be negative, got -1"
        P.indices = P.indices - 1
    with pytest.raises(ValueError, match=message):
        frontend.module.solve_qp(P, q)


def test_vectors_that_torch_negates_when_read():
    """As it does imaginary parts of conjugates."""
    torch = pytest.importorskip("torch")
    from optlayers.torch import solve_qp

    q = torch.complex(torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])).conj().imag
    assert q.is_neg()
    assert torch.equal(solve_qp(sp.eye_array(3), q).x, -q)


def test_gradients_of_torch_tensors_keep_their_layout(rng):
    torch = pytest.importorskip("torch")
    from optlayers.torch import solve_qp

    program = random_sparse(rng, 12, 8)
    gradients = {}
    for layout in (torch.sparse_coo, torch.sparse_csr):
        P = torch.tensor(program.P.toarray()).to_sparse(layout=layout).requires_grad_()
        A = torch.tensor(program.A.toarray()).to_sparse(layout=layout).requires_grad_()
        solve_qp(
            P, *(torch.tensor(program.q), A, torch.tensor(program.l), torch.tensor(program.u))
        ).x.sum().backward()
        assert P.grad.layout == A.grad.layout == layout
        gradients[layout] = P.grad.to_dense(), A.grad.to_dense()
    for a, b in zip(*gradients.values(), strict=True):
        assert_close(a, b, 1e-12)


def test_padding_of_bcoo_is_ignored(rng):
    jnp = pytest.importorskip("jax.numpy")
    from jax.experimental.sparse import BCOO

    from optlayers.jax import solve_qp

    P = BCOO.fromdense(jnp.eye(3), nse=5)
    assert_close(solve_qp(P, jnp.ones(3)).x, -np.ones(3), 1e-10)


def assert_large(frontend, program, rng):
    """Solved, and the gradient agrees with a difference in one direction of each value."""
    n, m = program.q.size, program.l.size
    cotangents = [rng.standard_normal(k) / np.sqrt(n) for k in (n, m, m)]
    solve = solver_of(frontend, program)
    _, gradients = frontend.differentiable(solve)(program.values, cotangents)
    assert [g.shape for g in gradients] == [v.shape for v in program.values]
    # Short enough that no constraint becomes active or inactive.
    assert_differences(frontend, solve, program, cotangents, gradients, rng, 1e-5, step=1e-7)


def test_banded(frontend, rng):
    assert_large(frontend, banded(rng, 2000, 5), rng)


@pytest.mark.slow
def test_large_banded(frontend, rng):
    """n = 20,000 and 20 entries a row, density 1e-3: 4 s forward, 0.3 s backward, 0.6 GB on one core."""
    assert_large(frontend, banded(rng, 20_000, 10), rng)
