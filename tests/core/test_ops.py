"""Every function of the seam, in both frameworks: values against NumPy, derivatives, batches, compilation."""

import importlib
import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from optlayers.ops import Ops, select

MEMBERS = [*Ops.__annotations__, *(n for n, f in vars(Ops).items() if inspect.isfunction(f) and n[0] != "_")]


@pytest.fixture
def framework(ops):
    """The transformations of both frameworks under the same names."""
    if ops.__name__.endswith("torch"):
        import torch

        def array(x):
            return torch.from_numpy(np.array(x))

        def compiled(function):
            torch.compiler.reset()
            return torch.compile(function, fullgraph=True, backend="eager")

        rows = lambda function, x: torch.stack([function(row) for row in x])
        return SimpleNamespace(array=array, compile=compiled, fast=lambda f: f, rows=rows, **vars(torch.func))
    import jax

    # `fast`: without jit JAX would compile every operation of every test by itself.
    names = {name: getattr(jax, name) for name in ("vmap", "jvp", "vjp")}
    array = lambda x: jax.numpy.asarray(np.array(x))
    return SimpleNamespace(array=array, compile=jax.jit, fast=jax.jit, rows=jax.lax.map, **names)


@pytest.fixture
def host():
    pytest.importorskip("torch")
    return importlib.import_module("optlayers.ops.torch.host")


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    module.compiler.reset()
    return module


def numpy(x):
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


def assert_close(actual, expected, dtype=np.float64):
    """Equal values, and the kind of `expected` in the precision of `dtype`."""
    actual, expected = numpy(actual), np.asarray(expected)
    wanted = {"f": np.dtype(dtype), "c": np.result_type(dtype, 0j)}.get(expected.dtype.kind)
    assert actual.dtype == wanted if wanted else actual.dtype.kind == expected.dtype.kind
    assert actual.shape == expected.shape
    tolerance = 1e-4 if dtype == np.float32 else 1e-11
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# Functions that NumPy also has: `call` on arrays of the framework, `expected` on the same arrays of NumPy.


class Case(NamedTuple):
    call: Callable
    expected: Callable
    arguments: tuple[Callable, ...]


def normal(*shape):
    return lambda rng: rng.normal(size=shape)


def definite(*shape):
    """Well-conditioned symmetric positive definite matrices."""

    def draw(rng):
        x = rng.normal(size=shape)
        return x @ x.mT + np.eye(shape[-1])

    return draw


def each(call, expected, *arguments):
    """The same comparison for several tuples of arguments."""
    return [Case(call, expected, draws if isinstance(draws, tuple) else (draws,)) for draws in arguments]


MATRICES = [normal(3, 4), normal(0, 4), normal(2, 0)]
PAIRS = [(draw, draw) for draw in MATRICES]
SQUARES = [definite(3, 3), definite(2, 3, 3), definite(1, 3, 3), definite(0, 3, 3), definite(2, 0, 0)]
SQUARES += [definite(1, 1), definite(1, 1, 1), definite(2, 1, 1)]
# The batch axis of a matrix may have length 1, to be shared by the right-hand sides.
SYSTEMS = [
    (definite(2, 3, 3), normal(2, 3, 4)),
    (definite(1, 3, 3), normal(1, 3, 4)),
    (definite(1, 1, 1), normal(1, 1, 1)),
    (definite(1, 3, 3), normal(2, 3, 2)),
    (definite(0, 3, 3), normal(0, 3, 2)),
    (definite(2, 0, 0), normal(2, 0, 2)),
]


def add_at(values, indices, size):
    result = np.zeros((*values.shape[:-1], size))
    np.add.at(result, (..., indices), values)
    return result


def indices(ops, values, like):
    return ops.constant(np.array(values, dtype=np.int64), like)


def compose(ops, x):
    values, vectors = ops.eigh(x + x.mT)
    return ops.concat([(vectors * values[..., None, :]) @ vectors.mT, values[..., None]], axis=-1)


def solve_by_lu(ops, x, y, transpose=False):
    x = x * ops.exp(ops.sum(0.1 * x, axis=-1, keepdims=True))  # no longer symmetric
    return ops.lu_solve(ops.lu_factor(x), y, transpose=transpose)


def solve_by_numpy(x, y, transpose=False):
    x = x * np.exp(0.1 * x.sum(-1, keepdims=True))
    return np.linalg.solve(x.mT if transpose else x, y)


