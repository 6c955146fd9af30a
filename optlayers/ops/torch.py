"""The seam for PyTorch: see `optlayers.ops.Ops` for what each function does."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import math

import numpy as np
import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from .encoding import decode, encode

sqrt, exp, log, isfinite = torch.sqrt, torch.exp, torch.log, torch.isfinite
sin, cos, arctan2, moveaxis = torch.sin, torch.cos, torch.arctan2, torch.movedim
multiply_add = torch.addcmul
inf, nan = torch.inf, torch.nan


def constant(values, like):
    # Copied: torch would share the caller's memory, warn if it is read-only and refuse negative strides.
    tensor = torch.as_tensor(np.array(values))
    return tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else torch.int64)


def full(shape, value, like):
    return torch.full(tuple(shape), value, dtype=like.dtype, device=like.device)


def eye(n, like):
    return torch.eye(n, dtype=like.dtype, device=like.device)


def eps(x):
    return torch.finfo(x.dtype).eps


def widest(x):
    if x.device.type == "mps":
        return x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def real(x):
    return x.real if x.is_complex() else x


imag, complex_number = torch.imag, torch.complex


def cast(x, like):
    return x.to(like.dtype.to_complex() if x.is_complex() else like.dtype)


def to_int(x):
    return x.to(torch.int64)


def where(condition, x, y):
    return torch.where(condition, x, y)


def maximum(x, y):
    return torch.maximum(x, y) if isinstance(y, Tensor) else torch.clamp(x, min=y)


def minimum(x, y):
    return torch.minimum(x, y) if isinstance(y, Tensor) else torch.clamp(x, max=y)


def sum(x, axis, keepdims=False):
    return torch.sum(x, dim=axis, keepdim=keepdims)


def norm(x):
    return torch.linalg.vector_norm(x, dim=-1)


def amax(x, axis, keepdims=False):
    if x.shape[axis] == 0:
        return torch.sum(x, dim=axis, keepdim=keepdims)
    return torch.amax(x, dim=axis, keepdim=keepdims)


def any(x, axis=None):
    return torch.any(x) if axis is None else torch.any(x, dim=axis)


def all(x, axis=None):
    return torch.all(x) if axis is None else torch.all(x, dim=axis)


def concat(arrays, axis):
    return torch.cat(list(arrays), dim=axis)


def stack(arrays, axis):
    return torch.stack(list(arrays), dim=axis)


def reshape(x, shape):
    return torch.reshape(x, tuple(shape))


def broadcast_to(x, shape):
    return torch.broadcast_to(x, tuple(shape))


def put(x, index, value):
    x[index] = value
    return x


def take(x, indices, axis=-1):
    return torch.index_select(x, axis, indices)


def argsort(x):
    return torch.argsort(x, dim=-1, stable=True)


def scatter_add(values, indices, size):
    zeros = torch.zeros((*values.shape[:-1], size), dtype=values.dtype, device=values.device)
    return torch.index_add(zeros, -1, indices, values)


def diagonal(x):
    return torch.diagonal(x, dim1=-2, dim2=-1)


def add_diagonal(x, values):
    torch.diagonal(x, dim1=-2, dim2=-1).add_(values)
    return x


def cholesky(x):
    # cholesky_ex reports failure in `info` without a device synchronisation.
    factor, info = torch.linalg.cholesky_ex(x)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


def cholesky_solve(factor, rhs):
    half = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def inverse_triangular(factor):
    return torch.linalg.solve_triangular(factor, eye(factor.shape[-1], factor), upper=False)


def lu_factor(x):
    # .contiguous(): lu_solve is silently wrong on the CPU for some non-contiguous factors (torch 2.13).
    factor, pivots, _ = torch.linalg.lu_factor_ex(x)
    return factor.contiguous(), pivots.contiguous()


def lu_solve(factor, rhs, transpose=False):
    return torch.linalg.lu_solve(*factor, rhs, adjoint=transpose)


def eigh(x):
    # On a matrix that is not finite LAPACK may fail, which raises for the whole batch, or return numbers.
    finite = torch.isfinite(x).flatten(-2).all(-1)[..., None]
    values, vectors = torch.linalg.eigh(torch.where(finite[..., None], x, 0.0))
    return torch.where(finite, values, torch.nan), torch.where(finite[..., None], vectors, torch.nan)


def while_loop(condition, body, state):
    while bool(condition(state)):
        state = body(state)
    return state


def repeat(count, body, state):
    for _ in range(count):
        state = body(state)
    return state


def cond(condition, true, false, *operands):
    return true(*operands) if bool(condition) else false(*operands)


def _is_known(x) -> bool:
    """Whether `x` has a value that Python may read: it is not traced, nor mapped by torch.func.vmap."""
    if torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return not isinstance(x, FakeTensor)


def on_rows(mask, function, data, ndims, state):
    rows = torch.nonzero(mask)[:, 0]
    if not len(rows):
        return state
    if 2 * len(rows) > len(mask):
        return function(data, state)
    # Arrays of one row are what the batch shares: another row comes along, to be left alone.
    if len(rows) == 1:
        rows = torch.cat([rows, (rows + 1) % len(mask)])
    is_batched = [x.ndim > own and len(x) == len(mask) for x, own in zip(data, ndims, strict=True)]
    part = [x[rows] if batched else x for x, batched in zip(data, is_batched, strict=True)]
    take = lambda x: x[rows] if len(x) == len(mask) else x
    result = function(part, torch.utils._pytree.tree_map(take, state))
    put = lambda old, new: torch.index_copy(old, 0, rows, new) if len(old) == len(mask) else new
    return torch.utils._pytree.tree_map(put, state, result)


# Of the largest array. With 0.5 or 4 MiB dense problems of 100 variables take 10 % longer, uncut 40 %.
BLOCK_BYTES = 2**21


def in_blocks(function, arrays, ndims, size):
    is_batched = [x.ndim > own for x, own in zip(arrays, ndims, strict=False)]
    batch = max([len(x) for x, batched in zip(arrays, is_batched, strict=True) if batched], default=1)
    has_matrices = builtins.any(batched and own > 1 for batched, own in zip(is_batched, ndims, strict=False))
    count = min(batch, -(-batch * size * arrays[0].element_size() // BLOCK_BYTES))
    if count < 2 or not has_matrices or arrays[0].device.type != "cpu":
        return function(*arrays)
    parts = [
        x.tensor_split(count) if len(x) == batch and batched else [x] * count
        for x, batched in zip(arrays, is_batched, strict=True)
    ]
    results = [function(*part) for part in zip(*parts, strict=True)]
    return [torch.cat(outputs) for outputs in zip(*results, strict=True)]


def cond_or_both(condition, both, false, operand):
    return false(operand) if _is_known(condition) and not bool(condition) else both(operand)


def stop_gradient(x):
    return x.detach()


def _outside(function, *arrays):
    """`function` of the arrays outside torch.func's transformations, with the axes that vmap has hidden."""
    plain = []
    for x in arrays:
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
        plain.append(x)
    with temporarily_clear_interpreter_stack():
        return function(*(x.detach() for x in plain))


