"""A parametrised cone program, free of any framework.

    minimise    1/2 x'Px + q'x      subject to   A x + s = b,   s in K,

where P, q, A, b are affine in a parameter vector theta of length p. Symbols: n variables, m rows,
y in the dual cone K* are the multipliers of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cones import Cones


@dataclass(frozen=True, eq=False)
class AffineMap:
    """A vector or matrix whose entries are affine in theta, stored by its nonzeros only.

    Entry `positions[i]` (flat, row-major) is `constant[i] + sum of coefs[k] * theta[cols[k]]` over the
    k with `rows[k] == i`; every other entry is zero.

    Attributes:
        shape: (n,), (m,), (n, n) or (m, n).
        positions: flat row-major positions of the structural nonzeros, sorted (nnz,).
        constant: constant part of these entries (nnz,).
        rows: index into `positions`, sorted (k,).
        cols: index into theta (k,).
        coefs: coefficients (k,).
    """

    shape: tuple[int, ...]
    positions: np.ndarray
    constant: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    coefs: np.ndarray


@dataclass(frozen=True)
class Block:
    """A slice of theta: one part of one user parameter, flattened row-major.

    Attributes:
        parameter: position in the list of parameters that the user gave.
        part: "real" (the value itself, or its real part), "imag", or "log".
        start, stop: theta[start:stop] holds it.
    """

    parameter: int
    part: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Output:
    """How one output that the user asked for is read off the solution.

    Entry i (flat, row-major) is `coefs[i] * source[indices[i]]`, or zero where `indices[i]` is -1, with
    `source` the primal x or the multipliers y; `imag_indices`, `imag_coefs` give the imaginary part of a
    complex output in the same way. With `exp`, the exponential is taken last (geometric programs).
    """

    shape: tuple[int, ...]
    source: str
    indices: np.ndarray
    coefs: np.ndarray
    imag_indices: np.ndarray | None = None
    imag_coefs: np.ndarray | None = None
    exp: bool = False


@dataclass(frozen=True, eq=False)
class Program:
    """The program, its parameters and the outputs. `theta` is the concatenation of `blocks`."""

    cones: Cones
    P: AffineMap
    q: AffineMap
    A: AffineMap
    b: AffineMap
    blocks: tuple[Block, ...]
    outputs: tuple[Output, ...]

    @property
    def n(self) -> int:
        return self.q.shape[0]

    @property
    def m(self) -> int:
        return self.b.shape[0]
