"""Small quadratic programs on a GPU: the whole solution of one in one program of a single Triton kernel.

What `optlayers.layers.conic.ConicSolve` does in a thousand launches for a batch: equilibration, iterations of
ADMM, Newton's steps on the active set, the factor for the derivative and the test of regularity, by the same
formulas. Matrices stay in registers. A program that it does not solve, for whatever reason, is left to the
operations that it stands for, which also find the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numpy import batch_of


@triton.jit
def _entry(x, index, at):
    """x[at] of a vector, or row `at` of a symmetric matrix."""
    return tl.sum(tl.where(index == at, x, 0.0), 0)


@triton.jit
def _times(A, x):
    return tl.sum(A * x[None, :], 1)


@triton.jit
def _transposed_times(A, y):
    return tl.sum(A * y[:, None], 0)


@triton.jit
def _inverse(S, j, n):
    """The inverse of a symmetric matrix, by n sweeps, and the least pivot: positive if it is definite."""
    least = tl.max(tl.abs(S))
    for k in range(n):
        row = _entry(S, j[:, None], k)
        pivot = _entry(row, j, k)
        least = tl.minimum(least, pivot)
        scaled = row / pivot
        swept = S - row[:, None] * scaled[None, :]
        swept = tl.where(j[:, None] == k, scaled[None, :], swept)
        swept = tl.where(j[None, :] == k, scaled[:, None], swept)
        S = tl.where((j[:, None] == k) & (j[None, :] == k), -1 / pivot, swept)
    return -S, least


@triton.jit
def _cholesky(S, j, n):
    L = 0.0 * S
    for k in range(n):
        row = _entry(S, j[:, None], k)
        column = tl.where(j >= k, row / tl.sqrt(_entry(row, j, k)), 0.0)
        L = tl.where(j[None, :] == k, column[:, None], L)
        S = S - column[:, None] * column[None, :]
    return L


@triton.jit
def _add_gram(S, A, weights, i, m):
    """S + A' diag(weights) A."""
    for k in range(m):
        row = _entry(A, i[:, None], k)
        S = S + _entry(weights, i, k) * row[:, None] * row[None, :]
    return S


@triton.jit
def _fourth_root(x):
    return tl.sqrt(tl.sqrt(x))


@triton.jit
def _largest(x):
    return tl.max(tl.abs(x))


@triton.jit
def _solve(A, Hinv, T, F1, F2):
    """(dx, dv) with J (dx, dv) = -F up to the regularisation: `optlayers.linalg.kkt.inverse`."""
    dx = _times(Hinv, -F1 - _transposed_times(A, T * F2))
    ds = -F2 - _times(A, dx)
    return dx, ds + T * ds


@triton.jit
def _solve_refined(P, A, Hinv, T, free, F1, F2):
    dx, dv = _solve(A, Hinv, T, F1, F2)
    ds = free * dv
    F1 = F1 + _times(P, dx) + _transposed_times(A, ds - dv)
    F2 = F2 + _times(A, dx) + ds
    ddx, ddv = _solve(A, Hinv, T, F1, F2)
    return dx + ddx, dv + ddv


@triton.jit
def _evaluate(P, A, q, b, l, u, x, v, dual, primal, q_size, b_size, e):
    """F, s, free, lower and the relative residual: `optlayers.solvers.refinement.evaluate`."""
    lower = v <= l
    is_free = (v > l) & (v < u)
    s = tl.where(is_free, v, tl.where(lower, l, u))
    Aty, Ax = _transposed_times(A, s - v), _times(A, x)
    Px = _times(P, x)
    F1, F2 = Px + q + Aty, Ax + s - b
    q_one = tl.where(q_size > 0, tl.minimum(tl.maximum(q_size, 1e-12), 1.0), 1.0)
    b_one = tl.where(b_size > 0, tl.minimum(tl.maximum(b_size, 1e-12), 1.0), 1.0)
    rounding = tl.minimum(5e10 * e * e, 1.0)
    columns = tl.maximum(tl.abs(q), tl.abs(Aty)) + rounding * (_largest(Px) + _largest(s - v))
    rows = tl.maximum(tl.abs(b), tl.abs(Ax)) + rounding * _largest(x)
    dual_error = _largest(F1 * dual / (q_one + columns * dual))
    primal_error = _largest(F2 * primal / (b_one + rows * primal))
    free = tl.where(is_free, 1.0, 0.0).to(x.dtype)
    return F1, F2, s, free, tl.where(lower, 1.0, 0.0).to(x.dtype), tl.maximum(dual_error, primal_error)


