# %% [markdown]
# # Four deep equilibrium networks read handwritten digits
#
# A deep equilibrium layer has no depth: its output z is where its cell has nothing left to change,
#
#     z = cell(z, x),
#
# found by a root solver and differentiated by the implicit function theorem. Any cell will do. Here are
# four of them, through the same call `DEQ(cell, start)`, on the digits of scikit-learn (8x8 pixels): a dense
# layer, a residual convolution block, an LSTM cell whose state is a pair, and a transformer block. Each is
# compared with an explicit network of equal size: two applications of the same cell, with weights of its own.
#
#     python examples/deq_digits.py [--seed 0] [--output deq_digits.png] [--quick]

# %%
import argparse
import sys
import time
import weakref
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import affine_grid, conv2d, cross_entropy, grid_sample
from torch.nn.grad import conv2d_input
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from optlayers.torch import DEQ, Exact, jacobian_norm, plot_convergence, spectral_radius

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt


class Size(NamedTuple):
    """Epochs, the first of which unroll the cell; minibatch; and the cells that are trained."""

    epochs: int = 20
    unrolled: int = 3
    batch: int = 32
    cells: tuple = ("dense", "convolution", "LSTM", "transformer")


QUICK = Size(epochs=3, unrolled=2, batch=32, cells=("dense", "convolution"))

# %% [markdown]
# ## The data
#
# Training images are turned, scaled and shifted a little, anew in every epoch.


