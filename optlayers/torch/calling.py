"""What torch may do around the call of a layer: trace it, and lower its precision."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

F = TypeVar("F", bound=Callable[..., Any])


def not_traced(reason: str) -> Callable[[F], F]:
    """Decorator for a function that cannot be part of a graph, and why, which errors then say.

    torch.compile breaks its graph at such a call and runs it as it is, or raises with `fullgraph=True`;
    torch.export and torch.jit.trace raise. The attributes are those of torch.compiler.disable, which
    imports a lot.
    """

    def decorate(function):
        untraced = functools.cache(lambda: torch.compiler.disable(function))

        @functools.wraps(function)
        def call(*args, **kwargs):
            if torch.compiler.is_compiling() or torch.jit.is_tracing():
                raise NotImplementedError(reason)
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            # Else torch.compile, having left this function alone, would go on with those that it calls.
            return untraced()(*args, **kwargs)

        call._torchdynamo_disable = True  # type: ignore[attr-defined]
        call._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return call

    return decorate  # type: ignore[return-value]


def refuse_export(reason: str) -> None:
    """
    Raises:
        NotImplementedError: with `reason`, inside torch.export and torch.jit.trace.
    """
    # Old versions of torch do not say that they export.
    if getattr(torch.compiler, "is_exporting", bool)() or torch.jit.is_tracing():
        raise NotImplementedError(reason)


def in_full_precision(function: F) -> F:
    """Decorator: autocast is off inside, and half-precision inputs under it become float32.

    As torch does it for its own functions that iterate or solve: an equation between numbers of three digits
    cannot be solved to more.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        device = next((x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), "cpu")
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        args, kwargs = tree_map(_single, (args, kwargs))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _single(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x
