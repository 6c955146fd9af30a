"""Every layer under every transform: right, or refused with a message that says what to do instead."""

import importlib

import pytest

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