def on_host(function, *arrays):
    _outside(lambda *values: function(*(x.cpu().numpy() for x in values)), *arrays)


def reported(x, failed, function, *arrays):
    on_host(function, *arrays)
    return x


def call_host(function, shapes, active, *arrays):
    results = function(*(x.cpu().numpy() for x in (active, *arrays)))
    return [torch.as_tensor(x, dtype=arrays[0].dtype, device=arrays[0].device) for x in results]


def _detach(tree):
    return torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)


def call_detached(function, *args):
    with _undifferentiated():
        return _detach(function(*_detach(args)))


def frozen_jvp(function, x):
    return lambda dx: torch.func.jvp(lambda z: function(z), (x.detach(),), (dx,))[1]


def jacobian(function, x):
    size, x = math.prod(x.shape[1:]), x.detach()
    basis = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
    basis = basis.expand(size, *x.shape)
    # By reverse mode: torch nests no forward mode in another, and the layer may be inside one. Both ways are
    # needed: torch.func cannot work under hooks for saved tensors, nor plain autograd under torch.func.
    if _is_transformed() or torch.compiler.is_dynamo_compiling():
        pullback = torch.func.vjp(function, x)[1]
        rows = torch.func.vmap(lambda e: pullback(e)[0])(basis)
    else:
        with torch.enable_grad(), _kept_as_they_are():
            at = x.requires_grad_()
            rows = _pull_back(function(at), at, basis, is_grads_batched=True)
    return rows.detach().reshape(size, x.shape[0], size).movedim(0, -2)


