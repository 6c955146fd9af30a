# %% [markdown]
# # Learn a polytope from projections on it
#
# Somebody projects points x on a convex polytope and shows us x and the nearest point y, a little noisy. What
# is the polytope? We make the projection a layer whose weights are the faces,
#
#     y(x) = argmin_y |y - x|^2  subject to  A y <= b,
#
# and fit A and b by gradient descent on |y(x) - y|^2. A multilayer perceptron learns from the same pairs, for
# comparison. Run it as a script, or cell by cell as a notebook:
#
#     python examples/polytope.py [--framework torch|jax] [--seed 0] [--output polytope.png] [--quick]

# %%
import argparse
import sys
import time
from typing import NamedTuple

import cvxpy as cp
import matplotlib
import numpy as np
from tqdm import tqdm

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt

TRUE_FACES, LEARNED_FACES, HIDDEN, NOISE = 6, 12, 64, 0.02


class Size(NamedTuple):
    """How much is computed: pairs, polytopes to choose from, minibatch, steps for a polytope and for the MLP."""

    pairs: int = 2000
    restarts: int = 3
    batch: int = 128
    steps: int = 400
    mlp_steps: int = 6000


QUICK = Size(pairs=500, restarts=1, batch=64, steps=150, mlp_steps=1000)

# %% [markdown]
# ## Polygons, exactly
#
# In the plane, vertices, areas and projections have closed forms. They make the data and judge the result, so
# the layer is not its own judge.


# %%
def clip(vertices, normal, offset):
    """The part of a convex polygon (k, 2) where normal'y <= offset (Sutherland and Hodgman 1974)."""
    excess, kept = vertices @ normal - offset, []
    for p, q, at_p, at_q in zip(vertices, np.roll(vertices, -1, 0), excess, np.roll(excess, -1), strict=True):
        if at_p <= 0:
            kept.append(p)
        if at_p * at_q < 0:
            kept.append(p + at_p / (at_p - at_q) * (q - p))
    return np.reshape(kept, (-1, 2))


def intersect(vertices, A, b):
    for normal, offset in zip(A, b, strict=True):
        vertices = clip(vertices, normal, offset)
    return vertices


def polygon(A, b):
    """Vertices of {y : A y <= b} in the order of their angles, cut to a large square if it is unbounded."""
    return intersect(10.0 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]), A, b)


def area(vertices):
    (x, y), (x_next, y_next) = vertices.T, np.roll(vertices, -1, 0).T
    return np.sum(x * y_next - y * x_next) / 2


def iou(first, second):
    """Area of the intersection of two polytopes (A, b) over the area of their union."""
    common = area(intersect(polygon(*first), *second))
    return common / (area(polygon(*first)) + area(polygon(*second)) - common)


def project(faces, x):
    """Nearest points of the polytope `faces` = (A, b) to x (n, 2): x itself, or on the nearest edge."""
    A, b = faces
    start = polygon(A, b)
    edge = np.roll(start, -1, 0) - start
    along = np.sum((x[:, None] - start) * edge, -1) / np.sum(edge**2, -1)
    nearest = start + np.clip(along, 0, 1)[..., None] * edge
    best = np.argmin(np.sum((x[:, None] - nearest) ** 2, -1), -1)
    is_inside = np.all(x @ A.T <= b, -1)
    return np.where(is_inside[:, None], x, nearest[np.arange(len(x)), best])


# %% [markdown]
# ## The data


# %%
def true_faces(rng):
    """An irregular hexagon: normals within 10 degrees of even spacing, at distances that cut none off."""
    angle = 2 * np.pi * np.arange(TRUE_FACES) / TRUE_FACES + np.radians(rng.uniform(-10, 10, TRUE_FACES))
    return np.stack([np.cos(angle), np.sin(angle)], -1), rng.uniform(0.85, 1.1, TRUE_FACES)


