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
    """Pairs, starts of which the best counts, minibatch, and steps for either model."""

    pairs: int = 2000
    restarts: int = 3
    batch: int = 128
    steps: int = 300
    mlp_steps: int = 8000


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
def minibatches(rng, data, batch, steps, rate, title):
    """Yield (x, y, learning rate) for every step and advance a progress bar."""
    x, y = data
    for step in tqdm(range(steps), desc=f"{title:<12}", unit="step", ncols=88, mininterval=0.5):
        rows = rng.integers(len(x), size=batch)
        yield x[rows], y[rows], rate * (1 + np.cos(np.pi * step / steps)) / 2


def torch_trainer(model):
    """A function of first weights and minibatches that yields (weights, loss) after every step."""
    import torch

    def train(weights, batches):
        weights = [torch.tensor(w, requires_grad=True) for w in weights]
        optimizer = torch.optim.Adam(weights)
        for x, y, rate in batches:
            loss = (model(weights, torch.from_numpy(x)) - torch.from_numpy(y)).square().mean()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield [w.detach().numpy() for w in weights], loss.item()

    return train


def jax_trainer(model):
    """A function of first weights and minibatches that yields (weights, loss) after every step."""
    import jax
    import jax.numpy as jnp

    def loss(weights, x, y):
        return jnp.mean((model(weights, x) - y) ** 2)

    @jax.jit
    def update(weights, m, v, step, x, y, rate):
        """One step of Adam (Kingma and Ba 2015, algorithm 1)."""
        value, gradient = jax.value_and_grad(loss)(weights, x, y)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, gradient)
        rate = rate * jnp.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        weights = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + 1e-8), weights, m, v)
        return weights, m, v, value

    def train(weights, batches):
        m = v = jax.tree.map(np.zeros_like, weights)
        for step, (x, y, rate) in enumerate(batches, start=1):
            weights, m, v, value = update(weights, m, v, step, x, y, rate)
            yield weights, float(value)

    return train


def set_up(framework):
    """The layer and the trainer of a framework, in double precision."""
    if framework == "torch":
        import torch

        from optlayers.torch import CvxpyLayer

        torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for one another
        return CvxpyLayer, torch_trainer
    import jax

    from optlayers.jax import CvxpyLayer

    jax.config.update("jax_enable_x64", True)
    print("JAX compiles the first step of either model, which takes some seconds.")
    return CvxpyLayer, jax_trainer


# %% [markdown]
# ## The experiment
#
# Where the polygon starts decides which faces end up unused; of a few starts, the one with the least training
# loss counts.


# %%
class Fit(NamedTuple):
    """What came of a training.

    Attributes:
        steps: some steps, from 0 to the last.
        weights: the weights after each of them, in NumPy.
        errors: the mean squared error on the test pairs with each of them.
        losses: of the minibatch of every step.
        loss: on all training pairs, with the last weights.
    """

    steps: list
    weights: list
    errors: list
    losses: list
    loss: float


def mean_square(a, b):
    return np.mean((a - b) ** 2)


def fit(train, exact, first, batches, steps, data, test):
    """Train, and judge some of the weights on the way by `exact`, the model in NumPy."""
    keep = set(np.geomspace(1, steps, 50).astype(int))
    path, losses = {0: first}, []
    for step, (weights, loss) in enumerate(train(first, batches), start=1):
        losses.append(loss)
        if step in keep:
            path[step] = [np.array(w) for w in weights]
    errors = [mean_square(exact(w, test[0]), test[1]) for w in path.values()]
    loss = mean_square(exact(path[steps], data[0]), data[1])
    return Fit([*path], [*path.values()], errors, losses, loss)


def fit_polytopes(CvxpyLayer, trainer, rng, size, data, test):
    """The fits of all starts, the best first."""
    train, fits = trainer(projection(CvxpyLayer)), []
    for k in range(size.restarts):
        batches = minibatches(rng, data, size.batch, size.steps, 0.02, f"polytope {k + 1}/{size.restarts}")
        fits.append(fit(train, project, first_faces(rng), batches, size.steps, data, test))
    return sorted(fits, key=lambda fit: fit.loss)


def fit_mlp(trainer, rng, size, data, test):
    batches = minibatches(rng, data, size.batch, size.mlp_steps, 0.005, "MLP")
    return fit(trainer(mlp), mlp, first_weights(rng), batches, size.mlp_steps, data, test)


class Result(NamedTuple):
    true: tuple
    data: tuple
    polytopes: list
    mlp: Fit
    iou: float
    seconds: tuple


def run(framework="torch", seed=0, size=None):
    """Make the data, fit both models, measure."""
    size, rng = size or Size(), np.random.default_rng(seed)
    CvxpyLayer, trainer = set_up(framework)
    true, data, test = make_data(rng, size)
    start = time.perf_counter()
    polytopes = fit_polytopes(CvxpyLayer, trainer, rng, size, data, test)
    middle = time.perf_counter()
    mlp_fit = fit_mlp(trainer, rng, size, data, test)
    seconds = middle - start, time.perf_counter() - middle
    return Result(true, data, polytopes, mlp_fit, iou(true, polytopes[0].weights[-1]), seconds)


def count(weights):
    return sum(w.size for w in weights)


