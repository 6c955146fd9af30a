"""Each framework is imported in its two places only, and modules depend on one another without a cycle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = ("torch", "jax")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "optlayers").rglob("*.py"))}


def imported_names(module):
    """Absolute dotted names that a module imports at any depth, with `from a import b` as a.b."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def dependencies(module):
    """Other modules of this package that a module imports, or imports a name from."""
    for name in imported_names(module):
        owner = name if name in MODULES else name.rpartition(".")[0]
        if owner in MODULES and owner != module:
            yield owner


def is_place_of(framework, module):
    return f"{module}.".startswith((f"optlayers.{framework}.", f"optlayers.ops.{framework}."))


def assert_importable_without(frameworks, modules):
    """Import `modules` in a fresh interpreter that finds none of `frameworks`.

    That they are not loaded would be too much to ask: CVXPY loads jax, if it is there, to look for a solver.
    """
    lines = [
        "import sys",
        "class Without:",
        "    def find_spec(name, path, target=None):",
        f"        if name in {frameworks}: raise ModuleNotFoundError(name)",
        "sys.meta_path.insert(0, Without)",
        f"import {', '.join(modules)}",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_framework_is_imported_in_its_places_only(framework):
    importing = {m for m in MODULES if framework in (name.split(".")[0] for name in imported_names(m))}
    assert any(module.startswith(f"optlayers.ops.{framework}") for module in importing)
    assert {m for m in importing if not is_place_of(framework, m)} == set()


def test_no_import_cycle():
    graph = {module: set(dependencies(module)) for module in MODULES}
    assert any(graph.values())
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_the_rest_needs_no_framework():
    rest = [m for m in MODULES if not any(is_place_of(framework, m) for framework in FRAMEWORKS)]
    assert {"optlayers", "optlayers.canon"} <= set(rest)
    assert_importable_without(FRAMEWORKS, rest)


@pytest.mark.parametrize("framework, other", [FRAMEWORKS, FRAMEWORKS[::-1]])
def test_frontend_needs_its_own_framework_only(framework, other):
    pytest.importorskip(framework)
    assert_importable_without([other], [f"optlayers.{framework}"])


def test_first_call_imports_no_compiler():
    """That of torch takes longer to import than all else; an operator of torch.library would."""
    pytest.importorskip("torch")
    lines = [
        "import sys, torch",
        "from optlayers.torch import solve_qp",
        "solve_qp(torch.eye(2), torch.ones(2, requires_grad=True)).x.sum().backward()",
        "assert 'torch._dynamo' not in sys.modules",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
