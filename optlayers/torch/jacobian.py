"""What the derivative of a map is like at a point, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..docstring import continues
from ..layers.jacobian import (
    growth_of_powers,
    jacobian_norm_doc,
    mean_square_of_jacobian,
    spectral_radius_doc,
)
from ..ops import torch as ops


def _noise(generator):
    return lambda _, z: torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)


@continues(jacobian_norm_doc)
def jacobian_norm(
    f: Callable, z: Any, *args: Any, probes: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """
        generator: of the random v; None is torch's own.

    Example:
        >>> import torch
        >>> from optlayers.torch import jacobian_norm
        >>> W = torch.nn.Parameter(0.5 * torch.eye(3))
        >>> penalty = jacobian_norm(lambda z: torch.tanh(z @ W), torch.zeros(8, 3), probes=4).mean()
        >>> penalty.backward()
        >>> W.grad.shape
        torch.Size([3, 3])
    """
    return mean_square_of_jacobian(ops, _noise(generator), f, z, args, probes)


@continues(spectral_radius_doc)
def spectral_radius(
    f: Callable, z: Any, *args: Any, iterations: int = 40, generator: torch.Generator | None = None
) -> Tensor:
    """
        generator: of the first vector; None is torch's own.

    Example:
        >>> import torch
        >>> from optlayers.torch import spectral_radius
        >>> turn = torch.tensor([[0.0, 0.8], [-0.8, 0.0]])
        >>> spectral_radius(lambda z: z @ turn, torch.ones(2, 2))
        tensor([0.8000, 0.8000])
    """
    return growth_of_powers(ops, _noise(generator), f, z, args, iterations)
