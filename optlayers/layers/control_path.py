"""Paths through observations, which drive controlled differential equations dz = f(t, z) dX.

Observations are (B, N, C) at times (B, N), any of them missing. A path is a cubic on each of its pieces,

    X(t) = a + b d + c d^2 + e d^3,    d = t - t_i.

Pieces have length zero behind the end of a path that is shorter than others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops import Array, MatrixFreeOps
from .ode_continuous import Continuous


@dataclass(frozen=True, eq=False)
class ControlPath:
    """A path X(t) through observations; `control_path` makes one.

    Attributes:
        times: where its pieces meet (B, M); shorter paths repeat their end.
        coefficients: a, b, c and e of each piece (B, M - 1, 4, channels).
        is_single: whether the observations came without a batch axis.
        is_smooth: whether dX/dt is continuous.

    Example:
        >>> import torch
        >>> from optlayers.torch import control_path
        >>> X = control_path(torch.tensor([0.0, 2.0]), torch.tensor([[1.0], [5.0]]), "linear")
        >>> X.interval, X.derivative(torch.tensor(1.0))  # of time itself, and of x
        (tensor([0., 2.]), tensor([1., 2.]))
    """

    ops: MatrixFreeOps
    times: Array
    coefficients: Array
    is_single: bool
    is_smooth: bool

    @property
    def channels(self) -> int:
        return self.coefficients.shape[-1]

    @property
    def interval(self) -> Array:
        """Start and end of each path (B, 2), or (2,) without batch axis: times for `odeint`."""
        ends = self.ops.concat([self.times[:, :1], self.times[:, -1:]], 1)
        return ends[0] if self.is_single else ends

    def evaluate(self, t: Array) -> Array:
        """X(t) (B, channels), for one time or one for each path; (channels,) without batch axis."""
        (a, b, c, e), d = self._piece(t)
        return self._shaped(a + d * (b + d * (c + d * e)))

    def derivative(self, t: Array) -> Array:
        """dX/dt (B, channels), from the right where pieces meet; that of the last piece at its end."""
        (_, b, c, e), d = self._piece(t)
        return self._shaped(b + d * (2 * c + 3 * d * e))

    def _shaped(self, x: Array) -> Array:
        return x[0] if self.is_single else x

    def _piece(self, t: Array) -> tuple[list[Array], Array]:
        ops, (batch, pieces, _, channels) = self.ops, self.coefficients.shape
        t = ops.broadcast_to(ops.reshape(ops.cast(t, self.times), (-1,)), (batch,))
        # Of the last time and of those that repeat it, no piece starts.
        starts = (self.times <= t[:, None]) & (self.times < self.times[:, -1:])
        i = ops.maximum(ops.to_int(ops.sum(ops.where(starts, 1, 0), 1)) - 1, 0)[:, None]
        flat = ops.reshape(self.coefficients, (batch, pieces, 4 * channels))
        piece = ops.reshape(ops.take_rows(flat, i), (batch, 4, channels))
        d = t - ops.take_rows(self.times, i)[:, 0]
        return [piece[:, k] for k in range(4)], d[:, None]


def build_path(ops: MatrixFreeOps, t: Array, x: Array, interpolation: str, with_time: bool) -> ControlPath:
    """The path through `x` (B, N, C) at `t` (B, N); either may lack the batch axis."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {sorted(INTERPOLATIONS)}, got {interpolation!r}")
    shape, wanted = tuple(x.shape), ("(B, N, C) or (N, C)", "(B, N) or (N,)")
    if x.ndim not in (2, 3) or tuple(t.shape) not in (shape[:-1], shape[-2:-1]) or shape[-2] < 2:
        raise ValueError(
            f"x and t must have the axes {wanted[0]} and {wanted[1]}, N at least 2; "
            f"got {shape} and {tuple(t.shape)}"
        )
    is_single = x.ndim == 2
    x = x[None] if is_single else x
    t = ops.broadcast_to(ops.cast(t if t.ndim == 2 else t[None], x), x.shape[:2])
    asked = ops.isfinite(t)
    ops.on_host(_check_times, asked, t)
    count = ops.maximum(ops.to_int(ops.sum(ops.where(asked, 1, 0), 1)), 1)
    t = ops.where(asked, t, 0.0)
    is_ordered = ops.all(asked[:, :-1] & (t[:, 1:] > t[:, :-1]) | ~asked[:, 1:], 1)
    t = ops.where(asked, t, ops.take_rows(t, (count - 1)[:, None]))
    observed = ops.isfinite(x) & asked[..., None]
    x = ops.where(observed, x, 0.0)
    if with_time:
        x = ops.concat([t[..., None], x], 2)
        observed = ops.concat([ops.broadcast_to(asked[..., None], (*t.shape, 1)), observed], 2)
    times, coefficients = INTERPOLATIONS[interpolation](ops, t, x, observed)
    coefficients = ops.where(is_ordered[:, None, None, None], coefficients, ops.nan)  # as where t is traced
    return ControlPath(ops, times, coefficients, is_single, interpolation in SMOOTH)


