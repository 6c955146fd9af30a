"""What users do to a function of arrays in torch and in JAX, each as a way to get one of a few results.

A transform takes a `Call`, a layer at its values, and returns an array that `RESULTS` has by one plain route.
Taken through the closed form of the layer, that route is the oracle for all transforms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Call:
    """A layer of `transform_layers` at its values, also as a function of one vector theta of all of them.

    Attributes:
        values: the arrays of the case.
        theta: all their entries (p,).
        weights: make a scalar, `loss`, of the output; its second derivatives involve those of every entry.
        stacked: two sets of values on a new axis in front of those that the batch does not share; the second
            set has the batch in reverse.
        thetas: the entries of both sets (2, p).
    """

    def __init__(self, frontend, case, function, dtype="float64"):
        self.frontend, self.case, self.function, self.dtype = frontend, case, function, dtype
        pairs = list(zip(case.values, case.axes, strict=True))
        stacked = [v if axis is None else np.stack([v, v[::-1]]) for v, axis in pairs]
        sets = [
            np.broadcast_to(s, (2, *v.shape)).reshape(2, -1) for s, (v, _) in zip(stacked, pairs, strict=True)
        ]
        thetas = np.concatenate(sets, 1)
        self.values, self.stacked = ([frontend.array(v, dtype) for v in vs] for vs in (case.values, stacked))
        self.theta, self.thetas = frontend.array(thetas[0], dtype), frontend.array(thetas, dtype)
        shape = frontend.numpy(function(*self.values)).shape
        self.weights = frontend.array(np.random.default_rng(1).uniform(0.5, 1.5, shape), dtype)

    @property
    def arrays(self):
        return self.values, self.stacked, self.theta, self.thetas, self.weights

    def with_arrays(self, arrays):
        """The same call at other arrays, such as traced ones."""
        call = copy.copy(self)
        call.values, call.stacked, call.theta, call.thetas, call.weights = arrays
        return call

    def flat(self, theta):
        ends = np.cumsum([v.size for v in self.case.values]).tolist()
        parts = zip([0, *ends], ends, self.case.values, strict=False)
        return self.function(*(theta[i:j].reshape(v.shape) for i, j, v in parts))

    def loss(self, theta):
        return (self.weights * self.flat(theta)).sum()

    def loss_of_values(self, *values):
        return (self.weights * self.function(*values)).sum()

    def flatten(self, arrays):
        return self.frontend.xp.concatenate([x.reshape(-1) for x in arrays])


# Results by a plain route


def value(call):
    return call.function(*call.values)


def gradient(call):
    return call.frontend.transforms.grad(call.loss)(call.theta)


def jacobian(call):
    return call.frontend.transforms.jacrev(call.flat)(call.theta)


def hessian(call):
    transforms = call.frontend.transforms
    return transforms.jacfwd(transforms.jacrev(call.loss))(call.theta)


def _on_each(function):
    return lambda call: call.frontend.xp.stack([function(call)(theta) for theta in call.thetas])


RESULTS = {
    "value": value,
    "gradient": gradient,
    "jacobian": jacobian,
    "hessian": hessian,
    "tangent": lambda call: jacobian(call) @ call.theta,
    "values": _on_each(lambda call: call.flat),
    "gradients": _on_each(lambda call: call.frontend.transforms.grad(call.loss)),
    "hessians": _on_each(
        lambda call: call.frontend.transforms.jacfwd(call.frontend.transforms.jacrev(call.loss))
    ),
    "nothing": lambda call: call.flatten(
        [0 * v for v, axis in zip(call.values, call.case.axes, strict=True) if axis is None]
        or [call.theta[:0]]
    ),
}


class Transform(NamedTuple):
    """A way to get `result`, one of `RESULTS`.

    Args:
        apply: takes a `Call`.
        tolerance: where it is not that of the case.
        traced: in JAX, compile the whole; else `apply` does so itself.
    """

    result: str
    apply: Callable[[Call], Any]
    tolerance: float = 0.0
    traced: bool = True


def _composed(*names, of="flat"):
    """The composition of transformations of the framework, the last name the innermost, at theta."""

    def apply(call):
        function = getattr(call, of)
        for name in reversed(names):
            function = getattr(call.frontend.transforms, name)(function)
        return function(call.thetas if names[0] == "vmap" else call.theta)

    return apply


def _jvp(call):
    """The derivative in the direction of theta itself, in which all entries move."""
    return call.frontend.transforms.jvp(call.flat, (call.theta,), (call.theta,))[1]


def _vjp(call):
    return call.frontend.transforms.vjp(call.flat, call.theta)[1](call.weights)[0]


def _vmap(call):
    """Mapped over all that the batch does not share."""
    return call.frontend.transforms.vmap(call.function, call.case.axes)(*call.stacked)


def _gradient_through_vmap(call):
    vmap, grad = call.frontend.transforms.vmap, call.frontend.transforms.grad
    return grad(lambda thetas: (call.weights[None] * vmap(call.flat)(thetas)).sum())(call.thetas)


def _single_precision(call):
    arrays = (call.frontend.numpy(x) for x in (call.theta, call.weights))
    theta, call.weights = (call.frontend.array(x, "float32") for x in arrays)
    compiled = call.frontend.compiled(
        lambda theta: (call.flat(theta), call.frontend.transforms.grad(call.loss)(theta))
    )
    output, result = compiled(theta)
    assert {call.frontend.dtype(x) for x in (output, result)} == {"float32"}
    return result


def _empty_batch(call):
    """No problems: the gradients of what they share are zero."""
    numbers = [v if axis is None else v[:0] for v, axis in zip(call.case.values, call.case.axes, strict=True)]
    outputs, gradients = call.frontend.differentiable(lambda *v: (call.function(*v),))(
        numbers, [np.zeros((0, *call.weights.shape[1:]))]
    )
    assert outputs[0].shape == (0, *call.weights.shape[1:])
    return call.frontend.array(np.concatenate([g.ravel() for g in gradients]))


COMMON = {
    "call": Transform("value", value, traced=False),
    "grad": Transform("gradient", gradient),
    "vjp": Transform("gradient", _vjp),
    "jvp": Transform("tangent", _jvp),
    "jacrev": Transform("jacobian", jacobian),
    "jacfwd": Transform("jacobian", _composed("jacfwd")),
    "hessian": Transform("hessian", _composed("hessian", of="loss")),
    "jacrev of jacrev": Transform("hessian", _composed("jacrev", "jacrev", of="loss")),
    "jacrev of jacfwd": Transform("hessian", _composed("jacrev", "jacfwd", of="loss")),
    "jacfwd of jacfwd": Transform("hessian", _composed("jacfwd", "jacfwd", of="loss")),
    "vmap": Transform("values", _vmap),
    "vmap of grad": Transform("gradients", _composed("vmap", "grad", of="loss")),
    "vmap of hessian": Transform("hessians", _composed("vmap", "hessian", of="loss")),
    "grad of vmap": Transform("gradients", _gradient_through_vmap),
    "float32": Transform("gradient", _single_precision, tolerance=1e-4, traced=False),
    "empty batch": Transform("nothing", _empty_batch, traced=False),
}


def run(transform, call):
    """The result as a NumPy array."""
    frontend = call.frontend
    if frontend.name == "jax" and transform.traced:
        result = frontend.compiled(lambda arrays: transform.apply(call.with_arrays(arrays)))(call.arrays)
    else:
        result = transform.apply(copy.copy(call))
    return frontend.numpy(result)


class Subject:
    """A layer beside its closed form, and the results of the latter, each computed once."""

    def __init__(self, frontend, case):
        self.layer = Call(frontend, case, case.layer(frontend))
        self.exact = Call(frontend, case, frontend.transforms.vmap(case.exact(frontend), case.axes))
        self._results = {}

    def expected(self, result):
        if result not in self._results:
            self._results[result] = run(Transform(result, RESULTS[result]), self.exact)
        return self._results[result]

    def error(self, transform):
        """Difference from the exact result, relative to its largest entry or to 1."""
        actual, expected = run(transform, self.layer), self.expected(transform.result)
        assert actual.shape == expected.shape
        return np.abs(actual - expected).max(initial=0.0) / max(1.0, np.abs(expected).max(initial=0.0))
