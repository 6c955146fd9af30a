"""Layers of PyTorch as programs of XLA."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layers.conic import ConicLayer
from ..layers.cvxpy import Solution
from ..linalg.sensitivity import Regularity
from ..ops import torch as ops
from ..solvers.host import Host
from ..status import Status, check

_PROCESS = os.getpid()  # of which a fork has not the threads of XLA


class CompiledProgram:
    """A function like `CvxpyProgram.solve` for tensors on the CPU, through JAX.

    The first solver is a program by itself, which takes half as long to compile. The others are compiled with
    it when a batch needs them, and from then on it is their program that serves.

    Args:
        axes: numbers of axes of the values, without those of the batch.
    """

    def __init__(self, function: Callable[..., Solution], axes: Sequence[int]):
        if not find_spec("jax"):
            raise ModuleNotFoundError("compiled=True needs JAX; pip install 'optlayers[jax]'")
        from ..jax import compiled

        self._arguments, self._run = (function, axes), compiled.CompiledFunction(function, axes)
        self._count = 1  # of the solvers in use

    def __reduce__(self):  # without what is compiled
        return type(self), self._arguments

    def solve(
        self,
        plain: Callable[[Sequence[Tensor]], Any],
        layer: ConicLayer,
        whole: bool,
        values: Sequence[Tensor],
        warm: Sequence[Tensor],
        like: Tensor,
    ) -> Any:
        """`plain(values)`: the variables, or the `whole` solution; where XLA does not serve, `plain` does."""
        solvers = tuple(solver for solver in layer.solve.solvers if not isinstance(solver, Host))
        if not solvers or os.getpid() != _PROCESS:
            return plain(values)
        needed = [torch.is_grad_enabled() and x.requires_grad for x in values]
        arrays = [[x.numpy(force=True) for x in part] for part in (values, warm)]
        while True:
            tried = solvers[: self._count]
            own = replace(layer, solve=replace(layer.solve, solvers=tried))
            outputs, facts, pull_back = self._run(own, whole, needed, *arrays, like.numpy())
            status, iterations, residual, *unique = facts
            is_unfinished = (status == Status.ITERATION_LIMIT.code) | (status == Status.INACCURATE.code)
            if tried == layer.solve.solvers or not is_unfinished.any():
                break
            # JAX calls the host in another thread, where double precision is on for whole processes only.
            if tried == solvers:
                return plain(values)
            self._count = len(solvers)
        if layer.on_failure == "raise":
            check(status, residual)

        def again(order, inputs, constants):
            solution = plain(inputs)
            return (*solution.variables, *solution[1:4]) if whole else solution

        def adjoint(ops, still_needed, inputs, constants, bars):
            # In NumPy or in torch, as the size of the call decides.
            is_tensor = any(isinstance(bar, Tensor) for bar in bars)
            bars = [bar.numpy(force=True) if isinstance(bar, Tensor) else bar for bar in bars]
            bars = pull_back([None if bar is None else _conjugate(bar) for bar in bars])
            bars = compress(map(_conjugate, bars), compress(still_needed, needed))
            return tuple(torch.from_numpy(bar) if is_tensor else bar for bar in bars)

        outputs = [torch.from_numpy(x) for x in outputs]
        outputs = ops.deferred(again, layer.order, outputs, values, (), adjoint)
        if not whole:
            return tuple(outputs)
        status, iterations, residual, *unique = map(torch.from_numpy, facts)
        status, iterations = status.long(), iterations.long()
        *variables, x, s, y = outputs
        return Solution(tuple(variables), x, s, y, status, iterations, residual, Regularity(*unique))


def _conjugate(x: np.ndarray) -> np.ndarray:
    """Between the cotangents of torch and those of JAX."""
    return np.conj(x) if np.iscomplexobj(x) else x
