"""The seam for NumPy arrays in the memory of tensors on a CPU.

A small operation takes NumPy a third of torch's time, and OpenBLAS half of MKL's on some processors.
"""

# ruff: noqa: F403

from __future__ import annotations

import builtins
import contextlib
import contextvars
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

from .. import Leaf, numpy
from ..numpy import *
from . import arrays
from .context import is_plain

real, imag = np.real, np.imag


def serves(solve: Leaf, inputs: list[Tensor]) -> bool:
    return solve.in_numpy and inputs[0].device.type == "cpu"


# Numbers in the arguments of a call: with twice as many, tensors are as fast, and use several threads.
SMALL = 2**17
_DTYPES = torch.float32, torch.float64, torch.complex64, torch.complex128


def serves_call(tensors: Sequence[Tensor]) -> bool:
    """Whether NumPy gives all that is asked of a call with these arguments: values, without derivatives."""
    needs_grad = torch.is_grad_enabled() and builtins.any(x.requires_grad for x in tensors)
    return not needs_grad and is_readable(tensors) and builtins.sum(x.numel() for x in tensors) <= SMALL


def is_readable(tensors: Sequence[Tensor]) -> bool:
    """Whether NumPy can read them, and of what it computes a tape alone wants derivatives."""
    return is_plain(tensors) and builtins.all(x.is_cpu and x.dtype in _DTYPES for x in tensors)


def call(function, *args) -> Any:
    """The result of `function(ops, *args)`, for tensors in and out."""
    inputs = []

    def to_array(x):
        if not isinstance(x, Tensor):
            return x
        inputs.append(x.numpy(force=True))
        return inputs[-1]

    results = []
    with np.errstate(all="ignore"):
        tree = function(sys.modules[__name__], *numpy.tree_map(to_array, args))
    numpy.tree_map(results.append, tree)
    tensors = iter(to_tensors(results, inputs))
    return numpy.tree_map(lambda _: next(tensors), tree)


def leaf(solve, inputs):
    return solve(sys.modules[__name__], *inputs)


def deferred(function, order, values, inputs, constants, adjoint=None):
    return values


def complex_number(x, y):
    return x + 1j * y


def widest(x):
    return np.asarray(x, complex if np.iscomplexobj(x) else float)


# For one matrix LAPACK itself takes a tenth of the time; its matrices lie by columns, and so are transposed.
_LAPACK = {
    np.dtype(np.float32): (lapack.spotrf, lapack.spotrs, lapack.strtri),
    np.dtype(np.float64): (lapack.dpotrf, lapack.dpotrs, lapack.dtrtri),
}


def _is_one(x):
    return 0 < x.size == math.prod(x.shape[-2:])


def cholesky(x):
    if not _is_one(x):
        return numpy.cholesky(x)
    upper, failed = _LAPACK[x.dtype][0](x.reshape(x.shape[-2:]).T)
    # NaN in the matrix reaches the last entry, but is no failure to some versions of LAPACK.
    failed = failed or np.isnan(upper[-1, -1])
    return np.full_like(x, np.nan) if failed else upper.T.reshape(x.shape)


def cholesky_solve(factor, rhs):
    if not (_is_one(factor) and _is_one(rhs) and factor.ndim == rhs.ndim):
        return arrays.cholesky_solve(torch.from_numpy(factor), torch.from_numpy(rhs)).numpy()
    upper, columns = (x.reshape(x.shape[-2:]) for x in (factor.mT, rhs))
    return _LAPACK[factor.dtype][1](upper, columns)[0].reshape(rhs.shape)


def inverse_triangular(factor):
    if not _is_one(factor):
        return arrays.inverse_triangular(torch.from_numpy(factor)).numpy()
    upper = factor.reshape(factor.shape[-2:]).T
    return _LAPACK[factor.dtype][2](upper)[0].T.reshape(factor.shape)


def in_blocks(function, arrays, ndims, size):
    return numpy.in_blocks(function, arrays, ndims, size, _run_in_threads, torch.get_num_threads())


def _run_in_threads(work, parts):
    """As `map`, on as many threads as torch may use; BLAS gets one for each, since matrices are small."""
    contexts = (contextvars.copy_context() for _ in itertools.count())  # how numbers out of range are treated
    with _one_blas_thread(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return [*pool.map(lambda part, context: context.run(work, part), parts, contexts)]


_lock = Lock()


@contextlib.contextmanager
def _one_blas_thread():
    """Calls that have to limit BLAS do not overlap: only the thread that did it can undo it."""
    with _lock:
        blas = _libraries().select(user_api="blas")
        if builtins.any(library.num_threads > 1 for library in blas.lib_controllers):
            with blas.limit(limits=1):
                yield
            return
    yield


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
