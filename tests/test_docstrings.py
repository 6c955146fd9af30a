"""Every public function and class has a docstring, and its example gives what it says."""

import doctest
import importlib
import inspect

import pytest

FRONTENDS = ("torch", "jax")


def public(framework):
    module = importlib.import_module(f"optlayers.{framework}")
    return [getattr(module, name) for name in module.__all__]


@pytest.mark.parametrize("framework", FRONTENDS)
def test_every_public_name_has_an_example(framework):
    pytest.importorskip(framework)
    missing = [x.__name__ for x in public(framework) if ">>>" not in (inspect.getdoc(x) or "")]
    assert missing == []


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_examples(framework):
    pytest.importorskip(framework)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    # Records that both frontends have in common are tested once, with torch.
    for x in [x for x in public(framework) if framework == "torch" or x not in public("torch")]:
        example = parser.get_doctest(inspect.getdoc(x), {}, x.__name__, None, 0)
        report = []
        assert runner.run(example, out=report.append).failed == 0, "".join(report)
