# %% [markdown]
# # Read handwriting of which most is lost
#
# A pen draws one of twenty curves, seen at irregular times: 30 % of the points are lost in training, and 70 %
# in the test. Which curve is it? A neural controlled differential equation (Kidger et al. 2020) lays a
# path X through the points that are left, and is driven by it,
#
#     dz = f(z; theta) dX(t),    z(0) = g(X(0)),    class scores = C z(1).
#
# It reads the curve and not the points: it matters little how many there are. A recurrent network (GRU), told
# how much time passes between points, learns their rhythm along with their places; a second one reads the
# path X at regular times. Run it as a script, or cell by cell as a notebook:
#
#     python examples/neural_cde.py [--seed 0] [--output neural_cde.png] [--quick | --large]

# %%
import argparse
import sys
import time
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from optlayers.torch import cdeint, control_path

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt

CLASSES, POINTS, MODES = 20, 60, 3
TRAIN_DROP, TEST_DROP = 0.3, 0.7


class Size(NamedTuple):
    """Curves to learn from, minibatch, steps, hidden units, and curves to be judged by."""

    curves: int = 2000
    batch: int = 64
    steps: int = 200
    hidden: int = 24
    tests: int = 500


QUICK = Size(curves=500, batch=48, steps=25, tests=50)
LARGE = Size(curves=20000, batch=512, steps=5000, hidden=64, tests=2000)

# %% [markdown]
# ## The data
#
# A class is a curve of a few Fourier modes. Whoever draws it turns it, stretches it, changes its modes a
# little, and hurries here and lingers there.


# %%
class Curves(NamedTuple):
    """Times (B, N) and places (B, N, 2), both padded with NaN, and classes (B,)."""

    t: torch.Tensor
    x: torch.Tensor
    label: torch.Tensor

    def rows(self, index):
        return Curves(*(field[index] for field in self))

    def to(self, device):
        return Curves(*(field.to(device) for field in self))


def alphabet():
    """Coefficients (CLASSES, 2, 2 MODES) of sines and cosines of both coordinates, the same in every run."""
    generator = torch.Generator().manual_seed(20)
    decay = 1 / torch.arange(1, MODES + 1).repeat(2)
    curves = torch.randn(CLASSES, 2, 2 * MODES, generator=generator) * decay
    return curves / curves.square().sum((1, 2), keepdim=True).sqrt()


def pen_curves(generator, count, drop):
    """Curves drawn within unit time, of which a fraction `drop` of the points is lost."""
    normal = lambda *shape: torch.randn(shape, generator=generator)
    letters, label = alphabet(), torch.randint(CLASSES, (count,), generator=generator)
    turn = 0.15 * normal(count)
    c, s, stretch = turn.cos(), turn.sin(), torch.exp(0.1 * normal(count, 2))
    affine = torch.stack([c, -s, s, c], 1).reshape(count, 2, 2) * stretch[:, None]
    shape = affine @ (letters[label] + 0.04 * normal(count, 2, 2 * MODES))

    t = torch.linspace(0, 1, POINTS).expand(count, POINTS)
    pace = t + 0.05 * normal(count, 1) * torch.sin(2 * torch.pi * t)
    phase = 1.5 * torch.pi * pace[:, None] * torch.arange(1, MODES + 1)[:, None]
    x = (shape @ torch.cat([phase.sin(), phase.cos()], 1)).mT + 0.01 * normal(count, POINTS, 2)

    kept = POINTS - round(drop * POINTS)
    rank = torch.rand(count, POINTS, generator=generator)
    rank[:, [0, -1]] = -1  # the pen is seen when it is set down and when it is lifted
    place = rank.argsort(1)[:, :kept].sort(1).values
    return Curves(t.gather(1, place), x.gather(1, place[..., None].expand(-1, -1, 2)), label)


# %% [markdown]
# ## The three models
#
# All map times and places to class scores.


# %%
class NeuralCDE(nn.Module):
    channels = 3  # time and place

    def __init__(self, hidden):
        super().__init__()
        self.start, self.readout = nn.Linear(self.channels, hidden), nn.Linear(hidden, CLASSES)
        self.field = nn.Sequential(
            nn.Linear(hidden, 2 * hidden),
            nn.SiLU(),
            nn.Linear(2 * hidden, hidden * self.channels),
            nn.Tanh(),
        )

    def drive(self, z):
        return self.field(z).unflatten(1, (-1, self.channels))

    def forward(self, t, x):
        X = control_path(t, x)
        z = cdeint(
            lambda t, z: self.drive(z), self.start(X.evaluate(t[:, 0])), X, method="rk4", step_size=0.05
        )
        return self.readout(z[:, -1])


class GapGRU(nn.Module):
    """Reads points, and times since the last."""

    def __init__(self, hidden):
        super().__init__()
        self.gru, self.readout = nn.GRU(3, 2 * hidden, batch_first=True), nn.Linear(2 * hidden, CLASSES)

    def forward(self, t, x):
        gaps = t.diff(dim=1, prepend=t[:, :1])
        return self.readout(self.gru(torch.cat([POINTS * gaps[..., None], x], 2))[0][:, -1])


class PathGRU(GapGRU):
    """Reads the path at as many regular times as there were points."""

    def forward(self, t, x):
        X = control_path(t, x, with_time=False)
        times = torch.linspace(0, 1, POINTS, device=t.device)
        regular = torch.stack([X.evaluate(s) for s in times], 1)
        return super().forward(times.expand(len(t), -1), regular)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# %% [markdown]