def _check_times(asked: np.ndarray, t: np.ndarray) -> None:
    if (asked[:, 1:] & ~asked[:, :-1]).any() or (t[:, 1:] <= t[:, :-1])[asked[:, 1:]].any():
        raise ValueError("each row of t must ascend strictly, with times that are not finite at its end")


def _neighbours(ops: MatrixFreeOps, observed: Array) -> tuple[Array, Array]:
    """For each entry the last observed one before or at it, and the next one (B, N, C); -1 and N if none."""
    size = observed.shape[1]
    index = ops.constant(np.arange(size)[None, :, None], observed)
    before, after = ops.where(observed, index, -1), ops.where(observed, index, size)
    step = 1
    while step < size:  # running maximum and minimum, by doubling
        before = ops.concat([before[:, :step], ops.maximum(before[:, step:], before[:, :-step])], 1)
        after = ops.concat([ops.minimum(after[:, :-step], after[:, step:]), after[:, -step:]], 1)
        step *= 2
    return before, after


def _filled(ops: MatrixFreeOps, t: Array, x: Array, observed: Array) -> Array:
    """`x` with what is missing on straight lines between neighbours, constant before and behind them."""
    before, after = _neighbours(ops, observed)
    size = x.shape[1]
    i = ops.where(before < 0, ops.minimum(after, size - 1), before)
    j = ops.where(after >= size, i, after)
    ti, tj, xi, xj = _at(ops, t, i), _at(ops, t, j), _along(ops, x, i), _along(ops, x, j)
    weight = (t[..., None] - ti) / ops.where(tj > ti, tj - ti, 1.0)
    return xi + ops.where(tj > ti, weight, 0.0) * (xj - xi)


def _along(ops: MatrixFreeOps, x: Array, i: Array) -> Array:
    """x[b, i[b, n, c], c]."""
    batch, size, channels = x.shape
    columns = lambda x: ops.reshape(x.mT, (batch * channels, size))
    return ops.reshape(ops.take_rows(columns(x), columns(i)), (batch, channels, size)).mT


def _at(ops: MatrixFreeOps, t: Array, i: Array) -> Array:
    return _along(ops, ops.broadcast_to(t[..., None], i.shape), i)


def _lengths(ops: MatrixFreeOps, t: Array) -> Array:
    """Lengths of the pieces (B, N - 1, 1), with 1 for zero."""
    length = (t[:, 1:] - t[:, :-1])[..., None]
    return ops.where(length > 0, length, 1.0)


def linear(ops: MatrixFreeOps, t: Array, x: Array, observed: Array) -> tuple[Array, Array]:
    x = _filled(ops, t, x, observed)
    length = _lengths(ops, t)
    slope = (x[:, 1:] - x[:, :-1]) / length
    return t, ops.stack([x[:, :-1], slope, 0 * slope, 0 * slope], 2)