def _kept_as_they_are():
    """Within it, hooks for saved tensors such as a checkpoint's do not see those of an inner graph."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: (x, x._version), _if_unchanged)


def _if_unchanged(saved):
    """The saved tensor; torch itself does not look for changes of those that hooks keep."""
    x, version = saved
    if x._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(x.shape)} needed for the backward pass was modified by an inplace "
            "operation after the forward pass; step the optimizer after loss.backward()"
        )
    return x


def tree_flatten(tree):
    leaves, structure = torch.utils._pytree.tree_flatten(tree)
    return leaves, lambda new: torch.utils._pytree.tree_unflatten(list(new), structure)


def put_row(rows, index, row):
    if _is_transformed():  # vmap maps the row and perhaps not the rows, which then cannot hold it
        return torch.select_scatter(rows, row, 1, index)
    rows[:, index] = row
    return rows


def leading(rows, count):
    return rows[:, :count]


def any_mapped(mask):
    return _outside(lambda x: bool(torch.any(x)), mask)


@contextlib.contextmanager
def _undifferentiated():
    """Nothing is recorded, in either mode, as long as results are detached one by one."""
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        yield


def frozen(function, x):
    def detached(z):
        with _undifferentiated():
            return function(z).detach()

    return detached


def tangent_map(function, x):
    x = x.detach()
    return _linear_map(function if _is_transformed() else _Recorded(function, x), x, transposed=False)


# Linear solves that are differentiated by further solves. Plain autograd keeps the graph of the function;
# torch.func cannot, as its levels differ between a layer's call and its rules: there all tensors that the
# function uses travel with the rule as inputs of their own.


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


class _Recorded:
    """A function whose graph at `x` is made once, and then serves all its linear maps."""

    def __init__(self, function, x):
        self.function, self.x, self.graph = function, x, None

    def __call__(self, x):
        return self.function(x)

    def record(self):
        if self.graph is None:
            with torch.enable_grad(), _kept_as_they_are():
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
            with torch.enable_grad(), _kept_as_they_are():
                weight = torch.zeros_like(x).requires_grad_()
                image, at = _pull_back(image, at, weight, create_graph=True), weight
        product = lambda w: _pull_back(image, at, w)

    def apply(w):
        with _undifferentiated():
            return product(w).detach()

    return apply


def _pull_back(y, x, weight, **options):
    if not y.requires_grad:
        return torch.zeros(weight.shape[: weight.ndim - y.ndim] + x.shape, dtype=x.dtype, device=x.device)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True, **options}
    return torch.autograd.grad(y, x, weight, **options)[0]


def pullback(function, x):
    if _is_transformed():
        back = torch.func.vjp(function, x.detach())[1]
        return lambda v: back(v)[0]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        image = function(at)
    return lambda v: _pull_back(image, at, v, create_graph=create_graph)


def _tensors(tree):
    """The tensors in nested arguments of a function; torch's own walk of them is several times slower."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(item)