def make_data(rng, size):
    """The true polytope, noisy training pairs, and test pairs without noise."""
    faces = true_faces(rng)
    x, x_test = rng.uniform(-2, 2, (2, size.pairs, 2))
    y = project(faces, x) + NOISE * rng.standard_normal(x.shape)
    return faces, (x, y), (x_test, project(faces, x_test))


# %% [markdown]
# ## The two models
#
# A model maps its weights and points (B, 2) to points (B, 2). Both are written once: `CvxpyLayer` is called
# alike in PyTorch and in JAX. The points carry a batch axis and the faces do not, so all points share one
# polytope.


# %%
def projection(CvxpyLayer):
    x, A, b = cp.Parameter(2), cp.Parameter((LEARNED_FACES, 2)), cp.Parameter(LEARNED_FACES)
    y = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(y - x)), [A @ y <= b])
    layer = CvxpyLayer(problem, parameters=[x, A, b], variables=[y])
    return lambda faces, points: layer(points, *faces)[0]


def first_faces(rng):
    """A small regular polygon: a face that no point is projected on would get no gradient and never move."""
    angle = 2 * np.pi * (np.arange(LEARNED_FACES) + rng.uniform()) / LEARNED_FACES
    return [np.stack([np.cos(angle), np.sin(angle)], -1), np.full(LEARNED_FACES, 0.3)]


def mlp(weights, x):
    for W, b in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        x = x @ W + b
        x = x * (x > 0)
    return x @ weights[-2] + weights[-1]


def first_weights(rng):
    sizes = ((2, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 2))
    layers = ([rng.standard_normal(s) * np.sqrt(2 / s[0]), np.zeros(s[1])] for s in sizes)
    return [array for layer in layers for array in layer]


# %% [markdown]
# ## Training: one loop for each framework
#
# Adam on minibatches, with a learning rate that falls to zero along a cosine.


# %%
class Record(NamedTuple):
    """The weights before step `step`, and the loss of its minibatch."""

    step: int
    weights: list
    loss: float


def minibatches(rng, data, batch, steps, rate, title):
    """Yield (step, x, y, learning rate) and advance a progress bar."""
    x, y = data
    for step in tqdm(range(steps), desc=title, unit="step", ncols=88, mininterval=0.2):
        rows = rng.integers(len(x), size=batch)
        yield step, x[rows], y[rows], rate * (1 + np.cos(np.pi * step / steps)) / 2


def train_torch(model, weights, batches):
    """Yield a `Record` before every step, and one after the last."""
    import torch

    weights = [torch.tensor(w, requires_grad=True) for w in weights]
    optimizer = torch.optim.Adam(weights)
    for step, x, y, rate in batches:
        loss = (model(weights, torch.from_numpy(x)) - torch.from_numpy(y)).square().mean()
        yield Record(step, [w.detach().numpy().copy() for w in weights], loss.item())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    yield Record(step + 1, [w.detach().numpy() for w in weights], loss.item())


def train_jax(model, weights, batches):
    """Yield a `Record` before every step, and one after the last."""
    import jax
    import jax.numpy as jnp

    def loss(weights, x, y):
        return jnp.mean((model(weights, x) - y) ** 2)

    @jax.jit
    def update(weights, moments, step, x, y, rate):
        value, gradient = jax.value_and_grad(loss)(weights, x, y)
        # Adam (Kingma and Ba 2015, algorithm 1).
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, moments[1], gradient)
        rate = rate * jnp.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + 1e-8), weights, first, second)
        return weights, (first, second), value

    weights = jax.tree.map(jnp.asarray, weights)
    moments = (jax.tree.map(jnp.zeros_like, weights),) * 2
    for step, x, y, rate in batches:
        before = jax.tree.map(np.asarray, weights)
        weights, moments, value = update(weights, moments, step, x, y, rate)
        yield Record(step, before, float(value))
    yield Record(step + 1, jax.tree.map(np.asarray, weights), float(value))