CASES = {
    "constant": each(
        lambda ops, x: x * ops.constant(np.arange(4.0), x), lambda x: x * np.arange(4.0), normal(4)
    ),
    "full": each(lambda ops, x: x + ops.full((2, 3), 0.5, x), lambda x: x + 0.5, normal(2, 3)),
    "eye": each(lambda ops, x: ops.eye(3, x) * x, lambda x: np.eye(3) * x, normal(3, 3))
    + each(lambda ops, x: ops.eye(0, x), lambda x: np.eye(0), normal(2)),
    "to_int": each(lambda ops, x: ops.to_int(3 * x), lambda x: (3 * x).astype(int), *MATRICES),
    "where": each(
        lambda ops, x, y: ops.where(x > y, x, 2 * y), lambda x, y: np.where(x > y, x, 2 * y), *PAIRS
    )
    + each(lambda ops, x: ops.where(x > 0, x, -1.0), lambda x: np.where(x > 0, x, -1.0), *MATRICES),
    "maximum": each(lambda ops, x, y: ops.maximum(x, y), np.maximum, *PAIRS)
    + each(lambda ops, x: ops.maximum(x, 0.5), lambda x: np.maximum(x, 0.5), *MATRICES),
    "minimum": each(lambda ops, x, y: ops.minimum(x, y), np.minimum, *PAIRS)
    + each(lambda ops, x: ops.minimum(x, 0.5), lambda x: np.minimum(x, 0.5), *MATRICES),
    "sqrt": each(lambda ops, x: ops.sqrt(abs(x)), lambda x: np.sqrt(abs(x)), *MATRICES),
    "exp": each(lambda ops, x: ops.exp(x), np.exp, *MATRICES),
    "log": each(lambda ops, x: ops.log(abs(x)), lambda x: np.log(abs(x)), *MATRICES),
    "real": each(lambda ops, x: ops.real(x), np.real, *MATRICES)
    + each(lambda ops, x, y: ops.real(ops.complex_number(x, y)), lambda x, y: x, *PAIRS),
    "imag": each(lambda ops, x, y: ops.imag(ops.complex_number(x, y)), lambda x, y: y, *PAIRS),
    "complex_number": each(lambda ops, x, y: ops.complex_number(x, y), lambda x, y: x + 1j * y, *PAIRS),
    "sum": each(lambda ops, x: ops.sum(x, axis=-1), lambda x: x.sum(-1), *MATRICES)
    + each(lambda ops, x: ops.sum(x, axis=0, keepdims=True), lambda x: x.sum(0, keepdims=True), *MATRICES),
    **{
        name: each(lambda ops, x, n=name: getattr(ops, n)(x), getattr(np, name), *MATRICES)
        for name in ("sin", "cos")
    },
    "arctan2": each(lambda ops, y, x: ops.arctan2(y, x), np.arctan2, *PAIRS),
    "multiply_add": each(
        lambda ops, x, y: ops.multiply_add(x, y, 2 - x),
        lambda x, y: x + y * (2 - x),
        (normal(3, 4), normal(1, 4)),
    ),
    "moveaxis": each(
        lambda ops, x: ops.moveaxis(x, 0, -1), lambda x: np.moveaxis(x, 0, -1), normal(2, 3, 4), normal(0, 4)
    ),
    "put": each(
        lambda ops, x, y: ops.put(x + 0, 1, y),
        lambda x, y: np.stack([x[0], y, x[2]]),
        (normal(3, 4), normal(4)),
    ),
    "norm": each(lambda ops, x: ops.norm(x), lambda x: np.linalg.norm(x, axis=-1), *MATRICES),
    "amax": each(lambda ops, x: ops.amax(x, axis=-1), lambda x: x.max(-1), normal(3, 4), normal(0, 4))
    + each(lambda ops, x: ops.amax(x, 0, keepdims=True), lambda x: x.max(0, keepdims=True), normal(3, 4))
    + each(lambda ops, x: ops.amax(x, axis=-1), lambda x: np.zeros(2), normal(2, 0))
    + each(lambda ops, x: ops.amax(x, 0, keepdims=True), lambda x: np.zeros((1, 4)), normal(0, 4)),
    "any": each(lambda ops, x: ops.any(x > 1, axis=-1), lambda x: (x > 1).any(-1), *MATRICES)
    + each(lambda ops, x: ops.any(x > 1), lambda x: (x > 1).any(), *MATRICES),
    "all": each(lambda ops, x: ops.all(x > -1, axis=-1), lambda x: (x > -1).all(-1), *MATRICES)
    + each(lambda ops, x: ops.all(x > -1), lambda x: (x > -1).all(), *MATRICES),
    "concat": each(lambda ops, *xs: ops.concat(xs, axis=0), lambda *xs: np.concatenate(xs), *PAIRS)
    + each(
        lambda ops, *xs: ops.concat(xs, -1), lambda *xs: np.concatenate(xs, -1), (normal(2, 3), normal(2, 0))
    ),
    "stack": each(lambda ops, *xs: ops.stack(xs, axis=0), lambda *xs: np.stack(xs), *PAIRS)
    + each(lambda ops, *xs: ops.stack(xs, axis=-1), lambda *xs: np.stack(xs, -1), *PAIRS),
    "reshape": each(lambda ops, x: ops.reshape(x.mT, (2, -1)), lambda x: x.mT.reshape(2, -1), normal(3, 4))
    + each(lambda ops, x: ops.reshape(x, [0, 3]), lambda x: x.reshape(0, 3), normal(0, 4)),
    "broadcast_to": each(
        lambda ops, x: ops.broadcast_to(x, (2, 3, 4)), lambda x: np.broadcast_to(x, (2, 3, 4)), normal(3, 1)
    )
    + each(lambda ops, x: ops.broadcast_to(x, [0, 4]), lambda x: np.broadcast_to(x, (0, 4)), normal(1, 4)),
    "take": each(
        lambda ops, x: ops.take(x, indices(ops, [2, 0, 2], x)),
        lambda x: x[..., [2, 0, 2]],
        *(normal(3), normal(2, 4), normal(2, 3, 4), normal(0, 4)),
    )
    + each(lambda ops, x: ops.take(x, indices(ops, [], x)), lambda x: x[..., :0], *MATRICES),
    "argsort": each(
        lambda ops, x: x * 0 + ops.cast(ops.argsort(x), x),
        lambda x: np.argsort(x, -1).astype(x.dtype),
        *(normal(5), normal(2, 4), normal(0, 3)),
    ),
    "scatter_add": each(
        lambda ops, x: ops.scatter_add(x, indices(ops, [3, 0, 3, 1], x), 5),
        lambda x: add_at(x, [3, 0, 3, 1], 5),
        *(normal(4), normal(2, 4), normal(2, 3, 4), normal(0, 4)),
    )
    + each(
        lambda ops, x: ops.scatter_add(
            x, indices(ops, [3, 0, 3, 1], x), 5, ops.broadcast_to(x[..., :1], (*x.shape[:-1], 5))
        ),
        lambda x: x[..., :1] + add_at(x, [3, 0, 3, 1], 5),
        *(normal(4), normal(2, 4), normal(2, 3, 4)),
    )
    + each(
        lambda ops, x: ops.scatter_add(x, indices(ops, [2, 0, 2, 1], x), 4, x[0, 0]),
        lambda x: x[0, 0] + add_at(x, [2, 0, 2, 1], 4),
        normal(2, 3, 4),
    )
    + each(
        lambda ops, x: ops.scatter_add(x, indices(ops, [], x), 3), lambda x: np.zeros((2, 3)), normal(2, 0)
    )
    + each(lambda ops, x: ops.scatter_add(x, indices(ops, [], x), 0), lambda x: x, normal(2, 0)),
    "diagonal": each(lambda ops, x: ops.diagonal(x), lambda x: np.diagonal(x, axis1=-2, axis2=-1), *SQUARES),
    "add_diagonal": each(
        lambda ops, x: ops.add_diagonal(2.0 * x, 3.0), lambda x: 2 * x + 3 * np.eye(x.shape[-1]), *SQUARES
    )
    + each(
        lambda ops, x: ops.add_diagonal(2.0 * x, ops.sum(x, -1)),
        lambda x: 2 * x + x.sum(-1)[..., None] * np.eye(x.shape[-1]),
        *SQUARES,
    ),
    "cholesky": each(lambda ops, x: ops.cholesky(x + x.mT), lambda x: np.linalg.cholesky(x + x.mT), *SQUARES),
    "cholesky_solve": each(
        lambda ops, x, y: ops.cholesky_solve(ops.cholesky(x + x.mT), y),
        lambda x, y: np.linalg.solve(x + x.mT, y),
        *SYSTEMS,
    ),
    "inverse_triangular": each(
        lambda ops, x: ops.inverse_triangular(ops.cholesky(x + x.mT)),
        lambda x: np.linalg.inv(np.linalg.cholesky(x + x.mT)),
        *SQUARES,
    ),
    "lu_solve": each(partial(solve_by_lu, transpose=True), partial(solve_by_numpy, transpose=True), *SYSTEMS)
    + each(solve_by_lu, solve_by_numpy, SYSTEMS[0]),
    "eigh": each(
        compose,
        lambda x: np.concatenate([x + x.mT, np.linalg.eigvalsh(x + x.mT)[..., None]], -1),
        *SQUARES,
    ),
    "repeat": each(
        lambda ops, x, y: ops.repeat(3, lambda state: (state[0] * state[1], state[1]), (x, y))[0],
        lambda x, y: x * y**3,
        *PAIRS,
    )
    + each(lambda ops, x: ops.repeat(0, lambda state: (-state[0],), (x,))[0], lambda x: x, *MATRICES),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_is_defined_and_tested(ops, name):
    assert hasattr(ops, name)
    assert name in CASES or f"test_{name}" in globals()


@pytest.fixture(params=CASES)
def cases(request):
    return CASES[request.param]


def test_values(ops, framework, rng, cases):
    single = cases[0], np.float32
    checks = [*((case, np.float64) for case in cases), single]
    arguments = [[draw(rng) for draw in case.arguments] for case, _ in checks]
    call_all = framework.fast(lambda xs: [c.call(ops, *x) for (c, _), x in zip(checks, xs, strict=True)])
    arrays = [
        [framework.array(x.astype(dtype)) for x in xs]
        for (_, dtype), xs in zip(checks, arguments, strict=True)
    ]
    for actual, (case, dtype), xs in zip(call_all(arrays), checks, arguments, strict=True):
        assert_close(actual, case.expected(*xs), dtype)


def test_compiled_by_torch(torch, rng, cases):
    from optlayers.ops import torch as ops

    call, expected, draws = cases[0]
    arguments = [draw(rng) for draw in draws]
    function = torch.compile(partial(call, ops), fullgraph=True, backend="eager")
    assert_close(function(*map(torch.tensor, arguments)), expected(*arguments))


def test_vmap(ops, framework, rng, cases):
    call, expected, draws = cases[0]
    lanes = [[draw(rng) for draw in draws] for _ in range(3)]
    axes = (-1, 0)[: len(draws)]  # the lanes of the first argument are not contiguous in memory
    arguments = [np.stack(xs, axis) for axis, *xs in zip(axes, *lanes, strict=True)]
    actual = framework.fast(framework.vmap(partial(call, ops), axes))(*map(framework.array, arguments))
    assert_close(actual, np.stack([expected(*lane) for lane in lanes]))


def test_derivatives(ops, framework, rng, cases):
    call, reference, draws = cases[0]
    arguments = [draw(rng) for draw in draws]
    expected = reference(*arguments)
    if expected.dtype.kind != "f":
        pytest.skip("not real")
    tangents, h = [rng.normal(size=x.shape) for x in arguments], 1e-5
    shifted = [[x + s * dx for x, dx in zip(arguments, tangents, strict=True)] for s in (h, -h)]
    difference = (reference(*shifted[0]) - reference(*shifted[1])) / (2 * h)
    cotangent = rng.normal(size=expected.shape)

    def both_modes(inputs, tangents, cotangent):
        _, tangent = framework.jvp(partial(call, ops), tuple(inputs), tuple(tangents))
        value, pull = framework.vjp(partial(call, ops), *inputs)
        return value, tangent, pull(cotangent)

    arrays = ([framework.array(x) for x in xs] for xs in (arguments, tangents))
    value, tangent, gradients = framework.fast(both_modes)(*arrays, framework.array(cotangent))
    assert_close(value, expected)
    np.testing.assert_allclose(numpy(tangent), difference, rtol=1e-7, atol=1e-7)
    product = sum(np.sum(numpy(g) * dx) for g, dx in zip(gradients, tangents, strict=True))
    np.testing.assert_allclose(product, np.sum(cotangent * difference), rtol=1e-7, atol=1e-7)


# Numbers and types


@pytest.fixture(params=[np.float32, np.float64])
def dtype(request):
    return request.param


def test_inf(ops, framework):
    x = framework.array(np.ones(2))
    assert_close(ops.where(x > 0, x, ops.inf), [1.0, 1.0])
    assert_close(ops.full((2,), ops.inf, x), [np.inf, np.inf])


def test_nan(ops, framework):
    assert_close(ops.full((2,), ops.nan, framework.array(np.ones(2))), [np.nan, np.nan])


def test_eps(ops, framework, dtype):
    eps = ops.eps(framework.array(np.ones(2, dtype)))
    assert type(eps) is float
    assert eps == np.finfo(dtype).eps


def test_isfinite(ops, framework):
    assert_close(ops.isfinite(framework.array([0.0, np.nan, np.inf, -np.inf])), [True, False, False, False])


def test_maximum_and_minimum_keep_nan(ops, framework):
    functions = ops.maximum, ops.minimum
    x, one = framework.array([np.nan, 0.0]), framework.array([1.0, 1.0])
    for y in (1.0, one):
        larger, smaller = framework.fast(lambda x, y: [f(x, y) for f in functions])(x, y)
        assert_close(larger, [np.nan, 1.0])
        assert_close(smaller, [np.nan, 0.0])
    assert_close(ops.amax(x, axis=0), np.nan)


def test_widest(ops, framework, dtype):
    x = np.ones(2, dtype)
    assert_close(ops.widest(framework.array(x)), x, np.float64)
    assert_close(ops.widest(framework.array(1j * x)), 1j * x, np.float64)


def test_widest_keeps_what_the_settings_of_jax_allow():
    jax = pytest.importorskip("jax")
    from optlayers.ops import jax as ops

    with jax.enable_x64(False):
        assert_close(ops.widest(jax.numpy.ones(2)), np.ones(2), np.float32)


def test_cast(ops, framework, dtype):
    like = framework.array(np.ones(1, dtype))
    for x in (np.ones(2, np.float32), np.ones(2, np.float64), 1j * np.ones(2), np.ones(2, np.complex64)):
        assert_close(ops.cast(framework.array(x), like), x, dtype)


def test_constants_are_copies_of_any_array(ops, framework, dtype):
    like = framework.array(np.ones(2, dtype))
    memory = np.zeros(6 * 8 + 64, np.uint8)
    values = memory[-memory.ctypes.data % 64 :][:48].view(float)  # JAX shares only memory that is aligned
    values[:] = np.arange(6.0)
    for view in (values, values[::-1], values[::2], np.broadcast_to(values[:1], (2, 3)), values[:0]):
        assert_close(ops.constant(view, like), view, dtype)
    values.flags.writeable = False
    constant = ops.constant(values, like)
    values.flags.writeable = True
    values[:] = 7.0
    assert_close(constant, np.arange(6.0), dtype)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_integer_constants_index(ops, framework, kind):
    x = framework.array(np.arange(4.0))
    index = ops.constant(np.array([3, 0], kind), x)
    assert numpy(index).dtype in (np.int32, np.int64)
    assert_close(ops.take(x, index), [3.0, 0.0])
    assert_close(ops.where(index > 1, index, 0), [3, 0])


def test_select(ops, framework):
    class Pair(NamedTuple):
        a: object
        b: tuple

    mask = framework.array([True, False])
    ones, twos = (framework.array(np.full((2, 3), value)) for value in (1.0, 2.0))
    chosen = select(ops, mask, Pair(ones, (ones[:, 0],)), Pair(twos, (twos[:, 0],)))
    assert isinstance(chosen, Pair)
    assert_close(chosen.a, [[1.0] * 3, [2.0] * 3])
    assert_close(chosen.b[0], [1.0, 2.0])


# Linear algebra: one bad matrix of a batch leaves the others as they are.


def bad_lanes(n):
    """Good matrices at the odd places, and at the even ones all that can go wrong with a Cholesky factor."""
    good = np.diag(np.arange(1.0, n + 1)) + 0.1
    indefinite, nan_first, nan_last, nan_off = good - 5 * np.eye(n), good.copy(), good.copy(), good.copy()
    nan_first[0, 0] = nan_last[-1, -1] = nan_off[0, 1] = nan_off[1, 0] = np.nan
    bad = [indefinite, np.zeros((n, n)), nan_first, nan_last, nan_off, np.full((n, n), np.nan)]
    return np.stack([x for pair in zip(bad, [good] * len(bad), strict=True) for x in pair])


@pytest.mark.parametrize("shape", [(9, 20), (1, 9, 20), (3, 9, 20), (3, 9, 5)], ids=str)
@pytest.mark.parametrize("used", [(0, 0, 0), (2, 0, 4), (2, 5, 0)], ids=str)
def test_rows_in_use(ops, framework, host, rng, shape, used):
    """Sums over all rows are those over the rows in use, of which the host has no more than the most."""
    A, weights = rng.normal(size=shape), np.zeros((3, 9))
    for row, count in zip(weights, used, strict=True):
        row[rng.permutation(9)[:count]] = rng.uniform(1, 2, count)
    whole = np.broadcast_to(A, (3, *shape[-2:]))
    expected = np.einsum("bki,bk,bkj->bij", whole, weights, whole)
    for seam, array in ((ops, framework.array), (host, np.array)):
        rows, left = map(numpy, seam.rows_in_use(array(A), array(weights)))
        is_cut = seam is host and max(used) <= 4 and shape[-1] == 20
        assert left.shape == (3, max(used) if is_cut else 9)
        assert rows.shape == ((3, max(used), 20) if is_cut else shape)
        rows = np.broadcast_to(rows, (3, *rows.shape[-2:]))
        assert_close(np.einsum("bki,bk,bkj->bij", rows, left, rows), expected)


def test_cholesky_fails_by_lane(ops, framework, dtype):
    x = bad_lanes(3).astype(dtype)
    factors, alone = (numpy(framework.fast(ops.cholesky)(framework.array(x))) for x in (x, x[1::2]))
    assert np.isnan(factors[::2]).all()
    assert (factors[1::2] == alone).all()
    assert_close(alone, np.linalg.cholesky(x[1::2]), dtype)


def test_cholesky_reads_the_lower_triangle(ops, framework):
    x = np.eye(3)
    x[0, 2] = np.nan
    assert_close(framework.fast(ops.cholesky)(framework.array(x)), np.eye(3))


@pytest.mark.parametrize("n", [2, 3, 10])
def test_eigh_fails_by_lane(ops, framework, n):
    x = np.concatenate([bad_lanes(n), np.diag([np.inf] + [1.0] * (n - 1))[None]])
    values, vectors = map(numpy, framework.fast(ops.eigh)(framework.array(x)))
    finite = np.isfinite(x).all((1, 2))
    assert np.isnan(values[~finite]).all() and np.isnan(vectors[~finite]).all()
    x, values, vectors = x[finite], values[finite], vectors[finite]
    assert_close(values, np.linalg.eigvalsh(x))
    assert_close((vectors * values[:, None]) @ vectors.mT, x)
    assert_close(vectors.mT @ vectors, np.broadcast_to(np.eye(n), x.shape))


def test_eigh_reads_the_lower_triangle(ops, framework, rng):
    x = rng.normal(size=(4, 4))
    assert_close(framework.fast(ops.eigh)(framework.array(x))[0], np.linalg.eigvalsh(x, UPLO="L"))


@pytest.mark.parametrize("transpose", [False, True])
def test_lu_factor(ops, framework, rng, transpose):
    x, y = rng.normal(size=(4, 3, 3)), rng.normal(size=(4, 3, 2))
    x[0], x[2, 1, 1] = 0.0, np.nan

    def solve(x, y):
        return ops.lu_solve(ops.lu_factor(x), y, transpose=transpose)

    solution = numpy(framework.fast(solve)(framework.array(x), framework.array(y)))
    assert not np.isfinite(solution[::2]).any(axis=(1, 2)).all()
    assert_close(solution[1::2], np.linalg.solve(x[1::2].mT if transpose else x[1::2], y[1::2]))


@pytest.mark.parametrize("transpose", [False, True])
def test_lu_solve_of_torch_on_memory_in_any_order(rng, transpose):
    torch = pytest.importorskip("torch")
    from optlayers.ops import torch as ops

    x, y = rng.normal(size=(4, 3, 3)), rng.normal(size=(4, 3, 3))
    expected = np.linalg.solve(x.mT if transpose else x, y)
    x, y = torch.tensor(x.mT.copy()).mT, torch.tensor(y.mT.copy()).mT
    factor, pivots = ops.lu_factor(x)
    assert_close(ops.lu_solve((factor, pivots), y, transpose=transpose), expected)
    assert_close(ops.lu_solve((factor[::2], pivots[::2]), y[::2], transpose=transpose), expected[::2])
    assert_close(ops.lu_solve((factor, pivots), y[..., ::2], transpose=transpose), expected[..., ::2])
    repeated = ops.lu_solve((factor, pivots), y[..., :1].expand(4, 3, 5), transpose=transpose)
    assert_close(repeated, expected[..., [0] * 5])


# Control flow


def double_until(ops, limit):
    """x doubled until its sum exceeds `limit`, and how often, on a nested state."""

    def condition(state):
        _, (x, _) = state
        return ops.sum(x, axis=0) < limit

    def body(state):
        count, (x, previous) = state
        return count + 1, (2 * x, x)

    return lambda x: ops.while_loop(condition, body, (0, (x, x)))


@pytest.mark.parametrize("limit, count", [(100.0, 6), (-1.0, 0)])
def test_while_loop(ops, framework, limit, count):
    steps, (x, previous) = framework.fast(double_until(ops, limit))(framework.array([1.0, 2.0]))
    assert int(steps) == count
    assert_close(x, np.array([1.0, 2.0]) * 2**count)
    assert_close(previous, np.array([1.0, 2.0]) * 2 ** max(count - 1, 0))


@pytest.mark.parametrize(("count", "steps"), [(0, 0), (2, 2), (9, 3)])
def test_repeat_while(ops, framework, count, steps):
    """Here after three steps. A body that ran without need would be seen in the number of steps."""
    too_large = lambda state: state[1] > 1
    halve = lambda state: (state[0] + 1, ops.where(too_large(state), state[1] / 2, state[1]))
    x = np.array([0.5, 3.0, 8.0])
    k, actual = ops.repeat_while(count, too_large, halve, (0, framework.array(x)))
    assert int(k) == steps
    expected = {0: x, 2: [0.5, 0.75, 2.0], 9: [0.5, 0.75, 1.0]}
    np.testing.assert_array_equal(numpy(actual), expected[count])


def test_while_loop_under_vmap_of_jax(rng):
    jax = pytest.importorskip("jax")
    from optlayers.ops import jax as ops

    x = np.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    steps, (doubled, _) = jax.vmap(double_until(ops, 100.0))(jax.numpy.asarray(x))
    assert_close(steps, [6, 2, 0])
    assert_close(doubled, x * 2 ** np.array([[6], [2], [0]]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cond(ops, framework, sign):
    def function(x, y):
        def up(x, y):
            return x * y, {"sum": x + y}

        def down(x, y):
            return x - y, {"sum": -x}

        return ops.cond(ops.all(x > 0), up, down, x, y)

    x, y = sign * np.array([1.0, 2.0]), np.array([3.0, 4.0])
    value, rest = framework.fast(function)(framework.array(x), framework.array(y))
    assert_close(value, x * y if sign > 0 else x - y)
    assert_close(rest["sum"], x + y if sign > 0 else -x)
    assert_close(
        ops.cond(framework.array(sign > 0), lambda: framework.array(1.0), lambda: framework.array(2.0)),
        1.0 if sign > 0 else 2.0,
    )

    one = framework.array(np.ones(2))
    _, pull = framework.vjp(lambda x: function(x, framework.array(y))[0], framework.array(x))
    assert_close(pull(one)[0], y if sign > 0 else np.ones(2))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cond_or_both(ops, framework, sign):
    def function(x):
        # Both branches agree where x < 0.
        return ops.cond_or_both(ops.any(x > 0), lambda x: x * ops.maximum(x, 0.0), lambda x: 0 * x, x)

    x = sign * np.array([1.0, 2.0])
    array = framework.array(x)
    tangent = framework.jvp(function, (array,), (array,))[1]
    for actual in (framework.fast(function)(array), framework.compile(function)(array), tangent / 2):
        assert_close(actual, x * np.maximum(x, 0))
    assert_close(framework.vmap(function)(array[None]), (x * np.maximum(x, 0))[None])


def test_cond_or_both_of_torch_skips_both_where_it_can(torch):
    from optlayers.ops import torch as ops

    def both(x):
        raise AssertionError

    x = torch.ones(2)
    assert_close(ops.cond_or_both(ops.any(x < 0), both, lambda x: 2 * x, x), [2.0, 2.0], np.float32)


def test_on_host(ops, framework):
    seen = []
    arrays = framework.array([1.0, 2.0]), framework.array([True])
    assert ops.on_host(lambda *xs: seen.extend(xs), *arrays) is None
    assert all(isinstance(x, np.ndarray) for x in seen)
    assert [x.tolist() for x in seen] == [[1.0, 2.0], [True]]


def test_on_host_is_skipped_while_jax_traces():
    jax = pytest.importorskip("jax")
    from optlayers.ops import jax as ops

    seen = []
    jax.jit(lambda x: ops.on_host(seen.append, x))(jax.numpy.ones(2))
    assert seen == []


def test_call_host(ops, framework, rng):
    x, active = rng.normal(size=(3, 2)), np.array([True, False, True])

    def function(active, x):
        assert isinstance(active, np.ndarray) and isinstance(x, np.ndarray)
        return np.where(active[..., None], np.cumsum(x, -1), 0.0), x.sum(-1)

    def call(active, x):
        return ops.call_host(function, [(3, 2), (3,)], active, x)

    outputs = framework.fast(call)(framework.array(active), framework.array(x.astype(np.float32)))
    assert_all_close(outputs, function(active, x), np.float32)


def test_call_host_under_vmap_of_jax(rng):
    jax = pytest.importorskip("jax")
    from optlayers.ops import jax as ops

    def function(active, x):
        assert active.shape == x.shape[:-1] == (4, 3)
        return [x.sum(-1) * active]

    def call(active, x):
        return ops.call_host(function, [(3,)], active, x)

    x, active = rng.normal(size=(4, 3, 2)), np.array([True, False, True])
    (total,) = jax.vmap(call, (None, 0))(active, x)
    assert_close(total, x.sum(-1) * active)


def test_run_on_host(ops, framework, rng):
    """Without derivatives; what is not mapped comes once."""
    shared, x = rng.normal(size=(3, 2)), rng.normal(size=(4, 3, 2))

    def function(shared, x):
        assert shared.shape == (3, 2) or (shared.shape[0], x.shape[0]) == (1, 4)
        return [(shared * x).sum(-1)]

    def call(shared, x):
        return ops.run_on_host(function, [(3,)], shared, x)[0]

    shared, x = map(framework.array, (shared, x))
    expected = (numpy(shared) * numpy(x)).sum(-1)
    assert_close(call(shared, x[0]), expected[0])
    assert_close(framework.vmap(call, (None, 0))(shared, x), expected)
    value, pullback = framework.vjp(lambda x: call(shared, x) + ops.sum(x, -1), x[0])
    assert_close(pullback(0 * value + 1)[0], np.ones((3, 2)))


# What is not differentiated


MODES = ("forward", "reverse")


def differentiate(framework, function, modes):
    """The derivative of an elementwise function, once more for each mode."""
    if not modes:
        return function
    *inner, mode = modes
    function = differentiate(framework, function, inner)
    if mode == "forward":
        return lambda x: framework.jvp(function, (x,), (0 * x + 1,))[1]
    return lambda x: framework.vjp(function, x)[1](0 * x + 1)[0]


def assert_no_derivatives(framework, function, x):
    for modes in [*itertools.product(MODES), *itertools.product(MODES, MODES)]:
        derivative = framework.fast(differentiate(framework, function, modes))
        assert_close(derivative(framework.array(x)), np.zeros(x.shape))


def test_stop_gradient(ops, framework):
    x = np.array([1.0, 2.0])
    assert_close(ops.stop_gradient(framework.array(x)), x)
    assert_no_derivatives(framework, ops.stop_gradient, x)
    _, tangent = framework.jvp(
        lambda x: x * ops.stop_gradient(x), (framework.array(x),), (framework.array(x),)
    )
    assert_close(tangent, x * x)


def test_call_detached(ops, framework):
    x = np.array([1.0, 2.0])
    value, tree = ops.call_detached(lambda x, k: (k * x["a"], {"b": x["a"]}), {"a": framework.array(x)}, 3.0)
    assert_close(value, 3 * x)
    assert_close(tree["b"], x)
    assert_no_derivatives(framework, lambda x: ops.call_detached(lambda z: x * z, x**2), x)


JACOBIANS = {
    (4, 3): (
        lambda ops, z: z * ops.sum(z, -1, keepdims=True),
        lambda x: np.eye(3) * x.sum(-1)[:, None, None] + x[..., None],
    ),
    (3, 2, 2): (
        lambda ops, z: z @ z,
        lambda x: np.stack([np.kron(z, np.eye(2)) + np.kron(np.eye(2), z.T) for z in x]),
    ),
}


@pytest.mark.parametrize("shape", JACOBIANS, ids=str)
def test_jacobian(ops, framework, rng, shape):
    function, expected = JACOBIANS[shape]
    x = rng.normal(size=shape)
    jacobian = lambda x: ops.jacobian(partial(function, ops), x)
    assert_close(jacobian(framework.array(x)), expected(x))
    xs = rng.normal(size=(2, *shape))
    mapped = framework.compile(framework.vmap(jacobian))(framework.array(xs))
    assert_close(mapped, np.stack([expected(x) for x in xs]))
    assert_no_derivatives(framework, lambda x: ops.sum(jacobian(x), -1).reshape(shape), x)


def test_jacobian_of_a_constant(ops, framework):
    x = framework.array(np.ones((2, 3)))
    assert_close(ops.jacobian(lambda z: x, x), np.zeros((2, 3, 3)))


def test_jacobian_of_torch_under_hooks_for_saved_tensors(torch, rng):
    from optlayers.ops import torch as ops

    x, seen = torch.tensor(rng.normal(size=(4, 3)), requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        jacobian = ops.jacobian(lambda z: z**2, x)
    assert_close(jacobian, 2 * torch.diag_embed(x.detach()).numpy())
    assert not seen


def with_surrogate_gradient(ops):
    """x -> (x**2, 5 x), with x**2 u + 3 x w in place of the product with the cotangents u and w."""

    def rule(values, inputs, cotangents):
        return [values[0] * cotangents[0] + 3 * inputs[0] * cotangents[1]]

    return lambda x: ops.surrogate_gradient((ops.stop_gradient(x) ** 2, 5 * ops.stop_gradient(x)), (x,), rule)


def test_surrogate_gradient(ops, framework):
    values = with_surrogate_gradient(ops)(framework.array([1.0, 2.0]))
    assert_all_close(values, [[1.0, 4.0], [5.0, 10.0]])


def test_surrogate_gradient_of_torch(torch):
    from optlayers.ops import torch as ops

    layer = with_surrogate_gradient(ops)
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    cotangents = torch.ones_like(x), torch.tensor([1.0, torch.nan], dtype=torch.float64)
    assert_close(torch.autograd.grad(layer(x), x, cotangents)[0], [4.0, np.nan])
    # Even where the cotangents are constant and the rest of the sum has a second derivative.
    (gradient,) = torch.autograd.grad((layer(x)[0] + x**3).sum(), x, create_graph=True)
    assert_close(gradient, [4.0, 16.0])
    with pytest.raises(NotImplementedError, match="no derivative of its own"):
        gradient.sum().backward()
    total = lambda x: layer(x)[0].sum()
    for transformed in (torch.func.grad(total), torch.func.vmap(layer), torch.func.jacfwd(total)):
        with pytest.raises(NotImplementedError, match=r"backward\(\) alone"):
            transformed(x)


def test_surrogate_gradient_of_jax():
    jax = pytest.importorskip("jax")
    from optlayers.ops import jax as ops

    layer = with_surrogate_gradient(ops)
    x = jax.numpy.array([1.0, 2.0])
    cotangents = jax.numpy.ones(2), jax.numpy.array([1.0, np.nan])
    assert_close(jax.vjp(layer, x)[1](cotangents)[0], [4.0, np.nan])

    def gradient(x):
        return jax.grad(lambda x: (layer(x)[0] + x**3).sum())(x)

    assert_close(gradient(x), [4.0, 16.0])
    with pytest.raises(NotImplementedError, match="no derivative of its own"):
        jax.grad(lambda x: gradient(x).sum())(x)
    with pytest.raises(NotImplementedError, match="no derivative of its own"):
        jax.jvp(gradient, (x,), (x,))
    with pytest.raises(TypeError):
        jax.jvp(layer, (x,), (x,))


# Leaves


@dataclass(frozen=True)
class Tag:
    """A field of a leaf that is an object itself."""

    numbers: tuple = ()


@dataclass(frozen=True)
class Halving:
    """A x halved until no entry exceeds `limit`, and how often, for (A, x) of shapes (m, n) and (n,)."""

    limit: float = 1.0
    tag: Tag | None = None

    in_numpy = True

    @property
    def input_ndims(self):
        return 2, 1

    def output_shapes(self, shapes):
        A, x = shapes
        batch = A[0] if len(A) == 3 else x[0] if len(x) == 2 else 1
        return [((batch, A[-2]), "float"), ((batch,), "int")]

    def __call__(self, ops, A, x):
        A, x = (z if z.ndim > ndim else z[None] for z, ndim in zip((A, x), self.input_ndims, strict=True))
        y = (A @ x[..., None])[..., 0]

        def too_large(y):
            return ops.amax(abs(y), axis=-1) > self.limit

        def halve(state):
            y, count = state
            return ops.where(too_large(y)[:, None], y / 2, y), ops.where(too_large(y), count + 1, count)

        state = y, ops.to_int(0 * ops.sum(y, axis=-1))
        return list(ops.while_loop(lambda state: ops.any(too_large(state[0])), halve, state))


def halved(A, x, limit=1.0):
    """What `Halving` computes, in NumPy."""
    A, x = (z if z.ndim > ndim else z[None] for z, ndim in ((A, 2), (x, 1)))
    y = (A @ x[..., None])[..., 0]
    count = np.zeros(len(y), int)
    while (large := abs(y).max(axis=-1) > limit).any():
        y = np.where(large[:, None], y / 2, y)
        count += large
    return y, count


def assert_all_close(actual, expected, dtype=np.float64):
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, dtype)


BATCHES = [((), ()), ((), (4,)), ((4,), ()), ((4,), (4,)), ((), (0,)), ((0,), ())]


def test_leaf(ops, framework, rng, dtype):
    pairs = [(9 * rng.normal(size=(*b, 3, 2)), rng.normal(size=(*c, 2))) for b, c in BATCHES]
    arrays = [[framework.array(z.astype(dtype)) for z in pair] for pair in pairs]
    results = framework.fast(lambda pairs: [ops.leaf(Halving(), pair) for pair in pairs])(arrays)
    for outputs, (A, x) in zip(results, pairs, strict=True):
        assert_all_close(outputs, halved(A, x), dtype)
        expected = Halving().output_shapes([A.shape, x.shape])
        assert [(z.shape, "int" if "int" in str(z.dtype) else "float") for z in outputs] == expected


def test_leaves_with_other_settings_are_others(ops, framework, rng):
    A, x = rng.normal(size=(3, 2)), rng.normal(size=(4, 2))
    for limit in (0.1, 0.01, 0.1):
        outputs = ops.leaf(Halving(limit), [framework.array(A), framework.array(x)])
        assert_all_close(outputs, halved(A, x, limit))


@dataclass(frozen=True)
class Echo:
    """A leaf that returns its input (B, n), twice."""

    in_numpy = True

    @property
    def input_ndims(self):
        return (1,)

    def output_shapes(self, shapes):
        return [(shapes[0], "float")] * 2

    def __call__(self, ops, x):
        return [x, x]


def test_leaf_may_return_its_input(ops, framework):
    x = np.ones((2, 3))
    assert_all_close(ops.leaf(Echo(), [framework.array(x)]), [x, x])
    mapped = framework.vmap(lambda x: ops.leaf(Echo(), [x]))
    assert_all_close(mapped(framework.array(x[None])), [x[None], x[None]])


def test_leaf_has_no_derivatives(ops, framework, rng):
    A = framework.array(9 * rng.normal(size=(3, 3)))
    x = rng.normal(size=(2, 3))

    def value(x):
        return ops.leaf(Halving(), (A, x))[0]

    assert_no_derivatives(framework, value, x)
    assert_no_derivatives(framework, framework.vmap(lambda x: value(x)[0]), x)
    for mode in MODES:
        derivative = framework.fast(differentiate(framework, lambda x: x * value(x), [mode]))
        assert_close(derivative(framework.array(x)), halved(numpy(A), x)[0])


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None), (1, -1)])
def test_leaf_under_vmap(ops, framework, rng, axes):
    def draw(axis, *shape):
        return [9 * rng.normal(size=shape)] * 5 if axis is None else list(9 * rng.normal(size=(5, *shape)))

    def join(axis, lanes):
        return framework.array(lanes[0] if axis is None else np.stack(lanes, axis))

    pairs = [(draw(axes[0], *b, 3, 2), draw(axes[1], *c, 2)) for b, c in BATCHES[:5]]
    arrays = [[join(axis, lanes) for axis, lanes in zip(axes, pair, strict=True)] for pair in pairs]
    mapped = framework.vmap(lambda *inputs: ops.leaf(Halving(), inputs), axes)
    results = framework.fast(lambda pairs: [mapped(*pair) for pair in pairs])(arrays)
    for outputs, pair in zip(results, pairs, strict=True):
        expected = [halved(*lane) for lane in zip(*pair, strict=True)]
        assert_all_close(outputs, map(np.stack, zip(*expected, strict=True)))