class _Used(torch.overrides.TorchFunctionMode):
    """Finds the tensors that enter a computation and were neither given nor computed in it."""

    def __init__(self, *given):
        super().__init__()
        # The tensors themselves, lest an id be used again.
        self.found, self.own = {}, {id(x): x for x in given}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.found.update((id(x), x) for x in _tensors((args, kwargs)) if id(x) not in self.own)
        output = function(*args, **(kwargs or {}))
        self.own.update((id(x), x) for x in _tensors(output))
        return output


class _Replaced(torch.overrides.TorchFunctionMode):
    """Puts other tensors in the places of those that `_Used` has found."""

    def __init__(self, found, others):
        super().__init__()
        self.others = dict(zip(found, others, strict=True))

    def replace(self, tree):
        if not builtins.any(id(x) in self.others for x in _tensors(tree)):
            return tree
        return torch.utils._pytree.tree_map(lambda x: self.others.get(id(x), x), tree)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*self.replace(args), **self.replace(kwargs or {}))


def _explicit(function, x):
    """A function (x, *used) for `function`, and the tensors `used`, detached."""
    with _undifferentiated(), _Used(x) as mode:
        function(x)
    found = mode.found

    def explicit(z, *used):
        with _Replaced(found, used) as mode:
            return mode.replace(function(z))

    return explicit, [y.detach() for y in found.values()]


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


def _inverted(r, solve, transposed, *frozen):
    with _undifferentiated(), torch.autocast(r.device.type, enabled=False):
        solution = solve(r.detach(), transposed, *frozen).detach()
    return solution + _Increment.apply(r, solve, transposed, *frozen)


def increment(solve, r, *frozen):
    if torch.compiler.is_compiling():
        # A function with rules of its own cannot be traced; linear operations can.
        return solve(r - r.detach(), False, *(x.detach() for x in frozen))
    return _Increment.apply(r, solve, False, *(x.detach() for x in frozen))


def solve_increment(function, x, solve, r, *constants):
    x, count = x.detach(), len(constants)
    if _is_transformed():
        explicit, used = _explicit(function, x)
        applied = lambda used: lambda z: explicit(z, *used)
    else:
        recorded, used = _Recorded(function, x), []
        applied = lambda _: recorded
        if r.requires_grad:
            # Not in the backward pass, when the weights of modules that it closes over may be others.
            recorded.record()

    def invert(r, transposed, x, *tensors):
        return solve(_linear_map(applied(tensors[count:]), x, transposed), r, *tensors[:count])

    return increment(invert, r, x, *constants, *used)


def take_rows(x, rows):
    rows = rows.reshape(rows.shape + (1,) * (x.ndim - 2))
    return torch.gather(x, 1, rows.expand(*rows.shape[:2], *x.shape[2:]))


def put_rows(x, rows, values):
    place = (torch.arange(x.shape[0], device=x.device)[:, None], rows)
    is_recorded = torch.is_grad_enabled() or _is_transformed()
    return torch.index_put(x, place, values) if is_recorded else x.index_put_(place, values)


def rows(like, limit):
    return torch.zeros_like(like)[:, None].repeat_interleave(min(limit, 32), 1)


def grown(x, k):
    return x if k < x.shape[1] else torch.cat([x, torch.zeros_like(x)], 1)


def weighted_sum(weights, arrays):
    terms = [(w, x) for w, x in zip(weights, arrays, strict=True) if w != 0]
    total = terms[0][0] * terms[0][1]
    for w, x in terms[1:]:
        total = torch.add(total, x, alpha=w)
    return total


def largest(x):
    return _outside(lambda x: int(x.max()), x)


def is_constant(x):
    return not (x.requires_grad or _is_dual())


def bounded_repeat(count, limit, body, state):
    return repeat(count, body, state)