# %%
def make_data(seed):
    """Images (n, 1, 8, 8) between 0 and 1 and their digits: 80 % to train with, 20 % to test."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    parts = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=y)
    x_train, x_test, y_train, y_test = map(torch.from_numpy, parts)
    return (x_train, y_train), (x_test, y_test)


def perturb(x):
    """Images turned by about 3 degrees, scaled by 3 % and shifted by a quarter of a pixel, at random."""
    n = len(x)
    turn, scale = 0.06 * torch.randn(n), 1 + 0.03 * torch.randn(n)
    cos, sin = scale * torch.cos(turn), scale * torch.sin(turn)
    shift = 0.06 * torch.randn(n, 2)
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    return grid_sample(
        x, affine_grid(torch.stack(rows, 1), x.shape, align_corners=False), align_corners=False
    )


# %% [markdown]
# ## The cells
#
# Each maps the state z and the image x to the next state. Both the equilibrium and its derivative are found
# by iterations that converge where the derivative of the cell in z has a spectral radius below 1, and nothing
# in the loss asks for that. The first two cells are contractions by construction: their weights are divided
# by their norms, which `DEQ` evaluates once per solve. The other two pay a `penalty` on their Jacobian.
# Normalisation of the state needs care: it undoes every scale, so that small weights do not make the cell a
# contraction. Here the transformer normalises the state together with an input that is at least as large.


# %%
class Dense(nn.Module):
    """tanh(W z + U x + b), with |W| < 1: a contraction."""

    width = 256
    start, penalty = (width,), 0.0

    def __init__(self):
        super().__init__()
        self.W = spectral_norm(nn.Linear(self.width, self.width, bias=False))
        self.U, self.head = nn.Linear(64, self.width), nn.Linear(self.width, 10)

    def forward(self, z, x):
        return torch.tanh(0.9 * self.W(z) + self.U(x.flatten(1)))

    def read(self, z):
        return self.head(z)


class Nonexpansive(nn.Module):
    """A kernel, divided by the norm of its convolution of images (channels, side, side) if that exceeds 1.

    As in torch's `spectral_norm`, which takes the norm of the kernel as a matrix, each training step follows
    the norm by one step of the power method (Gouk et al. 2021).
    """

    def __init__(self, channels, side, **geometry):
        super().__init__()
        self.geometry = geometry
        self.register_buffer("image", torch.randn(1, channels, side, side))

    def forward(self, kernel):
        if self.training:
            with torch.no_grad():
                image = conv2d(self.image, kernel, **self.geometry)
                image = conv2d_input(self.image.shape, kernel, image, **self.geometry)
                self.image = image / image.norm()
        return kernel / conv2d(self.image, kernel, **self.geometry).norm().clamp(min=1)


def nonexpansive(inputs, outputs, size, side, stride=1):
    """A convolution with kernels of odd `size` that keeps distances between images or shortens them."""
    geometry = {"stride": stride, "padding": size // 2}
    convolution = nn.Conv2d(inputs, outputs, size, **geometry)
    return register_parametrization(convolution, "weight", Nonexpansive(inputs, side, **geometry))


class Convolution(nn.Module):
    """relu(u(x) + (z + 2 second relu first z) / 4), a residual block whose convolutions do not expand."""

    channels = 24
    start, penalty = (channels, 8, 8), 0.0

    def __init__(self):
        super().__init__()
        c = self.channels
        self.inject = nn.Sequential(nn.Conv2d(1, c, 3, padding=1), nn.GroupNorm(4, c))
        self.first, self.second = (nonexpansive(c, c, 3, 8) for _ in range(2))
        self.head = nn.Linear(c * 16, 10)

    def forward(self, z, x):
        return torch.relu(self.inject(x) + (z + 2 * self.second(torch.relu(self.first(z)))) / 4)

    def read(self, z):
        return self.head(nn.functional.max_pool2d(z, 2).flatten(1))


class LSTM(nn.Module):
    """An LSTM cell that reads the same image again and again; its state is a pair."""

    penalty = 1.5

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(64, 64), nn.Linear(64, 10)

    @staticmethod
    def start(x):
        return x.new_zeros(len(x), 64), x.new_zeros(len(x), 64)

    def forward(self, state, x):
        return self.cell(x.flatten(1), state)

    def read(self, state):
        return self.head(state[0])


class Transformer(nn.Module):
    """Self-attention and a small network on 16 tokens, patches of 2x2 pixels."""

    width = 32
    start, penalty = (16, width), 0.5

    def __init__(self):
        super().__init__()
        d = self.width
        self.embed, self.position = nn.Linear(4, d), nn.Parameter(0.1 * torch.randn(16, d))
        self.attend = nn.MultiheadAttention(d, 4, batch_first=True)
        self.think = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Dropout(0.05), nn.Linear(2 * d, d))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        nn.init.constant_(self.norms[2].weight, 0.5)
        self.head = nn.Linear(16 * d, 10)

    def forward(self, z, x):
        patches = nn.functional.unfold(x, 2, stride=2).mT
        tokens = z + self.norms[0](self.embed(patches) + self.position)
        # With weights, since without them attention has no second derivatives, which `jacobian_norm` needs.
        z = self.norms[1](tokens + self.attend(tokens, tokens, tokens, need_weights=True)[0])
        return self.norms[2](z + self.think(z))

    def read(self, z):
        return self.head(z.flatten(1))


CELLS = {"dense": Dense, "convolution": Convolution, "LSTM": LSTM, "transformer": Transformer}

# %% [markdown]
# ## Training
#
# The first epochs unroll three applications of the cell, which is cheap; the penalty is there from the start,
# so that the cell then has equilibria. Later on equilibria and their exact derivatives are solved for, to one
# per cent. The explicit network unrolls two applications, all the time.


# %%
class Result(NamedTuple):
    name: str
    accuracy: float
    explicit: float
    parameters: int
    iterations: float
    radius: float
    seconds: float
    info: object


def fit(deq, size, data, unroll, penalty, label):
    """Train with Adam; `unroll` maps an epoch to a number of applications, or to None for the equilibrium."""
    x, y = data
    optimizer = torch.optim.Adam(deq.parameters(), lr=2e-3)
    steps = size.epochs * -(-len(x) // size.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps, pct_start=0.2)
    for epoch in tqdm(range(size.epochs), desc=label, leave=False):
        for batch in torch.randperm(len(x)).split(size.batch):
            images = perturb(x[batch])
            z = deq(images, unroll=unroll(epoch))
            loss = cross_entropy(deq.cell.read(z), y[batch])
            if penalty:
                loss = loss + penalty * jacobian_norm(deq.cell, z, images).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(deq.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def evaluate(deq, data, unroll=None):
    """Accuracy on `data`, the state, and what the solver did."""
    deq.eval()
    z, info = deq.solve(data[0], unroll=unroll)
    return (deq.cell.read(z).argmax(1) == data[1]).double().mean().item(), z, info


def make(name):
    cell = CELLS[name]()
    return DEQ(cell, cell.start, tol=1e-2, max_iter=30, on_failure="mask")


def compare(name, size, train, test, seed):
    """Train one cell as an equilibrium and as an explicit network."""
    torch.manual_seed(seed)
    deq, start = make(name), time.perf_counter()
    unroll = lambda epoch: 3 if epoch < size.unrolled else None
    fit(deq, size, train, unroll, deq.cell.penalty, f"DEQ, {name}")
    seconds = time.perf_counter() - start
    torch.manual_seed(seed)
    explicit = make(name)
    fit(explicit, size, train, lambda epoch: 2, 0.0, f"explicit, {name}")
    accuracy, z, info = evaluate(deq, test)
    radius = spectral_radius(deq.cell, z, test[0]).max().item()
    steps = info.iterations.double().mean().item()
    count = sum(p.numel() for p in deq.parameters())
    return Result(name, accuracy, evaluate(explicit, test, 2)[0], count, steps, radius, seconds, info)


# %% [markdown]
# ## Memory
#
# The most memory that tensors take at a time in a training step, forward and backward: for the equilibrium it
# does not depend on the number of iterations, for the unrolled cell it grows with them.


# %%
class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return while these live; `peak` is the maximum."""

    def __init__(self):
        super().__init__()
        self.living, self.bytes, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, torch.Tensor):
                self.add(x.untyped_storage())
        return output

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.living:
            self.living.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.living.remove(key)
        self.bytes -= size


