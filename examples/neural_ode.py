# %% [markdown]
# # Learn a vector field from trajectories
#
# Some spirals dy/dt = A y^3 are observed at irregular times, a little noisy. A neural ODE (Chen et al. 2018)
# makes the right-hand side a network,
#
#     dy/dt = f(y^3; theta),    y(t_0) = y_0,
#
# and fits theta to the observations through the solution. What it has learned is a law of motion: it starts
# anywhere and goes on after the last observation. A recurrent network (GRU) of equal size, which is told how
# much time passes, learns from the same data. Both are given the cubes, as in the first demonstrations of
# neural ODEs. Run it as a script, or cell by cell as a notebook:
#
#     python examples/neural_ode.py [--seed 0] [--output neural_ode.png] [--quick | --large]

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

from optlayers.torch import odeint

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt

A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
HORIZON, RATE, NOISE = 8.0, 8, 0.01  # of the observations: last time, number in unit time, standard deviation


class Size(NamedTuple):
    """Trajectories, observations in a window, windows in a minibatch, hidden units, steps of either model."""

    trajectories: int = 256
    window: int = 12
    batch: int = 128
    hidden: int = 48
    steps: int = 400
    gru_steps: int = 1600
    tests: int = 32


QUICK = Size(trajectories=64, window=9, batch=32, steps=60, gru_steps=60, tests=8)
LARGE = Size(trajectories=4096, batch=1024, hidden=128, steps=4000, gru_steps=16000, tests=256)

# %% [markdown]
# ## The data
#
# Each trajectory has its own start and its own times: `t` is (B, T), and every row is solved with step sizes
# of its own.


# %%
def spirals(generator, count, horizon):
    """Times (count, T) and the states at them (count, T, 2), exact to nine digits."""
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)
    angle, radius = 2 * torch.pi * uniform(count), 0.8 + 0.8 * uniform(count)
    y0 = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    t = (horizon * uniform(count, int(RATE * horizon))).sort(1).values
    t[:, 0] = 0
    y = odeint(lambda t, y: y**3 @ A.T.double(), y0, t, rtol=1e-9, atol=1e-9, method="dopri8", max_steps=4096)
    return t.float(), y.float()


def windows(generator, data, batch, length, device):
    """Times from the first one on (batch, length), and observations, of random parts of trajectories.

    Early parts are drawn more often: there the motion is fast, and soon over.
    """
    t, y = data
    row = torch.randint(len(t), (batch, 1), generator=generator)
    first = (t.shape[1] - length + 1) * torch.rand(batch, 1, generator=generator).square()
    column = first.long() + torch.arange(length)
    times = t[row, column]
    return (times - times[:, :1]).to(device), y[row, column].to(device)


# %% [markdown]
# ## The two models
#
# Both map a start (B, 2) and times (B, T) to states (B, T, 2), and both run freely: no later observation is
# shown to them.


