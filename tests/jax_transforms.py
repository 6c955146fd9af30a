"""What JAX does to a layer besides the transformations that it has in common with torch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transforms import COMMON, Transform


def _eager(call):
    return jax.grad(call.loss)(call.theta)


def _jit(call):
    return call.frontend.compiled(jax.grad(call.loss))(call.theta)


def _linearize(call):
    tangent = jax.linearize(call.flat, call.theta)[1]
    return jax.vmap(tangent, out_axes=-1)(jnp.eye(call.theta.size, dtype=call.theta.dtype))


def _vmap_in_scan(call):
    """Two steps of a scan, of which each maps the layer over problems of its own."""

    def step(carry, theta):
        return carry, jax.vmap(call.flat)(theta[None])[0]

    return lax.scan(step, 0, call.thetas)[1]


def _total(call):
    """The loss summed over both sets of values by a scan."""
    add = lambda total, theta: (total + call.loss(theta), None)
    return lambda thetas: lax.scan(add, jnp.zeros((), call.dtype), thetas)[0]


def _gradient_through_scan(call):
    return jax.grad(_total(call))(call.thetas)


def _hessian_through_scan(call):
    return jnp.einsum("ijik->ijk", jax.hessian(_total(call))(call.thetas))


def _checkpoint(call):
    return jax.grad(jax.checkpoint(call.loss))(call.theta)


def _debug_nans(call):
    with jax.debug_nans(True):
        return call.frontend.compiled(jax.grad(call.loss))(call.theta)


def _without_x64(call):
    with jax.enable_x64(False):
        theta, weights = call.theta.astype("float32"), call.weights.astype("float32")
        loss = lambda theta: (weights * call.flat(theta)).sum()
        gradient = call.frontend.compiled(jax.grad(loss))(theta)
    assert gradient.dtype == "float32"
    return gradient


def mesh_of_two(kind=AxisType.Auto):
    return Mesh(np.array(jax.devices()[:2]), ("batch",), axis_types=(kind,))


def _specs(call):
    return tuple(PartitionSpec() if axis is None else PartitionSpec("batch") for axis in call.case.axes)


def gradient_of_shards(loss, call, mesh):
    arguments = tuple(range(len(call.values)))
    placed = [
        jax.device_put(v, NamedSharding(mesh, spec))
        for v, spec in zip(call.values, _specs(call), strict=True)
    ]
    compiled = call.frontend.compiled(jax.grad(loss, arguments)).lower(*placed).compile()
    moves = ("all-gather", "all-to-all", "collective-permute")
    assert call.case.on_host or not any(word in compiled.as_text() for word in moves)
    return call.flatten([jnp.asarray(np.asarray(g)) for g in compiled(*placed)])


def _sharded(call):
    """The batch axis over two devices: shared gradients are summed, no data are gathered."""
    return gradient_of_shards(call.loss_of_values, call, mesh_of_two())


def _shard_map(call):
    def local(weights, *values):
        return lax.psum((weights * call.function(*values)).sum(), "batch")

    specs = (PartitionSpec("batch"), *_specs(call))
    total = jax.shard_map(local, mesh=mesh_of_two(), in_specs=specs, out_specs=PartitionSpec())
    return gradient_of_shards(partial(total, call.weights), call, mesh_of_two())


JAX = COMMON | {
    "grad, not compiled": Transform("gradient", _eager, traced=False),
    "jit of grad": Transform("gradient", _jit, traced=False),
    "linearize": Transform("jacobian", _linearize),
    "vmap in scan": Transform("values", _vmap_in_scan),
    "grad of scan": Transform("gradients", _gradient_through_scan),
    "hessian of scan": Transform("hessians", _hessian_through_scan),
    "checkpoint": Transform("gradient", _checkpoint),
    "debug_nans": Transform("gradient", _debug_nans, traced=False),
    "x64 off": Transform("gradient", _without_x64, tolerance=1e-4, traced=False),
    "inputs sharded over a mesh": Transform("gradient", _sharded, traced=False),
    "shard_map": Transform("gradient", _shard_map, traced=False),
}
