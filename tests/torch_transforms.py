"""What torch does to a layer besides the transformations that it has in common with JAX."""

from __future__ import annotations

import io

import torch
from torch.autograd import forward_ad

from transforms import COMMON, Transform


def _leaves(call):
    return [v.clone().requires_grad_() for v in call.values]


def _backward(call):
    leaves = _leaves(call)
    call.loss_of_values(*leaves).backward()
    return call.flatten([leaf.grad for leaf in leaves])


def _double_backward(call):
    theta = call.theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call.loss(theta), theta, create_graph=True)
    return torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in gradient])


def _dual(call, theta, tangent):
    with forward_ad.dual_level():
        output = call.flat(forward_ad.make_dual(theta, tangent))
        return forward_ad.unpack_dual(output).tangent


def _forward_mode(call):
    return _dual(call, call.theta, call.theta.clone())


def _forward_over_backward(call):
    columns = []
    for e in torch.eye(len(call.theta)).to(call.theta):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(call.theta.clone().requires_grad_(), e)
            (gradient,) = torch.autograd.grad(call.loss(dual), dual, create_graph=True)
            columns.append(forward_ad.unpack_dual(gradient).tangent.detach())
    return torch.stack(columns, -1)


def _each_input_alone(call):
    """`requires_grad` on one input at a time."""
    gradients = []
    for i in range(len(call.values)):
        leaves = [v.clone().requires_grad_(i == j) for j, v in enumerate(call.values)]
        call.loss_of_values(*leaves).backward()
        assert all((leaf.grad is not None) == leaf.requires_grad for leaf in leaves)
        gradients.append(leaves[i].grad)
    return call.flatten(gradients)


def _through_views(call):
    """Inputs that are neither contiguous nor own their memory."""
    leaves = _leaves(call)
    views = [torch.stack([v, v.detach()], -1)[..., 0] for v in leaves]
    views = [v.mT.contiguous().mT if v.ndim > 1 else v for v in views]
    call.loss_of_values(*views).backward()
    return call.flatten([leaf.grad for leaf in leaves])


def _expanded(call):
    """One problem, expanded: every problem of the batch is the first one, in the same memory."""
    firsts = [v if axis is None else v[:1] for v, axis in zip(call.values, call.case.axes, strict=True)]
    expanded = [v.expand(own.shape) for v, own in zip(firsts, call.values, strict=True)]
    output = call.function(*expanded)
    torch.testing.assert_close(output, output[:1].expand_as(output), rtol=1e-12, atol=1e-12)
    return torch.cat([output[:1], call.function(*call.values)[1:]])


def _without_grad(context):
    def apply(call):
        with context():
            output = call.function(*_leaves(call))
        assert not output.requires_grad
        return output.clone()

    return apply


def _autocast(call):
    """The results are those without autocast, which would round to 3 digits inside the layer."""
    leaves = _leaves(call)
    with torch.autocast("cpu", torch.bfloat16):
        output = call.function(*leaves)
        (call.weights * output).sum().backward()
    return call.flatten([leaf.grad for leaf in leaves])


class _Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *values):
        return self.function(*values)


def _compile(backend):
    def apply(call):
        torch.compiler.reset()
        compiled = torch.compile(call.loss_of_values, fullgraph=True, backend=backend)
        leaves = _leaves(call)
        compiled(*leaves).backward()
        with torch.no_grad():  # of which the graph is another one
            torch.testing.assert_close(compiled(*call.values), call.loss_of_values(*call.values))
        return call.flatten([leaf.grad for leaf in leaves])

    return apply


def _export(call):
    """Exported, saved, loaded and run on other numbers than those of the export."""
    others = tuple(v.flip(0) if axis == 0 else v for v, axis in zip(call.values, call.case.axes, strict=True))
    program = torch.export.export(_Model(call.function), others, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()(*call.values)


def _checkpoint(call):
    leaves = _leaves(call)
    torch.utils.checkpoint.checkpoint(call.loss_of_values, *leaves, use_reentrant=False).backward()
    return call.flatten([leaf.grad for leaf in leaves])


TORCH = COMMON | {
    "backward": Transform("gradient", _backward),
    "backward, twice": Transform("hessian", _double_backward),
    "forward_ad": Transform("tangent", _forward_mode),
    "forward_ad of backward": Transform("hessian", _forward_over_backward),
    "requires_grad on one input": Transform("gradient", _each_input_alone),
    "inputs that are views": Transform("gradient", _through_views),
    "expanded inputs": Transform("value", _expanded),
    "no_grad": Transform("value", _without_grad(torch.no_grad)),
    "inference_mode": Transform("value", _without_grad(torch.inference_mode)),
    "autocast": Transform("gradient", _autocast),
    "checkpoint": Transform("gradient", _checkpoint),
    "compile(fullgraph=True)": Transform("gradient", _compile("eager")),
    "export": Transform("value", _export),
}
