"""Functions with backward rules of their own."""

from __future__ import annotations

import inspect
import sys

import torch

from .. import NO_SECOND_DERIVATIVE
from . import host
from .context import is_dual, is_recorded, run_while_compiling


def _pull_back(outputs, cotangents, inputs, **options):
    """Cotangents of the inputs, None where there is nothing to add to."""
    pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None and y.requires_grad]
    live = [x for x in inputs if x.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    differentiable, weights = zip(*pairs, strict=True)
    bars = iter(torch.autograd.grad(differentiable, live, weights, allow_unused=True, **options))
    return [next(bars) if x.requires_grad else None for x in inputs]


def vjp(function, x, live):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = function(x, live)

    def pull(cotangents):
        x_bar, *bars = _pull_back(outputs, cotangents, [x, *live])
        return x_bar, bars

    return outputs, pull


def _separated(tensors):
    """What was computed is cut off from its history: it may depend on another one, and be counted twice."""
    return [x if x.is_leaf else x.detach().requires_grad_() for x in tensors]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, sweep, *inputs):
        ctx.sweep = sweep
        ctx.save_for_backward(*inputs)
        # Others than those that `sweep` may reach: they know this node, and would keep it alive.
        return tuple(v.detach() for v in values)

    @staticmethod
    def backward(ctx, *cotangents):
        inputs = ctx.saved_tensors  # once: torch.utils.checkpoint gives them only once
        with torch.no_grad():
            bars = ctx.sweep(_separated(inputs), cotangents)
        return None, None, *_final(bars, (*inputs, *cotangents))


def replayed(values, replay, sweep, inputs):
    return replay(inputs) if is_dual() else _Replayed.apply(values, sweep, *inputs)


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, adjoint, order, values, count, *arrays):
        ctx.function, ctx.adjoint, ctx.order, ctx.count = function, adjoint, order, count
        ctx.save_for_backward(*arrays)
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx, *cotangents):
        arrays = ctx.saved_tensors  # once: torch.utils.checkpoint gives them only once
        inputs, constants = arrays[: ctx.count], arrays[ctx.count :]
        needed, again = ctx.needs_input_grad[5 : 5 + ctx.count], torch.is_grad_enabled()
        if ctx.adjoint is not None and not (again or is_dual() or is_recorded()):
            bars = iter(_on_host_or_device(ctx.adjoint, needed, inputs, constants, cotangents))
            bars = [next(bars) if need else None for need in needed]
            return None, None, None, None, None, *bars, *[None] * len(constants)
        # New tensors: an input may be computed from another one, whose part would be counted twice.
        inputs = [
            x.view_as(x) if again else x.detach().requires_grad_(need)
            for x, need in zip(inputs, needed, strict=False)
        ]
        with torch.enable_grad():
            outputs = ctx.function(ctx.order if again else 1, inputs, constants)
        bars = _pull_back(outputs, cotangents, inputs, create_graph=again)
        return None, None, None, None, None, *bars, *[None] * len(constants)


# torch asks at every call.
_Deferred.forward.__signature__ = inspect.signature(_Deferred.forward)


def _on_host_or_device(adjoint, needed, *tensors):
    floats = [x for part in tensors for x in part if x is not None and x.is_floating_point()]
    if host.serves_call(floats):
        return host.call(adjoint, needed, *map(tuple, tensors))
    with torch.autocast(floats[0].device.type, enabled=False):
        return adjoint(sys.modules[__package__], needed, *tensors)


def deferred(function, order, values, inputs, constants, adjoint=None):
    if is_dual() or torch.compiler.is_compiling():
        return function(order, inputs, constants)
    return _Deferred.apply(function, adjoint, order, values, len(inputs), *inputs, *constants)


class _Zero(torch.autograd.Function):
    """The number zero, formally a function of x, whose derivatives exist up to `order`.

    A function with an identity as derivative rule would be shorter, but torch disables forward mode inside
    such rules and nested forward mode would lose a tangent in silence; adding zero cannot.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, order, message):
        return torch.zeros((), dtype=x.dtype, device=x.device)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.order, ctx.message = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def _lower(ctx, x):
        if ctx.order == 0:
            raise NotImplementedError(ctx.message)
        return _Zero.apply(x, ctx.order - 1, ctx.message)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors  # once: torch.utils.checkpoint gives them only once
        return _Zero._lower(ctx, x).expand(x.shape), None, None

    @staticmethod
    def jvp(ctx, *_):
        (x,) = ctx.saved_tensors
        return _Zero._lower(ctx, x)


def _zero(x, order, message):
    return _Zero.apply(x, order, message)


@run_while_compiling
def _keep_whole():
    """torch.compile cannot trace a function with a forward-mode rule; it can call one as it is."""
    torch.compiler.allow_in_graph(_zero)


def implied(residual, solve, root, order):
    for _ in range(order):
        root = root - solve(residual(root))
    return root


def guard(x, order, message):
    if torch.compiler.is_compiling():
        _keep_whole()
    return x + _zero(x, order, message)


_Zero.forward.__signature__ = inspect.signature(_Zero.forward)  # torch asks at every call


def _final(gradients, arrays):
    """`gradients` with derivatives in `arrays` that raise, where they would be missing in silence."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradients
    stop = torch.stack([_zero(x, 0, NO_SECOND_DERIVATIVE) for x in arrays]).sum()
    return [g if g is None else g + stop for g in gradients]


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backward, count, *arrays):
        ctx.backward_rule, ctx.count = backward, count
        ctx.save_for_backward(*arrays)
        return tuple(value.clone() for value in arrays[:count])

    @staticmethod
    def backward(ctx, *cotangents):
        arrays = ctx.saved_tensors  # once: torch.utils.checkpoint gives them only once
        values, inputs = arrays[: ctx.count], arrays[ctx.count :]
        with torch.no_grad():
            results = ctx.backward_rule(values, _separated(inputs), cotangents)
        return None, None, *([None] * ctx.count), *_final(results, (*inputs, *cotangents))


def surrogate_gradient(values, inputs, backward):
    if not torch.compiler.is_compiling() and is_dual():
        raise NotImplementedError(
            "this gradient is that of backward() alone; under torch.func and in forward mode use "
            "gradient='exact' or 'smoothed', or adjoint=Discrete()"
        )
    return _Surrogate.apply(backward, len(values), *(v.detach() for v in values), *inputs)
