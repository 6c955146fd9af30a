# %% [markdown]
# # Filter a process from sporadic observations
#
# Two correlated processes return to levels r of their own, which nobody tells (Ornstein and Uhlenbeck),
#
#     dX_i = (r_i - X_i) dt + 0.1 dW_i,    X(0) = 0,    correlation of dW_1 and dW_2: 0.99.
#
# They are looked at about twice in unit time, and mostly only one of them. What are they at any time, and how
# certain is that? The hidden state of GRU-ODE-Bayes (de Brouwer et al. 2019) moves along an ODE between
# observations and jumps at each,
#
#     dh/dt = (1 - z(h)) (g(h) - h),    h+ = GRU(h, observation),    X ~ N(mean(h), variance(h)).
#
# The jumps of a whole batch, each series at times of its own, are one call of `odeint`, which also gives the
# states before them: those have to predict the observations. As everything is normal, the Kalman filter,
# which knows the equations, is the best that can be done. A recurrent network (GRU), told how much time
# passes, learns from the same data. Run it as a script, or cell by cell as a notebook:
#
#     python examples/gru_ode_bayes.py [--seed 0] [--output gru_ode_bayes.png] [--quick | --large]

# %%
import argparse
import math
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

END, NOW, STEP = 6.0, 4.0, 0.05  # of a series, and of what is observed in the test; of the grid of times
SIGMA, RHO, RATE, BOTH = 0.1, 0.99, 2.0, 0.2  # observations in unit time; fraction of them of both processes
LEVELS, SPREAD = torch.tensor([1.0, -1.0]), 12**-0.5  # mean and standard deviation of r
SHARP = 0.01  # standard deviation of what is believed about a process just observed


class Size(NamedTuple):
    """Series to learn from, minibatch, steps, hidden units, and series to be judged by."""

    series: int = 2000
    batch: int = 100
    steps: int = 300
    hidden: int = 32
    tests: int = 1000


QUICK = Size(series=500, batch=32, steps=50, hidden=16, tests=200)
LARGE = Size(series=10000, batch=500, steps=4000, hidden=50, tests=2000)

# %% [markdown]
# ## The data
#
# Series live on a grid of times; only a few of its entries are observed. Transitions are exact, those of
# length `STEP`:
#
#     X(t + STEP) = r + decay (X(t) - r) + normal with the covariance matrix Q.

# %%
DECAY = math.exp(-STEP)
Q = SIGMA**2 * (1 - DECAY**2) / 2 * torch.tensor([[1.0, RHO], [RHO, 1.0]])


class Series(NamedTuple):
    """States (B, T, 2) on the grid t (T,), which of them are observed, and for each series the times of the
    observations (B, N), padded with NaN, and their places in the grid."""

    t: torch.Tensor
    x: torch.Tensor
    observed: torch.Tensor
    times: torch.Tensor
    place: torch.Tensor

    def rows(self, index):
        return Series(self.t, *(field[index] for field in self[1:]))

    def to(self, device):
        return Series(*(field.to(device) for field in self))

    def at(self, field):
        """Entries of a field (B, T, 2) at the observations (B, N, 2)."""
        return field.gather(1, self.place[..., None].expand(-1, -1, 2))