def peak_memory(x, iterations, unroll):
    """Megabytes that so many iterations of the convolution take."""
    cell = Convolution()
    # No residual is that small: all iterations are made.
    deq = DEQ(cell, cell.start, adjoint=Exact(tol=1e-2), tol=1e-30, max_iter=iterations, on_failure="ignore")
    with PeakMemory() as memory:
        deq(x, unroll=iterations if unroll else None).sum().backward()
    return memory.peak / 1e6


def measure_memory(x, counts=(10, 50, 200)):
    """Megabytes at so many iterations, of the equilibrium and of the unrolled cell."""
    return counts, *([peak_memory(x, n, unroll) for n in counts] for unroll in (False, True))


def print_tables(results, memory):
    columns = ("accuracy", "explicit", "parameters", "iterations", "radius", "seconds")
    print(f"\n{'method':<12}" + "".join(f"{c:>12}" for c in columns))
    for r in results:
        print(f"{r.name:<12}{r.accuracy:>12.4f}{r.explicit:>12.4f}{r.parameters:>12,}", end="")
        print(f"{r.iterations:>12.1f}{r.radius:>12.2f}{r.seconds:>12.0f}")
    print(f"\n{'iterations':<12}" + "".join(f"{n:>12}" for n in memory[0]))
    for name, row in zip(("DEQ, MB", "unrolled, MB"), memory[1:], strict=True):
        print(f"{name:<12}" + "".join(f"{entry:>12.1f}" for entry in row))


# %% [markdown]
# ## The picture

# %%
INK, ORANGE, VIOLET = "#212b36", "#e8590c", "#5f3dc4"


def draw_accuracy(axes, results):
    place = np.arange(len(results))
    for shift, color, label, values in (
        (-0.2, ORANGE, "equilibrium", [r.accuracy for r in results]),
        (0.2, VIOLET, "explicit, two applications", [r.explicit for r in results]),
    ):
        bars = axes.bar(place + shift, 100 * np.array(values), 0.36, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_xticks(place, [r.name for r in results])
    low = 100 * min(min(r.accuracy, r.explicit) for r in results)
    axes.set(ylim=(low - 2, 101.5), ylabel="test accuracy (%)", title="One call, any cell")
    axes.set_yticks(np.arange(np.ceil(low - 2), 101))
    axes.legend(loc="upper left", frameon=False, ncols=2)


def draw_memory(axes, memory):
    counts, equilibrium, unrolled = memory
    axes.plot(counts, unrolled, "o-", color=VIOLET, label="unrolled")
    axes.plot(counts, equilibrium, "o-", color=ORANGE, label="equilibrium")
    axes.set(xlabel="iterations", ylabel="peak memory of a training step (MB)", ylim=(0, None))
    axes.set_title("Memory does not grow with iterations")
    axes.legend(frameon=False)


def draw(results, memory, path):
    with plt.rc_context({"font.size": 12, "text.color": INK, "axes.titlesize": 14}):
        figure, axes = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
        draw_accuracy(axes[0], results)
        for result in results:
            plot_convergence(result.info, axes[1], label=result.name)
        axes[1].set_title("Convergence on the test images")
        axes[1].legend(frameon=False)
        draw_memory(axes[2], memory)
        for part in axes:
            part.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


# %%
def run(seed, size):
    """Train all cells, and measure the memory of one."""
    torch.manual_seed(seed)
    train, test = make_data(seed)
    results = [compare(name, size, train, test, seed) for name in size.cells]
    return results, measure_memory(test[0][:16])


def parse_arguments():
    parser = argparse.ArgumentParser(description="Equilibrium networks with four cells read digits.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="deq_digits.png", help="where to write the picture")
    parser.add_argument("--quick", action="store_true", help="two cells, fewer epochs")
    return parser.parse_args([] if IS_NOTEBOOK else None)


if __name__ == "__main__":
    arguments = parse_arguments()
    results, memory = run(arguments.seed, QUICK if arguments.quick else Size())
    print_tables(results, memory)
    draw(results, memory, arguments.output)
    print(f"\nPicture: {arguments.output}")