# %%
class NeuralODE(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.field = nn.Sequential(
            nn.Linear(2, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2)
        )

    def slope(self, y):
        return self.field(y**3)

    def forward(self, y0, t):
        tolerance = 1e-3 if self.training else 1e-5
        return odeint(lambda t, y: self.slope(y), y0, t, rtol=tolerance, atol=tolerance)


class Recurrent(nn.Module):
    """A GRU whose input is its last output, the cube of that, and the time to the next one."""

    def __init__(self, hidden):
        super().__init__()
        self.start, self.cell, self.change = (
            nn.Linear(2, hidden),
            nn.GRUCell(5, hidden),
            nn.Linear(hidden, 2),
        )

    def forward(self, y0, t):
        outputs, state = [y0], torch.tanh(self.start(y0))
        for gap in t.diff(dim=1).T:
            state = self.cell(torch.cat([outputs[-1], outputs[-1] ** 3, gap[:, None]], 1), state)
            outputs.append(outputs[-1] + self.change(state))
        return torch.stack(outputs, 1)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# %% [markdown]
# ## Training
#
# Adam on windows of the trajectories, with a learning rate that falls to zero along a cosine. The windows are
# short at first: with a wrong field, long ones end far from the data, and their gradients lead nowhere.


# %%
def fit(model, generator, data, size, title, device, rate=0.01):
    """Train `model` in place; returns the loss of every step, and the seconds."""
    optimizer, losses, start = torch.optim.Adam(model.parameters()), [], time.perf_counter()
    for step in tqdm(range(size.steps), desc=f"{title:<12}", unit="step", ncols=88, mininterval=0.5):
        optimizer.param_groups[0]["lr"] = rate * (1 + np.cos(np.pi * step / size.steps)) / 2
        length = size.window // 3 if step < size.steps // 2 else size.window
        t, y = windows(generator, data, size.batch, length, device)
        loss = (model(y[:, 0], t) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


class Fit(NamedTuple):
    """A trained model, its losses and seconds, and its states on the test trajectories (B, T, 2)."""

    model: nn.Module
    losses: list
    seconds: float
    states: torch.Tensor

    def errors(self, test):
        """Mean squared errors up to the horizon of the training data, and from there to its double."""
        t, y = test
        square = (self.states - y).square().mean(2)
        return square[t <= HORIZON].mean().item(), square[t > HORIZON].mean().item()


def run(seed=0, size=None, device="cpu"):
    """Make the data, fit both models, let them run on test trajectories twice as long."""
    size, generator = size or Size(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    t, y = spirals(generator, size.trajectories, HORIZON)
    data = t, y + NOISE * torch.randn(y.shape, generator=generator)
    test = spirals(generator, size.tests, 2 * HORIZON)
    fits = {}
    # The GRU needs longer windows and more steps to get anywhere, and takes less time for them.
    more = size._replace(window=3 * size.window, steps=size.gru_steps)
    for name, model, own_size in (
        ("neural ODE", NeuralODE(size.hidden), size),
        ("GRU", Recurrent(size.hidden * 2 // 3), more),
    ):
        losses, seconds = fit(model.to(device), generator, data, own_size, name, device)
        with torch.no_grad():
            states = model.cpu().eval()(test[1][:, 0], test[0])
        fits[name] = Fit(model, losses, seconds, states)
    return data, test, fits


def print_table(test, fits):
    print(f"\n{'method':<12}{'test MSE':>10}{'to 2T':>10}{'seconds':>9}{'parameters':>12}")
    for name, fit in fits.items():
        inside, beyond = fit.errors(test)
        print(f"{name:<12}{inside:>10.1e}{beyond:>10.1e}{fit.seconds:>9.1f}{parameters(fit.model):>12}")


# %% [markdown]
# ## The picture

# %%
INK, GREY, ORANGE, VIOLET = "#212b36", "#8795a5", "#e8590c", "#5f3dc4"
COLOURS = {"neural ODE": ORANGE, "GRU": VIOLET}


def draw_plane(axes, test, fit, data, shown):
    """The learned vector field, observations, and a test trajectory: true and learned."""
    grid = torch.linspace(-2.15, 2.15, 24)
    x, y = torch.meshgrid(grid, grid, indexing="xy")
    with torch.no_grad():
        field = fit.model.slope(torch.stack([x, y], -1))
        start, t = test[1][shown : shown + 1, 0], torch.linspace(0, 2 * HORIZON, 1500)
        learned = fit.model(start, t[None])[0]
    true = odeint(lambda t, y: y**3 @ A.T, start, t[None], rtol=1e-6, atol=1e-6)[0]
    axes.streamplot(
        x.numpy(), y.numpy(), *field.permute(2, 0, 1).numpy(), color="#ccd5df", density=1.3, linewidth=0.8
    )
    axes.scatter(*data[1].reshape(-1, 2)[::3].T, s=3, color=GREY, zorder=2, label="observations (a third)")
    axes.plot(*true.T, color=INK, lw=4, zorder=3, label="true trajectory, not trained on")
    axes.plot(*learned.T, color=ORANGE, lw=1.6, zorder=4, label="neural ODE from the same start")
    axes.plot(*start[0], "o", color=INK, ms=8, zorder=5)
    axes.set(aspect="equal", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))
    axes.set_title("The learned vector field", pad=10)
    axes.set_axis_off()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.03), ncols=2, frameon=False, fontsize=11)


def draw_series(axes, test, fits, shown):
    t, y = test[0][shown], test[1][shown]
    fine = torch.linspace(0, 2 * HORIZON, 1000)
    true = odeint(lambda t, y: y**3 @ A.T, y[:1], fine[None], rtol=1e-6, atol=1e-6)[0]
    axes.plot(fine, true[:, 0], color=INK, lw=3, label="true")
    for name, fit in fits.items():
        axes.plot(t, fit.states[shown, :, 0], color=COLOURS[name], lw=1.3, marker="o", ms=3, label=name)
    axes.set_ylabel("first coordinate")
    axes.legend(loc="upper right", ncols=3, frameon=False)
    axes.set_title("One trajectory, to twice the time that was trained on", pad=10)


def draw_errors(axes, test, fits):
    """Root mean square errors over the test trajectories, in ten bins of time."""
    edges = np.linspace(0, 2 * HORIZON, 21)
    for name, fit in fits.items():
        square = (fit.states - test[1]).square().mean(2).numpy()
        place = np.digitize(test[0].numpy(), edges)
        rms = [np.sqrt(square[place == k].mean()) for k in range(1, len(edges))]
        axes.plot((edges[1:] + edges[:-1]) / 2, rms, color=COLOURS[name], lw=2.4)
    axes.axhline(NOISE, color=INK, lw=1, ls=":")
    label = {"textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 10}
    axes.annotate("noise of the observations", (2 * HORIZON, NOISE), (-2, -3), **label)
    axes.set(yscale="log", xlabel="time", ylabel="error (root mean square)")


def draw(data, test, fits, path):
    with plt.rc_context({"font.size": 12, "text.color": INK, "axes.titlesize": 14}):
        figure = plt.figure(figsize=(14.2, 6.6), layout="constrained")
        axes = figure.subplot_mosaic([["plane", "series"], ["plane", "errors"]], width_ratios=[1, 1.25])
        shown = int(test[1][:, 0].norm(dim=1).argmax())
        draw_plane(axes["plane"], test, fits["neural ODE"], data, shown)
        draw_series(axes["series"], test, fits, shown)
        draw_errors(axes["errors"], test, fits)
        for name in ("series", "errors"):
            axes[name].axvspan(HORIZON, 2 * HORIZON, color="#f1f4f8", zorder=0)
            axes[name].set_xlim(0, 2 * HORIZON)
            axes[name].spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


# %%
def parse_arguments():
    parser = argparse.ArgumentParser(description="Learn a vector field from noisy trajectories.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="neural_ode.png", help="where to write the picture")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_const", dest="size", const=QUICK, help="less of everything")
    sizes.add_argument("--large", action="store_const", dest="size", const=LARGE, help="sizes for a GPU")
    parser.set_defaults(size=Size())
    return parser.parse_args([] if IS_NOTEBOOK else None)


if __name__ == "__main__":
    arguments = parse_arguments()
    is_large = arguments.size == LARGE and torch.cuda.is_available()
    data, test, fits = run(arguments.seed, arguments.size, "cuda" if is_large else "cpu")
    print_table(test, fits)
    draw(data, test, fits, arguments.output)
    print(f"\nPicture: {arguments.output}")
