"""Low-rank semidefinite programs over unit vectors, by the mixing method (Wang, Chang and Kolter 2017).

    minimise  sum_ij C_ij v_i'v_j   subject to  |v_i| = 1 for free i,   v_i given for the others

With g_i = sum_j C_ij v_j the best v_i for given others is -g_i / |g_i|; a sweep takes that step for one free
i after the other. Where sweeps end, g_i + lambda_i v_i = 0 with lambda_i = |g_i|. The linear equations with
the derivative of these conditions are symmetric, and solved by the same sweeps.

Shapes: C (N, N), symmetric with zero diagonal, shared by the batch or with its axis in front; V (B, N, k),
one vector a row; `free` (B, N), one or zero. A sweep works on blocks of variables, (M, 8, B, k): what a block
needs of the others is one matrix product, corrected within the block after each step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..ops import Array, MatrixFreeOps
from ..status import check
from .fixed_point import FixedPointSolver, Picard, Problem, Solution, run

BLOCK = 8


class _Rows(NamedTuple):
    """-C by blocks of rows (M, 8, N, b), and the part of each below the diagonal by columns (M, 8, 8, b, 1).

    b is B, or 1 for a shared C.
    """

    rows: Array
    below: Array


def _pad(ops: MatrixFreeOps, x: Array, axis: int, value: float = 0.0) -> Array:
    """`x` with more entries up to the next multiple of the block along `axis`."""
    shape = list(x.shape)
    shape[axis] = -shape[axis] % BLOCK
    return ops.concat([x, ops.full(shape, value, x)], axis)


def _blocks(ops: MatrixFreeOps, x: Array, padding: float = 0.0) -> Array:
    """(B, N, ...) as (M, 8, B, ...)."""
    x = ops.moveaxis(_pad(ops, x, 1, padding), 1, 0)
    return ops.reshape(x, (x.shape[0] // BLOCK, BLOCK, *x.shape[1:]))


def _rows(ops: MatrixFreeOps, C: Array) -> _Rows:
    C = -_pad(ops, _pad(ops, C, -1), -2)
    C = C[..., None] if C.ndim == 2 else ops.moveaxis(C, 0, -1)
    rows = ops.reshape(C, (C.shape[0] // BLOCK, BLOCK, *C.shape[1:]))
    square = [rows[p, :, p * BLOCK : (p + 1) * BLOCK] for p in range(rows.shape[0])]
    is_below = ops.constant(np.tri(BLOCK, k=-1)[None, ..., None], C)
    return _Rows(rows, ops.moveaxis(ops.stack(square, 0) * is_below, 1, 2)[..., None])


def _product(ops: MatrixFreeOps, rows: Array, X: Array) -> Array:
    """Rows (8, N, b) times vectors (M, 8, B, k): (8, B, k)."""
    size, (batch, k) = X.shape[0] * BLOCK, X.shape[2:]
    if rows.shape[-1] == 1:
        return ops.reshape(rows[..., 0] @ ops.reshape(X, (size, batch * k)), (BLOCK, batch, k))
    X = ops.moveaxis(ops.reshape(X, (size, batch, k)), 1, 0)
    return ops.moveaxis(ops.moveaxis(rows, -1, 0) @ X, 0, 1)


def _sweep(ops: MatrixFreeOps, C: _Rows, target: Array, X: Array, step: Callable) -> Array:
    """x_i <- x_i + change_i(h_i) with h_i = target_i - sum_j C_ij x_j, for one i after the other.

    Args:
        step: (p, x of block p) to the function (i, h) of its changes.
    """

    def advance(state):
        p, X = state
        old, below = X[p], list(C.below[p])
        h, change, changes = target[p] + _product(ops, C.rows[p], X), step(p, old), []
        for i in range(BLOCK):
            changes.append(change(i, h[i]))
            h = ops.multiply_add(h, below[i], changes[i][None])
        return p + 1, ops.put(X, p, old + ops.stack(changes, 0))

    return ops.repeat(X.shape[0], advance, (0, X + 0))[1]  # a copy, which `put` may overwrite


def _iterate(ops: MatrixFreeOps, settings: Mixing, sweep: Callable[[Array], Array], start: Array) -> Solution:
    """The fixed point of `sweep`, a map of vectors in blocks, from `start` (B, N, k)."""
    batch, size, k = start.shape

    def value(z):
        X = sweep(_blocks(ops, ops.reshape(z, (batch, size, k)), 1.0))  # not zero, so as to have a direction
        X = ops.moveaxis(ops.reshape(X, (X.shape[0] * BLOCK, batch, k)), 0, 1)
        return ops.reshape(X[:, :size], (batch, size * k))

    problem, flat = Problem(value, _no_tangent), ops.reshape(start, (batch, size * k))
    solution = run(ops, settings.solver, problem, flat, settings.tol, settings.max_iter)
    return solution._replace(z=ops.reshape(solution.z, (batch, size, k)))


def _no_tangent(z: Array) -> Callable[[Array], Array]:
    raise ValueError("the sweeps of the mixing method have no tangent; use Picard(), Anderson() or Broyden()")


@dataclass(frozen=True)
class Mixing:
    """The method as an opaque leaf: (C, start, free) to V, lambda (B, N), residual, status, iterations (B,).

    Args:
        solver: repeats, or accelerates, the sweeps.
        tol: relative change of V in a sweep at which they end.
        max_iter: most sweeps.
        check: raise SolveError for problems that did not converge, where the framework allows it.
    """

    solver: FixedPointSolver = Picard()
    tol: float = 1e-6
    max_iter: int = 1000
    check: bool = False

    in_numpy = False

    @property
    def input_ndims(self) -> tuple[int, ...]:
        return (2, 2, 1)

    def output_shapes(self, shapes):
        batch, size, k = shapes[1]
        floats = [((batch, size, k), "float"), ((batch, size), "float"), ((batch,), "float")]
        return [*floats, ((batch,), "int"), ((batch,), "int")]

    def __call__(self, ops: MatrixFreeOps, C: Array, start: Array, free: Array) -> list[Array]:
        # A proximal term, which moves no fixed point, but keeps a vector that nothing pulls where it is.
        size = ops.sum(abs(C), -1)
        proximal = ops.where(size > 0, 8 * ops.eps(C) * size, 1.0)
        rows = _rows(ops, C - proximal[..., None] * ops.eye(C.shape[-1], C))
        free_blocks = _blocks(ops, free[..., None])

        def step(p, old):
            free, stay = list(free_blocks[p]), list(-free_blocks[p] * old)
            return lambda i, h: ops.multiply_add(stay[i], h, free[i] / ops.norm(h)[..., None])

        nothing = ops.full((start.shape[1] + BLOCK, 1, 1, 1), 0.0, C)
        sweep = lambda X: _sweep(ops, rows, nothing, X, step)
        solution = _iterate(ops, self, sweep, start)
        if self.check:
            ops.on_host(check, solution.status, solution.residual)
        g = C @ solution.z
        multipliers = free * ops.norm(g)
        return [solution.z, multipliers, solution.residual, solution.status, solution.iterations]


@dataclass(frozen=True)
class MixingAdjoint:
    """The linear equations with the derivative of the conditions at a solution, as a leaf.

        sum_j C_ij w_j + lambda_i w_i + v_i mu_i = a_i,     v_i'w_i = b_i         for free i
        w_i = a_i,                                          mu_i = b_i            for the others

    where C_ij counts between free i and j only. With w_i = u_i + b_i v_i and P_i = I - v_i v_i' the sweeps
    are u_i <- P_i (a_i - sum_j C_ij (u_j + b_j v_j)) / lambda_i. The equations are singular along the common
    rotations of all vectors that no fixed one notices; for right-hand sides that do not either, sweeps
    converge.

    (a, b) and (w, mu) are arrays (B, N, k + 1), the root (V, lambda) likewise, with zeros where i
    is not free.
    """

    settings: Mixing

    in_numpy = False

    @property
    def input_ndims(self) -> tuple[int, ...]:
        return (2, 2, 2, 1)

    def output_shapes(self, shapes):
        return [(tuple(shapes[0]), "float"), ((shapes[0][0],), "float"), ((shapes[0][0],), "int")]

    def __call__(self, ops: MatrixFreeOps, rhs: Array, C: Array, root: Array, free: Array) -> list[Array]:
        free = free[..., None]
        (a, b), (V, multipliers) = ((x[..., :-1], x[..., -1:]) for x in (free * rhs, root))
        scale = ops.where(multipliers > 0, free / multipliers, 0.0)
        # A solution of about unit size, since the residual does not tell small ones from zero.
        size = ops.amax(ops.amax(abs(ops.concat([scale * a, b], -1)), -1), -1)[:, None, None]
        size = ops.where(size > 0, size, 1.0)
        a, b = a / size, b / size

        rows, normal = _rows(ops, C), b * V
        V_blocks, scale, target = (_blocks(ops, x) for x in (V, scale, a - C @ normal))

        def step(p, old):
            v, back, factor, stay = map(list, (V_blocks[p], -V_blocks[p], scale[p], -old))

            def change(i, h):
                tangent = ops.multiply_add(h, back[i], ops.sum(v[i] * h, -1, keepdims=True))
                return ops.multiply_add(stay[i], tangent, factor[i])

            return change

        sweep = lambda X: _sweep(ops, rows, target, X, step)
        solution = _iterate(ops, self.settings, sweep, 0 * V)
        w = solution.z + normal
        mu = ops.sum(V * (a - C @ w), -1, keepdims=True) - multipliers * b
        w = ops.where(free > 0, size * ops.concat([w, mu], -1), rhs)
        return [w, solution.residual, solution.status]