def ornstein_uhlenbeck(generator, count):
    t = torch.arange(1, round(END / STEP) + 1) * STEP
    normal = lambda *shape: torch.randn(shape, generator=generator)
    noise = normal(count, len(t), 2) @ torch.linalg.cholesky(Q).T
    r, x, states = LEVELS + SPREAD * normal(count, 2), torch.zeros(count, 2), []
    for k in range(len(t)):
        x = r + DECAY * (x - r) + noise[:, k]
        states.append(x)

    mean = round(RATE * END)
    most = mean * 5 // 4
    number = torch.randint(mean * 3 // 4, most + 1, (count, 1), generator=generator)
    place = torch.rand(count, len(t), generator=generator).argsort(1)[:, :most]
    place = place.masked_fill(torch.arange(most) >= number, len(t)).sort(1).values
    times = torch.cat([t, t.new_tensor([torch.nan])])[place]
    which = torch.rand(count, most, 1, generator=generator)
    seen = (which < BOTH) | ((which < (1 + BOTH) / 2) == torch.tensor([True, False]))
    observed = torch.zeros(count, len(t) + 1, 2, dtype=torch.bool).scatter(
        1, place[..., None].expand_as(seen), seen
    )
    return Series(t, torch.stack(states, 1), observed[:, :-1], times, place.clamp(max=len(t) - 1))


# %% [markdown]
# ## The best filter
#
# Kalman's, for the state (X, r).


# %%
def kalman(series, until):
    """Means and variances (B, T, 2) of X on the grid, given the observations before each time and `until`."""
    count, eye = len(series.x), torch.eye(2, dtype=torch.float64)
    F = torch.cat([torch.cat([DECAY * eye, (1 - DECAY) * eye], 1), torch.cat([0 * eye, eye], 1)])
    P = torch.block_diag(0 * eye, SPREAD**2 * eye).expand(count, 4, 4)
    s = torch.cat([0 * LEVELS, LEVELS]).double().expand(count, 4)
    means, variances, noise = [], [], torch.block_diag(Q.double(), 0 * eye)
    for k, t in enumerate(series.t):
        s, P = s @ F.T, F @ P @ F.T + noise
        means.append(s[:, :2])
        variances.append(P.diagonal(dim1=1, dim2=2)[:, :2])
        for i in range(2):
            used = (series.observed[:, k, i] & (t <= until))[:, None]
            gain = torch.where(used, P[:, :, i] / P[:, i, i, None].clamp(min=1e-15), 0.0)
            s = s + gain * (series.x[:, k, i] - s[:, i])[:, None]
            P = P - gain[:, :, None] * P[:, i, None, :]
    return torch.stack(means, 1).float(), torch.stack(variances, 1).float()


def hold(series, until):
    """The value last seen of each process before each time and `until`; at first, the mean of r."""
    value, values = LEVELS.expand(len(series.x), 2), []
    for k, t in enumerate(series.t):
        values.append(value)
        value = torch.where(series.observed[:, k] & (t <= until), series.x[:, k], value)
    return torch.stack(values, 1)


# %% [markdown]
# ## The two models
#
# `filtered` gives means and variances on the grid, as does the Kalman filter.


# %%
def likelihood(x, mean, variance):
    """Negative logarithm of the normal density."""
    return ((x - mean).square() / variance + (2 * torch.pi * variance).log()) / 2


def divergence(mean, variance, mean_2, variance_2):
    """Of one normal distribution from a second one (Kullback and Leibler)."""
    ratio = variance / variance_2
    return ((mean - mean_2).square() / variance_2 + ratio - ratio.log() - 1) / 2


def averaged(values, weights):
    return (values * weights).sum() / weights.sum()


def readout(inputs, hidden):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 4))


def moments(output):
    """Means, and variances between 1e-4 and 1, from the outputs (..., 4) of a network."""
    mean, log = output.chunk(2, -1)
    return mean, 1e-4 ** torch.sigmoid(-log)


