"""The seam for NumPy arrays in the memory of tensors on a CPU.

A small operation takes NumPy a third of torch's time, and OpenBLAS half of MKL's on some processors.
"""

# ruff: noqa: F403

from __future__ import annotations

import contextvars
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from .. import Leaf, numpy
from ..numpy import *
from . import arrays


def serves(solve: Leaf, inputs: list[Tensor]) -> bool:
    return solve.in_numpy and inputs[0].device.type == "cpu"


def cholesky_solve(factor, rhs):
    return arrays.cholesky_solve(torch.from_numpy(factor), torch.from_numpy(rhs)).numpy()


def inverse_triangular(factor):
    return arrays.inverse_triangular(torch.from_numpy(factor)).numpy()


def in_blocks(function, arrays, ndims, size):
    return numpy.in_blocks(function, arrays, ndims, size, _run_in_threads, torch.get_num_threads())


def _run_in_threads(work, parts):
    """As `map`, on as many threads as torch may use; BLAS gets one for each, since matrices are small."""
    contexts = (contextvars.copy_context() for _ in itertools.count())  # how numbers out of range are treated
    with _libraries().limit(limits=1, user_api="blas"), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return [*pool.map(lambda part, context: context.run(work, part), parts, contexts)]


@functools.cache
def _libraries():
    return ThreadpoolController()


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
