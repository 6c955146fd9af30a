"""What batch axes mean: any number of them, shared parameters, and no influence of one problem on another."""

from types import SimpleNamespace

import cvxpy as cp
import numpy as np
import pytest

from checks import assert_close
from optlayers.status import SolveError
from problems import qp_shared

NAMES = ("P", "q", "A", "b")


@pytest.fixture(scope="module")
def layer(frontend):
    """One layer with parameters P, q, A, b, and its derivatives, whose compiled forms all tests use."""
    family = qp_shared()
    layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables)
    differentiable = frontend.differentiable(layer)
    return SimpleNamespace(family=family, frontend=frontend, solve=layer, differentiable=differentiable)


def values_with(layer, rng, lead, batched):
    """Values of the parameters, with batch axes `lead` for those whose letter is in `batched`."""
    singles = [layer.family.sample(rng) for _ in range(max(1, int(np.prod(lead))))]
    return [
        np.stack(column).reshape(*lead, *column[0].shape) if name in batched else column[0]
        for name, column in zip(NAMES, zip(*singles, strict=True), strict=True)
    ]


MIXTURES = [
    *(((1,), "q"), ((2, 3), "qA"), ((4,), "PqAb")),
    *(pytest.param(*case, marks=pytest.mark.slow_to_compile) for case in (((4,), "Pb"), ((2, 1, 2), "qb"))),
]


@pytest.mark.parametrize("lead, batched", MIXTURES, ids=str)
def test_batch_equals_singles(layer, lead, batched, rng):
    values = values_with(layer, rng, lead, batched)
    cotangent = rng.standard_normal((*lead, 4))
    (x,), gradients = layer.differentiable(values, [cotangent])
    assert x.shape == (*lead, 4)
    totals = [np.zeros_like(value) for value in values]
    for index in np.ndindex(lead):
        single = [v[index] if name in batched else v for name, v in zip(NAMES, values, strict=True)]
        (x_single,), single_gradients = layer.differentiable(single, [cotangent[index]])
        assert_close(x[index], x_single, 1e-10, f"x of {index}")
        for name, total, gradient in zip(NAMES, totals, single_gradients, strict=True):
            total[index if name in batched else ...] += gradient
    for name, gradient, total in zip(NAMES, gradients, totals, strict=True):
        assert_close(gradient, total, 1e-9, f"gradient of {name}")


@pytest.mark.parametrize("batched, counts", [("PqAb", {4}), ("qb", {4, 2})], ids=["all", "vectors"])
def test_batch_in_blocks(layer, rng, monkeypatch, batched, counts):
    """As JAX cuts a batch on a CPU: solution, gradient and second derivatives are those of the whole.

    With matrices that the batch shares, what a few problems need longer is repeated in parts of the blocks.
    """
    jax = pytest.importorskip("jax")
    if layer.frontend.name != "jax":
        pytest.skip("torch cuts batches by size alone")
    values, weights = values_with(layer, rng, (7,), batched), rng.standard_normal((7, 4))
    values[3][2] = np.inf  # one problem without solution

    def outcome():
        solve = layer.frontend.CvxpyLayer(
            layer.family.problem, layer.family.parameters, layer.family.variables, on_failure="mask"
        )
        loss = lambda *v: (jax.numpy.sin(solve(*v)[0]) * weights).sum()
        slope = lambda q: jax.numpy.vdot(jax.grad(loss, 1)(values[0], q, *values[2:]), weights)
        return jax.jit(lambda q: (slope(q), jax.grad(slope)(q), solve(values[0], q, *values[2:])))(values[1])

    whole, loops, loop = outcome(), [], jax.lax.map
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax.lax, "map", lambda f, xs: loops.append(xs) or loop(f, xs))
    for name, value in (("BLOCK_ROWS", 2), ("SHARED_ROWS", 2), ("PART_BYTES", 0), ("PART_ROWS", 1)):
        monkeypatch.setattr(f"optlayers.ops.jax.control.{name}", value)
    for part, wanted in zip(jax.tree.leaves(outcome()), jax.tree.leaves(whole), strict=True):
        assert_close(part, wanted, 1e-9)
    assert {len(blocks) for blocks in loops} == counts


