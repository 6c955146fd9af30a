# %% [markdown]
# # Train on several devices, with JAX
#
# A linear map turns features f into scores z, and a quadratic program the scores into an allocation
#
#     x(z) = argmin_x |x - z|^2  subject to  sum(x) = 1,  0 <= x <= cap,
#
# whose caps are learned, too, and shared by all problems of a batch. The batch axis is laid over a mesh of
# devices, here virtual ones of the CPU, and the weights are copied to all. The compiler does the rest: each
# device solves its problems, and only gradients travel. One device alone has to give the same losses:
#
#     python examples/data_parallel_jax.py [--devices 4] [--output losses.png] [--quick]

# %%
import argparse
import sys
import time

import cvxpy as cp
import jax
import jax.numpy as jnp
import matplotlib
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt

from optlayers.jax import CvxpyLayer

FEATURES, ASSETS, BATCH = 4, 6, 64


# %%
def allocation_layer():
    x, z, cap = cp.Variable(ASSETS), cp.Parameter(ASSETS), cp.Parameter(ASSETS)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - z)), [cp.sum(x) == 1, x >= 0, x <= cap])
    return CvxpyLayer(problem, parameters=[z, cap], variables=[x])


def initial_weights(seed):
    W, b, slack = jax.random.split(jax.random.key(seed), 3)
    W = jax.random.normal(W, (FEATURES, ASSETS)) / FEATURES**0.5
    return W, jax.random.normal(b, (ASSETS,)) / 2, jax.random.normal(slack, (ASSETS,))


def allocate(layer, weights, features):
    W, b, slack = weights
    cap = 0.2 + jax.nn.softplus(slack) / 4  # more than 1 / ASSETS: there is an allocation
    return layer(features @ W + b, cap)[0]


# %% [markdown]
# The batches and the answers of a hidden model are made once, and so is the step, which JAX traces for each
# mesh.


# %%
def make_batches(layer, steps):
    """Features and targets (steps, BATCH, ...)."""
    keys = jax.random.split(jax.random.key(0), steps)
    features = jax.vmap(lambda key: jax.random.normal(key, (BATCH, FEATURES)))(keys)
    targets = jax.jit(lambda features: allocate(layer, initial_weights(1), features))(features)
    return features, targets


def make_step(layer):
    """A step of gradient descent with momentum: loss, new weights and new momentum."""

    def loss(weights, features, targets):
        return ((allocate(layer, weights, features) - targets) ** 2).sum(-1).mean()

    @jax.jit
    def step(weights, momentum, features, targets):
        value, gradient = jax.value_and_grad(loss)(weights, features, targets)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradient)
        return value, jax.tree.map(lambda w, m: w - m, weights, momentum), momentum

    return step


def train(step, batches, devices):
    """The loss of each step, with every batch laid over the first `devices` devices."""
    mesh = Mesh(jax.devices()[:devices], ("batch",))
    over_batch, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    weights = jax.device_put(initial_weights(2), everywhere)
    momentum, losses = jax.tree.map(jnp.zeros_like, weights), []
    for batch in tqdm(zip(*batches, strict=True), total=len(batches[0])):
        value, weights, momentum = step(weights, momentum, *jax.device_put(batch, over_batch))
        losses.append(float(value))
    return losses


def timed(train, *args):
    start = time.perf_counter()
    return train(*args), time.perf_counter() - start


# %%
def report(runs, output):
    """The table of what each way of training gave, and a picture of the losses."""
    print(f"\n{'method':<14}{'first loss':>12}{'last loss':>12}{'difference':>12}{'seconds':>9}")
    (_, reference, _), *_ = runs
    for name, losses, seconds in runs:
        difference = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        print(f"{name:<14}{losses[0]:>12.6f}{losses[-1]:>12.6f}{difference:>12.1e}{seconds:>9.1f}")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, losses, _), style, width in zip(runs, ("-", "--"), (5, 2), strict=True):
        axes.semilogy(range(1, len(losses) + 1), losses, style, linewidth=width, label=name)
    axes.set(xlabel="step", ylabel="loss", title="Losses do not depend on the number of devices")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=150)


def main(devices, steps, output):
    layer = allocation_layer()
    step, batches = make_step(layer), make_batches(layer, steps)
    report(
        [(f"{n} device" + "s" * (n > 1), *timed(train, step, batches, n)) for n in (1, devices)],
        output,
    )


# %%
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Data-parallel training with JAX.")
    parser.add_argument(
        "--devices", type=int, default=4, help="virtual devices, of which the batch is a multiple"
    )
    parser.add_argument("--output", default="losses.png", help="where to save the picture")
    parser.add_argument("--quick", action="store_true", help="a few steps, for tests")
    options = parser.parse_args([] if IS_NOTEBOOK else None)
    jax.config.update("jax_num_cpu_devices", options.devices)
    jax.config.update("jax_enable_x64", True)
    main(options.devices, 10 if options.quick else 100, options.output)
