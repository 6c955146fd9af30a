"""Sudoku puzzles with one solution, of 4x4 or 9x9 cells, for `sudoku.py` and `sudoku_jax.py`.

A board is a row of side^2 digits, cell after cell, with zeros for empty cells.
"""

from typing import NamedTuple

import numpy as np
from tqdm import tqdm


class Puzzles(NamedTuple):
    """Boards with zeros for empty cells, and their solutions (n, side^2)."""

    boards: np.ndarray
    solutions: np.ndarray


def make_data(side, givens, grids, counts, rng):
    """Puzzles to train on and to test on; they share no solution grid.

    Args:
        givens: cells of a puzzle that are not empty.
        grids: how many solution grids the puzzles come from, in training and in the test.
        counts: how many puzzles to make.
    """
    train, test = np.split(solution_grids(side, sum(grids), rng), [grids[0]])
    return [make_puzzles(part, side, givens, n, rng) for part, n in zip((train, test), counts, strict=True)]


def make_puzzles(grids, side, givens, count, rng):
    """Of small grids each puzzle is made anew; of large ones, where that takes long, one is disguised."""
    if side == 4:
        chosen = grids[rng.integers(len(grids), size=count)]
        pairs = [(puzzle(grid, givens, rng), grid) for grid in chosen]
    else:
        bases = [np.stack([puzzle(grid, givens, rng), grid]) for grid in tqdm(grids, "puzzles", ncols=88)]
        pairs = [disguised(bases[i], side, rng) for i in rng.integers(len(bases), size=count)]
    return Puzzles(*np.stack(pairs, 1))


def solution_grids(side, count, rng):
    """Different grids (count, side^2): a shuffled part of all 288 for 4x4, random ones for 9x9."""
    if side == 4:
        return rng.permutation(solutions(np.zeros(16, int), limit=288))[:count]
    return np.array([solutions(np.zeros(side**2, int), 1, rng)[0] for _ in range(count)])


def puzzle(grid, givens, rng):
    """`grid` with zeros for all but `givens` cells, of which it is the only completion."""
    while True:
        board = grid.copy()
        for cell in rng.permutation(len(grid)):
            board[cell] = 0
            if len(solutions(board, limit=2)) > 1:
                board[cell] = grid[cell]
            if np.count_nonzero(board) == givens:
                return board


def disguised(pair, side, rng):
    """A puzzle and its solution (2, side^2) after a random symmetry: new digits, lines exchanged in bands."""
    bands = np.arange(side).reshape(round(side**0.5), -1)
    rows, columns = (rng.permuted(rng.permutation(bands), axis=1).ravel() for _ in range(2))
    digits = np.append(0, 1 + rng.permutation(side))
    boards = digits[pair.reshape(2, side, side)[:, rows][:, :, columns]]
    return (boards.mT if rng.random() < 0.5 else boards).reshape(2, -1)


def solutions(board, limit, rng=None):
    """Up to `limit` completions of a board, by backtracking; in random order with `rng`.

    The next cell is one with the fewest digits left; those taken are bits, for each row, column and box.
    """
    side = round(len(board) ** 0.5)
    box = round(side**0.5)
    units = [(i, side + j, 2 * side + i // box * box + j // box) for i in range(side) for j in range(side)]
    board, taken, found = board.tolist(), [0] * (3 * side), []

    def toggle(cell, digit):
        for unit in units[cell]:
            taken[unit] ^= 1 << digit

    def candidates(cell):
        row, column, square = units[cell]
        used = taken[row] | taken[column] | taken[square]
        return [digit for digit in range(1, side + 1) if not used >> digit & 1]

    def search():
        empty = [(candidates(cell), cell) for cell, digit in enumerate(board) if not digit]
        if not empty:
            found.append(board.copy())
            return
        digits, cell = min(empty, key=lambda pair: len(pair[0]))
        for digit in digits if rng is None else rng.permutation(digits).tolist():
            board[cell] = digit
            toggle(cell, digit)
            search()
            toggle(cell, digit)
            board[cell] = 0
            if len(found) == limit:
                return

    for cell, digit in enumerate(board):
        if digit:
            toggle(cell, digit)
    search()
    return found