def rectilinear(ops: MatrixFreeOps, t: Array, x: Array, observed: Array) -> tuple[Array, Array]:
    """Causal: between t_i and the middle of the piece, time alone moves on; then the values follow.

    Values hold from one observation to the next, and are zero before the first.
    """
    before, _ = _neighbours(ops, observed)
    held = ops.where(before < 0, 0.0, _along(ops, x, ops.maximum(before, 0)))
    is_time = ops.constant((np.arange(x.shape[2]) == 0)[None, None] * 1.0, x)
    moved = is_time * held[:, 1:] + (1 - is_time) * held[:, :-1]
    middle = (t[:, 1:] + t[:, :-1]) / 2
    shape = (t.shape[0], 2 * t.shape[1] - 2)
    times = ops.concat([ops.reshape(ops.stack([t[:, :-1], middle], 2), shape), t[:, -1:]], 1)
    points = ops.reshape(ops.stack([held[:, :-1], moved], 2), (*shape, x.shape[2]))
    points = ops.concat([points, held[:, -1:]], 1)
    return linear(ops, times, points, ops.isfinite(points))


def hermite(ops: MatrixFreeOps, t: Array, x: Array, observed: Array) -> tuple[Array, Array]:
    """Cubic Hermite with backward differences (Morrill et al. 2021): causal but for the piece itself."""
    x = _filled(ops, t, x, observed)
    length = _lengths(ops, t)
    slope = (x[:, 1:] - x[:, :-1]) / length
    start = ops.concat([slope[:, :1], slope[:, :-1]], 1)
    return t, ops.stack([x[:, :-1], start, 2 * (slope - start) / length, (start - slope) / length**2], 2)


def natural(ops: MatrixFreeOps, t: Array, x: Array, observed: Array) -> tuple[Array, Array]:
    """The natural cubic spline through what is observed of each channel, constant before and behind that."""
    (batch, size, channels), before = x.shape, _neighbours(ops, observed)[0]
    columns = lambda x: ops.reshape(x.mT, (batch * channels, size))
    knots, x, observed, before = map(
        columns, (ops.broadcast_to(t[..., None], before.shape), x, observed, before)
    )
    # Observed entries come first; the spline repeats the last of them up to the end.
    index = ops.constant(np.arange(size)[None], observed)
    order = ops.argsort(ops.where(observed, index, index + size))
    last = ops.maximum(ops.to_int(ops.sum(ops.where(observed, 1, 0), 1))[:, None] - 1, 0)
    place = ops.take_rows(order, ops.minimum(index, last))
    starts, values = ops.take_rows(knots, place), ops.take_rows(x, place)
    spline = (values, *_natural_spline(ops, starts, values, last))

    k = ops.take_rows(ops.argsort(order), ops.maximum(before, 0))[:, :-1]
    inside = ops.cast((before[:, :-1] >= 0) & (k < last), x)
    d = inside * (knots[:, :-1] - ops.take_rows(starts, k))
    a, b, c, e = (ops.take_rows(ops.concat([z, z[:, -1:]], 1)[:, :size], k) for z in spline)
    a, b, c, e = a + d * (b + d * (c + d * e)), b + d * (2 * c + 3 * d * e), c + 3 * d * e, e
    pieces = (a, *(inside * z for z in (b, c, e)))
    return t, ops.stack([ops.reshape(z, (batch, channels, size - 1)).mT for z in pieces], 2)


def _natural_spline(ops: MatrixFreeOps, t: Array, x: Array, last: Array) -> tuple[Array, Array, Array]:
    """Coefficients b, c and e (R, N - 1) of splines (R, N) that end at entry `last` (R, 1).

    The second derivatives M solve h_{i-1} M_{i-1} + 2 (h_{i-1} + h_i) M_i + h_i M_{i+1} = 6 (s_i - s_{i-1}),
    with s the slopes of the chords, and M = 0 at both ends: by cyclic reduction, in log2(N) passes.
    """
    size = t.shape[1]
    h = t[:, 1:] - t[:, :-1]
    h = ops.where(h > 0, h, 1.0)
    s = (x[:, 1:] - x[:, :-1]) / h
    index = ops.constant(np.arange(size)[None], last)
    inner = ops.cast((index > 0) & (index < last), x)
    pad = lambda z, front, back, value=0.0: ops.concat(
        [ops.full((z.shape[0], front), value, z), z, ops.full((z.shape[0], back), value, z)], 1
    )
    lower, upper = inner * pad(h, 1, 0), inner * pad(h, 0, 1)
    M, diagonal = inner * 6 * (pad(s, 0, 1) - pad(s, 1, 0)), 2 * (lower + upper) + (1 - inner)
    step = 1
    while step < size:
        earlier = lambda z, value=0.0, step=step: pad(z[:, :-step], step, 0, value)
        later = lambda z, value=0.0, step=step: pad(z[:, step:], 0, step, value)
        p, q = lower / earlier(diagonal, 1.0), upper / later(diagonal, 1.0)
        M = M - p * earlier(M) - q * later(M)
        diagonal = diagonal - p * earlier(upper) - q * later(lower)
        lower, upper = -p * earlier(lower), -q * later(upper)
        step *= 2
    M = M / diagonal
    return s - h * (2 * M[:, :-1] + M[:, 1:]) / 6, M[:, :-1] / 2, (M[:, 1:] - M[:, :-1]) / (6 * h)