def print_table(result):
    rows = [
        ("polytope", result.polytopes[0], f"{result.iou:.4f}", result.seconds[0]),
        (f"MLP {HIDDEN}x{HIDDEN}", result.mlp, "-", result.seconds[1]),
    ]
    print(f"\n{'method':<12}{'test MSE':>10}{'IoU':>9}{'seconds':>9}{'parameters':>12}")
    for method, fit, overlap, seconds in rows:
        parameters = count(fit.weights[-1])
        print(f"{method:<12}{fit.errors[-1]:>10.1e}{overlap:>9}{seconds:>9.1f}{parameters:>12}")


# %% [markdown]
# ## The picture

# %%
INK, GREY, BLUE, ORANGE, VIOLET = "#212b36", "#8795a5", "#dfe9f5", "#e8590c", "#5f3dc4"


def closed(vertices):
    return np.append(vertices, vertices[:1], 0).T


def draw_pairs(axes, x, y, label):
    axes.scatter(*x.T, s=16, color=GREY, zorder=2, label=label)
    is_moved = np.sum((y - x) ** 2, -1) > 0.1**2
    x, arrow = x[is_moved], (y - x)[is_moved]
    in_data_units = {"angles": "xy", "scale_units": "xy", "scale": 1}
    axes.quiver(*x.T, *arrow.T, **in_data_units, width=0.0028, headwidth=5, color=GREY, zorder=2)


def draw_polytopes(axes, result, shown=60, early=(0, 6, 12)):
    """Some pairs, the true polytope, and the learned one: early, and at the end."""
    (x, y), best, true = result.data, result.polytopes[0], polygon(*result.true)
    axes.fill(*true.T, color=BLUE, zorder=1)
    draw_pairs(axes, x[:shown], y[:shown], f"x and its arrow to y, {shown} of {len(x):,}")
    axes.plot(*closed(true), color=INK, lw=6, solid_joinstyle="round", zorder=3, label="true polytope")
    dashed = {"color": ORANGE, "lw": 1.2, "ls": (0, (4, 2)), "zorder": 4}
    for step in early:
        axes.plot(*closed(polygon(*best.weights[np.searchsorted(best.steps, step)])), **dashed)
    axes.plot([], [], **dashed, label=f"learned, steps {', '.join(map(str, early))}")
    final = closed(polygon(*best.weights[-1]))
    axes.plot(*final, color=ORANGE, lw=2.4, zorder=5, label=f"learned, step {best.steps[-1]}")
    axes.set(aspect="equal", xlim=(-2.05, 2.05), ylim=(-2.05, 2.05))
    axes.set_title(f"{LEARNED_FACES} faces learned from {len(x):,} pairs: IoU {result.iou:.3f}", pad=10)
    axes.set_axis_off()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, frameon=False)


def draw_fit(axes, fit, name, color, **place):
    axes.plot(np.arange(len(fit.losses)) + 1, fit.losses, color=color, lw=0.6, alpha=0.35)
    axes.plot(fit.steps[1:], fit.errors[1:], color=color, lw=2.6)
    text = f"{name}\n{count(fit.weights[-1]):,} parameters\nerror {fit.errors[-1]:.1e}"
    end = fit.steps[-1], fit.errors[-1]
    axes.annotate(text, end, textcoords="offset points", color=color, weight="bold", **place)


def draw_training(axes, result):
    """Errors of the best polytope and of the MLP during training."""
    best, mlp_fit = result.polytopes[0], result.mlp
    draw_fit(axes, best, "polytope layer", ORANGE, xytext=(8, 0), ha="left", va="center")
    draw_fit(axes, mlp_fit, f"MLP {HIDDEN}x{HIDDEN}", VIOLET, xytext=(0, -8), ha="right", va="top")
    axes.axhline(NOISE**2, color=INK, lw=1, ls=":")
    axes.annotate("noise of the training pairs", (1, NOISE**2), (0, -4), textcoords="offset points", va="top")
    axes.set(xscale="log", yscale="log", xlabel="step", ylim=(best.errors[-1] / 4, None))
    axes.set_ylabel("mean squared error: test pairs (bold), minibatches (faint)")
    axes.set_title(f"Test error: 1/{mlp_fit.errors[-1] / best.errors[-1]:.0f} of the perceptron's", pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6ebf0", lw=0.8)
    axes.set_axisbelow(True)


def draw(result, path):
    with plt.rc_context({"font.size": 12, "text.color": INK, "axes.titlesize": 14}):
        figure, axes = plt.subplots(1, 2, figsize=(13.3, 6.2), layout="constrained")
        draw_polytopes(axes[0], result)
        draw_training(axes[1], result)
        figure.savefig(path, dpi=150)


# %%
def parse_arguments():
    parser = argparse.ArgumentParser(description="Learn a convex polytope from projections on it.")
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="polytope.png", help="where to write the picture")
    parser.add_argument("--quick", action="store_true", help="fewer pairs and steps, one start")
    return parser.parse_args([] if IS_NOTEBOOK else None)


if __name__ == "__main__":
    arguments = parse_arguments()
    result = run(arguments.framework, arguments.seed, QUICK if arguments.quick else Size())
    print_table(result)
    draw(result, arguments.output)
    print(f"\nPicture: {arguments.output}")
