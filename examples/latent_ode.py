# %% [markdown]
# # Complete a curve from a few irregular observations
#
# Damped oscillators are observed 10 to 30 times on [0, 5], each at times of its own, a little noisy. What are
# the values between these times, and on [5, 8]? A latent ODE (Rubanova et al. 2019) reads the observations
# backwards in time: its state moves along an ODE and jumps at every observation. What it holds at t = 0 is a
# belief about the start z(0) of another ODE, whose solution is read out at any time,
#
#     z(0) ~ N(mean, deviation),    dz/dt = f(z),    x(t) = C z(t).
#
# The jumps of a whole batch, all at different times, are one call of `odeint`. A recurrent network (GRU), no
# smaller and told how much time passes, learns from the same data. Run it as a script, or cell by cell as a
# notebook:
#
#     python examples/latent_ode.py [--seed 0] [--output latent_ode.png] [--quick | --large]

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

from optlayers.torch import ODE

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt

OBSERVED, END, NOISE = 5.0, 8.0, 0.05
FEWEST = 10  # observations of a curve
FINE = torch.linspace(0, END, 200)


class Size(NamedTuple):
    """Curves, minibatch, steps; dimension of the latent state, hidden units; curves to be judged by, and most
    observations of a curve."""

    curves: int = 2000
    batch: int = 64
    steps: int = 700
    latent: int = 6
    hidden: int = 32
    tests: int = 200
    most: int = 30


QUICK = Size(curves=300, batch=32, steps=80, tests=50, most=12)
LARGE = Size(curves=20000, batch=512, steps=10000, latent=12, hidden=128, tests=1000)

# %% [markdown]
# ## The data
#
# Rows are padded with NaN: neither the solver nor the loss sees what is not there.


# %%
class Curves(NamedTuple):
    """Observation times (B, N), padded with NaN, noisy values (B, N), target times and values (B, T), and the
    truth at the times `FINE`, for pictures."""

    t: torch.Tensor
    x: torch.Tensor
    target_t: torch.Tensor
    target_x: torch.Tensor
    truth: torch.Tensor

    def rows(self, index):
        return Curves(*(field[index] for field in self))


def oscillators(generator, count, most):
    """x(t) = a exp(-c t) cos(w t + p), with a, c, w and p drawn for each curve."""
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(shape, generator=generator)
    a, c, w = uniform(0.5, 1.5, count, 1), uniform(0.05, 0.25, count, 1), uniform(1.5, 3.0, count, 1)
    p = uniform(0, 2 * torch.pi, count, 1)
    curve = lambda t: a * (-c * t).exp() * (w * t + p).cos()
    number = torch.randint(FEWEST, most + 1, (count, 1), generator=generator)
    t = uniform(0, OBSERVED, count, most)
    t = t.masked_fill(torch.arange(most) >= number, torch.nan).sort(1).values
    target_t = uniform(0, END, count, 40).sort(1).values
    x = curve(t) + NOISE * torch.randn(t.shape, generator=generator)
    return Curves(t, x, target_t, curve(target_t), curve(FINE))


# %% [markdown]
# ## The two models
#
# Both map observations to values at target times.


# %%
def mlp(inputs, hidden, outputs):
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, outputs)
    )


