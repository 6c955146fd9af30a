"""Values with derivatives of their own, which JAX keeps in every transform.

Where a `lax.scan` is differentiated in reverse mode, JAX 0.10 moves what does not change out of it, and drops
the rules of `jax.custom_jvp`, and so of `lax.custom_root`: second derivatives become zero, and those that do
not exist raise nothing. It keeps primitives as they are.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

_with_tangent = jax.extend.core.Primitive("with_tangent")


def with_tangent(rule, value, *inputs):
    """`value`, of which `rule(live, value, inputs, tangents)` is the tangent, for those of the inputs `live`.

    The rule itself is differentiated for derivatives of higher order. It may close over no traced values. Its
    matrix products have the precision that is the default here.
    """
    precision = jax.config.jax_default_matmul_precision

    def precise(*args):
        with jax.default_matmul_precision(precision):
            return rule(*args)

    return _with_tangent.bind(value, *inputs, rule=precise)


@_with_tangent.def_impl
@_with_tangent.def_abstract_eval
def _value(value, *inputs, rule):
    return value


def _differentiate(primals, tangents, *, rule):
    value, (_, *inputs) = _with_tangent.bind(*primals, rule=rule), primals
    given = enumerate(tangents[1:])
    live = {i: t for i, t in given if type(t) is not ad.Zero and t.dtype != jax.dtypes.float0}
    if not live:
        return value, ad.Zero.from_primal_value(value)
    return value, rule(tuple(live), value, inputs, [*live.values()])


def _vectorize(arrays, axes, *, rule):
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    front = lambda x, axis: x if axis is None else jnp.moveaxis(x, axis, 0)
    value, *inputs = map(front, arrays, axes)
    if axes[0] is None:  # the tangent may be mapped
        value = jnp.broadcast_to(value, (size, *value.shape))
    own = [None if axis is None else 0 for axis in axes[1:]]

    def each(live, value, inputs, tangents):
        in_axes = (0, own, [own[i] for i in live])
        return jax.vmap(partial(rule, live), in_axes, axis_size=size)(value, inputs, tangents)

    return with_tangent(each, value, *inputs), 0


ad.primitive_jvps[_with_tangent] = _differentiate
batching.primitive_batchers[_with_tangent] = _vectorize
mlir.register_lowering(_with_tangent, lambda context, value, *inputs, rule: [value])
