"""The two frontends behind one interface, so that a test is written once: NumPy in, NumPy out."""

import contextlib
import importlib

import numpy as np

COMPLEX = {"float32": "complex64", "float64": "complex128"}


def dtype_of(x, dtype):
    """`dtype`, or the complex one of its precision if `x` is complex."""
    return COMPLEX.get(dtype, dtype) if np.iscomplexobj(x) else dtype


class Torch:
    """`optlayers.torch`, and what a test needs of torch."""

    name = "torch"

    def __init__(self):
        self.framework = importlib.import_module("torch")
        self.module = importlib.import_module("optlayers.torch")
        self.CvxpyLayer, self.implicit = self.module.CvxpyLayer, self.module.implicit
        self.xp = self.framework
        self.transforms = self.framework.func

    def array(self, x, dtype="float64"):
        return self.framework.tensor(np.asarray(x), dtype=getattr(self.framework, dtype_of(x, dtype)))

    def compiled(self, function):
        return function

    def mixing_types(self):
        """Within it, arrays of different types may meet."""
        return contextlib.nullcontext()

    def numpy(self, x):
        return x.detach().cpu().numpy()

    def dtype(self, x):
        return str(x.dtype).removeprefix("torch.")

    def differentiable(self, function, dtype="float64"):
        """(values, cotangents) to (outputs, gradients) of a function with a tuple of outputs."""

        def call(values, cotangents):
            tensors = [self.array(v, dtype).requires_grad_() for v in values]
            outputs = function(*tensors)
            weights = [self.array(c, dtype) for c in cotangents]
            gradients = self.framework.autograd.grad(outputs, tensors, weights, materialize_grads=True)
            return [self.numpy(o) for o in outputs], [self.numpy(g) for g in gradients]

        return call

    def check_derivatives(self, function, values, order):
        """Compare the derivatives of `function` up to `order` with differences, in both modes."""
        check = self.framework.autograd
        tensors = [self.array(v).requires_grad_() for v in values]
        tolerance = {"eps": 1e-5, "atol": 1e-6, "rtol": 1e-5}
        assert check.gradcheck(function, tensors, check_forward_ad=True, **tolerance)
        if order == 2:
            assert check.gradgradcheck(
                function, tensors, check_fwd_over_rev=True, fast_mode=True, **tolerance
            )


class Jax:
    """`optlayers.jax`, and what a test needs of JAX."""

    name = "jax"

    def __init__(self):
        self.framework = importlib.import_module("jax")
        self.module = importlib.import_module("optlayers.jax")
        self.CvxpyLayer, self.implicit = self.module.CvxpyLayer, self.module.implicit
        self.xp = self.framework.numpy
        self.transforms = self.framework
        # XLA without the optimisations that cost most of the time of these tests, where it knows the options.
        self.options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
        try:
            self.compiled(abs)(1.0)
        except Exception:
            self.options = {}

    def compiled(self, function):
        return self.framework.jit(function, compiler_options=self.options)

    def mixing_types(self):
        """As of `Torch`; the tests are else strict about it."""
        return self.framework.numpy_dtype_promotion("standard")

    def array(self, x, dtype="float64"):
        return self.xp.asarray(np.asarray(x), dtype=dtype_of(x, dtype))

    def numpy(self, x):
        return np.asarray(x)

    def dtype(self, x):
        return str(x.dtype)

    def differentiable(self, function, dtype="float64"):
        """As of `Torch`; compiled once for each combination of shapes.

        JAX's gradients of complex numbers are the conjugates of torch's, and so are its cotangents.
        """

        def traced(values, cotangents):
            outputs, pullback = self.framework.vjp(lambda *v: tuple(function(*v)), *values)
            gradients = pullback(tuple(c.conj() for c in cotangents))
            return outputs, [g.conj() for g in gradients]

        compiled = self.compiled(traced)

        def call(values, cotangents):
            arrays = [[self.array(x, dtype) for x in xs] for xs in (values, cotangents)]
            outputs, gradients = compiled(*arrays)
            return [self.numpy(o) for o in outputs], [self.numpy(g) for g in gradients]

        return call

    def check_derivatives(self, function, values, order):
        """As of `Torch`; not compiled, which would take several times as long."""
        check_grads = importlib.import_module("jax.test_util").check_grads
        arrays = [self.array(v) for v in values]
        with self.framework.disable_jit():
            check_grads(function, arrays, order, modes=("fwd", "rev"), eps=1e-5, atol=1e-6, rtol=1e-5)


FRONTENDS = {"torch": Torch, "jax": Jax}


def in_each_framework(cases, fast_in_jax):
    """Parameters (case, framework) of a test; in JAX, which compiles each, slow but for the fast ones."""
    import pytest  # which benchmarks do without

    return [
        pytest.param(
            (case, framework),
            id=f"{getattr(case, '__name__', case)}-{framework}",
            marks=[pytest.mark.slow] if framework == "jax" and case not in fast_in_jax else [],
        )
        for case in cases
        for framework in FRONTENDS
    ]
