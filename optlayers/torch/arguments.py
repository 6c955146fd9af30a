"""Whether tensors may stand beside one another as the arguments of a layer, and the type of its results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def common(values: Sequence[Any], label: Callable[[int], str], is_complex: Callable[[int], bool]) -> Tensor:
    """A real scalar with the dtype of the results and the device of all values.

    Args:
        label: what the value of a number is called in messages.
        is_complex: whether it may be complex.

    Raises:
        ValueError: a value that is no tensor, is on another device than the first, or may not be complex.
    """
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{label(i)} must be a torch tensor, got {type(value).__name__}; "
                "convert it with torch.as_tensor"
            )
        if value.device != values[0].device:
            raise ValueError(
                f"{label(i)} is on {value.device}, but {label(0)} is on {values[0].device}; "
                "move all of them to one device"
            )
        if value.is_complex() and not is_complex(i):
            raise ValueError(f"{label(i)} is real, got a complex tensor; pass its real part")
    if not values:
        return torch.zeros(())
    dtype = functools.reduce(torch.promote_types, [value.dtype for value in values])
    if dtype.is_complex:
        dtype = dtype.to_real()
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    return torch.zeros((), dtype=dtype, device=values[0].device)
