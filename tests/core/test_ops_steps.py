"""What the seam offers to solvers that log their steps, in both frameworks."""

from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture
def framework(ops):
    if ops.__name__.endswith("torch"):
        import torch

        return SimpleNamespace(array=lambda x: torch.tensor(np.asarray(x)), is_jax=False, torch=torch)
    import jax

    return SimpleNamespace(array=lambda x: jax.numpy.asarray(np.asarray(x)), is_jax=True, jax=jax)


def numpy(x):
    return np.asarray(x.detach() if hasattr(x, "detach") else x)


def gradient(framework, function, x):
    """Of a function with scalar values at the NumPy array x."""
    if framework.is_jax:
        return np.asarray(framework.jax.jit(framework.jax.grad(function))(framework.array(x)))
    x = framework.array(x).requires_grad_()
    return framework.torch.autograd.grad(function(x), x)[0].numpy()


def test_argsort_keeps_the_order_of_equals(ops, framework):
    x = np.array([[2.0, np.inf, 1.0, 2.0, 1.0]])
    np.testing.assert_array_equal(numpy(ops.argsort(framework.array(x))), [[2, 4, 0, 3, 1]])


def test_rows_are_taken_and_put(ops, framework, rng):
    x, values, rows = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 2, 3)), np.array([[4, 0], [1, 3]])
    batch = np.arange(2)[:, None]
    np.testing.assert_array_equal(numpy(ops.take_rows(*map(framework.array, (x, rows)))), x[batch, rows])
    expected = x.copy()
    expected[batch, rows] = values
    actual = ops.put_rows(*map(framework.array, (x, rows, values)))
    np.testing.assert_array_equal(numpy(actual), expected)

    def put(values):
        return (ops.put_rows(0 * framework.array(x) + 1, framework.array(rows), values) ** 2).sum()

    np.testing.assert_allclose(gradient(framework, put, values), 2 * values)


def test_rows_grow(ops, framework, rng):
    like = framework.array(rng.normal(size=(2, 3)))
    log, entries = ops.rows(like, 200), rng.normal(size=(200, 2, 3))
    for k, entry in enumerate(entries):
        place = framework.array(np.full((2, 1), k))
        log = ops.put_rows(ops.grown(log, k), place, framework.array(entry)[:, None])
    np.testing.assert_array_equal(numpy(log)[:, :200], entries.swapaxes(0, 1))


def test_weighted_sum(ops, framework, rng):
    x = rng.normal(size=(3, 2, 2))
    actual = ops.weighted_sum((0.5, 0.0, -2.0), [framework.array(a) for a in x])
    np.testing.assert_allclose(numpy(actual), 0.5 * x[0] - 2 * x[2])


def test_largest_counts_a_loop(ops, framework):
    count = ops.largest(framework.array(np.array([2, 5, 3])))
    assert int(ops.repeat(count, lambda state: (state[0] + 1,), (0,))[0]) == 5


@pytest.mark.parametrize("count", [0, 1, 7, 10])
def test_bounded_repeat_is_differentiable(ops, framework, count):
    def power(x):
        n = ops.largest(framework.array(np.array([count])))
        return ops.bounded_repeat(n, 10, lambda s: (s[0] * x,), (0 * x + 1,))[0].sum()

    x = np.array([0.5, -1.5])
    np.testing.assert_allclose(gradient(framework, power, x), count * x ** max(count - 1, 0))


def test_constants_are_known(ops, framework):
    x = framework.array(np.ones(2))
    assert ops.is_constant(x)
    seen = []
    gradient(framework, lambda x: (seen.append(ops.is_constant(x)), x.sum())[1], np.ones(2))
    assert seen == [False]


def test_explicit_functions_take_what_they_closed_over(ops, framework, rng):
    x, w = rng.normal(size=(2, 3)), rng.normal(size=(1, 3))

    def value(w):
        other = 2 * w
        functions = [lambda x: x * w, lambda x, y: x * other + y]
        arrays = framework.array(x), framework.array(x)
        (f, g), theta = ops.explicit(functions, [arrays[:1], arrays])
        assert len(theta) == 2
        return f(arrays[0], theta).sum() + (g(*arrays, theta) ** 2).sum()

    expected = (x + 2 * (2 * x * w + x) * 2 * x).sum(0, keepdims=True)
    np.testing.assert_allclose(gradient(framework, value, w), expected)


def test_replayed_values_are_differentiated_by_the_sweep(ops, framework, rng):
    """Values, sweep and replay are told apart by their factors 1, 2 and 3."""
    x, w = rng.normal(size=4), rng.normal(size=4)

    def call(x):
        replay = lambda inputs: (3 * inputs[0] ** 2,)
        sweep = lambda inputs, bars: [2 * 2 * inputs[0] * bars[0]]
        return ops.replayed((ops.stop_gradient(x) ** 2,), replay, sweep, [x])[0]

    np.testing.assert_allclose(numpy(call(framework.array(x))), x**2)
    loss = lambda x: (call(x) * framework.array(w)).sum()
    np.testing.assert_allclose(gradient(framework, loss, x), 4 * x * w)
    jvp = framework.jax.jvp if framework.is_jax else framework.torch.func.jvp
    tangent = jvp(call, (framework.array(x),), (framework.array(w),))[1]
    np.testing.assert_allclose(numpy(tangent), 6 * x * w)


def test_vjp(ops, framework, rng):
    x, w = rng.normal(size=(2, 3)), rng.normal(size=(1, 3))

    def pulled(w):
        # `live` arrays are those themselves, whose gradients are found where they are used.
        outputs, pull = ops.vjp(lambda x, live: (x * live[0], x.sum(0)[None]), framework.array(x), [w])
        bars = [ops.stop_gradient(2 * o) for o in outputs]
        return pull(tuple(bars))

    w = framework.array(w) if framework.is_jax else framework.array(w).requires_grad_()
    x_bar, (w_bar,) = pulled(w)
    w = numpy(w)
    np.testing.assert_allclose(numpy(x_bar), 2 * x * w * w + 2 * x.sum(0, keepdims=True))
    np.testing.assert_allclose(numpy(w_bar), (2 * x * w * x).sum(0, keepdims=True))
