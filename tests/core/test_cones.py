"""Cones: projections against Moreau's conditions and CVXPY, derivatives against differences."""

import pickle
from types import SimpleNamespace

import cvxpy as cp
import numpy as np
import pytest

from optlayers import cones as K
from optlayers.cones import Cones

FAMILIES = {
    "orthant": Cones(zero=2, nonneg=3),
    "soc": Cones(soc=(3, 1, 4, 3, 2)),
    "psd": Cones(psd=(3, 2, 3, 1)),
    "exp": Cones(exp=3),
    "pow": Cones(pow=((0.3, 0.7), (0.2, 0.3, 0.5), (0.9, 0.1))),
}
ALL = Cones(1, 2, (3, 1, 4, 3), (3, 2, 3), 2, ((0.3, 0.7), (0.2, 0.3, 0.5), (0.9, 0.1)))


@pytest.fixture
def numeric(ops):
    """The functions of `optlayers.cones` on NumPy arrays, and the transformations of the framework."""
    if ops.__name__.endswith("torch"):
        import torch

        array, fast, transforms = torch.tensor, lambda f: f, torch.func
    else:
        import jax

        array, fast, transforms = jax.numpy.asarray, jax.jit, jax

    def call(function, *args):
        outputs = fast(function)(*map(array, args))
        return [np.asarray(x) for x in outputs] if isinstance(outputs, list) else np.asarray(outputs)

    return SimpleNamespace(
        call=call,
        jvp=lambda f, x, dx: transforms.jvp(f, (x,), (dx,))[1],
        vjp=lambda f, x, w: transforms.vjp(f, x)[1](w)[0],
        project=lambda cones, v: call(lambda v: K.project(ops, cones, v), v),
        derivative=lambda cones, v: call(
            lambda v, I: derivative(ops, cones, v, I), v, np.eye(cones.rows, dtype=v.dtype)
        ),
    )