def test_shard_map_with_constant_data(rng):
    """What devices have in common, here all but c, may meet what differs between them. min c'x, |x| <= 1."""
    jax = pytest.importorskip("jax")
    from optlayers.jax import CvxpyLayer

    c, x = cp.Parameter(3), cp.Variable(3)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(c @ x), [cp.norm2(x) <= 1]), [c], [x], rescue=True)
    axis, mesh = jax.sharding.PartitionSpec("batch"), jax.sharding.Mesh(jax.devices()[:2], ("batch",))
    solve = jax.shard_map(lambda c: layer(c)[0], mesh=mesh, in_specs=axis, out_specs=axis)
    value, weights = rng.standard_normal((2, 4, 3))
    size = np.linalg.norm(value, axis=1, keepdims=True)
    solution, back = jax.vjp(jax.jit(solve), jax.numpy.asarray(value))
    assert_close(solution, -value / size, 1e-9)
    along = (weights * value).sum(1, keepdims=True) / size**2
    assert_close(back(jax.numpy.asarray(weights))[0], (along * value - weights) / size, 1e-9)


def nearest(**options):
    c, x = cp.Parameter(3), cp.Variable(3)
    objective = cp.Minimize(cp.sum_squares(x) + c @ x)
    return cp.Problem(objective, [x >= 0, cp.sum(x) <= 1]), c, x, options


def correlation():
    C, X = cp.Parameter((6, 6), symmetric=True), cp.Variable((6, 6), PSD=True)
    return cp.Problem(cp.Minimize(cp.trace(C @ X)), [cp.diag(X) == 1]), C, X, {}


def test_exported_batch_of_any_size(rng):
    jax = pytest.importorskip("jax")
    from optlayers.jax import CvxpyLayer

    problem, c, x, _ = nearest()
    solve = jax.vmap(lambda c, layer=CvxpyLayer(problem, [c], [x]): layer(c)[0])
    (size,) = jax.export.symbolic_shape("size")
    exported = jax.export.export(jax.jit(solve))(jax.ShapeDtypeStruct((size, 3), "float64"))
    value = jax.numpy.asarray(rng.standard_normal((5, 3)))
    assert_close(exported.call(value), solve(value), 1e-12)


@pytest.mark.parametrize(
    "case", [nearest(gradient="lpgd"), nearest(), correlation()], ids=["lpgd", "qp", "sdp"]
)
def test_shard_map_with_data_that_devices_share(case, rng):
    """Gradients are those without."""
    jax = pytest.importorskip("jax")
    from optlayers.jax import CvxpyLayer

    problem, c, x, options = case
    layer = CvxpyLayer(problem, [c], [x], **options)
    axis, mesh = jax.sharding.PartitionSpec("batch"), jax.sharding.Mesh(jax.devices()[:2], ("batch",))
    value, weights = map(jax.numpy.asarray, rng.standard_normal((2, 4, *c.shape)))
    value = value if c.ndim == 1 else value + value.mT
    solve = lambda c: layer(c)[0]
    split = jax.shard_map(solve, mesh=mesh, in_specs=axis, out_specs=axis)
    gradient = lambda solve: jax.jit(jax.grad(lambda c: (weights * solve(c)).sum()))(value)
    expected, actual = gradient(solve), gradient(split)
    assert abs(expected).max() > 0.1
    assert_close(actual, expected, 1e-9)


@pytest.mark.parametrize("lead", [(0,), pytest.param((3, 0), marks=pytest.mark.slow_to_compile)], ids=str)
def test_empty_batch(layer, lead, rng):
    values = values_with(layer, rng, (), "")
    values[1], values[3] = np.zeros((*lead, 4)), np.zeros((*lead, 6))
    (x,), gradients = layer.differentiable(values, [np.zeros((*lead, 4))])
    assert x.shape == (*lead, 4)
    for value, gradient in zip(values, gradients, strict=True):
        assert_close(gradient, np.zeros_like(value), 0.0)


