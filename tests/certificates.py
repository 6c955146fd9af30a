"""Optimality certificates in NumPy: a program at parameter values, and how far a point is from solving it.

Nothing here uses the projections of the library: a cone is described by the inequality that defines it.
"""

from typing import NamedTuple

import numpy as np


class Data(NamedTuple):
    """P, q, A, b of one problem."""

    P: np.ndarray
    q: np.ndarray
    A: np.ndarray
    b: np.ndarray


class Residuals(NamedTuple):
    """Largest violations, relative to the data: see `residuals`."""

    stationarity: float
    primal: float
    cone: float
    dual_cone: float
    complementarity: float


def program_data(program, values):
    """The data of an `optlayers.canon` program for one value per parameter."""
    part = {"real": np.real, "imag": np.imag, "log": np.log}
    blocks = [np.ravel(part[block.part](values[block.parameter])) for block in program.blocks]
    theta = np.concatenate([np.zeros(0), *blocks])

    def dense(affine):
        flat = np.zeros(int(np.prod(affine.shape)))
        entries = affine.constant.copy()
        np.add.at(entries, affine.rows, affine.coefs * theta[affine.cols])
        flat[affine.positions] = entries
        return flat.reshape(affine.shape)

    return Data(*(dense(affine) for affine in (program.P, program.q, program.A, program.b)))


def residuals(cones, data, x, s, y):
    """Violations of P x + q + A'y = 0, A x + s = b, s in K, y in K*, s'y = 0 cone by cone."""
    P, q, A, b = data
    dual_unit = 1 + max(np.abs(v).max(initial=0) for v in (P @ x, q, A.T @ y))
    primal_unit = 1 + max(np.abs(v).max(initial=0) for v in (A @ x, s, b))
    outside, dual_outside, product = [0.0], [0.0], [0.0]
    for kind, rows, weights in _parts(cones):
        inside, dual_inside = _INSIDE[kind]
        outside.append(inside(s[rows], weights))
        dual_outside.append(dual_inside(y[rows], weights))
        product.append(abs(s[rows] @ y[rows]))
    return Residuals(
        np.abs(P @ x + q + A.T @ y).max(initial=0) / dual_unit,
        np.abs(A @ x + s - b).max(initial=0) / primal_unit,
        max(outside) / primal_unit,
        max(dual_outside) / dual_unit,
        max(product) / (primal_unit * dual_unit),
    )


def _parts(cones):
    """Kind, rows and weights of each cone, in the order of the rows; an inequality is a cone of its own."""
    sizes = [("zero", cones.zero, None)] if cones.zero else []
    sizes += [("nonneg", 1, None)] * cones.nonneg
    sizes += [("soc", size, None) for size in cones.soc]
    sizes += [("psd", k * (k + 1) // 2, k) for k in cones.psd]
    sizes += [("exp", 3, None)] * cones.exp
    sizes += [("pow", len(weights) + 1, np.array(weights)) for weights in cones.pow]
    start = 0
    for kind, size, weights in sizes:
        yield kind, slice(start, start + size), weights
        start += size


def _negative(u):
    return max(0.0, -float(np.min(u)))


def _second_order(u, _):
    return max(0.0, np.linalg.norm(u[1:]) - u[0])


def _semidefinite(u, order):
    matrix = np.zeros((order, order))
    j, i = np.tril_indices(order)  # upper triangle by columns
    matrix[i, j] = u / np.where(i == j, 1.0, 2**0.5)
    return _negative(np.linalg.eigvalsh(matrix, UPLO="U"))


def _exponential(u, _):
    """y exp(x / y) <= z, y > 0, or x <= 0, y = 0, z >= 0."""
    x, y, z = u
    flat = max(0.0, x, abs(y), -z)
    if y <= 0 or x > 500 * y:
        return flat
    return min(flat, max(0.0, y * np.exp(x / y) - z))


def _exponential_dual(u, _):
    """-x exp(y / x) <= e z, x < 0, or x = 0, y >= 0, z >= 0."""
    x, y, z = u
    flat = max(0.0, abs(x), -y, -z)
    if x >= 0 or y / x > 500:
        return flat
    return min(flat, max(0.0, -x * np.exp(y / x - 1) - z))


def _power(u, weights):
    mean = np.prod(np.maximum(u[:-1], 0.0) ** weights)
    return max(_negative(u[:-1]), abs(u[-1]) - mean)


def _power_dual(u, weights):
    return _power(np.append(u[:-1] / weights, u[-1]), weights)


_INSIDE = {
    "zero": (lambda s, _: np.abs(s).max(), lambda y, _: 0.0),
    "nonneg": (lambda s, _: _negative(s), lambda y, _: _negative(y)),
    "soc": (_second_order, _second_order),
    "psd": (_semidefinite, _semidefinite),
    "exp": (_exponential, _exponential_dual),
    "pow": (_power, _power_dual),
}