def derivative(ops, cones, v, u):
    """D u at v for the columns of u."""
    return K.spectral(ops, cones, K.linearize(ops, cones, v), lambda d: d, u, columns=True)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_satisfies_moreau(numeric, rng, family):
    cones = FAMILIES[family]
    v = np.concatenate([scaled_points(rng, cones, 4000), special_points(rng, cones, numeric.project)])
    assert_moreau(cones, v, numeric.project(cones, v), 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_in_single_precision(numeric, rng, family):
    cones = FAMILIES[family]
    v = np.concatenate([scaled_points(rng, cones, 1000), special_points(rng, cones, numeric.project)])
    v = v.astype(np.float32)
    s = numeric.project(cones, v)
    assert s.dtype == np.float32
    assert_moreau(cones, v.astype(float), s.astype(float), 3e-6)


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
@pytest.mark.parametrize("family", FAMILIES)
def test_derivative_is_a_symmetric_contraction_everywhere(numeric, rng, family, dtype):
    cones = FAMILIES[family]
    v = np.concatenate([scaled_points(rng, cones, 300), special_points(rng, cones, numeric.project)])
    D = numeric.derivative(cones, v.astype(dtype))
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


def test_spectral_functions(numeric, ops, rng):
    v, A = rng.standard_normal((4, ALL.rows)), rng.standard_normal((4, ALL.rows, 5))
    e = 10 ** rng.uniform(-3, 0, (4, 1))

    def products(v, A, e):
        lin = K.linearize(ops, ALL, v)

        def weight(d):
            return (1 - d + e) / (d + e)

        columns = K.spectral(ops, ALL, lin, weight, A, columns=True)
        loop = [K.spectral(ops, ALL, lin, weight, A[..., i]) for i in range(A.shape[-1])]
        shared = K.spectral(ops, ALL, lin, weight, A[0], columns=True)
        rotated = K.spectral(ops, ALL, lin, weight, A, columns=True, rotated=True)
        return [columns, ops.stack(loop, axis=-1), shared, rotated]

    columns, loop, shared, rotated = numeric.call(products, v, A, e)
    D, identity = numeric.derivative(ALL, v), np.eye(ALL.rows)
    inverse = np.linalg.solve(D + e[..., None] * identity, (1 + e[..., None]) * identity - D)
    np.testing.assert_allclose(columns, inverse @ A, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(loop, columns, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(shared, inverse @ A[0], rtol=1e-9, atol=1e-9)
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


def orders(numeric, ops, cones, v, direction, weight, order=2):
    """Value and derivatives of `project_linearized`: first, then second in every nesting of modes."""

    def derivatives(v, dv, w):
        lin = K.linearize(ops, cones, v)

        def f(x):
            return K.project_linearized(ops, cones, lin, x, order)

        def forward(x):
            return numeric.jvp(f, x, dv)

        def reverse(x):
            return numeric.vjp(f, x, w)

        second = [numeric.jvp(forward, v, dv), numeric.vjp(forward, v, w)]
        second += [numeric.jvp(reverse, v, dv), numeric.vjp(reverse, v, dv)]
        return [f(v), forward(v), reverse(v), *second]

    return numeric.call(derivatives, v, direction, weight)


@pytest.mark.parametrize("points", SMOOTH)
def test_derivatives_of_both_orders(numeric, ops, rng, points):
    cones, v = SMOOTH[points]
    dv, w = rng.standard_normal((2, *v.shape))
    value, forward, reverse, *second = orders(numeric, ops, cones, v, dv, w)
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


def test_first_order_only(numeric, ops, rng):
    cones, v = SMOOTH["all"]
    dv, w = rng.standard_normal((2, *v.shape))
    value, forward, reverse, *_ = orders(numeric, ops, cones, v, dv, w, order=1)
    D = numeric.derivative(cones, v)
    np.testing.assert_allclose(value, numeric.project(cones, v), rtol=0, atol=1e-13)
    np.testing.assert_allclose(forward, (D @ dv[..., None])[..., 0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(reverse, (D @ w[..., None])[..., 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_derivatives_are_finite_everywhere(numeric, ops, rng, dtype):
    # The second derivative grows as 1 / distance to a kink and must not overflow.
    tiny = {"float64": 1e-30, "float32": 1e-8}[dtype]
    v = special_points(rng, ALL, numeric.project, tiny).astype(dtype)
    dv, w = rng.standard_normal((2, *v.shape)).astype(dtype)
    value, *derivatives = orders(numeric, ops, ALL, v, dv, w)
    assert all(np.isfinite(x).all() for x in derivatives)
    error = np.abs(value - numeric.project(ALL, v)) / np.abs(v).max(axis=1, keepdims=True).clip(1e-30)
    assert error.max() < 100 * np.finfo(dtype).eps


def test_value_follows_small_changes(numeric, ops, rng):
    """Off the point of linearisation by h the value is off by h^3 only: a chord step moves the point."""
    cones, v = SMOOTH["all"]
    dv = 1e-4 * rng.standard_normal(v.shape)

    def moved(v, dv):
        return K.project_linearized(ops, cones, K.linearize(ops, cones, v), v + dv)

    np.testing.assert_allclose(numeric.call(moved, v, dv), numeric.project(cones, v + dv), rtol=0, atol=1e-9)


def test_frameworks_agree(rng):
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    from optlayers.ops import jax as jax_ops
    from optlayers.ops import torch as torch_ops

    v, dv = rng.standard_normal((2, 10, ALL.rows))

    def values(ops, jvp, v, dv):
        lin = K.linearize(ops, ALL, v)
        near = lambda x: K.project_linearized(ops, ALL, lin, x)
        first = lambda x: jvp(near, (x,), (dv,))[1]
        return [K.project(ops, ALL, v), first(v), jvp(first, (v,), (dv,))[1]]

    in_torch = values(torch_ops, torch.func.jvp, torch.tensor(v), torch.tensor(dv))
    in_jax = jax.jit(lambda v, dv: values(jax_ops, jax.jvp, v, dv))(v, dv)
    for a, b in zip(in_torch, in_jax, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


# Structure.


def test_batch_elements_are_independent(numeric, ops, rng):
    v = rng.standard_normal((3, ALL.rows))
    broken = v.copy()
    broken[1] = np.nan

    def everything(v):
        lin = K.linearize(ops, ALL, v)
        return [
            K.project(ops, ALL, v),
            K.project_linearized(ops, ALL, lin, v),
            K.spectral(ops, ALL, lin, lambda d: d, v),
        ]

    for whole, part in zip(numeric.call(everything, v), numeric.call(everything, broken), strict=True):
        assert np.isnan(part[1]).all()
        np.testing.assert_allclose(part[[0, 2]], whole[[0, 2]], rtol=0, atol=1e-14)


@pytest.mark.parametrize("cones", [ALL, Cones(nonneg=2), Cones()], ids=["all", "nonneg", "none"])
@pytest.mark.parametrize("batch", [0, 2])
def test_shapes_and_flat_form(numeric, ops, rng, cones, batch):
    v, A = rng.standard_normal((batch, cones.rows)), rng.standard_normal((batch, cones.rows, 4))

    def everything(v, A):
        lin = K.linearize(ops, cones, v)
        flat = K.flatten(lin)
        lin = K.unflatten(cones, flat)
        columns = K.spectral(ops, cones, lin, lambda d: d, A, columns=True)
        return [K.project(ops, cones, v), K.project_linearized(ops, cones, lin, v), columns, *flat]

    s, near, columns, *flat = numeric.call(everything, v, A)
    assert s.shape == near.shape == v.shape and columns.shape == A.shape
    assert [(x.shape, "float") for x in flat] == K.linearization_shapes(cones, batch)
    assert all(x.dtype == np.float64 for x in flat)


def test_linearization_travels_through_a_loop(numeric, ops, rng):
    v = rng.standard_normal((2, ALL.rows))

    def loop(v):
        state = K.linearize(ops, ALL, v), v
        body = lambda state: (K.linearize(ops, ALL, 2 * state[1]), 2 * state[1])
        lin, last = ops.repeat(3, body, state)
        return K.project_linearized(ops, ALL, lin, last)

    np.testing.assert_allclose(numeric.call(loop, v), numeric.project(ALL, 8 * v), rtol=0, atol=1e-13)


def test_interleaved_cones_keep_their_rows(numeric, rng):
    """Equal cones are computed together wherever they stand."""
    v = rng.standard_normal((2, ALL.rows))
    parts = []
    for kind, parameter, rows in pieces(ALL):
        size = {"soc": (parameter,), "psd": (parameter,), "pow": (parameter,)}.get(kind, 1)
        parts.append(numeric.project(Cones(**{kind: size}), v[:, rows]))
    np.testing.assert_allclose(numeric.project(ALL, v), np.concatenate(parts, axis=1), rtol=0, atol=1e-14)


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