class LatentODE(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.drift, self.cell = mlp(size.hidden, size.hidden, size.hidden), nn.GRUCell(1, size.hidden)
        self.belief = nn.Linear(size.hidden, 2 * size.latent)
        self.field, self.readout = mlp(size.latent, size.hidden, size.latent), nn.Linear(size.latent, 1)
        self.encoder = ODE(lambda t, h: self.drift(h), method="euler")
        self.decoder = ODE(lambda t, z: self.field(z), rtol=1e-3, atol=1e-3)

    def encode(self, t, x):
        """Mean and logarithm of the deviation of z(0)."""
        # Backwards: from the end of the window to zero, with the latest observation first.
        last = (~t.isnan()).sum(1, keepdim=True) - 1
        order = last - torch.arange(t.shape[1], device=t.device)
        is_there = order >= 0
        place = order.clamp(min=0)
        values, times = x.gather(1, place), t.gather(1, place).masked_fill(~is_there, torch.nan)
        update = lambda t, h, j: self.cell(values.gather(1, j[:, None]), h)
        span = torch.tensor([OBSERVED, 0.0], device=t.device).expand(len(t), 2)
        start = x.new_zeros(len(t), self.cell.hidden_size)
        return self.belief(self.encoder(start, span, jumps=(times, update))[:, -1]).chunk(2, 1)

    def decode(self, z, t):
        t = torch.cat([torch.zeros_like(t[:, :1]), t], 1)
        return self.readout(self.decoder(z, t)[:, 1:])[..., 0]

    def forward(self, t, x, target_t):
        return self.decode(self.encode(t, x)[0], target_t)

    def loss(self, curves, progress):
        """Negative evidence lower bound for each target; the divergence comes in slowly."""
        mean, log = self.encode(curves.t, curves.x)
        z = mean + log.exp() * torch.randn_like(mean)
        misfit = ((self.decode(z, curves.target_t) - curves.target_x) / NOISE).square().mean()
        divergence = (mean.square() + (2 * log).exp() - 2 * log - 1).sum(1).mean() / curves.target_t.shape[1]
        return (misfit + min(1.0, 2 * progress) * divergence) / 2


class Recurrent(nn.Module):
    """A GRU reads values and gaps; a second one, from its state, writes values and is told the gaps."""

    def __init__(self, size):
        super().__init__()
        width = 3 * size.hidden // 2
        self.reader, self.writer = nn.GRUCell(2, width), nn.GRUCell(2, width)
        self.readout = nn.Linear(width, 1)

    def forward(self, t, x, target_t):
        gaps = lambda t: torch.cat([t[:, :1], t.diff(dim=1)], 1)
        state = x.new_zeros(len(x), self.reader.hidden_size)
        for entry in torch.stack([gaps(t), x], 2).unbind(1):
            is_there = ~entry[:, :1].isnan()
            state = torch.where(is_there, self.reader(entry.nan_to_num(), state), state)
        outputs, value = [], x.new_zeros(len(x), 1)
        for gap in gaps(target_t).T:
            state = self.writer(torch.cat([gap[:, None], value], 1), state)
            value = self.readout(state)
            outputs.append(value)
        return torch.cat(outputs, 1)

    def loss(self, curves, progress):
        return ((self(*curves[:3]) - curves.target_x) / NOISE).square().mean() / 2


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# %% [markdown]
# ## Training


# %%
class Fit(NamedTuple):
    """A trained model, its losses and seconds, and its values at the targets of the test curves (B, T)."""

    model: nn.Module
    losses: list
    seconds: float
    values: torch.Tensor

    def errors(self, test):
        """Mean squared errors where there were observations, and behind them."""
        square = (self.values - test.target_x).square()
        return [square[test.target_t <= OBSERVED].mean(), square[test.target_t > OBSERVED].mean()]


def fit(model, generator, data, test, size, title, device):
    optimizer, losses, start = torch.optim.Adam(model.to(device).parameters()), [], time.perf_counter()
    for step in tqdm(range(size.steps), desc=f"{title:<12}", unit="step", ncols=88, mininterval=0.5):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + np.cos(np.pi * step / size.steps)) / 2
        rows = torch.randint(len(data.t), (size.batch,), generator=generator)
        loss = model.loss(Curves(*(x.to(device) for x in data.rows(rows))), step / size.steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        return Fit(model, losses, seconds, model(*(x.to(device) for x in test[:3])).cpu())


def run(seed=0, size=None, device="cpu"):
    """Make the data, fit both models, complete the test curves."""
    size, generator = size or Size(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    data, test = (oscillators(generator, count, size.most) for count in (size.curves, size.tests))
    models = {"latent ODE": LatentODE(size), "GRU": Recurrent(size)}
    return test, {
        name: fit(model, generator, data, test, size, name, device) for name, model in models.items()
    }


def print_table(test, fits):
    print(f"\n{'method':<12}{'to 5':>10}{'5 to 8':>10}{'seconds':>9}{'parameters':>12}")
    for name, fit in fits.items():
        inside, beyond = fit.errors(test)
        print(f"{name:<12}{inside:>10.1e}{beyond:>10.1e}{fit.seconds:>9.1f}{parameters(fit.model):>12}")


# %% [markdown]
# ## The picture

# %%
INK, GREY, ORANGE, VIOLET = "#212b36", "#8795a5", "#e8590c", "#5f3dc4"
COLOURS = {"latent ODE": ORANGE, "GRU": VIOLET}


def draw_curve(axes, test, fits, row):
    """One test curve: truth, observations, samples of the latent ODE, and the GRU."""
    curve = test.rows(slice(row, row + 1))
    fine = FINE[None]
    model = fits["latent ODE"].model.cpu()
    with torch.no_grad():
        mean, log = model.encode(curve.t, curve.x)
        z = mean + log.exp() * torch.randn(40, mean.shape[1])
        samples, middle = model.decode(z, fine.expand(40, -1)), model.decode(mean, fine)
    axes.axvspan(OBSERVED, END, color="#f1f4f8", zorder=0)
    axes.plot(fine[0], samples.T, color=ORANGE, lw=0.5, alpha=0.15)
    axes.plot(FINE, curve.truth[0], color=INK, lw=3.5)
    axes.plot(fine[0], middle[0], color=ORANGE, lw=1.8)
    order = curve.target_t[0]
    axes.plot(order, fits["GRU"].values[row], color=VIOLET, lw=1.4, ls=(0, (4, 2)))
    axes.plot(curve.t[0], curve.x[0], "o", color=GREY, mec="white", ms=6, zorder=5)
    axes.set(xlim=(0, END), ylim=(-1.7, 1.7))
    axes.spines[["top", "right"]].set_visible(False)


def draw_legend(figure):
    handles = [
        plt.Line2D([], [], color=INK, lw=3.5, label="truth"),
        plt.Line2D([], [], color=GREY, marker="o", ls="", label="observations"),
        plt.Line2D([], [], color=ORANGE, lw=1.8, label="latent ODE and samples of it"),
        plt.Line2D([], [], color=VIOLET, ls="--", label="GRU with time gaps"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def draw(test, fits, path):
    with plt.rc_context({"font.size": 12, "text.color": INK, "axes.titlesize": 14}):
        figure, grid = plt.subplots(2, 3, figsize=(13.3, 6.2), sharex=True, sharey=True, layout="constrained")
        count = (~test.t.isnan()).sum(1)
        rows = [int(row) for row in count.argsort(stable=True)[:: len(count) // 6][:6]]
        for axes, row in zip(grid.flat, rows, strict=True):
            draw_curve(axes, test, fits, row)
            axes.set_title(f"{count[row]} observations", fontsize=12)
        ratio = [a / b for a, b in zip(*(fit.errors(test) for fit in fits.values()), strict=True)]
        figure.suptitle(
            f"Curves completed: squared error {ratio[0]:.2f} of the GRU's on [0, 5], {ratio[1]:.2f} on [5, 8]"
        )
        draw_legend(figure)
        figure.savefig(path, dpi=150)


# %%
def parse_arguments():
    parser = argparse.ArgumentParser(description="Complete curves from a few irregular observations.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="latent_ode.png", help="where to write the picture")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_const", dest="size", const=QUICK, help="less of everything")
    sizes.add_argument("--large", action="store_const", dest="size", const=LARGE, help="sizes for a GPU")
    parser.set_defaults(size=Size())
    return parser.parse_args([] if IS_NOTEBOOK else None)


if __name__ == "__main__":
    arguments = parse_arguments()
    is_large = arguments.size == LARGE and torch.cuda.is_available()
    test, fits = run(arguments.seed, arguments.size, "cuda" if is_large else "cpu")
    print_table(test, fits)
    draw(test, fits, arguments.output)
    print(f"\nPicture: {arguments.output}")
