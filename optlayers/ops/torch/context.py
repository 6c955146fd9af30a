"""What surrounds a call: transformations of torch.func, forward mode, a compiler, hooks."""

from __future__ import annotations

import contextlib

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_dual() -> bool:
    """Whether derivatives are taken by other means than the tape."""
    return is_transformed() or forward_ad._current_level >= 0


def is_recorded() -> bool:
    """Whether operations become a graph of torch.fx, as in torch.func.linearize: its values are examples."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_plain(tensors) -> bool:
    """Whether they are just that, and of what is done with them no more than a tape is kept."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not is_dual() and all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors)


def is_known(x) -> bool:
    """Whether `x` has a value that Python may read: it is not traced, nor mapped by torch.func.vmap."""
    if torch.compiler.is_compiling() or is_recorded():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return not isinstance(x, FakeTensor)


def outside(function, *arrays):
    """`function` of the arrays outside torch.func's transformations, with the axes that vmap has hidden."""
    plain = []
    for x in arrays:
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
        plain.append(x)
    with temporarily_clear_interpreter_stack():
        return function(*(x.detach() for x in plain))


@contextlib.contextmanager
def undifferentiated():
    """Nothing is recorded, in either mode, as long as results are detached one by one."""
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        yield


def kept_as_they_are():
    """Within it, hooks for saved tensors such as a checkpoint's do not see those of an inner graph."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: (x, version(x)), if_unchanged)


def version(x):
    """The count of in-place changes of `x`; inference tensors do not have one, nor any changes."""
    return 0 if x.is_inference() else x._version


def if_unchanged(saved):
    """The tensor of (tensor, version), saved where torch itself does not look for changes."""
    x, saved_version = saved
    if version(x) != saved_version:
        raise RuntimeError(
            f"a tensor of shape {tuple(x.shape)} needed for the backward pass was modified by an inplace "
            "operation after the forward pass; step the optimizer after loss.backward()"
        )
    return x


# torch.compile must not trace the tables of leaves: new entries would be missing while the graph is built,
# and each would recompile all earlier graphs. It can run a function of constants instead of tracing it, and a
# leaf is made of constants; an object built in the traced function is not one, and its fields are not set.
def run_while_compiling(function):
    function._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, which imports a lot
    return function
