"""Power cones {(w, z): prod w_i ** a_i >= |z|, w >= 0}, sum a_i = 1. Symbols: see `optlayers.cones.product`.

The projection of (v, z) has the entries (Hien 2015, Differential properties of Euclidean projection onto
power cone)

    w_i = (v_i + R_i) / 2,     R_i = sqrt(v_i^2 + 4 a_i r p),     sign(z) r,     r + p = |z|,

and r, its distance to the axis, solves sum a_i log w_i = log r. The unknown is e = log(r / p), the root of
a decreasing function. |z| is not taken below eps times the largest entry: at z = 0 the formulas go to their
limits.

Derivatives along (dv, dz). From w_i (w_i - v_i) = a_i r p, with m_i = r a_i / w_i = (w_i - v_i) / p and, for
the changes, dzeta of |z|, dp of p, b = dw / w and h = dr / r,

    c  = sum a_i m_i / R_i,      l = sum a_i w_i / R_i,      q = l + r c,
    h  = (sum a_i dv_i / R_i + c dzeta) / q,
    dp = (l dzeta - r sum a_i dv_i / R_i) / q,
    b  = (dv + m (dp + p h)) / R,

and, differentiating once more,

    d2r / r = (2 c h dp - 2 sum a_i / R_i b_i (dw_i - dv_i) - sum a_i b_i^2 + h^2) / q,
    d2w / w = (m ((p - r) d2r / r + 2 h dp) - 2 b (dw - dv)) / R.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np

from .eigenbasis import apply_spectral

# 14 million points, entries from 1e-20 to 1, weights from 1e-4 on: 5e-12 after 13 steps, 9e-16 after 14.
_STEPS = 15


@dataclass(frozen=True)
class Power:
    """Power cones with equally many weights. The linearisation is (v, s, basis, eigenvalues, m, axis).

    v and s = Pi_K(v) are (B, c, d); eigenvectors (B, c, d, d) and eigenvalues (B, c, d) of D; m
    (B, c, d - 1); axis = (r, p) (B, c, 2) relative to the largest entry of v, with r = p = -1 where the
    second derivative is zero.
    """

    weights: tuple[tuple[float, ...], ...]

    @property
    def rows(self) -> int:
        return len(self.weights[0]) + 1

    def shapes(self, count):
        d = self.rows
        return ((count, d), (count, d), (count, d, d), (count, d), (count, d - 1), (count, 2))

    def project(self, ops, v, start=None):
        scale, u = _normalize(ops, v)
        a = self._exponents(ops, v)
        s, _, _ = _point(ops, a, u)
        inside, zero = _regions(ops, a, u, s)
        return ops.where(inside, v, ops.where(zero, 0.0, scale * s))

    def linearize(self, ops, v):
        scale, u = _normalize(ops, v)
        a = self._exponents(ops, v)
        s, m, axis = _point(ops, a, u)
        inside, zero = _regions(ops, a, u, s)
        curved = ~(inside | zero)
        identity = ops.eye(self.rows, v)[None, None]
        columns = [x[..., None, :] for x in (a, u, s, m, axis)]
        D, bend = _expand(ops, *columns, identity)
        D = ops.where(curved[..., None], (D + D.mT) / 2, ops.cast(inside, v)[..., None] * identity)
        # LAPACK may fail on denormal entries; rounding at extreme ratios may leave [-1, 1].
        D = ops.where(abs(D) < ops.eps(v) ** 2, 0.0, ops.minimum(ops.maximum(D, -1.0), 1.0))
        eigenvalues, basis = ops.eigh(D)
        eigenvalues = ops.minimum(ops.maximum(eigenvalues, 0.0), 1.0)
        s = ops.where(inside, v, ops.where(zero, 0.0, scale * s))
        # Beyond this curvature the projection has a kink to working precision.
        bend = ops.amax(ops.amax(abs(bend), axis=-1), axis=-1, keepdims=True)
        axis = ops.where(curved & (bend < ops.eps(v) ** -0.5), axis, -1.0)
        return v, s, basis, eigenvalues, m, axis

    def spectral(self, ops, lin, g, u, rotated):
        _, _, basis, eigenvalues, _, _ = lin
        return apply_spectral(ops, basis, eigenvalues, g, u, rotated)

    def project_linearized(self, ops, lin, v, order):
        """The Taylor polynomial: short, and as differentiable as any other polynomial."""
        v0, s, basis, eigenvalues, m, axis = lin
        if order == 0:
            return s
        E = v - v0
        change = (basis @ (eigenvalues * (E[..., None, :] @ basis)[..., 0, :])[..., None])[..., 0]
        if order > 1:
            curved = axis[..., :1] >= 0
            scale, u = _normalize(ops, v0)
            # The branch that `where` discards is differentiated too and must be finite.
            point = [ops.where(curved, x, 1.0) for x in (u, s / scale, m, axis)]
            second = _expand(ops, self._exponents(ops, v), *point, E / scale)[1]
            change = change + ops.where(curved, scale * second / 2, 0.0)
        return s + change

    def _exponents(self, ops, like):
        return ops.constant(np.array(self.weights)[None], like)


def _normalize(ops, v):
    """The largest entry (B, c, 1), and the points divided by it."""
    scale = ops.amax(abs(v), axis=-1, keepdims=True)
    scale = ops.where(scale > 0, scale, 1.0)
    return scale, v / scale


def _regions(ops, a, u, s):
    """Where the projection is the point itself, and where it is zero: (B, c, 1)."""
    v, size = u[..., :-1], ops.log(abs(u[..., -1:]))
    logs = ops.sum(a * ops.log(abs(v)), axis=-1, keepdims=True)
    inside = ops.all(v > 0, axis=-1)[..., None] & (logs > size)
    entropy = ops.sum(a * ops.log(a), axis=-1, keepdims=True)
    polar = ops.all(v <= 0, axis=-1)[..., None] & (logs - entropy >= size)
    # Next to the polar cone s is zero to working precision, and its derivative a ratio of underflows.
    polar = polar | (ops.amax(abs(s), axis=-1, keepdims=True) < ops.eps(u) ** 2)
    return inside, polar & ~inside


def _shares(ops, e):
    """r / |z| and p / |z| for e = log(r / p)."""
    small = ops.exp(-abs(e))
    large = 1 / (1 + small)
    return ops.where(e > 0, large, small * large), ops.where(e > 0, small * large, large)


def _roots(ops, a, v, zeta, r, p):
    """R, from the shares r and p of |z| = zeta."""
    # The product r p alone may underflow.
    t = 2 * zeta * ops.sqrt(a * r * p)
    return ops.maximum(ops.sqrt(v * v + t * t), t), t


def _point(ops, a, u):
    """The point s of the curved surface, m, and axis = (r, p), of normalised points u (B, c, d)."""
    v, z = u[..., :-1], u[..., -1:]
    zeta = ops.maximum(abs(z), ops.eps(u))
    r, p = _shares(ops, _root(ops, a, v, zeta))
    R, t = _roots(ops, a, v, zeta, r, p)
    tiny = ops.eps(u) ** 4
    w = ops.where(v > 0, (v + R) / 2, t / ops.maximum(R + abs(v), tiny) * t / 2)
    axis = ops.concat([zeta * r, ops.maximum(zeta * p, tiny)], axis=-1)
    m = ops.where(v > 0, a * axis[..., :1] / ops.maximum(w, tiny), (w - v) / axis[..., 1:])
    return ops.concat([w, z * r], axis=-1), m, axis


def _root(ops, a, v, zeta):
    """e = log(r / p) by a fixed number of steps: bisection to a width of 2, then Newton's method.

    Inside, the d - 1 entries of a cone are the second axis: broadcasting along a short last axis is slow.
    Newton's method is applied with r / (r + p) as the unknown, in which the equation is nearly linear when
    it saturates, next to the cone and to its polar; else with e. Bisection is in log(1 + |e|).
    """
    limit = -5 * log(ops.eps(v))
    a, v, zeta = (ops.stack([x[..., i] for i in range(x.shape[-1])], axis=-2) for x in (a, v, zeta))

    def step(state):
        low, high, e = state
        r, p = _shares(ops, e)
        R, t = _roots(ops, a, v, zeta, r, p)
        size = abs(v) + R
        log_r, log_p = ops.log(zeta) + ops.log(r), ops.log(p)
        log_w = ops.where(v > 0, ops.log(size / 2), ops.log(2 * a * zeta / size) + log_r + log_p)
        F = ops.sum(a * log_w, axis=-2, keepdims=True) - log_r
        share = ops.where(v > 0, t / size * t, size) / (2 * R)
        dF = ops.sum(a * share, axis=-2, keepdims=True) * (p - r) - p
        low, high = ops.where(F > 0, e, low), ops.where(F > 0, high, e)
        return low, high, _next(ops, low, high, e, -F / dF, r, p)

    bound = limit + 0.0 * zeta
    return ops.repeat(_STEPS, step, (-bound, bound, 0.0 * zeta))[2].mT


def _next(ops, low, high, e, newton, r, p):
    """The next iterate of `_root`, in [low, high]."""
    factor = (1 + p * newton) / (1 - r * newton)
    valid = (1 + p * newton > 0) & (1 - r * newton > 0)
    share_step = e + ops.log(ops.where(valid, factor, 1.0))
    valid = valid & (share_step >= low) & (share_step <= high)
    e_step = e + newton
    middle = ops.sqrt((1 + abs(low)) * (1 + abs(high))) - 1
    middle = ops.where(high > 0, middle, -middle)
    e_step = ops.where((e_step >= low) & (e_step <= high), e_step, middle)
    e = ops.where(high - low < 2, ops.where(valid, share_step, e_step), middle)
    return ops.where(ops.isfinite(e), e, middle)


def _expand(ops, a, v, s, m, axis, E):
    """First and second derivative of the point s along E, by the formulas of the module."""
    w, r, p = s[..., :-1], axis[..., :1], axis[..., 1:]
    v, sign = v[..., :-1], ops.where(v[..., -1:] < 0, -1.0, 0.0 * r + 1.0)
    dv, dzeta = E[..., :-1], sign * E[..., -1:]

    def total(x):
        return ops.sum(x, axis=-1, keepdims=True)

    scaled = a / ops.maximum(2 * w - v, ops.eps(v) ** 2)
    c, lean, sigma = total(scaled * m), total(scaled * w), total(scaled * dv)
    q = lean + r * c
    h, dp = (sigma + c * dzeta) / q, (lean * dzeta - r * sigma) / q
    b = scaled / a * (dv + m * (dp + p * h))
    dw = w * b
    first = ops.concat([dw, sign * r * h], axis=-1)
    h2 = (2 * c * (h * dp) - total(2 * scaled * b * (dw - dv) + a * b * b) + h * h) / q
    b2 = scaled / a * (m * ((p - r) * h2 + 2 * h * dp) - 2 * b * (dw - dv))
    return first, ops.concat([w * b2, sign * r * h2], axis=-1)
