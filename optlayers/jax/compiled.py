"""Layers of other frameworks as programs that XLA compiles for the CPU, with NumPy arrays in and out."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ..layers.conic import ConicLayer
from ..layers.cvxpy import Solution
from ..ops import jax as ops
from ..ops.jax.context import alike


class CompiledFunction:
    """A function like `CvxpyProgram.solve` and its reverse mode, compiled once per set of shapes.

    The first batch axis is filled up to the size of a program that is there already, of up to twice as many
    problems. New programs are for powers of two, unless a batch is more than twice the largest one so far.
    Over several devices of the CPU the axis is laid out, as far as it divides.

    Args:
        axes: numbers of axes of the values, without those of the batch.
    """

    def __init__(self, function: Callable[..., Solution], axes: Sequence[int]):
        self._function, self._axes = function, axes
        self._sizes: dict[Any, list[int]] = {}  # no sets: other threads may add to what one looks through

    # Not before the first call, since afterwards JAX is not told how many devices the CPU has.
    @functools.cached_property
    def _forward(self):
        return jax.jit(self._solve_and_pull, static_argnums=(0, 1, 2), compiler_options=_known_options())

    @functools.cached_property
    def _backward(self):
        return jax.jit(lambda pull, bars: pull(bars)[0], compiler_options=_known_options())

    def __call__(
        self,
        layer: ConicLayer,
        whole: bool,
        needed: Sequence[bool],
        values: Sequence[np.ndarray],
        warm: Sequence[np.ndarray],
        like: np.ndarray,
    ) -> tuple[list[np.ndarray], list[np.ndarray], Callable]:
        """What has derivatives of a solution, the facts about it, and the pull-back of derivatives.

        Args:
            whole: x, s and y follow the variables.
            needed: which values have cotangents.

        Returns:
            The arrays with derivatives; status, iterations, residual, and regularity of x and y; and the map
            from cotangents of the first, None for zero, to those of the values that are needed.
        """
        static, leads = (layer, whole, tuple(needed)), self._leads([*values, *warm])
        arrays, own = self._filled(static[1:], [*values, *warm], leads)
        values, warm = arrays[: len(values)], arrays[len(values) :]
        with _on_cpu():
            results, pull, facts = self._forward(*static, values, warm, like)
            outputs, facts = ([np.array(np.asarray(x)[own]) for x in y] for y in (results, facts))
        forms = [(x.shape, x.dtype) for x in results]

        def pull_back(bars: Sequence[np.ndarray | None]) -> list[np.ndarray]:
            full = [np.zeros(*form) for form in forms]
            for x, bar in zip(full, bars, strict=True):
                if bar is not None:
                    x[own] = bar
            with _on_cpu():
                results = list(map(np.asarray, self._backward(pull, full)))
            parts = (own if lead else ... for lead in itertools.compress(leads, needed))
            return [np.array(x[part]) for x, part in zip(results, parts, strict=True)]

        return outputs, facts, pull_back

    def _leads(self, arrays) -> list[tuple[int, ...]]:
        """Batch axes of each; where they do not agree () for all, and the function will raise."""
        axes = (*self._axes, 1, 1, 1)
        leads = [x.shape[: max(x.ndim - k, 0)] for x, k in zip(arrays, axes, strict=False)]
        return leads if len({*leads} - {()}) < 2 else [()] * len(leads)

    def _filled(self, key, arrays, leads) -> tuple[list[np.ndarray], Any]:
        """The arrays filled up to the size of a program, and the index of the rows that count."""
        common = max(leads, default=())
        if not common or not common[0]:
            return arrays, ...
        batch, is_batched = common[0], [bool(lead) for lead in leads]
        own = [x.shape[lead:] for x, lead in zip(arrays, is_batched, strict=True)]
        sizes = self._sizes.setdefault((*key, *own, *is_batched), [])
        size = min((size for size in sizes if batch <= size <= 2 * batch), default=0)
        if not size:
            size = batch if batch > 2 * max(sizes, default=0) else 1 << (batch - 1).bit_length()
            sizes.append(size)
        if size > batch:
            rows = np.minimum(np.arange(size), batch - 1)
            arrays = [x[rows] if lead else x for x, lead in zip(arrays, is_batched, strict=True)]
        return arrays, slice(batch)

    def _solve_and_pull(self, layer, whole, needed, values, warm, like):
        def solve(live):
            live = iter(live)
            chosen = [next(live) if need else x for need, x in zip(needed, values, strict=True)]
            return self._spread(layer, whole, chosen, warm, like)

        live = [x for need, x in zip(needed, values, strict=True) if need]
        return jax.vjp(solve, live, has_aux=True)

    def _spread(self, layer, whole, values, warm, like):
        """`_solve` on as many devices as divide the first batch axis."""
        leads, devices = self._leads([*values, *warm]), jax.devices("cpu")
        common = max(leads, default=())
        count = math.gcd(len(devices), common[0]) if common and common[0] else 1
        if count == 1:
            return self._solve(layer, whole, values, warm, like)
        specs = [PartitionSpec("batch") if lead else PartitionSpec() for lead in leads]
        return jax.shard_map(
            lambda values, warm: self._solve(layer, whole, values, warm, like),
            mesh=Mesh(np.array(devices[:count]), ("batch",)),
            in_specs=(specs[: len(values)], specs[len(values) :]),
            out_specs=PartitionSpec("batch"),
        )(values, warm)

    def _solve(self, layer, whole, values, warm, like):
        solution = self._function(_FIRST_ORDER, layer, values, warm, like)
        derived = [*solution.variables, *((solution.x, solution.s, solution.y) if whole else ())]
        return derived, [solution.status, solution.iterations, solution.residual, *solution.regularity]


# Compilation takes half the time with them, and the code is as fast.
OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}


@functools.cache
def _known_options() -> dict[str, Any]:
    """Those of the OPTIONS that the installed version of XLA has, and the environment does not set."""

    def is_known(name):
        try:
            jax.jit(lambda: 0, compiler_options={name: OPTIONS[name]})()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    flags = os.environ.get("XLA_FLAGS", "")
    return {name: OPTIONS[name] for name in OPTIONS if name not in flags and is_known(name)}


@contextlib.contextmanager
def _on_cpu():
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def _deferred(function, order, values, inputs, constants, adjoint):
    """As that of the seam, by `adjoint` alone: the first derivatives in reverse mode."""

    @jax.custom_vjp
    def attach(values, inputs, constants):
        return values

    def pull(saved, bars):
        inputs, constants = saved
        return None, list(adjoint(ops, [True] * len(inputs), inputs, constants, bars)), None

    attach.defvjp(lambda values, *saved: (values, saved), pull)
    # The cotangents of inputs that devices share would differ between them.
    inputs = alike([*inputs, *values])[: len(inputs)]
    return attach(list(values), inputs, list(constants))


_FIRST_ORDER = types.SimpleNamespace(**vars(ops) | {"deferred": _deferred})
