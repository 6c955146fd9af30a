"""The seam for NumPy arrays in the memory of tensors on a CPU.

A small operation takes NumPy a third of torch's time, and OpenBLAS half of MKL's on some processors.
"""

# ruff: noqa: F403

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import Leaf
from ..numpy import *
from . import arrays


def serves(solve: Leaf, inputs: list[Tensor]) -> bool:
    return solve.in_numpy and inputs[0].device.type == "cpu"


def cholesky_solve(factor, rhs):
    return arrays.cholesky_solve(torch.from_numpy(factor), torch.from_numpy(rhs)).numpy()


def inverse_triangular(factor):
    return arrays.inverse_triangular(torch.from_numpy(factor)).numpy()


def to_tensors(results, inputs: list[np.ndarray]) -> list[Tensor]:
    """Tensors of the results, copied where they have the memory of an input or of one another."""
    seen, tensors = {id(_owner(x)) for x in inputs}, []
    for result in results:
        result = np.asarray(result)
        is_fit = result.flags.c_contiguous and result.flags.writeable
        if id(_owner(result)) in seen or not is_fit:
            result = result.copy()
        seen.add(id(_owner(result)))
        tensor = torch.from_numpy(result)
        tensors.append(tensor if result.size else tensor.new_empty(result.shape))  # strides of its own
    return tensors


def _owner(x):
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x
