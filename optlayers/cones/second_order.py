"""The second-order cone {(t, w): |w| <= t}. Symbols: see `optlayers.cones.product`.

With r = |w| the projection of (t, w) is itself for t > r, zero for t <= -r, and between them

    (r + t) / 2 * (1, w / r).

Its derivative has the eigenvectors (1, w / r) / sqrt(2) and (1, -w / r) / sqrt(2) with eigenvalues 1 and
0, and the eigenvalue (1 + t / r) / 2 on their complement (Fukushima, Luo and Tseng 2002; Hayashi,
Yamashita and Fukushima 2005).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SecondOrder:
    """Second-order cones of one size.

    The linearisation is (direction, eigenvalues): w / r (B, c, size - 1), zero where w = 0, and the
    eigenvalues (plus, minus, rest) (B, c, 3). Inside the cone they are (1, 1, 1), in its polar (0, 0, 0)
    and between (1, 0, rest), so that they also record the branch.
    """

    size: int

    @property
    def rows(self) -> int:
        return self.size

    def shapes(self, count):
        return ((count, self.size - 1), (count, 3))

    def project(self, ops, v, start=None):
        t, w, r, safe = _parts(ops, v)
        height = ops.maximum((r + t) / 2, 0.0)
        inside = t > r
        return ops.concat([ops.where(inside, t, height), ops.where(inside, 1.0, height / safe) * w], axis=-1)

    def linearize(self, ops, v):
        t, w, r, safe = _parts(ops, v)
        minus = ops.cast(t > r, v)
        plus = ops.cast(t > -r, v)
        rest = ops.where(t > r, 1.0, ops.where(t > -r, (r + t) / (2 * safe), 0.0 * t))
        rest = ops.minimum(ops.maximum(rest, 0.0), 1.0)
        return w / safe, ops.concat([plus, minus, rest], axis=-1)

    def spectral(self, ops, lin, g, u, rotated):
        direction, eigenvalues = lin
        direction = direction[..., None]
        batch, count, _ = eigenvalues.shape
        values = g(ops.reshape(eigenvalues, (batch, count * 3)))
        values = ops.reshape(values, (values.shape[0], count, 3, 1))
        plus, minus, rest = values[:, :, :1], values[:, :, 1:2], values[:, :, 2:]
        t, w = u[:, :, :1], u[:, :, 1:]
        along = direction.mT @ w
        plus = (plus - rest) * (t + along) / 2
        minus = (minus - rest) * (t - along) / 2
        return ops.concat([rest * t + (plus + minus), rest * w + (plus - minus) * direction], axis=-2)

    def project_linearized(self, ops, lin, v, order):
        _, eigenvalues = lin
        plus, minus = eigenvalues[..., :1], eigenvalues[..., 1:2]
        between = (plus - minus) > 0
        t, w = v[..., :1], v[..., 1:]
        scale = ops.stop_gradient(_largest(ops, w))
        u = w / scale
        squared = ops.sum(u * u, axis=-1, keepdims=True)
        # `where` also differentiates the branch it discards: at w = 0, sqrt(0) and 0 / 0 there would
        # turn the gradient into NaN.
        r = scale * ops.sqrt(ops.where(between, squared, 1.0))
        height = (r + t) / 2
        middle = ops.concat([height, height / r * w], axis=-1)
        # Not `minus * v`: XLA makes a choice of the product with a mask and loses NaN.
        return ops.where(between, middle, ops.where(minus > 0, v, 0.0 * v))


def _parts(ops, v):
    """t, w and r, and 1 where r is zero."""
    t, w = v[..., :1], v[..., 1:]
    scale = _largest(ops, w)
    u = w / scale
    r = scale * ops.sqrt(ops.sum(u * u, axis=-1, keepdims=True))
    return t, w, r, ops.where(r > 0, r, 1.0)


def _largest(ops, w):
    """The largest entry of w, whose square alone may underflow or overflow; 1 where w = 0."""
    scale = ops.amax(abs(w), axis=-1, keepdims=True)
    return ops.where(scale > 0, scale, 1.0)
