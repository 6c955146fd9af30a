"""Cells that are modules of Equinox and of Flax: gradients of their parameters against unrolling."""

import numpy as np
import pytest

from checks import assert_close

jax = pytest.importorskip("jax")
jnp = jax.numpy

from optlayers.jax import DEQ  # noqa: E402

TIGHT = {"tol": 1e-13, "max_iter": 100}


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((4, 3)))


def assert_same(actual, expected, size):
    """Trees of gradients, of so many arrays, none of them zero."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected) == size
    for a, e in zip(actual, expected, strict=True):
        assert np.abs(e).max() > 1e-2
        assert_close(np.asarray(a), np.asarray(e), 1e-9)


def test_equinox_module(x):
    """`DEQ` of a module is a module, static fields and functions among its leaves included."""
    eqx = pytest.importorskip("equinox")

    class Cell(eqx.Module):
        W: eqx.nn.Linear
        U: eqx.nn.Linear
        activation: object
        scale: float = eqx.field(static=True)

        def __call__(self, z, x):
            return jax.vmap(lambda z, x: self.activation(self.scale * self.W(z) + self.U(x)))(z, x)

    keys = jax.random.split(jax.random.key(0))
    cell = Cell(eqx.nn.Linear(6, 6, key=keys[0]), eqx.nn.Linear(3, 6, key=keys[1]), jnp.tanh, 0.5)
    deq = DEQ(cell, (6,), **TIGHT)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda deq, unroll: (deq(x, unroll=unroll) ** 2).sum()))
    assert_same(gradient(deq, None), gradient(deq, 100), 4)


def test_flax_linen_module(x):
    """Parameters are an input of the cell; `init` needs no equilibrium."""
    linen = pytest.importorskip("flax.linen")

    class Cell(linen.Module):
        @linen.compact
        def __call__(self, z, x):
            dense = lambda: linen.Dense(6, param_dtype=jnp.float64)
            return jnp.tanh(0.5 * dense()(z) + dense()(x))

    cell = Cell()
    parameters = cell.init(jax.random.key(0), jnp.zeros((1, 6)), x[:1])
    deq = DEQ(lambda z, x, parameters: cell.apply(parameters, z, x), (6,), **TIGHT)
    loss = lambda parameters, unroll: (deq(x, parameters, unroll=unroll) ** 2).sum()
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    assert_same(gradient(parameters, None), gradient(parameters, 100), 4)


def test_flax_nnx_module(x):
    """The layer holds the module, and nnx's own transformations differentiate it."""
    nnx = pytest.importorskip("flax.nnx")

    class Cell(nnx.Module):
        def __init__(self, rngs):
            self.W, self.U = (nnx.Linear(k, 6, param_dtype=jnp.float64, rngs=rngs) for k in (6, 3))

        def __call__(self, z, x):
            return jnp.tanh(0.5 * self.W(z) + self.U(x))

    deq = DEQ(Cell(nnx.Rngs(0)), (6,), **TIGHT)
    gradient = nnx.jit(
        nnx.grad(lambda deq, unroll: (deq(x, unroll=unroll) ** 2).sum()), static_argnames="unroll"
    )
    assert_same(gradient(deq, unroll=None), gradient(deq, unroll=100), 4)


def test_memory_does_not_grow_with_iterations():
    """The compiled gradient of an equilibrium needs the same memory for 10 and for 200 iterations."""
    W = 0.5 * jnp.eye(16)
    x = jnp.ones((32, 16))

    def kilobytes(iterations, unroll):
        deq = DEQ(lambda z, x: jnp.tanh(z @ W + x), max_iter=iterations, on_failure="mask")
        loss = lambda x: deq(x, unroll=iterations if unroll else None).sum()
        return jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes / 1024

    few, many = (kilobytes(n, unroll=False) for n in (10, 200))
    assert few == many
    assert kilobytes(200, unroll=True) > 10 * many
