"""Every function of the seam, in both frameworks: values against NumPy, derivatives, batches, compilation."""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from optlayers.ops import Ops, select

MEMBERS = [*Ops.__annotations__, *(n for n, f in vars(Ops).items() if inspect.isfunction(f) and n[0] != "_")]
DTYPES = (np.float32, np.float64)


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

        return SimpleNamespace(array=array, compile=compiled, fast=lambda f: f, **vars(torch.func))
    import jax

    # `fast`: without jit JAX would compile every operation of every test by itself.
    names = {name: getattr(jax, name) for name in ("vmap", "jvp", "vjp")}
    return SimpleNamespace(array=jax.numpy.asarray, compile=jax.jit, fast=jax.jit, **names)


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
SQUARES = [definite(3, 3), definite(2, 3, 3), definite(0, 3, 3), definite(2, 0, 0)]
# The batch axis of a matrix may have length 1, to be shared by the right-hand sides.
SYSTEMS = [
    (definite(2, 3, 3), normal(2, 3, 4)),
    (definite(3, 3), normal(3, 1)),
    (definite(1, 3, 3), normal(2, 3, 2)),
    (definite(0, 3, 3), normal(0, 3, 2)),
    (definite(2, 0, 0), normal(2, 0, 2)),
    (definite(2, 3, 3), normal(2, 3, 0)),
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
    "eye": each(
        lambda ops, x: ops.eye(3, x) * x, lambda x: np.eye(3) * x, normal(3, 3)
    ) + each(lambda ops, x: ops.eye(0, x), lambda x: np.eye(0), normal(2)),
    "to_int": each(lambda ops, x: ops.to_int(3 * x), lambda x: (3 * x).astype(int), *MATRICES),
    "where": each(lambda ops, x, y: ops.where(x > y, x, 2 * y), lambda x, y: np.where(x > y, x, 2 * y), *PAIRS)
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
    "amax": each(lambda ops, x: ops.amax(x, axis=-1), lambda x: x.max(-1), normal(3, 4), normal(0, 4))
    + each(lambda ops, x: ops.amax(x, 0, keepdims=True), lambda x: x.max(0, keepdims=True), normal(3, 4))
    + each(lambda ops, x: ops.amax(x, axis=-1), lambda x: np.zeros(2), normal(2, 0))
    + each(lambda ops, x: ops.amax(x, 0, keepdims=True), lambda x: np.zeros((1, 4)), normal(0, 4)),
    "any": each(lambda ops, x: ops.any(x > 1, axis=-1), lambda x: (x > 1).any(-1), *MATRICES)
    + each(lambda ops, x: ops.any(x > 1), lambda x: (x > 1).any(), *MATRICES),
    "all": each(lambda ops, x: ops.all(x > -1, axis=-1), lambda x: (x > -1).all(-1), *MATRICES)
    + each(lambda ops, x: ops.all(x > -1), lambda x: (x > -1).all(), *MATRICES),
    "concat": each(lambda ops, *xs: ops.concat(xs, axis=0), lambda *xs: np.concatenate(xs), *PAIRS)
    + each(lambda ops, *xs: ops.concat(xs, -1), lambda *xs: np.concatenate(xs, -1), (normal(2, 3), normal(2, 0))),
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
    "scatter_add": each(
        lambda ops, x: ops.scatter_add(x, indices(ops, [3, 0, 3, 1], x), 5),
        lambda x: add_at(x, [3, 0, 3, 1], 5),
        *(normal(4), normal(2, 4), normal(2, 3, 4), normal(0, 4)),
    )
    + each(lambda ops, x: ops.scatter_add(x, indices(ops, [], x), 3), lambda x: np.zeros((2, 3)), normal(2, 0))
    + each(lambda ops, x: ops.scatter_add(x, indices(ops, [], x), 0), lambda x: x, normal(2, 0)),
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
    "lu_factor": each(solve_by_lu, solve_by_numpy, *SYSTEMS),
    "lu_solve": each(partial(solve_by_lu, transpose=True), partial(solve_by_numpy, transpose=True), *SYSTEMS),
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
    "jacobian": each(
        lambda ops, x: ops.jacobian(lambda z: z * ops.sum(z, -1, keepdims=True), x),
        lambda x: np.eye(x.shape[-1]) * x.sum(-1)[:, None, None] + x[..., None],
        *MATRICES,
    )
    + each(
        lambda ops, x: ops.jacobian(lambda z: z @ z, x),
        lambda x: np.stack([np.kron(z, np.eye(2)) + np.kron(np.eye(2), z.T) for z in x]),
        normal(3, 2, 2),
    ),
}



@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_is_defined_and_tested(ops, name):
    assert hasattr(ops, name)
    assert name in CASES or f"test_{name}" in globals()


@pytest.fixture(params=CASES)
def cases(request):
    return CASES[request.param]


def calls(ops, cases):
    return lambda arguments: [case.call(ops, *xs) for case, xs in zip(cases, arguments, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values(ops, framework, rng, cases, dtype):
    arguments = [[draw(rng) for draw in case.arguments] for case in cases]
    arrays = [[framework.array(x.astype(dtype)) for x in xs] for xs in arguments]
    for actual, case, xs in zip(framework.fast(calls(ops, cases))(arrays), cases, arguments, strict=True):
        assert_close(actual, case.expected(*xs), dtype)


def test_compiled(ops, framework, rng, cases):
    call, expected, draws = cases[0]
    arguments = [draw(rng) for draw in draws]
    actual = framework.compile(partial(call, ops))(*map(framework.array, arguments))
    assert_close(actual, expected(*arguments))


def test_vmap(ops, framework, rng, cases):
    # The first argument is mapped along its last axis, which leaves a lane without contiguous memory.
    lanes = [[[draw(rng) for draw in case.arguments] for case in cases] for _ in range(3)]
    axes = [[(-1, 0)[i] for i, _ in enumerate(case.arguments)] for case in cases]
    join = lambda axis, *xs: framework.array(np.stack(xs, axis))
    arrays = [list(map(join, *arguments)) for arguments in zip(axes, *lanes, strict=True)]
    actual = framework.fast(framework.vmap(calls(ops, cases), (axes,)))(arrays)
    for i, case in enumerate(cases):
        assert_close(actual[i], np.stack([case.expected(*arguments[i]) for arguments in lanes]))


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
