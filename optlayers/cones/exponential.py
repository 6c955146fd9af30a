"""The exponential cone closure {(x, y, z): y exp(x / y) <= z, y > 0}. Symbols: see `optlayers.cones.product`.

Outside the cone, its polar and its flat face, the projection is a point of the ray s = y (r, 1, exp(r)) whose
r is the root of an increasing function (Friberg 2023, Projection onto the exponential cone: a univariate
root-finding problem):

    h(r) = sigma(r) exp(r) - mu(r) exp(-r) - z,
    sigma(r) = ((r - 1) x + y) / (r^2 - r + 1),     mu(r) = (x - r y) / (r^2 - r + 1),

with sigma, mu > 0 on the interval that is searched. There s = sigma (r, 1, exp(r)).

Derivatives. Write the cone as f(s) = y exp(x / y) - z <= 0, n for the unit normal at s, delta = |s - v| and
t = n x s / |s|, so that (n, s / |s|, t) is an orthonormal basis. The Hessian of f is rank one and its vector
(1, -r, 0) is a combination of n and t, so that the optimality system s - v + m grad f(s) = 0, f(s) = 0 is
solved by hand:

    D = s s' / |s|^2 + theta t t',      theta = 1 / (1 + kappa delta),

with kappa the curvature of the cone across the ray. In the same way, the second derivative along E, twice, is

    k E_t (-E_t n + a E_t s / |s| + (g E_t + 2 a E_s - 2 E_n) t),     k = kappa theta^2, a = delta / |s|.

Since exp(|r|) may overflow, rays are scaled by exp(-|r|): (c, d) = (1, exp(-r)) for r > 0, else (exp(r), 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from .eigenbasis import apply_spectral

# 8 million points with entries from 1e-16 to 1e16 of one another: 9e-12 after 8 steps, 7e-16 after 9.
_STEPS = 2, 7
# From the root of another point. Three calls in a row leave 7e-11, however far that was; without the first of
# these steps one point in 500 would keep an error of a tenth for a while.
_STEPS_FROM_NEAR = 1, 3


@dataclass(frozen=True)
class Exponential:
    """Exponential cones. The linearisation is (v, s, basis, eigenvalues, curvature).

    v and s = Pi_K(v) (B, c, 3); n, s / |s| and t in the columns of the basis (B, c, 3, 3); the eigenvalues
    (B, c, 3); k, a and g of the second derivative (B, c, 3).
    """

    @property
    def rows(self) -> int:
        return 3

    def shapes(self, count):
        return ((count, 3), (count, 3), (count, 3, 3), (count, 3), (count, 3))

    def project(self, ops, v, start=None):
        scale, point = _normalize(ops, v)
        regions = _regions(ops, *point)
        near = None
        if start is not None:
            x, y = start[..., 0], start[..., 1]
            near = x / ops.where(y > 0, y, ops.inf)
        ray, _ = _ray(ops, _root(ops, *point, near), *point)
        return _select_point(ops, regions, v, scale, point, ray)

    def linearize(self, ops, v):
        scale, (x, y, z) = _normalize(ops, v)
        regions = inside, zero, flat = _regions(ops, x, y, z)
        r = _root(ops, x, y, z)
        ray, delta = _ray(ops, r, x, y, z)
        basis, theta, k, a, g = _spectrum(ops, r, ray, delta)
        smooth = ~(inside | zero | flat)
        s = _select_point(ops, regions, v, scale, (x, y, z), ray)
        basis = ops.where(smooth[..., None, None], basis, ops.eye(3, v)[None, None])
        unit = [ops.cast(inside | (flat & free), v) for free in (x < 0, y > 0, z > 0)]
        curved = [0.0 * theta, 0.0 * theta + 1.0, theta]
        eigenvalues = ops.stack([ops.where(smooth, c, u) for c, u in zip(curved, unit, strict=True)], axis=-1)
        # Beyond this curvature the projection has a kink to working precision.
        regular = smooth & (k * (1 + a + abs(g)) < ops.eps(v) ** -0.5)
        curvature = [ops.where(regular, c, 0.0) for c in (k / scale[..., 0], a, g)]
        return v, s, basis, eigenvalues, ops.stack(curvature, axis=-1)

    def spectral(self, ops, lin, g, u, rotated):
        _, _, basis, eigenvalues, _ = lin
        return apply_spectral(ops, basis, eigenvalues, g, u, rotated)

    def project_linearized(self, ops, lin, v, order):
        """The Taylor polynomial: short, and as differentiable as any other polynomial."""
        v0, s, basis, eigenvalues, curvature = lin
        if order == 0:
            return s
        E = ((v - v0)[..., None, :] @ basis)[..., 0, :]
        change = eigenvalues * E
        if order > 1:
            k, a, g = (curvature[..., i] for i in range(3))
            n, along, t = (E[..., i] for i in range(3))
            second = [-t * t, a * t * t, t * (g * t + 2 * a * along - 2 * n)]
            change = change + k[..., None] / 2 * ops.stack(second, axis=-1)
        return s + (basis @ change[..., None])[..., 0]


def _limit(ops, x) -> float:
    """Ratios r beyond +-limit are those of a face to working precision; exp(2 limit) does not overflow."""
    return -2.5 * log(ops.eps(x))


def _normalize(ops, v):
    """The largest entry (B, c, 1) and the three coordinates (B, c) divided by it."""
    scale = ops.amax(abs(v), axis=-1, keepdims=True)
    scale = ops.where(scale > 0, scale, 1.0)
    v = v / scale
    return scale, (v[..., 0], v[..., 1], v[..., 2])


def _regions(ops, x, y, z):
    """Where the projection is v, where zero, and where it lies on the flat face or one of its edges."""
    limit = _limit(ops, x)
    positive = ops.where(y > 0, y, 1.0)
    inside = (y > 0) & (z > positive * ops.exp(x / positive))
    positive = ops.where(x > 0, x, 1.0)
    zero = (x > 0) & (-z >= positive * ops.exp(y / positive - 1))
    flat = (x <= -limit * ops.maximum(y, 0.0)) | ((x > 0) & (y < -limit * x))
    return inside, zero & ~inside, flat & ~inside & ~zero


def _select_point(ops, regions, v, scale, point, ray):
    """Pi_K(v) from its regions; `point` is v and `ray` the point of the curved surface, both normalised."""
    inside, zero, flat = regions
    x, y, z = point
    face = ops.minimum(x, 0.0), ops.maximum(y, 0.0), ops.maximum(z, 0.0)
    s = [ops.where(zero, 0.0, ops.where(flat, *pair)) for pair in zip(face, ray, strict=True)]
    return ops.where(inside[..., None], v, scale * ops.stack(s, axis=-1))


def _ray(ops, r, x, y, z):
    """The point s = y (r, 1, exp(r)) for the root r, and its distance delta to v."""
    E = ops.exp(-abs(r))
    size = r * (r - 1) + 1
    sigma = ops.maximum(((r - 1) * x + y) / size, 0.0)
    mu = ops.maximum((x - r * y) / size, 0.0)
    # The formula without cancellation depends on the sign of r.
    up = r > 0
    sz = ops.where(up, ops.maximum(z + mu * E, 0.0), sigma * E)
    sy = ops.where(up, sz * E, sigma)
    dual = ops.where(up, mu, ops.maximum(sigma * E - z, 0.0))
    c, d = ops.where(up, 1.0, E), ops.where(up, E, 1.0)
    return (r * sy, sy, sz), dual * ops.sqrt(c * c * (1 + (1 - r) * (1 - r)) + d * d)


def _spectrum(ops, r, s, delta):
    """Basis, theta, k, a and g of the module's formulas."""
    E = ops.exp(-abs(r))
    up = r > 0
    c, d = ops.where(up, 1.0, E), ops.where(up, E, 1.0)
    size = r * (r - 1) + 1
    N = ops.sqrt(c * c * (1 + (1 - r) * (1 - r)) + d * d)
    L = ops.sqrt(d * d * (r * r + 1) + c * c)
    tiny = ops.eps(r) ** 4
    y = ops.maximum(s[1], tiny)
    length = ops.maximum(ops.where(up, s[2], s[1]) * L, tiny)
    kappa = c * L * L / (y * N * N * N)
    theta = 1 / (1 + kappa * delta)
    n = [c / N, c * (1 - r) / N, -d / N]
    along = [d * r / L, d / L, c / L]
    t = [((1 - r) * c * c + d * d) / (N * L), -(r * d * d + c * c) / (N * L), c * d * size / (N * L)]
    rows = [ops.stack(row, axis=-1) for row in zip(n, along, t, strict=True)]
    g = theta * delta / y * (3 * c * c * size * L / (N * N * N) + 3 * t[1] - L / N)
    return ops.stack(rows, axis=-2), theta, kappa * theta * theta, delta / length, g


