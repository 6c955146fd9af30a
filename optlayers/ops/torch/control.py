"""Loops, branches, parts of a batch, and calls of the host."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numpy
from ..numpy import cond, on_chosen, repeat, while_loop  # noqa: F401
from .context import is_dual, is_known, is_recorded, is_transformed, outside, undifferentiated


def repeat_while(count, needed, body, state):
    for _ in range(count):
        mask = needed(state)
        if mask.is_cpu and is_known(mask) and not bool(torch.any(mask)):
            break
        state = body(state)
    return state


def bounded_repeat(count, limit, body, state):
    return repeat(count, body, state)


def cond_or_both(condition, both, false, operand):
    return false(operand) if is_known(condition) and not bool(condition) else both(operand)


def on_rows(mask, function, data, ndims, state):
    rows, put = torch.nonzero(mask)[:, 0], lambda x, rows, values: torch.index_copy(x, 0, rows, values)
    return on_chosen(rows, len(mask), function, data, ndims, state, put)


def repeat_on_rows(needed, function, data, ndims, state):
    return numpy.repeat_on_rows(needed, function, data, ndims, state, on_rows)


def in_blocks(function, arrays, ndims, size):
    return function(*arrays)


MOST_FUSED = 64  # variables and rows: with more, matrices would not fit the registers


def solve_small(inputs, settings, counts):
    m, n = inputs[2].shape[-2:]
    if not inputs[2].is_cuda or n + m > MOST_FUSED:
        return None
    from . import fused  # compiled on demand, and not there without Triton

    return fused.solve(inputs, settings, counts)


def stop_gradient(x):
    return x.detach()


def is_constant(x):
    return not (x.requires_grad or is_dual())


def has_tape():
    return torch.is_grad_enabled() and not is_dual()


def holds(condition):
    return is_known(condition) and bool(condition)


def remembered(function, settings, *arrays):
    return function(*settings, *arrays)


def any_mapped(mask):
    if not is_transformed():
        return bool(torch.any(mask))
    return outside(lambda x: bool(torch.any(x)), mask)


def largest(x):
    return outside(lambda x: int(x.max()), x)


def on_host(function, *arrays):
    outside(lambda *values: function(*(x.cpu().numpy() for x in values)), *arrays)


def reported(x, failed, function, *arrays):
    if torch.compiler.is_compiling():
        return torch.where(failed[:, None], torch.nan, x)
    on_host(function, *arrays)
    return x


def call_host(function, shapes, *arrays):
    like = next(x for x in arrays if x.is_floating_point())
    results = function(*(x.numpy(force=True) for x in arrays))
    return [torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in results]


class _HostCall(torch.autograd.Function):
    """`call_host` without derivative."""

    @staticmethod
    def forward(function, *arrays):
        return tuple(call_host(function, None, *arrays))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info, in_dims, function, *arrays):
        pairs = zip(arrays, in_dims[1:], strict=True)
        results = _HostCall.apply(
            function, *(x[None] if dim is None else x.movedim(dim, 0) for x, dim in pairs)
        )
        return results, (0,) * len(results)


HOST_IS_NOT_TRACED = (
    "sparse programs are solved on the host, by calls that cannot be traced into a graph; give P and A as "
    "dense tensors, or a CvxpyLayer solver=ADMM(), or compile the model without fullgraph=True"
)


def run_on_host(function, shapes, *arrays):
    if is_recorded():
        raise NotImplementedError(HOST_IS_NOT_TRACED)
    return list(_HostCall.apply(function, *(x.detach() for x in arrays)))


def _detach(tree):
    return torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def call_detached(function, *args):
    with undifferentiated():
        return _detach(function(*_detach(args)))
