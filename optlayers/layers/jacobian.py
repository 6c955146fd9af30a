"""What the derivative A = df/dz of a map is like at a point: its size, and whether it is a contraction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..ops import Array, MatrixFreeOps
from .fixed_point import flatten_map


def mean_square_of_jacobian(
    ops: MatrixFreeOps, noise: Callable[[int, Array], Array], f: Callable, z: Any, args: tuple, probes: int
) -> Array:
    """The average over `probes` draws v of |A'v|^2 / k, sample by sample."""
    value, z, _ = flatten_map(ops, f, z, args)
    pullback = ops.pullback(value, z)

    def add(carry):
        i, total = carry
        return i + 1, total + ops.norm(pullback(noise(i, z))) ** 2

    return ops.repeat(probes, add, (0, 0 * z[:, 0]))[1] / (probes * z.shape[1])


def growth_of_powers(
    ops: MatrixFreeOps,
    noise: Callable[[int, Array], Array],
    f: Callable,
    z: Any,
    args: tuple,
    iterations: int,
) -> Array:
    """The geometric mean of |A v| / |v| over the later half of the powers of A, sample by sample."""
    value, z, _ = flatten_map(ops, f, z, args)
    tangent = ops.tangent_map(value, z)

    def step(carry):
        v, total = carry
        v = tangent(v)
        size = ops.norm(v)
        return v / ops.where(size > 0, size, 1.0)[:, None], total + ops.log(size)

    v, total = ops.repeat(iterations // 2, step, (noise(0, z), 0 * z[:, 0]))
    later = iterations - iterations // 2
    return ops.exp(ops.repeat(later, step, (v, 0 * total))[1] / later)


def jacobian_norm_doc():
    """An estimate of |A|_F^2 / k for A = df/dz at z, for each sample (B,), differentiable in all but z.

    Added to a loss, with a small factor, it keeps the equilibria of a cell easy to find (Bai, Koltun and
    Kolter 2021). It is the mean of |A'v|^2 / k over normal random v (Hutchinson 1989).

    Args:
        f: (z, *args) to the next z, as of `fixed_point`.
        z: the point: an array (B, ...), or nested containers of such arrays, k numbers a sample in all. It is
            taken as constant.
        args: whatever f takes besides z.
        probes: number of random v.
    """


def spectral_radius_doc():
    """An estimate of the largest |eigenvalue| of A = df/dz at z, for each sample (B,), by the power method.

    Below 1, z <- f(z, *args) converges near z, with this factor a step. It is the mean growth of A^i v over
    the later half of the iterations, which serves pairs of complex eigenvalues too, to a relative accuracy of
    about one over the number of iterations.

    Args:
        f: (z, *args) to the next z, as of `fixed_point`.
        z: the point: an array (B, ...), or nested containers of such arrays.
        args: whatever f takes besides z.
        iterations: products with A.
    """
