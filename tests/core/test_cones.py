"""Cones: projections against Moreau's conditions and CVXPY, derivatives against differences."""

import pickle
from functools import cache, partial

import cvxpy as cp
import numpy as np
import pytest

from optlayers import cones as K
from optlayers.cones import Cones
from optlayers.ops import numpy as numpy_ops

# Every family; equal cones apart from one another.
ALL = Cones(1, 2, (3, 1, 4, 3), (3, 2, 3), 2, ((0.3, 0.7), (0.2, 0.3, 0.5), (0.9, 0.1)))


def quick_options(jax):
    """XLA without the optimisations that cost most of the time of these tests, where it knows the options."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(abs, compiler_options=options)(1.0)
    except Exception:
        return {}
    return options


class Numeric:
    """`optlayers.cones` on NumPy arrays. Compiles each function once in JAX: batches are padded."""

    def __init__(self, ops):
        self.ops = ops
        if ops.__name__.endswith("torch"):
            import torch

            self.array, self.compile, self.transforms = torch.tensor, lambda f: f, torch.func
        else:
            import jax

            self.array, self.transforms = jax.numpy.asarray, jax
            self.compile = partial(jax.jit, compiler_options=quick_options(jax))
        self.compiled = {}

    def call(self, function, *args, key=None):
        """A list of arrays, or an array. All `args` are batches; functions of one `key` are the same."""
        batch = len(args[0])
        size = next(n for n in (0, 256, 4096, 16384) if n >= batch)
        padded = [np.concatenate([x, np.zeros((size - batch, *x.shape[1:]), x.dtype)]) for x in args]
        function = self.compiled.setdefault(key or function, self.compile(function))
        outputs = function(*map(self.array, padded))
        if isinstance(outputs, list):
            return [np.asarray(x)[:batch] for x in outputs]
        return np.asarray(outputs)[:batch]

    def jvp(self, function, x, dx):
        return self.transforms.jvp(function, (x,), (dx,))[1]

    def vjp(self, function, x, w):
        return self.transforms.vjp(function, x)[1](w)[0]

    def project(self, cones, v):
        return self.call(lambda v: K.project(self.ops, cones, v), v, key=("project", cones))

    def linearize(self, cones, v):
        """The flat list of arrays."""
        flat = self.call(lambda v: K.flatten(K.linearize(self.ops, cones, v)), v, key=("linearize", cones))
        assert [(x.shape, "float") for x in flat] == K.linearization_shapes(cones, len(v))
        assert all(x.dtype == v.dtype for x in flat)
        return flat

    def spectral(self, cones, v, g, u, *more, columns=True, rotated=False):
        def apply(u, *arrays):
            data, flat = arrays[: len(more)], arrays[len(more) :]
            lin = K.unflatten(cones, flat)
            return K.spectral(self.ops, cones, lin, lambda d: g(d, *data), u, columns, rotated)

        return self.call(apply, u, *more, *self.linearize(cones, v))

    def derivative(self, cones, v):
        """D as matrices (B, m, m)."""

        def apply(v, *flat):
            identity = self.ops.eye(cones.rows, v)
            return K.spectral(self.ops, cones, K.unflatten(cones, flat), lambda d: d, identity, columns=True)

        return self.call(apply, v, *self.linearize(cones, v), key=("derivative", cones))


numeric_of = cache(Numeric)


@pytest.fixture
def numeric(ops):
    return numeric_of(ops)


def pieces(cones):
    """Kind, parameter and rows of every single cone."""
    kinds = [("zero", 1)] * cones.zero + [("nonneg", 1)] * cones.nonneg
    kinds += [("soc", n) for n in cones.soc] + [("psd", n) for n in cones.psd]
    kinds += [("exp", 3)] * cones.exp + [("pow", weights) for weights in cones.pow]
    start = 0
    for kind, parameter in kinds:
        rows = {"psd": lambda n: n * (n + 1) // 2, "pow": lambda a: len(a) + 1}.get(kind, int)(parameter)
        yield kind, parameter, slice(start, start + rows)
        start += rows
    assert start == cones.rows


def matrices(v, n):
    """Symmetric matrices of scaled half-vectors (B, n (n + 1) / 2)."""
    M = np.zeros((len(v), n, n))
    j, i = np.tril_indices(n)
    M[:, i, j] = M[:, j, i] = v * np.where(i == j, 1, 0.5**0.5)
    return M


def half_vector(M):
    j, i = np.tril_indices(len(M))
    return M[i, j] * np.where(i == j, 1, 2**0.5)


def outside(kind, parameter, s, dual, tolerance):
    """Which rows of s (B, d) are out of the cone, or its dual, after a shift by `tolerance` into it."""
    if kind == "zero":
        return np.zeros(len(s), bool) if dual else np.abs(s[:, 0]) > tolerance
    if kind == "nonneg":
        return s[:, 0] < -tolerance
    if kind == "soc":
        return np.linalg.norm(s[:, 1:], axis=1) > s[:, 0] + tolerance
    if kind == "psd":
        return np.linalg.eigvalsh(matrices(s, parameter))[:, 0] < -tolerance
    with np.errstate(all="ignore"):
        if kind == "exp":
            x, y, z = (s + tolerance * np.array([-1, 1, 1])).T
            if dual:  # -x exp(y / x - 1) <= z, x < 0
                return ~((x < 0) & (-x * np.exp(y / x - 1) <= z))
            return ~((y > 0) & (y * np.exp(x / y) <= z))
        w = (s[:, :-1] + tolerance) / (np.array(parameter) if dual else 1.0)
        return ~(np.prod(w ** np.array(parameter), axis=1) >= np.abs(s[:, -1]) - tolerance)


def assert_moreau(cones, v, s, tolerance):
    """s in K, s - v in K*, s orthogonal to s - v: s is the projection. Relative to each cone's part of v."""
    assert np.isfinite(s).all()
    for kind, parameter, rows in pieces(cones):
        scale = np.abs(v[:, rows]).max(axis=1, keepdims=True)
        scale[scale == 0] = 1
        primal, dual = s[:, rows] / scale, (s[:, rows] - v[:, rows]) / scale
        for part, is_dual in ((primal, False), (dual, True)):
            wrong = outside(kind, parameter, part, is_dual, tolerance)
            assert not wrong.any(), f"{kind} {'dual' if is_dual else 'primal'} at {v[wrong, rows][0]}"
        gap = np.abs((primal * dual).sum(axis=1))
        assert gap.max(initial=0) <= tolerance, f"{kind} orthogonality at {v[gap.argmax(), rows]}"