INTERPOLATIONS = {
    "linear": linear,
    "rectilinear": rectilinear,
    "hermite": hermite,
    "natural": natural,
}
SMOOTH = ("hermite", "natural")


def controlled_field(f: Any, path: ControlPath) -> Any:
    """(t, z) to f(t, z) dX/dt, for f with values (..., k, channels)."""

    def field(t, z):
        matrix, rate = f(t, z), path.derivative(t)
        wanted = (*z.shape, path.channels)
        if tuple(matrix.shape) != wanted:
            raise ValueError(f"f(t, z) must have the axes {wanted} of z and dX, got {tuple(matrix.shape)}")
        return (matrix @ rate[..., None])[..., 0]

    return field


def stopped_at_knots(path: ControlPath, t: Array | None, stay: Callable, options: dict) -> dict:
    """The options of `odeint`, so that steps end where dX/dt jumps: there each state jumps to itself, by
    `stay`.

    Step sizes that were given are kept, as are jumps; steps that a batch shares would end at all its knots.
    """
    is_shared = t is not None and t.ndim == 1 and not path.is_single
    is_decided = options.get("step_size") is not None or options.get("jumps") is not None
    if path.is_smooth or is_shared or is_decided or isinstance(options.get("adjoint"), Continuous):
        return options
    times, start, end = path.times, path.times[:, :1], path.times[:, -1:]
    jumps = [times, (times > start) & (times < end)]
    times, inside = (x[0] for x in jumps) if path.is_single else jumps
    return options | {"jumps": (times, stay, inside)}


def control_path_doc():
    """A path X(t) through observations x at times t, to drive `cdeint`.

    What is missing is no obstacle: entries of x that are NaN, a channel that is never observed (it stays
    zero), and shorter samples, padded with NaN in t or in x.

    Args:
        t: times (N,) or (B, N), ascending; NaN behind the last one of a sample.
        x: observations (N, C) or (B, N, C), NaN where there is none.
        interpolation: "hermite", smooth, of backward differences, with which the path up to a time depends
            only on what was observed until the next; "natural", the smoothest cubic spline; "linear";
            "rectilinear", which depends on the past only: between two times, time moves on first and then
            values follow.
        with_time: let time be the first channel of X, without which the solution does not feel how fast x
            was observed.

    Returns:
        A `ControlPath`: X.evaluate(t), X.derivative(t), and X.interval, from the first to the last time of
        each sample.
    """


def cdeint_doc():
    """The solution z(t) of the controlled differential equation dz = f(t, z) dX(t) from z0 (Kidger et al.
    2020).

    Args:
        f: values (B, k, channels), or (k, channels) without batch axis; see below for its arguments.
        z0: start (B, k) or (k,).
        X: a path of `control_path`.
        t: times, as for `odeint`; None takes X.interval, so that z[:, -1] is the end of each sample.

    The other arguments are those of `odeint`. Along "linear" and "rectilinear" paths, whose derivative jumps,
    steps end where pieces meet, as `jumps` that leave the state as it is; but not with jumps or a step size
    of your own, with times (T,) for a batch, or with Continuous().
    """