@pytest.mark.parametrize("x_batch", [(), (4,)])
def test_leaf_under_nested_vmap(ops, framework, rng, x_batch):
    A, x = 9 * rng.normal(size=(5, 3, 2)), rng.normal(size=(6, *x_batch, 2))
    inner = framework.vmap(lambda *inputs: ops.leaf(Halving(), inputs), (None, 0))
    outputs = framework.fast(framework.vmap(inner, (0, None)))(*map(framework.array, (A, x)))
    rows = [[halved(a, z) for z in x] for a in A]
    assert_all_close(outputs, [np.array([[pair[i] for pair in row] for row in rows]) for i in range(2)])


def test_leaf_built_and_first_called_while_compiling(ops, framework, rng):
    A, x = 9 * rng.normal(size=(3, 2)), rng.normal(size=(4, 2))

    def function(A, x):
        return ops.leaf(Halving(limit=0.37, tag=Tag(numbers=(1, 2.0))), (A, x))

    assert_all_close(framework.compile(function)(*map(framework.array, (A, x))), halved(A, x, 0.37))


def test_leaf_of_torch_has_no_graph(torch):
    from optlayers.ops import torch as ops

    A, x = torch.ones(3, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    assert not any(output.requires_grad for output in ops.leaf(Halving(), (A, x)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_leaf_of_torch_in_a_gradient(torch, rng, backend):
    from optlayers.ops import torch as ops

    A, x = 9 * rng.normal(size=(3, 3)), rng.normal(size=(4, 3))
    function = torch.compile(
        lambda A, x: (x * ops.leaf(Halving(), (A, x))[0]).sum(), fullgraph=True, backend=backend
    )
    A_t, x_t = (torch.tensor(z, requires_grad=True) for z in (A, x))
    function(A_t, x_t).backward()
    assert A_t.grad is None
    assert_close(x_t.grad, halved(A, x)[0])


def test_torch_compiles_once_for_each_leaf(torch, rng):
    from torch._dynamo.testing import CompileCounter

    from optlayers.ops import torch as ops

    A, x = 9 * rng.normal(size=(3, 2)), rng.normal(size=(4, 2))
    tensors = torch.tensor(A), torch.tensor(x)
    counter = CompileCounter()
    function = torch.compile(lambda solve, *inputs: ops.leaf(solve, inputs), fullgraph=True, backend=counter)
    for limit in (0.31, 0.32, 0.33):
        assert_all_close(function(Halving(limit), *tensors), halved(A, x, limit))
    count = counter.frame_count
    for limit in (0.41, 0.42, 0.43):
        ops.leaf(Halving(limit), tensors)
        assert_all_close(function(Halving(0.33), *tensors), halved(A, x, 0.33))
    assert counter.frame_count == count


@pytest.mark.parametrize("A_batch, x_batch", BATCHES)
def test_leaf_of_fake_tensors(torch, A_batch, x_batch):
    from torch._subclasses import FakeTensorMode

    from optlayers.ops import torch as ops

    inputs = torch.ones(*A_batch, 3, 2), torch.ones(*x_batch, 2)
    real = ops.leaf(Halving(), inputs)
    with FakeTensorMode() as mode:
        fake = ops.leaf(Halving(), [mode.from_tensor(z) for z in inputs])
    assert [(z.shape, z.dtype, z.stride()) for z in fake] == [(z.shape, z.dtype, z.stride()) for z in real]


def test_leaf_keeps_the_contract_of_a_custom_operator(torch):
    from optlayers.ops.torch.leaf import _text

    arguments = _text(Halving()), [torch.ones(3, 2), torch.ones(4, 2)]
    torch.library.opcheck(torch.ops.optlayers.leaf.default, arguments)


def test_amax_keeps_nan(ops, framework, rng):
    """Also where XLA's own maximum of long rows does not."""
    x = rng.normal(size=(128, 120))
    x[0], x[5, 60], x[127, 119] = np.nan, np.nan, np.nan
    largest = framework.fast(lambda x: ops.amax(x, axis=-1))(framework.array(x))
    np.testing.assert_array_equal(np.isnan(np.asarray(largest)), np.isin(np.arange(128), [0, 5, 127]))


@pytest.mark.parametrize("masked", [[], [2], [0, 2, 3]])
def test_on_rows(ops, framework, masked):
    """A batched, a shared and a broadcast array; rows outside the mask keep their state.

    What is batched never comes as one row, which stands for what the batch shares.
    """
    mask = np.isin(np.arange(4), masked)
    data = [np.arange(8.0).reshape(4, 2), np.arange(4.0), np.arange(2.0).reshape(1, 2)]
    state = np.zeros((4, 2)), np.arange(4.0)

    def work(data, state):
        (own, shared, row), (total, index) = data, state
        assert len(own) == len(total) > 1 == len(row)
        inside = ops.any(index[:, None] == framework.array(np.array([*masked, -1.0]))[None], -1)
        new = own + shared[:2][None] + row
        return ops.where(inside[:, None], new, total), index

    arrays = [framework.array(x) for x in data], tuple(framework.array(x) for x in state)
    result = ops.on_rows(framework.array(mask), work, arrays[0], (1, 1, 1), arrays[1])
    expected = np.where(mask[:, None], data[0] + 2 * np.arange(2.0), 0.0)
    for actual, wanted in zip(result, (expected, state[1]), strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "batched"])
@pytest.mark.parametrize("rows", [2, 3, 100])
def test_repeat_on_rows(ops, framework, host, monkeypatch, is_shared, rows):
    """Each row takes the steps that it needs, with their numbers, whatever parts the batch comes in."""
    if ops.__name__.endswith("jax"):
        monkeypatch.setattr("jax.device_count", lambda: 1)
        monkeypatch.setattr(ops.control, "PART_BYTES", 0)
        monkeypatch.setattr(ops.control, "PART_ROWS", rows)
    counts, M = np.array([3.0, 0.0, 1.0, 5.0, 2.0, 1.0, 4.0]), np.array([[0.0, 1.0], [1.0, 0.0]])
    x = np.arange(14.0).reshape(7, 2)
    data = [M if is_shared else np.stack(7 * [M]), x]

    for seam, array in ((ops, framework.array), (host, np.array)):

        def step(k, data, state, seam=seam):
            (total, taken), left = state
            M, x = data
            active = left > 0
            flipped = (M @ x[..., None])[..., 0]
            total = seam.where(active[:, None], total + k * flipped, total)
            return (total, seam.where(active, taken + 1, taken)), seam.where(active, left - 1, left)

        zeros = array(0 * x), array(0 * counts)
        (total, taken), left = seam.repeat_on_rows(
            lambda state: state[1] > 0, step, [array(y) for y in data], (2, 1), (zeros, array(counts))
        )
        assert_close(total, (counts * (counts + 1) / 2)[:, None] * x[:, ::-1])
        assert_close(taken, counts)
        assert_close(left, 0 * counts)


@pytest.mark.parametrize("block_bytes", [1, 64, 200, 10**6])
def test_in_blocks(ops, framework, host, rng, monkeypatch, block_bytes):
    """The same as all at once, and on the host nothing larger than asked for, where less will do."""
    monkeypatch.setattr("optlayers.ops.numpy.BLOCK_BYTES", block_bytes)
    M, x, shared = rng.normal(size=(7, 2, 2)), rng.normal(size=(7, 2)), rng.normal(size=2)
    for seam, array in ((ops, framework.array), (host, np.array)):
        sizes = []

        def work(M, x, shared, sizes=sizes):
            sizes.append(len(M))
            return [x + shared[None], (M @ x[..., None])[..., 0]]

        blocks = seam.in_blocks(work, [array(z) for z in (M, x, shared)], (2, 1, 1), 4)
        assert_all_close(blocks, [x + shared, (M @ x[..., None])[..., 0]])
        assert sum(sizes) == 7
        assert seam is ops or max(sizes) <= max(block_bytes // 32, 1)


BLAS_IN_THREADS = """
import time
from concurrent.futures import ThreadPoolExecutor
from threadpoolctl import threadpool_info
from optlayers.ops.torch import host

def count():
    return {x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"}

def work(part):
    time.sleep(part)
    return count()

before = count()
with ThreadPoolExecutor(2) as pool:
    calls = [pool.submit(host._run_in_threads, work, [part]) for part in (0.1, 0.5)]
    assert [call.result() for call in calls] == [[{1}], [{1}]]
assert count() == before, count()
"""


def test_threads_of_blas_after_calls_of_several_threads():
    """A call that begins while another one works does not take its one thread for the number before."""
    pytest.importorskip("torch")
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", BLAS_IN_THREADS], check=True, env=environment)


@pytest.mark.parametrize("few", [1, 60])
def test_few_matrices_at_a_time(rng, monkeypatch, few):
    """As for large ones in JAX: a batch in blocks of one and of two, also if it shares a matrix."""
    jax = pytest.importorskip("jax")
    from optlayers.ops import jax as ops

    monkeypatch.setattr("optlayers.ops.jax.arrays.FEW", few)
    x, y, shared = (rng.normal(size=(*lead, 3, k)) for *lead, k in ((2, 4, 3), (2, 4, 2), (1, 1, 3)))
    x, y, shared = map(jax.numpy.asarray, (x @ x.mT + np.eye(3), y, shared @ shared.mT + np.eye(3)))
    inverse = jax.numpy.linalg.inv
    assert_all_close(ops.cholesky(x), np.linalg.cholesky(x))
    assert_all_close(ops.inverse_triangular(ops.cholesky(x)), np.linalg.inv(np.linalg.cholesky(x)))
    values, vectors = ops.eigh(x)
    assert_all_close((vectors * values[..., None, :]) @ vectors.mT, x)
    gradient = lambda solve, at: jax.grad(lambda z: jax.numpy.sin(solve(z + z.mT)).sum())(at)
    for matrix in (x, shared):
        expected = gradient(lambda z: inverse(z) @ y, matrix)
        assert_all_close(gradient(lambda z: ops.cholesky_solve(ops.cholesky(z), y), matrix), expected)
        expected = gradient(lambda z: inverse(z).mT @ y, matrix)
        solve = lambda z: ops.lu_solve(ops.lu_factor(z), y, transpose=True)
        assert_all_close(gradient(solve, matrix), expected)


BESIDE = """
import os, jax, jax.numpy as jnp, optlayers.ops.jax as ops
count, x = 3 * os.cpu_count(), jnp.broadcast_to(4 * jnp.eye(40), (64, 40, 40))
work = jax.jit(lambda x: sum(ops.cholesky(x + k) for k in range(count)).sum())
print([float(work(x)) > 0 for _ in range(50)].count(True))
"""


def test_many_factorizations_beside_each_other():
    """They must not wait for one another: JAX 0.10 by itself does not come to an end here."""
    pytest.importorskip("jax")
    call = subprocess.run([sys.executable, "-c", BESIDE], capture_output=True, text=True, timeout=120)
    assert call.stdout.split() == ["50"], call.stderr


@pytest.mark.parametrize(
    "block_bytes, most, count", [(64, 128, 4), (10**6, 2, 4), (200, 128, 2), (10**6, 8, 1)]
)
def test_in_blocks_of_jax(rng, monkeypatch, block_bytes, most, count):
    """Blocks of equal size, the last of which may share problems with the one before it."""
    jax = pytest.importorskip("jax")
    from optlayers.ops import jax as ops

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr("optlayers.ops.jax.control.BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("optlayers.ops.jax.control.BLOCK_ROWS", most)
    M, x, shared = rng.normal(size=(7, 2, 2)), rng.normal(size=(7, 2)), rng.normal(size=2)
    calls = []

    def work(M, x, shared):
        jax.debug.callback(lambda rows: calls.append(len(rows)), x)
        return [x + shared[None], (M @ x[..., None])[..., 0]]

    blocks = ops.in_blocks(work, [jax.numpy.asarray(z) for z in (M, x, shared)], (2, 1, 1), 4)
    assert_all_close(blocks, [x + shared, (M @ x[..., None])[..., 0]])
    jax.effects_barrier()
    assert len(calls) == count and len(set(calls)) == 1


def test_in_blocks_on_each_device(rng, monkeypatch):
    """Under shard_map in JAX; elsewhere a batch is left whole where there are several devices."""
    jax = pytest.importorskip("jax")
    from optlayers.ops import jax as ops

    monkeypatch.setattr("optlayers.ops.jax.control.BLOCK_ROWS", 2)
    x, calls = rng.normal(size=(8, 2)), []

    def work(x):
        jax.debug.callback(lambda rows: calls.append(len(rows)), x)
        return [2 * x]

    blocks = lambda x: ops.in_blocks(work, [x[:, None] * x[:, :, None]], (2,), 4)[0]
    axis = jax.sharding.PartitionSpec("batch")
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("batch",))
    for function, count, rows in (
        (jax.shard_map(blocks, mesh=mesh, in_specs=axis, out_specs=axis), 4, 2),
        (blocks, 1, 8),
    ):
        calls.clear()
        assert_all_close(jax.jit(function)(x), 2 * x[:, None] * x[:, :, None])
        jax.effects_barrier()
        assert calls == [rows] * count


def test_in_blocks_of_problems_without_variables(host):
    (same,) = host.in_blocks(lambda M: [M], [np.ones((7, 0, 0))], (2,), 0)
    assert same.shape == (7, 0, 0)


def test_solve_small(ops, framework, host):
    """None on a CPU; the kernel of torch on a GPU is tested in `layers/test_fused.py`."""
    data = [np.eye(2), np.ones(2), np.eye(2), np.ones(2), np.zeros(2), np.ones(2)]
    assert host.solve_small(data, (), ()) is None
    assert ops.solve_small([framework.array(x) for x in data], (), ()) is None


# The seam for leaves on the host


# What no leaf on NumPy arrays calls.
OFF_HOST = {"lu_solve", "argsort"}  # layers outside of their leaves
OFF_HOST |= {"sin", "cos", "arctan2", "norm", "multiply_add", "moveaxis", "put"}  # SATLayer, on tensors


@pytest.mark.parametrize("name", [name for name in CASES if name not in OFF_HOST])
def test_values_on_the_host(host, rng, name):
    for (call, expected, draws), dtype in itertools.product(CASES[name], (np.float64, np.float32)):
        arguments = [draw(rng) for draw in draws]
        assert_close(call(host, *(x.astype(dtype) for x in arguments)), expected(*arguments), dtype)


@pytest.mark.parametrize("kind", ["cholesky", "eigh"])
def test_factors_on_the_host_fail_by_lane(host, kind):
    x = np.eye(3) + np.zeros((5, 1, 1))
    x[1], x[4, 2, 2] = -x[1], np.nan
    result = getattr(host, kind)(x)
    lanes = np.isnan(result if kind == "cholesky" else result[1]).all((1, 2))
    np.testing.assert_array_equal(lanes, [False, kind == "cholesky", False, False, True])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_cholesky_of_one_matrix_on_the_host(host, dtype):
    """As of several: the lower triangle is read, and failure is NaN."""
    for x in bad_lanes(3).astype(dtype):
        several = host.cholesky(np.stack([x, x]))[:1]
        assert_close(host.cholesky(x[None]), several, dtype)
    x = np.eye(3)[None]
    x[0, 0, 2] = np.nan
    assert_close(host.cholesky(x), np.eye(3)[None])


def test_remembered_on_the_host(host, monkeypatch):
    """Once for equal arguments, whoever owns their memory, and never for others."""
    monkeypatch.setattr("optlayers.ops.numpy._remembered", {})
    calls = []

    def scaled(factor, x):
        calls.append(factor)
        return (factor * x, (x,))

    x = np.array([1.0, 2.0, 3.0])
    recall = lambda factor, x: host.remembered(scaled, (factor,), x)
    for _ in range(3):
        assert_close(recall(2.0, x.copy())[0], 2 * x)
    assert calls == [2.0]
    recall(3.0, x)
    recall(2.0, x[None])
    recall(2.0, x.astype(np.float32))
    assert len(calls) == 4
    x[:] = x[::-1].copy()  # the sum stays as it was
    result, (same,) = recall(3.0, x)
    assert_close(result, 3 * x)
    x[:] = 0.0
    assert_close(same, [3.0, 2.0, 1.0])
    for kept in (result, same):
        with pytest.raises(ValueError, match="read-only"):
            kept[0] = 0.0
    assert_close(recall(3.0, np.array([3.0, 2.0, 1.0]))[0], [9.0, 6.0, 3.0])
    assert len(calls) == 5


def test_remembered_on_the_host_is_limited(host, monkeypatch):
    results = {}
    monkeypatch.setattr("optlayers.ops.numpy._remembered", results)
    monkeypatch.setattr("optlayers.ops.numpy.REMEMBERED_BYTES", 1000)
    recall = lambda i: host.remembered(np.multiply, (2.0,), np.full(30, float(i)))  # 480 bytes each
    for i in range(3):
        recall(i)
    assert [key[2].arrays[0][0] for key in results] == [1.0, 2.0]
    large = host.remembered(np.multiply, (2.0,), np.ones(1000))
    assert_close(large, np.full(1000, 2.0))
    assert not results
    monkeypatch.setattr("optlayers.ops.numpy.MOST_REMEMBERED", 1)
    recall(0), recall(1)
    assert [key[2].arrays[0][0] for key in results] == [1.0]


def test_holds(ops, framework, host):
    for seam, array in ((ops, framework.array), (host, np.array)):
        assert seam.holds(array(True)) and not seam.holds(array(False))
    seen = []
    framework.vmap(lambda x: seen.append(ops.holds(x > 0)) or x)(framework.array([1.0, 2.0]))
    assert seen == [False]


def test_remembered(ops, framework):
    x = framework.array([1.0, 2.0])
    assert_close(ops.remembered(lambda factor, x: factor * x, (2.0,), x), [2.0, 4.0])


def test_on_rows_on_the_host(host):
    state = np.zeros((4, 2)), (np.arange(4),)
    mask = np.array([False, False, True, False])

    def add(data, state):
        (total, (index,)), (ones,) = state, data
        return total + ones * (index == 2)[:, None], (index,)

    total, (index,) = host.on_rows(mask, add, [np.ones((4, 2))], (1,), state)
    np.testing.assert_array_equal(total, [[0, 0], [0, 0], [1, 1], [0, 0]])
    np.testing.assert_array_equal(index, np.arange(4))


# Increments


CUBE_DERIVATIVES = [lambda x: x**3, lambda x: 3 * x**2, lambda x: 6 * x, lambda x: 6 + 0 * x]
SEQUENCES = [modes for n in range(1, 4) for modes in itertools.product(MODES, repeat=n)]


def times(r, transposed, matrix):
    return r @ (matrix if transposed else matrix.mT)


def test_increment(ops, framework, rng):
    """Zero; tangents are mapped by the matrix and cotangents by its transpose, also under vmap."""
    matrices, r, t = rng.normal(size=(3, 2, 2)), rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 4, 2))

    def derivatives(matrix, r, t):
        function = lambda r: ops.increment(times, r, matrix)
        _, pullback = framework.vjp(function, r)[:2]
        value, tangent = framework.jvp(function, (r,), (t,))
        return value, tangent, pullback(t)[0]

    arrays = [framework.array(x) for x in (matrices, r, t)]
    mapped = framework.vmap(derivatives)(*arrays)
    for actual, expected in zip(mapped, (0 * t, t @ matrices.mT, t @ matrices), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("modes", SEQUENCES, ids="-".join)
def test_increment_of_any_order(ops, framework, modes):
    """Its derivatives are those of 3 x^3, whose value it has not."""
    x = np.array([0.5, -1.5])
    scale = lambda r, transposed, factor: factor * r
    function = lambda x: ops.increment(scale, x**3, framework.array(np.full(2, 3.0)))
    derivative = framework.fast(differentiate(framework, function, modes))(framework.array(x))
    assert_close(derivative, 3 * CUBE_DERIVATIVES[len(modes)](x))


@pytest.mark.parametrize("modes", SEQUENCES, ids="-".join)
def test_implied(ops, framework, modes):
    """The derivatives of the cube root of t, from y^3 = t; its value is the given one."""
    t, n = np.array([0.5, -1.5]), len(modes)
    y = np.cbrt(t)
    scale = lambda r, transposed, factor: factor * r

    def root(t):
        inverse = lambda r: ops.increment(scale, r, framework.array(1 / (3 * y**2)))
        return ops.implied(lambda y: y**3 - t, inverse, framework.array(y), n)

    assert_close(root(framework.array(t)), y)
    expected = [y / (3 * t), -2 * y / (9 * t**2), 10 * y / (27 * t**3)][n - 1]
    assert_close(framework.fast(differentiate(framework, root, modes))(framework.array(t)), expected)


@pytest.mark.parametrize("modes", SEQUENCES[2:6], ids="-".join)
def test_derivatives_in_a_loop_over_rows(ops, framework, modes):
    """Second derivatives are those outside of it; beyond its order a guard raises."""
    x = framework.array([[0.5], [-1.5]])
    one = framework.array([1.0])
    scale = lambda r, transposed, factor: factor * r
    tripled = lambda x: ops.increment(scale, x**3, 3 * one)
    inverse = lambda r: ops.increment(scale, r, one)
    root = lambda x: ops.implied(lambda y: y - x**3, inverse, ops.stop_gradient(x**3), 2)
    for function, factor in ((tripled, 3), (root, 1), (cube(ops, 2), 1)):
        derivative = differentiate(framework, partial(framework.rows, function), modes)
        assert_close(framework.fast(derivative)(x), factor * 6 * numpy(x))
    for function in (cube(ops, 1), guarded_cube(ops, 1)):
        with pytest.raises(NotImplementedError, match=MESSAGE):
            differentiate(framework, partial(framework.rows, function), modes)(x)


# Functions that are called for their derivatives only


def power(ops, calls=None):
    """6 x^2, as the product of the constant 3 and two inputs, x and, computed from it, 2 x."""

    def function(order, inputs, constants):
        if calls is not None:
            calls.append(order)
        x, double = inputs
        (three,) = constants
        return [ops.guard(three * x * double, order, MESSAGE)]

    def call(order, x):
        double = 2 * x
        value = ops.stop_gradient(3 * x * double)
        return ops.deferred(function, order, [value], [x, double], [3.0 + 0 * ops.stop_gradient(x)])[0]

    return call


@pytest.mark.parametrize("modes", SEQUENCES, ids="-".join)
def test_deferred(ops, framework, rng, modes):
    x, n, call = rng.normal(size=(2,)), len(modes), power(ops)
    derivative = lambda order: differentiate(framework, partial(call, order), modes)
    expected = [6 * x**2, 12 * x, np.full(2, 12.0), np.zeros(2)][n]
    assert_close(framework.fast(derivative(n))(framework.array(x)), expected)
    with pytest.raises(NotImplementedError, match=MESSAGE):
        derivative(n - 1)(framework.array(x))


def test_deferred_is_called_in_the_backward_pass_of_torch(torch):
    from optlayers.ops import torch as ops

    calls = []
    x = torch.tensor([0.5, -1.5], dtype=torch.float64, requires_grad=True)
    y = power(ops, calls)(2, x)
    assert_close(y, 6 * x.detach().numpy() ** 2)
    assert not calls
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert_close(first, 12 * x.detach().numpy())
    assert calls == [1]  # the second chord step of a layer would be in vain
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_close(second, [12.0, 12.0])
    assert calls == [1, 2]
    with torch.no_grad():
        assert not power(ops, calls)(2, x).requires_grad
    assert len(calls) == 2


# Guards


MESSAGE = "build it with order=7"


def cube(ops, order):
    return lambda x: ops.guard(x, order, MESSAGE) ** 3


def guarded_cube(ops, order):
    return lambda x: ops.guard(x**3, order, MESSAGE)


def guarded(ops, order):
    return lambda x: ops.guard(x, order, MESSAGE)


@pytest.mark.parametrize("modes", SEQUENCES, ids="-".join)
def test_guard(ops, framework, modes):
    x, n = np.array([0.5, -1.5]), len(modes)
    exact = [differentiate(framework, f(ops, n), modes) for f in (cube, guarded_cube)]
    for derivative in framework.fast(lambda x: [f(x) for f in exact])(framework.array(x)):
        assert_close(derivative, CUBE_DERIVATIVES[n](x))
    for function in (cube, guarded_cube, guarded):
        with pytest.raises(NotImplementedError, match=MESSAGE):
            differentiate(framework, function(ops, n - 1), modes)(framework.array(x))


def test_guard_keeps_values(ops, framework, rng, dtype):
    xs = [rng.normal(size=shape).astype(dtype) for shape in ((), (3,), (2, 3), (0, 3))]
    gradient = differentiate(framework, cube(ops, 1), ["reverse"])
    both = framework.fast(lambda xs: [(ops.guard(x, 1, MESSAGE), gradient(x)) for x in xs])
    for x, actual in zip(xs, both([framework.array(x) for x in xs]), strict=True):
        assert_all_close(actual, [x, 3 * x**2], dtype)


@pytest.mark.parametrize("modes", SEQUENCES[2:6], ids="-".join)
def test_guard_under_vmap(ops, framework, rng, modes):
    x = framework.array(rng.normal(size=(4, 2)))

    def second(order):
        return framework.vmap(differentiate(framework, cube(ops, order), modes))

    assert_close(framework.fast(second(2))(x), 6 * numpy(x))
    assert_close(framework.fast(framework.vmap(second(2)))(x[:, None]), 6 * numpy(x[:, None]))
    with pytest.raises(NotImplementedError, match=MESSAGE):
        second(1)(x)


@pytest.mark.parametrize("modes", SEQUENCES[:6], ids="-".join)
def test_guard_compiled(ops, framework, rng, modes):
    x, n = framework.array(rng.normal(size=3)), len(modes)

    def compiled(order):
        return framework.compile(differentiate(framework, cube(ops, order), modes))

    assert_close(compiled(n)(x), CUBE_DERIVATIVES[n](numpy(x)))
    # torch.compile wraps the error in one of its own.
    with pytest.raises(Exception, match=MESSAGE):
        compiled(n - 1)(x)


@pytest.mark.parametrize("modes", SEQUENCES[2:6], ids="-".join)
def test_guard_keeps_lanes_apart(ops, framework, modes):
    """A lane whose tangents and cotangents are NaN has NaN derivatives; the others are exact."""
    weight = framework.array([1.0, np.nan])

    def weighted(function, mode):
        if mode == "forward":
            return lambda x: framework.jvp(function, (x,), (weight,))[1]
        return lambda x: framework.vjp(function, x)[1](weight)[0]

    derivative = weighted(weighted(cube(ops, 2), modes[0]), modes[1])
    assert_close(derivative(framework.array([0.5, 1.5])), [3.0, np.nan])


def test_guard_on_the_tape_of_torch(torch):
    import torch.autograd.forward_ad as forward_ad

    from optlayers.ops import torch as ops

    x = torch.tensor([0.5, -1.5], dtype=torch.float64, requires_grad=True)
    derivatives = [cube(ops, 2)(x)]
    for _ in range(2):
        derivatives += torch.autograd.grad(derivatives[-1].sum(), x, create_graph=True)
    assert_all_close(derivatives, [CUBE_DERIVATIVES[n](x.detach().numpy()) for n in range(3)])
    with pytest.raises(NotImplementedError, match=MESSAGE):
        torch.autograd.grad(derivatives[-1].sum(), x)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        (gradient,) = torch.autograd.grad(cube(ops, 2)(dual).sum(), dual, create_graph=True)
        assert_close(forward_ad.unpack_dual(gradient).tangent, 6 * x.detach().numpy())
        with pytest.raises(NotImplementedError, match=MESSAGE):
            torch.autograd.grad(cube(ops, 1)(dual).sum(), dual, create_graph=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_guard_of_torch_in_a_gradient(torch, backend):
    from optlayers.ops import torch as ops

    x = torch.tensor([0.5, -1.5], dtype=torch.float64, requires_grad=True)
    torch.compile(cube(ops, 1), fullgraph=True, backend=backend)(x).sum().backward()
    assert_close(x.grad, 3 * x.detach().numpy() ** 2)