def scaled_points(rng, cones, count):
    """Entries of any sign from 1e-6 to 1e6."""
    return rng.standard_normal((count, cones.rows)) * 10 ** rng.uniform(-6, 6, (count, cones.rows))


def special_points(rng, cones, project, tiny=1e-30):
    """On the boundary of K and of its polar, next to them, in the apex, with zero entries, on the axes."""
    v = rng.standard_normal((8, cones.rows)) * 10 ** rng.uniform(-3, 3, (8, 1))
    s = project(cones, v)
    boundary = np.concatenate([s, v - s])
    near = boundary * (
        1 + rng.choice([1e-15, 1e-12, 1e-8], boundary.shape) * rng.standard_normal(boundary.shape)
    )
    corners = rng.choice([-1, -1e-8, -tiny, 0, tiny, 1e-8, 1], (60, cones.rows))
    signs = rng.choice([-1.0, 0.0, 1.0], (60, cones.rows))
    apex = np.outer([0, tiny, -tiny], np.ones(cones.rows))
    return np.concatenate([boundary, near, corners, signs, apex])


# Projections.


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 3e-6)])
def test_projection_satisfies_moreau(numeric, rng, dtype, tolerance):
    v = np.concatenate([scaled_points(rng, ALL, 3900), special_points(rng, ALL, numeric.project)])
    s = numeric.project(ALL, v.astype(dtype))
    assert s.dtype == dtype
    assert_moreau(ALL, v.astype(dtype).astype(float), s.astype(float), tolerance)


def exponential_pairs(rng, count, ratio):
    """Points s = (r, 1, exp(r)), normalised, and v = s - y with y normal to the cone at s."""
    r, mu = rng.uniform(-ratio, ratio, count), 10 ** rng.uniform(-8, 8, count)
    s = np.stack([r, np.ones(count), np.exp(r)], axis=1)
    y = np.stack([-np.exp(r), (r - 1) * np.exp(r), np.ones(count)], axis=1)
    s, y = s / np.linalg.norm(s, axis=1, keepdims=True), y / np.linalg.norm(y, axis=1, keepdims=True)
    return s, s - mu[:, None] * y


def test_exponential_projection_is_accurate(numeric, rng):
    s, v = exponential_pairs(rng, 10_000, 30)
    scale = 10 ** rng.uniform(-8, 8, (10_000, 1))
    error = np.abs(numeric.project(Cones(exp=1), scale * v) / scale - s).max(axis=1)
    # v itself is rounded relative to its largest entry.
    assert (error / np.abs(v).max(axis=1)).max() < 1e-14