@triton.jit(do_not_specialize=["n", "m", "iterations", "rounds", "steps", "passes"])
def _kernel(
    P_in, q_in, A_in, b_in, l_in, u_in, P_stride, q_stride, A_stride, b_stride, l_stride, u_stride,
    settings, probe,
    x_out, s_out, y_out, residual_out, iterations_out, root_x_out, root_v_out,
    D_out, E_out, c_out, L_out, free_out, lower_out,
    n, m, iterations, rounds, steps, passes, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    j, i = tl.arange(0, N), tl.arange(0, M)
    in_x, in_rows = j < n, i < m
    square, wide = in_x[:, None] & in_x[None, :], in_rows[:, None] & in_x[None, :]
    at_square, at_wide = j[:, None] * n + j[None, :], i[:, None] * n + j[None, :]
    P = tl.load(P_in + lane * P_stride + at_square, mask=square, other=0.0)
    A = tl.load(A_in + lane * A_stride + at_wide, mask=wide, other=0.0)
    q = tl.load(q_in + lane * q_stride + j, mask=in_x, other=0.0)
    b = tl.load(b_in + lane * b_stride + i, mask=in_rows, other=0.0)
    # Rows that only fill up are free, columns that only fill up have a one on the diagonal of P.
    l = tl.load(l_in + lane * l_stride + i, mask=in_rows, other=-float("inf"))
    u = tl.load(u_in + lane * u_stride + i, mask=in_rows, other=float("inf"))
    rho, sigma, alpha = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    e, shift = tl.load(settings + 3), tl.load(settings + 4)
    target, accept = tl.load(settings + 5), tl.load(settings + 6)
    unit = tl.where(j[:, None] == j[None, :], 1.0, 0.0).to(P.dtype)
    filling = tl.where(square, 0.0, unit).to(P.dtype)

    # Equilibration: `optlayers.solvers.scaling.equilibrate`.
    P2, A2 = P * P, A * A
    own = tl.sqrt(tl.sum(P2, 1))
    D2 = 1 / tl.where(own > 0, own, 1.0)
    is_defined = (tl.sum(tl.where(A2 > 0, 1, 0), 0) == 1) & (own > 0)
    rows, all_rows = _times(A2, tl.where(is_defined, D2, 0.0)), _times(A2, D2)
    no_row = tl.where(all_rows > 0, 0.0, 1.0).to(P.dtype)
    E = 1 / tl.sqrt(tl.where(rows > 0, rows, all_rows) + no_row)
    columns = own + _transposed_times(A2, E * E)
    no_column = tl.where(columns > 0, 0.0, 1.0).to(P.dtype)
    D = 1 / tl.sqrt(columns + no_column)
    for _pass in range(passes):
        D2, E2 = D * D, E * E
        columns = D2 * (_times(P2, D2) + _transposed_times(A2, E2)) + no_column
        rows = E2 * _times(A2, D2) + no_row
        D, E = D / _fourth_root(columns), E / _fourth_root(rows)
    size = tl.maximum(tl.sum(tl.where(in_x, D * tl.sqrt(_times(P2, D * D)), 0.0)) / n, _largest(D * q))
    c = 1 / tl.where(size > 0, size, 1.0)
    P, A = c * D[:, None] * P * D[None, :], E[:, None] * A * D[None, :]
    q, b, l, u = c * D * q, E * b, E * l, E * u
    largest = tl.max(tl.where(square & (j[:, None] == j[None, :]), tl.abs(P), 0.0))
    inverse, least = _inverse(P + shift * tl.where(largest > 0, largest, 1.0) * unit + filling, j, n)

    # ADMM, `optlayers.solvers.admm`, from x = 0 and v = 0; then Newton's method on the active set,
    # `optlayers.solvers.refinement`; and both again from where ADMM was.
    R = rho * tl.where(l == u, 1000.0, 1.0).to(P.dtype)
    step, pivot = _inverse(_add_gram(P + sigma * unit + filling, A, R, i, m), j, n)
    s = tl.minimum(tl.maximum(0.0 * b, l), u)
    w, x = s - s / R, 0.0 * q
    dual, primal = 1 / (c * D), 1 / E
    q_size, b_size = _largest(q * dual), _largest(b * primal)
    best_x, best_v, best = x, 0.0 * b, float("inf") + 0.0 * c
    turn = 0
    while (turn < rounds) & ~(best <= accept):
        for _iteration in range(iterations):
            x = _times(step, _transposed_times(A, R * (b - (s + s - w))) - q)
            w = w + alpha * (b - _times(A, x) - s)
            s = tl.minimum(tl.maximum(w, l), u)
        v, k = s - R * (s - w), 0
        F1, F2, t, free, lower, error = _evaluate(P, A, q, b, l, u, x, v, dual, primal, q_size, b_size, e)
        while k <= steps:
            better = error < best
            best_x, best_v = tl.where(better, x, best_x), tl.where(better, v, best_v)
            best = tl.where(better, error, best)
            if (best > target) & (k < steps):
                T = (1 - free) / (free + e)
                inverse, pivot = _inverse(_add_gram(P + e * unit + filling, A, T, i, m), j, n)
                dx, dv = _solve_refined(P, A, inverse, T, free, F1, F2)
                x, v, k = x + dx, v + dv, k + 1
                F1, F2, t, free, lower, error = _evaluate(
                    P, A, q, b, l, u, x, v, dual, primal, q_size, b_size, e
                )
            else:
                k = steps + 1
        turn += 1
    x, v = best_x, best_v
    F1, F2, s, free, lower, error = _evaluate(P, A, q, b, l, u, x, v, dual, primal, q_size, b_size, e)

    # The factor, and the probe of `optlayers.linalg.sensitivity`.
    T = (1 - free) / (free + e)
    H = _add_gram(P + e * unit + filling, A, T, i, m)
    inverse, pivot = _inverse(H, j, n)
    dx = tl.load(probe + j, mask=in_x, other=0.0)
    dv = tl.load(probe + n + i, mask=in_rows, other=0.0)
    ds = free * dv
    F1, F2 = _times(P, dx) + _transposed_times(A, ds - dv), _times(A, dx) + ds
    back_x, back_v = _solve_refined(P, A, inverse, T, free, F1, F2)
    irregular = tl.maximum(_largest(back_x + dx), _largest((1 - free) * (back_v + dv)))
    # Rows at a bound without multiplier: `optlayers.linalg.rows.inward`.
    rounding = 100 * e * e * (1 + tl.abs(v))
    is_open = (tl.abs(v - l) <= rounding) != (tl.abs(v - u) <= rounding)
    closed = tl.max(tl.where(is_open, 1, 0)) == 0
    ordered = tl.min(tl.where(l <= u, 1, 0)) > 0
    nothing = tl.sum(0 * x) + tl.sum(0 * v)  # largest entries may leave out NaN
    solved = (error <= accept) & (irregular < e) & closed & (least > 0) & ordered & (nothing == 0)

    vector, row = lane * n + j, lane * m + i
    tl.store(x_out + vector, D * x, mask=in_x)
    tl.store(s_out + row, s / E, mask=in_rows)
    tl.store(y_out + row, (s - v) * E / c, mask=in_rows)
    tl.store(residual_out + lane, error)
    tl.store(iterations_out + lane, tl.where(solved, turn * iterations, 0).to(tl.int64))
    tl.store(root_x_out + vector, x, mask=in_x)
    tl.store(root_v_out + row, v, mask=in_rows)
    tl.store(D_out + vector, D, mask=in_x)
    tl.store(E_out + row, E, mask=in_rows)
    tl.store(c_out + lane, c)
    tl.store(L_out + lane * n * n + at_square, _cholesky(H, j, n), mask=square)
    tl.store(free_out + row, free, mask=in_rows)
    tl.store(lower_out + row, lower, mask=in_rows)


def solve(inputs: Sequence[Tensor], settings: Sequence[float], counts: Sequence[int]) -> list[Tensor]:
    """x, s, y, residual, iterations; x, v, D, E, c, the factor, and free and lower, all with a batch axis.

    Those that are not solved have 0 iterations.

    Args:
        inputs: P, q, A, b, l, u, each with a batch axis or shared.
        settings: rho, sigma, alpha, regularisation, shift of the test for convexity, residuals of the target
            and of a solution.
        counts: iterations of ADMM in a round, rounds, Newton's steps in a round, passes of equilibration.
    """
    _, q, A, *_ = inputs
    m, n = A.shape[-2:]
    batch, is_batched = batch_of(inputs, (2, 1, 2, 1, 1, 1))
    inputs = [x.contiguous() for x in inputs]
    strides = [x.stride(0) if own else 0 for x, own in zip(inputs, is_batched, strict=True)]
    probe = torch.from_numpy(np.random.default_rng(0).standard_normal(n + m)).to(q)
    shapes = (n,), (m,), (m,), (), (), (n,), (m,), (n,), (m,), (1,), (n, n), (m,), (m,)
    outputs = [q.new_empty((batch, *shape)) for shape in shapes]
    outputs[4] = torch.empty(batch, dtype=torch.int64, device=q.device)
    N, M = (max(triton.next_power_of_2(size), 2) for size in (n, m))
    warps = 1 if max(N, M) <= 16 else 4 if max(N, M) <= 32 else 8
    numbers = q.new_tensor(settings), probe
    with torch.cuda.device_of(q):
        _kernel[(batch,)](  # type: ignore[index]
            *inputs, *strides, *numbers, *outputs, n, m, *counts, N=N, M=M, num_warps=warps
        )
    return outputs
