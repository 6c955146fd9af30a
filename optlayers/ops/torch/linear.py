"""Derivatives of functions as linear maps, and solves with them that are differentiated by further solves."""

from __future__ import annotations

import inspect
import math

import torch
from torch.autograd import forward_ad

from .closures import lifted
from .context import is_dual, is_transformed, kept_as_they_are, undifferentiated


def frozen(function, x):
    def detached(z):
        with undifferentiated():
            return function(z).detach()

    return detached


def jacobian(function, x):
    size, x = math.prod(x.shape[1:]), x.detach()
    basis = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
    basis = basis.expand(size, *x.shape)
    # By reverse mode: torch nests no forward mode in another, and the layer may be inside one. Both ways are
    # needed: torch.func cannot work under hooks for saved tensors, nor plain autograd under torch.func.
    if is_transformed() or torch.compiler.is_dynamo_compiling():
        pullback = torch.func.vjp(function, x)[1]
        rows = torch.func.vmap(lambda e: pullback(e)[0])(basis)
    else:
        with torch.enable_grad(), kept_as_they_are():
            at = x.requires_grad_()
            rows = _pull_back(function(at), at, basis, is_grads_batched=True)
    return rows.detach().reshape(size, x.shape[0], size).movedim(0, -2)


def tangent_map(function, x):
    x = x.detach()
    return _linear_map(function if is_transformed() else _Recorded(function, x), x, transposed=False)


def pullback(function, x):
    if is_transformed():
        back = torch.func.vjp(function, x.detach())[1]
        return lambda v: back(v)[0]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        image = function(at)
    return lambda v: _pull_back(image, at, v, create_graph=create_graph)


# Linear solves that are differentiated by further solves. Plain autograd keeps the graph of the function;
# torch.func cannot, as its levels differ between a layer's call and its rules: there all tensors that the
# function uses travel with the rule as inputs of their own.


class _Recorded:
    """A function whose graph at `x` is made once, and then serves its value there and all its linear maps."""

    def __init__(self, function, x):
        self.function, self.x, self.graph = function, x, None

    def __call__(self, x):
        is_recorded = x is self.x and torch.is_grad_enabled() and not is_dual()
        return self.record()[1] if is_recorded else self.function(x)

    def record(self):
        if self.graph is None:
            with torch.enable_grad(), kept_as_they_are():
                at = self.x.detach().requires_grad_()
                self.graph = at, self.function(at)
        return self.graph


def _linear_map(function, x, transposed):
    """w to J w, or to J'w, for J = d function / dx.

    J w is the derivative of v to J'v, since torch allows no forward mode within its own.
    """
    if not isinstance(function, _Recorded):
        pull = lambda v: torch.func.vjp(function, x)[1](v)[0]
        with torch.no_grad():
            pullback = torch.func.vjp(*((function, x) if transposed else (pull, torch.zeros_like(x))))[1]
        product = lambda w: pullback(w)[0]
    else:
        at, image = function.record()
        if not transposed:
            with torch.enable_grad(), kept_as_they_are():
                weight = torch.zeros_like(x).requires_grad_()
                image, at = _pull_back(image, at, weight, create_graph=True), weight
        product = lambda w: _pull_back(image, at, w)

    def apply(w):
        with undifferentiated():
            return product(w).detach()

    return apply


def _pull_back(y, x, weight, **options):
    if not y.requires_grad:
        return torch.zeros(weight.shape[: weight.ndim - y.ndim] + x.shape, dtype=x.dtype, device=x.device)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True, **options}
    return torch.autograd.grad(y, x, weight, **options)[0]


class _Increment(torch.autograd.Function):
    """Zero, with a linear map or its transpose as derivative in r; see `Ops.increment`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(r, solve, transposed, *frozen):
        return torch.zeros_like(r)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.solve, ctx.transposed, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, gradient):
        tensors = ctx.saved_tensors  # once: torch.utils.checkpoint gives them only once
        solution = _inverted(gradient, ctx.solve, not ctx.transposed, *tensors)
        return solution, *[None] * (len(tensors) + 2)

    @staticmethod
    def jvp(ctx, tangent, *_):
        # torch has disabled forward mode here, and would lose the tangents of an outer one in silence.
        with forward_ad._set_fwd_grad_enabled(True):
            return _inverted(tangent, ctx.solve, ctx.transposed, *ctx.saved_tensors)


# torch asks at every call, which takes Python as long as the call.
_Increment.forward.__signature__ = inspect.signature(_Increment.forward)


def _inverted(r, solve, transposed, *frozen):
    with undifferentiated(), torch.autocast(r.device.type, enabled=False):
        solution = solve(r.detach(), transposed, *frozen).detach()
    return solution + _Increment.apply(r, solve, transposed, *frozen)


def increment(solve, r, *frozen):
    if torch.compiler.is_compiling():
        # A function with rules of its own cannot be traced; linear operations can.
        return solve(r - r.detach(), False, *(x.detach() for x in frozen))
    return _Increment.apply(r, solve, False, *(x.detach() for x in frozen))


def recorded_at(function, x):
    return function if is_transformed() else _Recorded(function, x)


def solve_increment(function, x, solve, r, *constants):
    x, count = x.detach(), len(constants)
    if is_transformed():
        explicit, used = lifted(function, x)
        applied = lambda used: lambda z: explicit(z, *used)
    else:
        recorded, used = function if isinstance(function, _Recorded) else _Recorded(function, x), []
        applied = lambda _: recorded
        if r.requires_grad:
            # Not in the backward pass, when the weights of modules that it closes over may be others.
            recorded.record()

    def invert(r, transposed, x, *tensors):
        return solve(_linear_map(applied(tensors[count:]), x, transposed), r, *tensors[:count])

    return increment(invert, r, x, *constants, *used)