def _bracket(ops, x, y, z):
    """An interval that holds the root: sigma, mu > 0, sigma exp(r) >= z and mu exp(-r) >= -z."""
    limit = _limit(ops, x)
    q = 2 * ops.sqrt(x * x - x * y + y * y)

    def largest(b, x):
        """Maximum over r of sigma or mu, (b + q) / 3, written without cancellation."""
        return ops.where(b > 0, (b + q) / 3, x * x / ops.where(b > 0, 1.0, q - b))

    low = ops.where(x > 0, 1 - y / ops.where(x > 0, x, 1.0), -limit)
    high = ops.where(y > 0, x / ops.where(y > 0, y, 1.0), limit)
    low = ops.where(z > 0, ops.maximum(low, ops.log(abs(z) / largest(2 * y - x, x))), low)
    high = ops.where(z < 0, ops.minimum(high, -ops.log(abs(z) / largest(2 * x - y, y))), high)
    return [ops.minimum(ops.maximum(r, -limit), limit) for r in (low, high)]


def _root(ops, x, y, z, near=None):
    """The root r of h by a fixed number of safeguarded Newton steps, of fewer from one that is `near`.

    Far from the root, where exp(r) is off by more than a factor e, a step of Newton's method on
    F(r) = r - log T(r) is better: T is the root of sigma T - mu / T = z, so that F has the sign of h and is
    nearly linear. At the ends of the bracket F has logarithmic singularities while h is nearly linear, hence
    the longer of the two steps is taken, and that on h where it is short. A step of F beyond an end tries the
    point at distance 1 from it. After two such steps Newton's method on h alone, at a third of the cost, is
    as fast. In place of h stands (r^2 - r + 1) h, of the same sign, which takes fewer operations.
    """
    low, high = _bracket(ops, x, y, z)

    def step(state, is_far):
        low, high, r = state
        size, slope = r * (r - 1) + 1, 2 * r - 1
        a, b = (r - 1) * x + y, x - r * y  # sigma and mu times size
        up = ops.exp(r)
        down = 1 / up
        h = a * up - b * down - z * size
        near = r - h / ((a + x) * up + (b + y) * down - z * slope)
        low, high = ops.where(h < 0, r, low), ops.where(h < 0, high, r)
        new = ops.minimum(ops.maximum(near, low), high)
        if is_far:
            sigma, mu = a / size, b / size
            dsigma, dmu = (x - slope * sigma) / size, (-y - slope * mu) / size
            sigma, mu = ops.maximum(sigma, 0.0), ops.maximum(mu, 0.0)
            root = ops.sqrt(z * z + 4 * sigma * mu)
            T = ops.where(z >= 0, (abs(z) + root) / (2 * sigma), 2 * mu / (abs(z) + root))
            F = r - ops.log(T)
            far = r - F / (1 - (dmu / T - dsigma * T) / root)
            new = _farther(ops, low, high, r, F, far, near, new)
        return low, high, ops.where(ops.isfinite(new), new, (low + high) / 2)

    if near is None:
        middle = (low + high) / 2
        start = ops.where(low > -_limit(ops, x), ops.minimum(low + 1, middle), ops.maximum(high - 1, middle))
    else:
        start = ops.minimum(ops.maximum(near, low), high)
    state = low, high, start
    for count, is_far in zip(_STEPS if near is None else _STEPS_FROM_NEAR, (True, False), strict=True):
        state = ops.repeat(count, lambda state, is_far=is_far: step(state, is_far), state)
    return state[2]


def _farther(ops, low, high, r, F, far, near, inner):
    """The next iterate of `_root` from those of Newton on F and h; `inner` is the latter in [low, high]."""
    allowed = (far > low) & (far < high)
    longer = ~((near > low) & (near < high) & (abs(near - r) > abs(far - r)))
    probe = ops.where(F < 0, high - 1, low + 1)
    beyond = ops.where(~allowed & (high - low > 2), probe, inner)
    is_far = (abs(F) > 1) & (abs(inner - r) > 0.3)
    return ops.where(is_far, ops.where(allowed & longer, far, beyond), inner)
