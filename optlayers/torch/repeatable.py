"""A cell as one solve needs it: the same function at every call, and nothing evaluated twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.checkpoint import get_device_states, set_device_states


def repeatable(cell: Callable) -> Callable:
    """`cell` with the weights that it has now, and with the same random numbers at every call.

    Weights by parametrisation, such as spectral norms, are evaluated once, here.
    """
    return _SameRandomNumbers(snapshot(cell))


def snapshot(function: Callable) -> Callable:
    """`function`, of a module a copy that shares its tensors, and has results of parametrisations as such.

    It keeps them when the module is given others, as by torch.func.functional_call, before the backward pass.
    A lazy module is itself the one to be initialised, by its first call.
    """
    if not isinstance(function, nn.Module) or any(map(is_lazy, function.parameters())):
        return function
    return _snapshot(function, {})


def _snapshot(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:
        return done[module]
    twin = done[module] = object.__new__(type_before_parametrizations(module))
    values = {name: getattr(module, name) for name in getattr(module, "parametrizations", ())}
    children = {
        name: child and _snapshot(child, done)
        for name, child in module._modules.items()
        if name != "parametrizations"
    }
    own = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers), "_modules": children}
    twin.__dict__.update(module.__dict__ | own | values)
    return twin


class _SameRandomNumbers:
    """`cell`, which finds torch's random generators at every call as they were at the first one.

    As torch.utils.checkpoint does it. A cell that draws nothing, as the first call shows, costs nothing.
    """

    def __init__(self, cell: Callable):
        self.cell, self.first, self.draws = cell, None, False

    def __call__(self, *args: Any) -> Any:
        if self.first is None:
            self.first = _Generators(args)
            result = self.cell(*args)
            self.draws = _Generators(args) != self.first
            return result
        if not self.draws:
            return self.cell(*args)
        now = _Generators(args)
        self.first.restore()
        try:
            return self.cell(*args)
        finally:
            now.restore()


class _Generators:
    """The states of the random generators of the CPU and of the devices on which tensors of `tree` are."""

    def __init__(self, tree: Any):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tree)

    def __ne__(self, other: object) -> bool:
        pairs = zip([self.cpu, *self.states], [other.cpu, *other.states], strict=True)
        return not all(torch.equal(a, b) for a, b in pairs)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)