class GRUODEBayes(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.gates, self.candidate = nn.Linear(hidden, 2 * hidden), nn.Linear(hidden, hidden)
        self.prepare, self.cell = nn.Linear(8, hidden), nn.GRUCell(hidden, hidden)
        self.readout, self.first = readout(hidden, hidden), nn.Parameter(torch.zeros(hidden))
        self.ode = ODE(lambda t, h: self.drift(h), method="bosh3", rtol=1e-2, atol=1e-2)

    def drift(self, h):
        z, r = torch.sigmoid(self.gates(h)).chunk(2, 1)
        return (1 - z) * (torch.tanh(self.candidate(r * h)) - h)

    def observe(self, h, x, seen):
        """The state after x (B, 2), of which some entries are seen."""
        mean, variance = moments(self.readout(h))
        surprise = (x - mean) / variance.sqrt()
        entries = torch.stack([x, mean, surprise.clamp(-9, 9), torch.ones_like(x)], 2) * seen[..., None]
        return self.cell(torch.relu(self.prepare(entries.flatten(1))), h)

    def solve(self, series, t, until):
        """States at times t (B, T), and around the jumps, which happen at observations `until` some time."""
        x, seen = series.at(series.x), series.at(series.observed)
        jump = lambda t, h, j: self.observe(h, *(f[torch.arange(len(f)), j] for f in (x, seen)))
        jumps = (series.times, jump, series.times <= until)
        return self.ode.solve(self.first.expand(len(x), -1), t, jumps=jumps)

    def filtered(self, series, until):
        t = torch.cat([series.t.new_zeros(1), series.t]).expand(len(series.x), -1)
        return moments(self.readout(self.solve(series, t, until)[0][:, 1:]))

    def loss(self, series):
        """Of the states before the observations as predictions, and of those after them as beliefs."""
        x, seen = series.at(series.x), series.at(series.observed) & ~series.times.isnan()[..., None]
        span = series.t.new_tensor([0.0, END]).expand(len(x), 2)
        _, info = self.solve(series, span, END)
        before, after = (moments(self.readout(h.nan_to_num())) for h in (info.before, info.after))
        # Bayes: the product of the prediction and of a narrow density at the observation.
        mean, variance = (y.detach() for y in before)
        weight = variance / (variance + SHARP**2)
        belief = mean + weight * (x - mean), weight * SHARP**2
        return averaged(likelihood(x, *before), seen) + 0.01 * averaged(divergence(*belief, *after), seen)


class Recurrent(nn.Module):
    """A GRU that reads observations and times between them; its readout is told how long ago the last was."""

    def __init__(self, hidden):
        super().__init__()
        self.cell, self.readout = nn.GRUCell(5, hidden), readout(hidden + 1, hidden)

    def states(self, series):
        """Before the first observation and after each (B, N + 1, k), and their times."""
        x, seen = series.at(series.x), series.at(series.observed)
        t = torch.cat([torch.zeros_like(series.times[:, :1]), series.times.nan_to_num(END)], 1)
        inputs = torch.cat([x * seen, seen, t.diff(dim=1)[..., None]], 2)
        states = [x.new_zeros(len(x), self.cell.hidden_size)]
        for entry in inputs.unbind(1):
            states.append(self.cell(entry, states[-1]))
        return torch.stack(states, 1), t

    def filtered(self, series, until):
        states, t = self.states(series)
        last = (series.times[:, None] < series.t[:, None]) & (series.times[:, None] <= until)
        last = last.sum(2)
        state = states.gather(1, last[..., None].expand(-1, -1, states.shape[2]))
        return moments(self.readout(torch.cat([state, (series.t - t.gather(1, last))[..., None]], 2)))

    def loss(self, series):
        states, t = self.states(series)
        output = moments(self.readout(torch.cat([states[:, :-1], t.diff(dim=1)[..., None]], 2)))
        seen = series.at(series.observed) & ~series.times.isnan()[..., None]
        return averaged(likelihood(series.at(series.x), *output), seen)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# %% [markdown]
# ## Training and test
#
# In the test nothing is seen after `NOW`, and the next observation behind it is to be predicted.


# %%
class Fit(NamedTuple):
    """Moments (B, T, 2) on the grid of the test series; the seconds and the parameters of a model."""

    mean: torch.Tensor
    variance: torch.Tensor | None = None
    seconds: float | None = None
    parameters: int | None = None

    def errors(self, test):
        """Mean squared error and negative logarithm of the likelihood, of the next observation."""
        future = test.observed.any(2) & (test.t > NOW)
        following = test.observed & (future & (future.cumsum(1) == 1))[..., None]
        square = averaged((self.mean - test.x).square(), following).item()
        if self.variance is None:
            return square, None
        return square, averaged(likelihood(test.x, self.mean, self.variance), following).item()


def train(model, generator, data, test, size, title, device):
    optimizer, start = torch.optim.Adam(model.to(device).parameters()), time.perf_counter()
    for step in tqdm(range(size.steps), desc=f"{title:<16}", unit="step", ncols=88, mininterval=0.5):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + np.cos(np.pi * step / size.steps)) / 2
        rows = torch.randint(len(data.x), (size.batch,), generator=generator)
        loss = model.loss(data.rows(rows).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        moments = model.filtered(test.to(device), NOW)
    return Fit(*(y.cpu() for y in moments), seconds, parameters(model))


def run(seed=0, size=None, device="cpu"):
    """Make the data, train both models, filter the test series."""
    size, generator = size or Size(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    data, test = ornstein_uhlenbeck(generator, size.series), ornstein_uhlenbeck(generator, size.tests)
    models = {"GRU-ODE-Bayes": GRUODEBayes(size.hidden), "GRU": Recurrent(5 * size.hidden // 4)}
    fits = {name: train(m, generator, data, test, size, name, device) for name, m in models.items()}
    return test, fits | {"last value held": Fit(hold(test, NOW)), "Kalman, the best": Fit(*kalman(test, NOW))}


def print_table(test, fits):
    entry = lambda value, form: "-" if value is None else format(value, form)
    print(f"\n{'method':<18}{'MSE':>10}{'NLL':>8}{'seconds':>9}{'parameters':>12}")
    for name, fit in fits.items():
        square, surprise = fit.errors(test)
        print(
            f"{name:<18}{square:>10.2e}{entry(surprise, '.2f'):>8}{entry(fit.seconds, '.1f'):>9}"
            f"{entry(fit.parameters, 'd'):>12}"
        )


# %% [markdown]
# ## The picture

# %%
INK, GREY, ORANGE, VIOLET, BLUE = "#212b36", "#8795a5", "#e8590c", "#5f3dc4", "#1c7ed6"
COLOURS = {"GRU-ODE-Bayes": ORANGE, "GRU": VIOLET, "last value held": GREY, "Kalman, the best": INK}


def draw_series(axes, test, fits, row):
    """Both processes of one series: the truth, what was seen of it, and bands of two standard deviations."""
    ode, best = fits["GRU-ODE-Bayes"], fits["Kalman, the best"]
    for i in range(2):
        mean, deviation = ode.mean[row, :, i], 2 * ode.variance[row, :, i].sqrt()
        axes.fill_between(test.t, mean - deviation, mean + deviation, color=ORANGE, alpha=0.22, lw=0)
        axes.plot(test.t, mean, color=ORANGE, lw=1.8)
        mean, deviation = best.mean[row, :, i], 2 * best.variance[row, :, i].sqrt()
        axes.plot(test.t, mean - deviation, color=INK, lw=0.8, ls=":")
        axes.plot(test.t, mean + deviation, color=INK, lw=0.8, ls=":")
        axes.plot(test.t, test.x[row, :, i], color=BLUE, lw=1.0, alpha=0.8)
        seen = test.observed[row, :, i] & (test.t <= NOW)
        axes.plot(test.t[seen], test.x[row, seen, i], "o", color=INK, mec="white", ms=7, zorder=5)
    axes.axvspan(NOW, END, color="#f1f4f8", zorder=0)
    axes.set(xlim=(0, END), ylim=(-2.1, 2.1))
    axes.spines[["top", "right"]].set_visible(False)


def draw_errors(axes, test, fits):
    """Root mean square errors of the forecasts from `NOW`."""
    ahead = test.t > NOW
    for name, fit in fits.items():
        rms = (fit.mean - test.x)[:, ahead].square().mean((0, 2)).sqrt()
        style = {"color": COLOURS[name], "lw": 2.4, "label": name}
        axes.plot(test.t[ahead] - NOW, rms, **style, ls=":" if name.startswith("Kalman") else "-")
    axes.set(xlim=(0, END - NOW), ylim=(0, None), xlabel="time since the last observations")
    axes.set_title("Error of the forecast (root mean square)", pad=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw(test, fits, path):
    with plt.rc_context({"font.size": 12, "text.color": INK, "axes.titlesize": 14}):
        figure = plt.figure(figsize=(13.6, 6.4), layout="constrained")
        axes = figure.subplot_mosaic([["a", "errors"], ["b", "errors"]], width_ratios=[1.5, 1])
        count = (test.observed.any(2) & (test.t <= NOW)).sum(1)
        for name, row in zip("ab", (int(count.argmin()), int(count.argmax())), strict=True):
            draw_series(axes[name], test, fits, row)
            axes[name].text(0.08, 1.75, f"{count[row]} observations", weight="bold")
        axes["a"].set_xticklabels([])
        axes["a"].set_title("Two processes, seen now and then until 4, forecast to 6", pad=10)
        axes["b"].set_xlabel("time")
        handles = [
            plt.Line2D([], [], color=INK, marker="o", mec="white", ms=7, ls="", label="observed"),
            plt.Line2D([], [], color=BLUE, lw=1, label="truth"),
            plt.Line2D([], [], color=ORANGE, lw=8, alpha=0.4, label="GRU-ODE-Bayes, 95 %"),
            plt.Line2D([], [], color=INK, lw=1, ls=":", label="Kalman filter, 95 %"),
        ]
        axes["b"].legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4, frameon=False
        )
        draw_errors(axes["errors"], test, fits)
        figure.savefig(path, dpi=150)


# %%
def parse_arguments():
    parser = argparse.ArgumentParser(description="Filter a process from sporadic observations.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="gru_ode_bayes.png", help="where to write the picture")
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
