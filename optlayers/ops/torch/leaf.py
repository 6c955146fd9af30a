"""A solver as one opaque operator of torch, with a rule for vmap and none for derivatives."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import torch
from torch import Tensor

from .. import Leaf
from ..encoding import decode, encode
from . import host
from .context import is_plain, run_while_compiling

# A custom operator takes tensors, numbers and strings only, so a leaf travels as text. The tables grow with
# the number of distinct solver settings, not of calls.
_texts: dict = {}
_leaves: dict = {}


def _text(solve) -> str:
    if solve not in _texts:
        text = encode(solve)
        _leaves[text], _texts[solve] = solve, text
    return _texts[solve]


def _from_text(text):
    if text not in _leaves:
        _leaves[text] = decode(text)
    return _leaves[text]


def _parts(x):
    if dataclasses.is_dataclass(x):
        fields = [f.name for f in dataclasses.fields(x) if f.init]
        return type(x), tuple([(name, _parts(getattr(x, name))) for name in fields])
    if isinstance(x, dict):
        return dict, tuple([(name, _parts(value)) for name, value in x.items()])
    if type(x) is tuple:
        return tuple, tuple([_parts(item) for item in x])
    # A number that differed between calls has become symbolic; guard_scalar gives its value back.
    is_number = isinstance(x, (int, float))
    return None, torch.fx.experimental.symbolic_shapes.guard_scalar(x) if is_number else x


def _assemble(parts):
    kind, content = parts
    if kind is None:
        return content
    if kind is tuple:
        return tuple(_assemble(item) for item in content)
    return kind(**{name: _assemble(part) for name, part in content})


@run_while_compiling
def _text_of_parts(parts):
    return _text(_assemble(parts))


def _run(solve: Leaf, inputs: list[Tensor]) -> list[Tensor]:
    if host.serves(solve, inputs):
        arrays = [x.numpy() for x in inputs]
        with np.errstate(all="ignore"):
            return host.to_tensors(solve(host, *arrays), arrays)
    ops = sys.modules[__package__]
    # An operator may not return memory that it was given, nor the same memory twice.
    seen, outputs = {x.untyped_storage().data_ptr() for x in inputs}, []
    for output in solve(ops, *inputs):
        output = output.contiguous()
        outputs.append(output.clone() if output.untyped_storage().data_ptr() in seen else output)
        seen.add(output.untyped_storage().data_ptr())
    return outputs


@torch.library.custom_op("optlayers::leaf", mutates_args=())
def _leaf(solve: str, inputs: list[Tensor]) -> list[Tensor]:
    return _run(_from_text(solve), inputs)


@_leaf.register_fake
def _(solve, inputs):
    shapes = _from_text(solve).output_shapes([tuple(x.shape) for x in inputs])
    dtypes = {"float": inputs[0].dtype, "int": torch.int64}
    return [inputs[0].new_empty(shape, dtype=dtypes[kind]) for shape, kind in shapes]


def _leaf_vmap(info, in_dims, text, inputs):
    """Fold the mapped axis into the batch axis: one call of the leaf on a larger batch."""
    solve, count = _from_text(text), info.batch_size
    ndims = solve.input_ndims[: len(inputs)]
    sizes = [
        x.shape[0 if dim is None else 1 if dim == 0 else 0]
        for x, dim, ndim in zip(inputs, in_dims[1], ndims, strict=True)
        if x.ndim - (dim is not None) > ndim
    ]
    batch = sizes[0] if sizes else 1

    def fold(x, dim, ndim):
        batched = x.ndim - (dim is not None) > ndim
        if dim is None and not batched:
            return x
        x = x[None] if dim is None else x.movedim(dim, 0)
        x = x if batched else x[:, None]
        own = x.shape[2:]
        return x.expand(count, batch, *own).reshape(count * batch, *own)

    folded = [fold(*args) for args in zip(inputs, in_dims[1], ndims, strict=True)]
    outputs = [x.reshape(count, batch, *x.shape[1:]) for x in _leaf(text, folded)]
    return outputs, [0] * len(outputs)


_leaf.register_vmap(_leaf_vmap)


def leaf(solve, inputs):
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "a graph of torch.jit.trace would go on with factors of the data that it was made from; "
            "use torch.export or torch.compile"
        )
    if is_plain(inputs):  # an operator would import torch._dynamo, at first, for more than a second
        return _run(solve, [x.detach() for x in inputs])
    text = _text_of_parts(_parts(solve)) if torch.compiler.is_dynamo_compiling() else _text(solve)
    return _leaf(text, [x.detach() for x in inputs])