def explicit(functions, examples):
    given = [x for arguments in examples for x in arguments]
    if _is_dual():
        return [lambda *args, f=f: f(*args[:-1]) for f in functions], []
    with _undifferentiated(), _Used(*given) as mode:
        for function, arguments in zip(functions, examples, strict=True):
            function(*arguments)
    theta = [x for x in mode.found.values() if x.requires_grad and torch.is_grad_enabled()]
    ids = [id(x) for x in theta]

    def call(function, *args):
        *args, others = args
        if not torch.is_grad_enabled():
            return function(*args)
        if [id(x) for x in others] == ids:  # the very tensors that function uses: there is nothing to replace
            output = function(*args)
            is_missing = _has_other_leaves(output, (*args, *others))
        else:
            with _Used(*args, *others) as used, _Replaced(ids, others) as mode:
                output = mode.replace(function(*args))
            is_missing = builtins.any(x.requires_grad for x in used.found.values())
        if is_missing:
            raise RuntimeError(
                "func uses a tensor with a gradient that it did not use when it was first called, and its "
                "gradient would be missing; pass it in args, or let it enter every call, if only times zero"
            )
        return output

    return [lambda *args, f=f: call(f, *args) for f in functions], theta


def _has_other_leaves(y, inputs):
    """Whether `y` is computed from tensors with gradients other than by way of `inputs`."""
    edges = torch.autograd.graph.get_gradient_edge
    nodes = [edges(y).node] if y.requires_grad else []
    seen = {edges(x).node for x in inputs if x.requires_grad}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            return True
        nodes += [below for below, _ in node.next_functions]
    return False


def _is_dual() -> bool:
    """Whether derivatives are taken by other means than the tape."""
    return _is_transformed() or forward_ad._current_level >= 0


def vjp(function, x, live):
    wanted = [i for i, y in enumerate(live) if y.requires_grad]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = function(x, live)

    def pull(cotangents):
        pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y.requires_grad]
        sources = [x, *[live[i] for i in wanted]]
        differentiable, weights = zip(*pairs, strict=True)
        x_bar, *rest = torch.autograd.grad(differentiable, sources, weights, allow_unused=True)
        bars = [None] * len(live)
        for i, bar in zip(wanted, rest, strict=True):
            bars[i] = bar
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
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *cotangents):
        inputs = _separated(ctx.saved_tensors)
        return None, None, *ctx.sweep(inputs, cotangents)


def replayed(values, replay, sweep, inputs):
    return replay(inputs) if _is_dual() else _Replayed.apply(values, sweep, *inputs)


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


# torch.compile must not trace the tables: their new entries would be missing while the graph is built, and
# each entry would recompile all earlier graphs. It can run a function of constants instead of tracing it, and
# a leaf is made of constants; an object built in the traced function is not one, and its fields are not set.
def run_while_compiling(function):
    function._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, which imports a lot
    return function


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


@torch.library.custom_op("optlayers::leaf", mutates_args=())
def _leaf(solve: str, inputs: list[Tensor]) -> list[Tensor]:
    from . import torch as ops

    # An operator may not return memory that it was given, nor the same memory twice.
    seen, outputs = {x.untyped_storage().data_ptr() for x in inputs}, []
    for output in _from_text(solve)(ops, *inputs):
        output = output.contiguous()
        outputs.append(output.clone() if output.untyped_storage().data_ptr() in seen else output)
        seen.add(output.untyped_storage().data_ptr())
    return outputs


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
    text = _text_of_parts(_parts(solve)) if torch.compiler.is_dynamo_compiling() else _text(solve)
    return _leaf(text, [x.detach() for x in inputs])


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


def guard(x, order, message):
    if torch.compiler.is_compiling():
        _keep_whole()
    return x + _zero(x, order, message)


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
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Zeros whose derivatives raise: without them that of the result would be missing in silence.
            message = "this gradient has no derivative of its own; use gradient='exact' or 'smoothed'"
            stops = [_zero(x, 0, message) for x in (*inputs, *cotangents)]
            results = [r if r is None else r + torch.stack(stops).sum() for r in results]
        return None, None, *([None] * ctx.count), *results


def surrogate_gradient(values, inputs, backward):
    return _Surrogate.apply(backward, len(values), *(v.detach() for v in values), *inputs)