def test_projection_from_another_one(rng):
    """As ADMM calls it: accurate once the points no longer move, wherever the first one was."""
    v = rng.standard_normal((20_000, ALL.rows))
    v = v * 10 ** rng.uniform(-3, 3, (len(v), 1))
    project = np.errstate(all="ignore")(partial(K.project, numpy_ops, ALL))
    exact = project(v)
    for start in (v + 0.1 * rng.standard_normal(v.shape) * abs(v), rng.standard_normal(v.shape)):
        s = project(start)
        for _ in range(4):
            s = project(v, s)
        assert (abs(s - exact).max(1) <= 1e-13 * abs(v).max(1)).all()


def solved_by_cvxpy(cones, v):
    s = cp.Variable(cones.rows)
    constraints = []
    for kind, parameter, rows in pieces(cones):
        part = s[rows]
        if kind == "soc":
            constraints.append(cp.SOC(part[0], part[1:]) if parameter > 1 else part[0] >= 0)
        elif kind == "psd":
            M = cp.Variable((parameter, parameter), PSD=True)
            j, i = np.tril_indices(parameter)
            constraints += [
                part[row] == M[i[row], j[row]] * (1 if i[row] == j[row] else 2**0.5) for row in range(len(i))
            ]
        elif kind == "exp":
            constraints.append(cp.ExpCone(part[0], part[1], part[2]))
        elif kind == "pow":
            # CVXPY 1.9.3 fails on PowConeND of different lengths in one problem.
            if len(parameter) == 2:
                constraints.append(cp.PowCone3D(*part, parameter[0]))
            else:
                constraints.append(cp.PowConeND(part[:-1], part[-1], np.array(parameter)))
        else:
            constraints.append(part == 0 if kind == "zero" else part >= 0)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(s - v)), constraints)
    problem.solve(cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return s.value


def test_projection_agrees_with_cvxpy(numeric, rng):
    v = rng.standard_normal((3, ALL.rows))
    expected = np.stack([solved_by_cvxpy(ALL, row) for row in v])
    np.testing.assert_allclose(numeric.project(ALL, v), expected, rtol=0, atol=1e-6)


def test_margins(numeric, ops, rng):
    v = rng.standard_normal((5, ALL.rows))
    s = numeric.project(ALL, v)
    margin = numeric.call(lambda s: K.margin(ops, ALL, s), np.concatenate([s, v]))
    dual = numeric.call(lambda y: K.dual_margin(ops, ALL, y), np.concatenate([s - v, -v]))
    assert max(margin[:5].max(), dual[:5].max()) < 1e-14
    np.testing.assert_allclose(margin[5:], np.abs(s - v).max(axis=1))
    np.testing.assert_allclose(dual[5:], np.abs(s).max(axis=1))


# The derivative D.


def differences(numeric, cones, v, step):
    """Central differences of the projection: (B, m, m)."""
    shifts = step * np.eye(cones.rows)
    up, down = (
        numeric.project(cones, (v[:, None] + sign * shifts).reshape(-1, cones.rows)).reshape(*v.shape, -1)
        for sign in (1, -1)
    )
    return ((up - down) / (2 * step)).swapaxes(1, 2)


def test_derivative_agrees_with_differences(numeric, rng):
    v = rng.standard_normal((20, ALL.rows))
    D = numeric.derivative(ALL, v)
    np.testing.assert_allclose(D, differences(numeric, ALL, v, 1e-6), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_derivative_is_a_symmetric_contraction_everywhere(numeric, rng, dtype):
    v = np.concatenate([scaled_points(rng, ALL, 90), special_points(rng, ALL, numeric.project)])
    D = numeric.derivative(ALL, v.astype(dtype))
    rounding = 20 * np.finfo(dtype).eps
    assert np.isfinite(D).all()
    assert np.abs(D - D.swapaxes(1, 2)).max() <= rounding
    eigenvalues = np.linalg.eigvalsh(D.astype(float))
    assert eigenvalues.min() >= -rounding and eigenvalues.max() <= 1 + rounding


def test_kinks_count_as_active(numeric):
    """At zero D = 0; on the boundary of the cone the derivative is that from outside."""
    zero = np.zeros((1, ALL.rows))
    assert not numeric.derivative(ALL, zero).any()
    cones = Cones(nonneg=1, soc=(2,), psd=(2,))
    D = numeric.derivative(cones, np.array([[0, 1, 1, 1, 0, 0]], float))[0]
    expected = np.zeros((6, 6))
    expected[1:3, 1:3] = 0.5
    expected[3, 3] = expected[4, 4] = 1
    np.testing.assert_allclose(D, expected, atol=1e-15)


def test_spectral_functions(numeric, rng):
    v, A = rng.standard_normal((4, ALL.rows)), rng.standard_normal((4, ALL.rows, 5))
    e = 10 ** rng.uniform(-3, 0, (4, 1))

    def weight(d, e):
        return (1 - d + e) / (d + e)

    columns = numeric.spectral(ALL, v, weight, A, e)
    rotated = numeric.spectral(ALL, v, weight, A, e, rotated=True)
    vector = numeric.spectral(ALL, v, weight, A[..., 0], e, columns=False)
    identity = np.eye(ALL.rows)
    D = numeric.derivative(ALL, v)
    expected = np.linalg.solve(D + e[..., None] * identity, ((1 + e[..., None]) * identity - D) @ A)
    np.testing.assert_allclose(columns, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(vector, columns[..., 0], rtol=1e-12, atol=1e-12)
    gram = columns.swapaxes(1, 2) @ columns
    np.testing.assert_allclose(rotated.swapaxes(1, 2) @ rotated, gram, rtol=1e-9)


# The projection as a differentiable function.


def psd_repeated():
    """Definite, indefinite and negative matrices with repeated eigenvalues, none of them zero."""
    Q = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    spectra = ([2, 2, -1], [2, -1, -1], [1, 1, 1], [-1, -1, -1], [1, -1, -1])
    rotated = [half_vector(Q @ np.diag(d) @ Q.T) for d in np.array(spectra, float)]
    return np.stack([*rotated, half_vector(np.diag([1.0, 1, -1]))])


SMOOTH = {
    "all": (ALL, np.random.default_rng(2).standard_normal((6, ALL.rows))),
    "repeated": (Cones(psd=(3,)), psd_repeated()),
}


def orders(numeric, cones, v, direction, weight):
    """Value and derivatives of `project_linearized`: first, then second in every nesting of modes."""

    def derivatives(v, dv, w, *flat):
        lin = K.unflatten(cones, flat)

        def f(x):
            return K.project_linearized(numeric.ops, cones, lin, x, 2)

        def forward(x):
            return numeric.jvp(f, x, dv)

        def reverse(x):
            return numeric.vjp(f, x, w)

        second = [numeric.jvp(forward, v, dv), numeric.vjp(forward, v, w)]
        second += [numeric.jvp(reverse, v, dv), numeric.vjp(reverse, v, dv)]
        return [f(v), forward(v), reverse(v), *second]

    return numeric.call(
        derivatives, v, direction, weight, *numeric.linearize(cones, v), key=("orders", cones)
    )


@pytest.mark.parametrize("points", SMOOTH)
def test_derivatives_of_both_orders(numeric, rng, points):
    cones, v = SMOOTH[points]
    dv, w = rng.standard_normal((2, *v.shape))
    value, forward, reverse, *second = orders(numeric, cones, v, dv, w)
    D, step = numeric.derivative(cones, v), 1e-6
    dD = (numeric.derivative(cones, v + step * dv) - numeric.derivative(cones, v - step * dv)) / (2 * step)

    def product(M, x):
        return (M @ x[..., None])[..., 0]

    np.testing.assert_allclose(value, numeric.project(cones, v), rtol=0, atol=1e-13)
    np.testing.assert_allclose(forward, product(D, dv), rtol=0, atol=1e-13)
    np.testing.assert_allclose(reverse, product(D, w), rtol=0, atol=1e-13)
    # Pi is a gradient, its second derivative symmetric in all arguments: each nesting gives dD times one.
    for actual, argument in zip(second, (dv, w, w, w), strict=True):
        np.testing.assert_allclose(actual, product(dD, argument), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("order", "tolerance"), [(1, 1e-6), (2, 1e-9)])
def test_near_the_point_of_linearisation(numeric, rng, order, tolerance):
    """The derivative is right, and off by h the value is off by a power of h: a chord step."""
    cones, v = SMOOTH["all"]
    dv, w = 1e-4 * rng.standard_normal(v.shape), rng.standard_normal(v.shape)

    def near(v, dv, w, *flat):
        lin = K.unflatten(cones, flat)
        f = lambda x: K.project_linearized(numeric.ops, cones, lin, x, order)
        return [f(v + dv), numeric.vjp(f, v, w)]

    value, reverse = numeric.call(near, v, dv, w, *numeric.linearize(cones, v))
    np.testing.assert_allclose(value, numeric.project(cones, v + dv), rtol=0, atol=tolerance)
    D = numeric.derivative(cones, v)
    np.testing.assert_allclose(reverse, (D @ w[..., None])[..., 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_derivatives_are_finite_everywhere(numeric, rng, dtype):
    # The second derivative grows as 1 / distance to a kink and must not overflow.
    tiny = {"float64": 1e-30, "float32": 1e-8}[dtype]
    v = special_points(rng, ALL, numeric.project, tiny).astype(dtype)
    dv, w = rng.standard_normal((2, *v.shape)).astype(dtype)
    value, *derivatives = orders(numeric, ALL, v, dv, w)
    assert all(np.isfinite(x).all() for x in derivatives)
    error = np.abs(value - numeric.project(ALL, v)) / np.abs(v).max(axis=1, keepdims=True).clip(1e-30)
    assert error.max() < 100 * np.finfo(dtype).eps


def test_frameworks_agree(rng):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    from optlayers.ops import jax, torch

    v, dv, w = rng.standard_normal((3, 10, ALL.rows))
    in_torch, in_jax = (
        [f.project(ALL, v), f.derivative(ALL, v), *orders(f, ALL, v, dv, w)]
        for f in map(numeric_of, (torch, jax))
    )
    for a, b in zip(in_torch, in_jax, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


# Structure.


def test_batch_elements_are_independent(numeric, rng):
    v = rng.standard_normal((3, ALL.rows))
    broken = v.copy()
    broken[1] = np.nan

    def everything(v):
        near = orders(numeric, ALL, v, np.ones_like(v), np.ones_like(v))
        return [numeric.project(ALL, v), numeric.derivative(ALL, v), *near]

    whole, part = everything(v), everything(broken)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_allclose(b[[0, 2]], a[[0, 2]], rtol=0, atol=1e-14)
    assert np.isnan(part[0][1]).all() and np.isnan(part[2][1]).all()


@pytest.mark.parametrize("cones", [ALL, Cones(nonneg=2), Cones()], ids=["all", "nonneg", "none"])
def test_empty_batches_and_empty_cones(numeric, cones):
    for batch in (0,) if cones is ALL else (0, 2):
        v, A = np.ones((batch, cones.rows)), np.ones((batch, cones.rows, 4))
        near, *_ = orders(numeric, cones, v, v, v)
        assert near.shape == numeric.project(cones, v).shape == v.shape
        assert numeric.spectral(cones, v, lambda d: d, A).shape == A.shape


def test_a_matrix_may_be_shared_by_the_batch(ops, numeric, rng):
    v, A = rng.standard_normal((3, ALL.rows)), rng.standard_normal((ALL.rows, 4))

    def shared(v, *flat):
        lin = K.unflatten(ALL, flat)
        return K.spectral(ops, ALL, lin, lambda d: d, ops.constant(A, v), columns=True)

    actual = numeric.call(shared, v, *numeric.linearize(ALL, v))
    np.testing.assert_allclose(actual, numeric.derivative(ALL, v) @ A, rtol=0, atol=1e-13)


def test_linearization_travels_through_a_loop(numeric, ops, rng):
    cones = Cones(nonneg=1, soc=(3,), psd=(2,), exp=1)
    v = rng.standard_normal((2, cones.rows))

    def loop(v):
        state = K.linearize(ops, cones, v), v
        lin, last = ops.repeat(3, lambda state: (K.linearize(ops, cones, 2 * state[1]), 2 * state[1]), state)
        return K.project_linearized(ops, cones, lin, last)

    np.testing.assert_allclose(numeric.call(loop, v), numeric.project(cones, 8 * v), rtol=0, atol=1e-13)


def test_cones_are_values():
    again = pickle.loads(pickle.dumps(ALL))
    assert again == ALL and hash(again) == hash(ALL) and again.rows == ALL.rows
    assert Cones(soc=(3,)) != Cones(soc=(4,)) and "layout" not in repr(ALL)


def test_compiles_into_one_graph(rng):
    torch = pytest.importorskip("torch")
    from optlayers.ops import torch as ops

    v = torch.tensor(rng.standard_normal((2, ALL.rows)))
    lin = K.linearize(ops, ALL, v)

    def near(v):
        return K.project_linearized(ops, ALL, lin, v)

    torch.compiler.reset()
    compiled = torch.compile(near, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(v), near(v))
