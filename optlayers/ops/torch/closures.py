"""Functions made explicit in the tensors that they close over."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .context import if_unchanged, is_dual, undifferentiated, version


def _tensors(tree):
    """The tensors in nested arguments of a function; torch's own walk of them is several times slower."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(item)


class Used(torch.overrides.TorchFunctionMode):
    """Finds the tensors that enter a computation and were neither given nor computed in it."""

    def __init__(self, *given):
        super().__init__()
        # The tensors themselves, lest an id be used again.
        self.found, self.versions, self.own = {}, {}, {id(x): x for x in given}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        for x in _tensors((args, kwargs)):
            if id(x) not in self.own and id(x) not in self.found and not is_lazy(x):
                self.found[id(x)], self.versions[id(x)] = x, version(x)
        output = function(*args, **(kwargs or {}))
        self.own.update((id(x), x) for x in _tensors(output))
        return output


class Replaced(torch.overrides.TorchFunctionMode):
    """Puts other tensors in the places of those that `Used` has found."""

    def __init__(self, found, others):
        super().__init__()
        self.others = dict(zip(found, others, strict=True))

    def replace(self, tree):
        if not any(id(x) in self.others for x in _tensors(tree)):
            return tree
        return torch.utils._pytree.tree_map(lambda x: self.others.get(id(x), x), tree)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*self.replace(args), **self.replace(kwargs or {}))


def lifted(function, x):
    """A function (x, *used) for `function`, and the tensors `used`, detached."""
    with undifferentiated(), Used(x) as mode:
        function(x)
    found = mode.found

    def explicit(z, *used):
        with Replaced(found, used) as mode:
            return mode.replace(function(z))

    return explicit, [y.detach() for y in found.values()]


def explicit(functions, examples):
    given = [x for arguments in examples for x in arguments]
    if is_dual():
        return [lambda *args, f=f: f(*args[:-1]) for f in functions], []
    with undifferentiated(), Used(*given) as mode:
        for function, arguments in zip(functions, examples, strict=True):
            function(*arguments)
    theta = [x for x in mode.found.values() if x.requires_grad and torch.is_grad_enabled()]
    ids = [id(x) for x in theta]
    # Those that functions change themselves are no part of what they compute, such as a count of their calls.
    fixed = [(x, mode.versions[i]) for i, x in mode.found.items() if mode.versions[i] == version(x)]

    def call(function, *args):
        *args, others = args
        if not torch.is_grad_enabled() or (others and not any(x.requires_grad for x in others)):
            return function(*args)
        for saved in fixed:
            if_unchanged(saved)
        if [id(x) for x in others] == ids:  # the very tensors that function uses: there is nothing to replace
            output = function(*args)
            is_missing = _has_other_leaves(output, (*args, *others))
        else:
            with Used(*args, *others) as used, Replaced(ids, others) as mode:
                output = mode.replace(function(*args))
            is_missing = any(x.requires_grad for x in used.found.values())
        if is_missing:
            raise RuntimeError(
                "func uses a tensor with a gradient that it did not use when it was first called, and its "
                "gradient would be missing; pass it in args, or let it enter every call, if only times zero"
            )
        return output

    return [lambda *args, f=f: call(f, *args) for f in functions], theta


def _has_other_leaves(y, inputs):
    """Whether `y` is computed from tensors with gradients other than by way of `inputs`."""
    if y.grad_fn is None:
        return y.requires_grad and not any(y is x for x in inputs)
    leaves, nodes = {id(x) for x in inputs}, [y.grad_fn]
    seen = {None, *(x.grad_fn for x in inputs)}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        below = node.next_functions
        if not below and hasattr(node, "variable") and id(node.variable) not in leaves:
            return True
        nodes += [other for other, _ in below]
    return False
