# %% [markdown]
# # The rules of Sudoku, learned and looked at, with JAX
#
# The core of `sudoku.py` in JAX: a `SATLayer` fills in boards of 4x4 symbols, and its clauses S are learned
# from puzzles and their solutions, with the whole step under `jit`. Each pair of cell and digit is a
# variable, and the layer couples two of them by an entry of S'S, which is large where both cannot be true.
# The picture shows these couplings beside the rules, which the layer was never told.
#
#     python examples/sudoku_jax.py [--seed 0] [--output rules.png] [--quick]

# %%
import argparse
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.example_libraries.optimizers import adam
from sudoku_puzzles import make_data
from tqdm import tqdm

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt

from optlayers.jax import SATLayer

SIDE, CELLS, GIVENS, BATCH, CLAUSES = 4, 16, 7, 25, 100


# %%
def one_hot(boards):
    """(n, cells * side), all zero for empty cells."""
    return jax.nn.one_hot(boards - 1, SIDE).reshape(len(boards), -1)


def is_given(boards):
    return jnp.repeat(boards > 0, SIDE, axis=-1)


class Score(NamedTuple):
    """Shares of full boards and of empty cells that are right."""

    boards: float
    empty: float


def judge(fill, S, puzzles):
    """The score of S with `fill`, which maps S, what is known and where to probabilities."""
    z = np.asarray(fill(S, one_hot(puzzles.boards), is_given(puzzles.boards)))
    is_right = 1 + z.reshape(-1, CELLS, SIDE).argmax(-1) == puzzles.solutions
    return Score(is_right.all(-1).mean(), is_right[puzzles.boards == 0].mean())


def train(layer, S, puzzles, epochs, rng):
    """S after Adam on the cross entropy of all cells."""
    start, update, value = adam(8e-3)

    def loss(S, boards, solutions):
        z, truth = layer(S, one_hot(boards), is_given(boards)).clip(1e-6, 1 - 1e-6), one_hot(solutions)
        return -(truth * jnp.log(z) + (1 - truth) * jnp.log(1 - z)).mean()

    @jax.jit
    def advance(step, state, boards, solutions):
        error, gradient = jax.value_and_grad(loss)(value(state), boards, solutions)
        return error, update(step, gradient, state)

    state, steps = start(S), epochs * (len(puzzles.boards) // BATCH)
    order = np.concatenate([rng.permutation(len(puzzles.boards)) for _ in range(epochs)])
    with tqdm(enumerate(order.reshape(steps, BATCH)), total=steps, unit="step", ncols=88) as bar:
        for step, rows in bar:
            error, state = advance(step, state, puzzles.boards[rows], puzzles.solutions[rows])
            bar.set_postfix(loss=f"{error:.3f}", refresh=False)
    return value(state)


# %% [markdown]
# ## The picture
#
# The layer was not told either that all digits, and all rows, columns and boxes, are alike.


# %%
def couplings(S):
    """Of the same digit in each pair of cells (16, 16), the mean over digits, in units of the largest."""
    V = S[:, 1:].reshape(-1, CELLS, SIDE)
    C = np.array(jnp.einsum("mcd,med->ce", V, V)) * (1 - np.eye(CELLS))
    return C / abs(C).max()


def rules():
    """1 for cells that share a row, a column or a box, 0 for others and the cell itself (16, 16)."""
    row, column = np.divmod(np.arange(CELLS), SIDE)
    units = (row, column, row // 2 * 2 + column // 2)
    return np.any([unit[:, None] == unit for unit in units], 0) * (1 - np.eye(CELLS))


def draw(before, after, score, path):
    panels = {
        "before training": before,
        f"learned: {score.boards:.0%} of boards": after,
        "the rules": rules(),
    }
    with plt.rc_context({"font.size": 12}):
        figure, axes = plt.subplots(1, 3, figsize=(13.3, 4.9), layout="constrained")
        for axis, (title, matrix) in zip(axes, panels.items(), strict=True):
            image = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
            axis.set(title=title, xlabel="cell", xticks=range(0, CELLS, SIDE), yticks=range(0, CELLS, SIDE))
        axes[0].set_ylabel("cell")
        figure.colorbar(image, ax=axes, label="coupling of the same digit in two cells", shrink=0.9)
        figure.savefig(path, dpi=150)
        plt.close(figure)


# %%
def run(seed=0, quick=False):
    """S before and after training, the scores of both on unseen grids, and the seconds of training."""
    rng = np.random.default_rng(seed)
    data, test = make_data(SIDE, GIVENS, (216, 72), (500, 100) if quick else (1000, 300), rng)
    layer = SATLayer(CELLS * SIDE, CLAUSES, tol=1e-2, max_iter=8, on_failure="ignore")
    first, start = layer.init(jax.random.key(seed)), time.perf_counter()
    last = train(layer, first, data, 2 if quick else 4, rng)
    seconds = time.perf_counter() - start
    fill = jax.jit(layer)
    return first, last, judge(fill, first, test), judge(fill, last, test), seconds


def parse_arguments():
    parser = argparse.ArgumentParser(description="Learn the rules of Sudoku from symbols, with JAX.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="rules.png", help="where to write the picture")
    parser.add_argument("--quick", action="store_true", help="fewer puzzles and epochs")
    return parser.parse_args([] if IS_NOTEBOOK else None)


if __name__ == "__main__":
    arguments = parse_arguments()
    first, last, before, after, seconds = run(arguments.seed, arguments.quick)
    print(f"\n{'method':<18}{'boards':>9}{'empty cells':>13}{'seconds':>9}")
    for title, score, taken in (("before training", before, 0), ("SAT layer", after, seconds)):
        print(f"{title:<18}{score.boards:>9.1%}{score.empty:>13.1%}{taken:>9.1f}")
    draw(couplings(first), couplings(last), after, arguments.output)
    print(f"\nPicture: {arguments.output}")
