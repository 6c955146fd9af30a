"""Every layer under every transform: right, or refused with a message that says what to do instead."""

import importlib
import re

import pytest

from checks import assert_close
from frontends import FRONTENDS
from transform_layers import LAYERS
from transforms import Subject

# In JAX a layer compiles anew for each transform, and so do graphs of torch; these few stand for all.
ALWAYS = {
    "solve_qp": {"jit of grad", "vmap in scan", "inputs sharded over a mesh", "compile(fullgraph=True)"}
}
COMPILED = {"compile(fullgraph=True)", "export"}


def transforms_of(framework):
    module = importlib.import_module(f"{framework}_transforms")
    return getattr(module, framework.upper())


def product():
    """One entry for each framework that is there, layer and transform, slow ones marked."""
    for framework in FRONTENDS:
        try:
            transforms = transforms_of(framework)
        except ModuleNotFoundError:
            continue
        for layer in LAYERS:
            for name in transforms:
                quick = framework == "torch" and name not in COMPILED
                quick = quick or layer == "implicit" or name in ALWAYS.get(layer, ())
                marks = () if quick or name in refused(framework, layer) else pytest.mark.slow
                yield pytest.param(framework, layer, name, marks=marks, id=f"{framework}-{layer}-{name}")


def refused(framework, layer):
    return LAYERS[layer].refuses.get(framework, {})


@pytest.fixture(scope="module")
def subject_of():
    subjects = {}

    def find(framework, layer):
        if (framework, layer) not in subjects:
            subjects[framework, layer] = Subject(FRONTENDS[framework](), LAYERS[layer])
        return subjects[framework, layer]

    return find


@pytest.mark.parametrize("framework, layer, name", [*product()])
def test_layer_under_transform(framework, layer, name, subject_of):
    subject, transform = subject_of(framework, layer), transforms_of(framework)[name]
    if name in refused(framework, layer):
        with pytest.raises(Exception, match=refused(framework, layer)[name]):
            subject.error(transform)
    else:
        error = subject.error(transform)
        assert error <= (transform.tolerance or LAYERS[layer].tolerance), f"off by {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["solve_qp", "CvxpyLayer, QP"])
def test_mesh_with_explicit_axes(layer, subject_of):
    """As JAX makes meshes by default. A user's map or residual has to tell its shardings itself there."""
    pytest.importorskip("jax")
    from jax.sharding import AxisType

    from jax_transforms import gradient_of_shards, mesh_of_two

    subject = subject_of("jax", layer)
    mesh = mesh_of_two(AxisType.Explicit)

    def loss(*values):
        x = subject.layer.function(*values)
        assert str(subject.layer.frontend.framework.typeof(x).sharding.spec) == "P('batch', None)"
        return (x**2).sum()

    actual = gradient_of_shards(loss, subject.layer, mesh)
    exact = subject.exact
    gradients = exact.frontend.framework.grad(
        lambda *v: (exact.function(*v) ** 2).sum(), tuple(range(len(exact.values)))
    )(*exact.values)
    assert_close(actual, exact.flatten(gradients), 1e-8)


@pytest.mark.parametrize("name", [name for name, case in LAYERS.items() if not case.on_host])
def test_program_for_a_gpu(name):
    """Lowered for CUDA, which needs no device, a layer and its gradient call only what runs there.

    And they ask for products in full precision, which is not what GPUs make of single precision by default.
    """
    jax = pytest.importorskip("jax")
    frontend, case = FRONTENDS["jax"](), LAYERS[name]
    function, values = jax.jit(case.layer(frontend)), [frontend.array(v, "float64") for v in case.values]
    loss = jax.value_and_grad(lambda *v: (function(*v) ** 2).sum(), tuple(range(len(values))))
    program = jax.export.export(jax.jit(loss), platforms=["cuda"])(*values).mlir_module()
    calls = set(re.findall(r"custom_call @([\w.$]+)", program))
    assert all(call.startswith(("cu", "Sharding")) for call in calls), calls
    products = re.findall(r"stablehlo.dot_general.*", program)
    assert all("[HIGHEST, HIGHEST]" in product for product in products), products
