"""One thread, double precision and strict promotion in JAX, seeded random numbers, both frameworks."""

import functools
import importlib
import os

import numpy as np
import pytest

from frontends import FRONTENDS

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch its share of a GPU
# Each test compiles for one call: eight times faster to compile, two to three times slower to run.
QUICK_TO_COMPILE = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_llvm_disable_expensive_passes": "true",
}
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{flag}={x}" for flag, x in QUICK_TO_COMPILE.items()))

try:
    import jax
except ModuleNotFoundError:
    jax = None
else:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")

try:
    import torch
except ModuleNotFoundError:
    torch = None
else:
    torch.set_num_threads(1)

FRAMEWORKS = ("torch", "jax")

# Nearly every test of these compiles a layer of its own, for ten seconds and more.
COMPILED_ANEW = {
    "test_batching.py",
    "test_cone_layers.py",
    "test_cones.py",
    "test_cvxpy_layer.py",
    "test_degenerate.py",
    "test_gradients.py",
    "test_outcomes.py",
    "test_sat.py",
    "test_solvers.py",
    "test_sparse.py",
}


@functools.cache
def has_gpu():
    on_torch = torch is not None and torch.cuda.is_available()
    return on_torch or (jax is not None and jax.default_backend() == "gpu")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow_to_compile: becomes slow in JAX, which compiles it anew")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        in_jax = hasattr(item, "callspec") and "jax" in item.callspec.id.split("-")
        if in_jax and (item.get_closest_marker("slow_to_compile") or item.path.name in COMPILED_ANEW):
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs a GPU")


@pytest.fixture
def rng():
    """A NumPy generator, seeded anew for every test."""
    return np.random.default_rng(0)


@pytest.fixture(params=FRAMEWORKS, scope="session")
def ops(request):
    """The module `optlayers.ops.torch`, then `optlayers.ops.jax`."""
    pytest.importorskip(request.param)
    return importlib.import_module(f"optlayers.ops.{request.param}")


@pytest.fixture(params=FRAMEWORKS, scope="session")
def frontend(request):
    """`optlayers.torch`, then `optlayers.jax`, as `frontends` presents them."""
    pytest.importorskip(request.param)
    return FRONTENDS[request.param]()


@pytest.fixture(scope="session")
def torch_frontend():
    """For what does not depend on the framework."""
    pytest.importorskip("torch")
    return FRONTENDS["torch"]()