@pytest.mark.parametrize("lead", [(3,), (2, 0)], ids=str)
def test_batch_of_a_parameter_that_no_solution_depends_on(frontend, lead):
    x, p, constant = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p) + constant), [x <= 1, x >= p])
    layer = frontend.CvxpyLayer(problem, [p, constant], [x])
    solve = lambda p, constant: layer.solve(frontend.array(p), frontend.array(constant))
    solution = solve(np.array([0.5, -1.0]), np.zeros(lead))
    assert solution.status.shape == lead and solution.y.shape == (*lead, 6)
    assert_close(frontend.numpy(solution.variables[0]), np.full((*lead, 2), [0.5, -1.0]), 1e-8)
    if 0 not in lead:
        with pytest.raises(SolveError, match="3 of 3 problems"):
            solve(np.array([0.5, 2.0]), np.zeros(lead))


def test_permuted_batch_gives_permuted_result(layer, rng):
    values, order = values_with(layer, rng, (4,), "PqAb"), np.array([2, 0, 3, 1])
    cotangent = rng.standard_normal((4, 4))
    (x,), gradients = layer.differentiable(values, [cotangent])
    (y,), permuted = layer.differentiable([v[order] for v in values], [cotangent[order]])
    assert_close(y, x[order], 1e-11)
    for name, a, b in zip(NAMES, permuted, gradients, strict=True):
        assert_close(a, b[order], 1e-10, name)


def test_scaled_objective_has_the_same_solution(layer, rng):
    P, q, A, b = values_with(layer, rng, (), "")
    scales = np.array([1.0, 1e-3, 30.0, 1e4])
    scaled = [
        np.multiply.outer(scales, P),
        np.multiply.outer(scales, q),
        *(np.stack([v] * 4) for v in (A, b)),
    ]
    (x,), gradients = layer.differentiable(scaled, [np.ones((4, 4))])
    for i in range(1, 4):
        assert_close(x[i], x[0], 1e-9, f"scale {scales[i]}")
        assert_close(gradients[0][i] * scales[i], gradients[0][0], 1e-7, f"gradient of P, scale {scales[i]}")
        assert_close(gradients[3][i], gradients[3][0], 1e-7, f"gradient of b, scale {scales[i]}")


def test_vmap_equals_batch(layer, rng):
    """Mapped over the first of two batch axes, the second axis of one value; P and b stay as they are."""
    P, q, A, b = values = values_with(layer, rng, (2, 3), "qA")
    (x,), _ = layer.differentiable(values, [np.ones((2, 3, 4))])
    mapped = layer.frontend.transforms.vmap(layer.solve, (None, 1, 0, None))
    (y,) = mapped(*map(layer.frontend.array, (P, q.swapaxes(0, 1), A, b)))
    assert_close(layer.frontend.numpy(y), x, 1e-10)


@pytest.mark.slow_to_compile
def test_vmap_of_single_problems(layer, rng):
    values = values_with(layer, rng, (4,), "Pb")
    (x,), _ = layer.differentiable(values, [np.ones((4, 4))])
    (y,) = layer.frontend.transforms.vmap(layer.solve, (0, None, None, 0))(*map(layer.frontend.array, values))
    assert_close(layer.frontend.numpy(y), x, 1e-10)


def test_float32_in_float32_out(layer, rng):
    values = values_with(layer, rng, (1,), "q")
    (expected,), expected_gradients = layer.differentiable(values, [np.ones((1, 4))])
    frontend = layer.frontend
    outputs, gradients = frontend.differentiable(layer.solve, "float32")(values, [np.ones((1, 4))])
    assert {a.dtype for a in (*outputs, *gradients)} == {np.dtype("float32")}
    assert_close(outputs[0], expected, 1e-3)
    for name, a, b in zip(NAMES, gradients, expected_gradients, strict=True):
        assert_close(a, b, 1e-3, name)


@pytest.mark.slow_to_compile
def test_mixed_precision_gives_the_wider_one(layer, rng):
    values = values_with(layer, rng, (), "")
    dtypes = ("float32", "float64", "float64", "float32")
    with layer.frontend.mixing_types():
        (x,) = layer.solve(*map(layer.frontend.array, values, dtypes))
    assert layer.frontend.dtype(x) == "float64"