# ## Training, and a test with fewer and fewer points

# %%
LOST = (0.1, 0.3, 0.5, 0.6, TEST_DROP, 0.8)


class Fit(NamedTuple):
    """The seconds and the parameters of a model, and the fraction of test curves read at each of `LOST`."""

    seconds: float
    parameters: int
    accuracy: list[float]

    def at(self, drop):
        return self.accuracy[LOST.index(drop)]


@torch.no_grad()
def accuracy(model, curves):
    return (model(curves.t, curves.x).argmax(1) == curves.label).float().mean().item()


def fit(model, generator, data, tests, size, title, device):
    model, data = model.to(device), data.to(device)
    optimizer, start = torch.optim.Adam(model.parameters()), time.perf_counter()
    for step in tqdm(range(size.steps), desc=f"{title:<12}", unit="step", ncols=88, mininterval=0.5):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + np.cos(np.pi * step / size.steps)) / 2
        curves = data.rows(torch.randint(size.curves, (size.batch,), generator=generator))
        loss = nn.functional.cross_entropy(model(curves.t, curves.x), curves.label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    return Fit(seconds, parameters(model), [accuracy(model, test.to(device)) for test in tests])


def run(seed=0, size=None, device="cpu"):
    """Make the data, train the three models, read test curves of which more and more is lost."""
    size, generator = size or Size(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    data = pen_curves(generator, size.curves, TRAIN_DROP)
    tests = [pen_curves(generator, size.tests, drop) for drop in LOST]
    models = {"neural CDE": NeuralCDE, "GRU on path": PathGRU, "GRU": GapGRU}
    return tests, {
        name: fit(model(size.hidden), generator, data, tests, size, name, device)
        for name, model in models.items()
    }


def print_table(fits):
    head = f"{100 * TRAIN_DROP:.0f} % lost", f"{100 * TEST_DROP:.0f} % lost"
    print(f"\n{'method':<12}{head[0]:>12}{head[1]:>12}{'seconds':>9}{'parameters':>12}")
    for name, fit in fits.items():
        seen, lost = (f"{100 * fit.at(drop):.1f} %" for drop in (TRAIN_DROP, TEST_DROP))
        print(f"{name:<12}{seen:>12}{lost:>12}{fit.seconds:>9.1f}{fit.parameters:>12}")


# %% [markdown]
# ## The picture

# %%
INK, GREY, ORANGE, VIOLET, BLUE = "#212b36", "#8795a5", "#e8590c", "#5f3dc4", "#1c7ed6"
COLOURS = {"neural CDE": ORANGE, "GRU on path": BLUE, "GRU": VIOLET}


def draw_curve(axes, curves, row):
    """The points that are left of a test curve, and the path through them."""
    X = control_path(curves.t[row], curves.x[row], with_time=False)
    path = torch.stack([X.evaluate(s) for s in torch.linspace(0, 1, 200)])
    axes.plot(*path.T, color=ORANGE, lw=1.8)
    axes.plot(*curves.x[row].T, "o", color=INK, ms=3.5)
    axes.set(aspect="equal")
    axes.margins(0.12)


def draw_accuracy(axes, fits):
    for name, fit in fits.items():
        axes.plot([100 * x for x in LOST], [100 * x for x in fit.accuracy], "o-", color=COLOURS[name], lw=2.4)
        axes.annotate(
            name,
            (100 * LOST[-1], 100 * fit.accuracy[-1]),
            (8, -4),
            textcoords="offset points",
            color=COLOURS[name],
        )
    axes.axvline(100 * TRAIN_DROP, color=GREY, lw=1, ls=":")
    axes.text(100 * TRAIN_DROP + 1, 3, "in training", color=GREY)
    axes.set(ylim=(0, 103), xlabel="points lost (%)", ylabel="test curves read (%)")
    axes.spines[["top", "right"]].set_visible(False)


def draw(tests, fits, path):
    curves = tests[LOST.index(TEST_DROP)]
    with plt.rc_context({"font.size": 12, "text.color": INK, "axes.titlesize": 14}):
        figure = plt.figure(figsize=(14.2, 6.2), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
        grid = left.subplots(4, 5)
        for label, axes in enumerate(grid.flat):
            rows = (curves.label == label).nonzero()
            axes.set_axis_off()
            if len(rows):
                draw_curve(axes, curves, int(rows[0]))
        left.suptitle(f"One test curve of each class: {100 * TEST_DROP:.0f} % of the points are lost")
        draw_accuracy(right.subplots(), fits)
        figure.savefig(path, dpi=150)


# %%
def parse_arguments():
    parser = argparse.ArgumentParser(description="Read handwriting of which most is lost.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="neural_cde.png", help="where to write the picture")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_const", dest="size", const=QUICK, help="less of everything")
    sizes.add_argument("--large", action="store_const", dest="size", const=LARGE, help="sizes for a GPU")
    parser.set_defaults(size=Size())
    return parser.parse_args([] if IS_NOTEBOOK else None)


if __name__ == "__main__":
    arguments = parse_arguments()
    is_large = arguments.size == LARGE and torch.cuda.is_available()
    tests, fits = run(arguments.seed, arguments.size, "cuda" if is_large else "cpu")
    print_table(fits)
    draw(tests, fits, arguments.output)
    print(f"\nPicture: {arguments.output}")
