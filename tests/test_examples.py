"""Every example runs in its quick form, writes its picture and learns what it should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = [("polytope", "torch"), ("polytope", "jax"), ("sudoku", "torch")]


def run(script, *options, launcher=()):
    """What a script prints on this checkout."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *launcher, str(ROOT / "examples" / f"{script}.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return result.stdout


def rows(table, width=12):
    """The rows below the line that starts with "method", each as its name and its other columns."""
    _, _, body = table.partition("\nmethod ")
    _, *lines = body.split("\n\n")[0].splitlines()
    return {line[:width].strip(): line[width:].split() for line in lines}


def check_polytope(output):
    table = rows(output)
    error, iou = (float(entry) for entry in table["polytope"][:2])
    assert iou >= 0.95
    assert error < float(table["MLP 64x64"][0]) / 10


def check_sudoku(output):
    boards = {name: float(row[0].rstrip("%")) for name, row in rows(output, width=26).items()}
    assert boards["symbols: SAT layer"] >= 95
    assert boards["pictures: SAT, all cells"] >= 75
    assert boards["pictures: ConvNet"] < 20


CHECKS = {"polytope": check_polytope, "sudoku": check_sudoku}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHERS = {"torch": TORCHRUN, "jax": ()}


def test_every_example_is_run():
    tested = {script for script, _ in EXAMPLES} | {f"data_parallel_{name}" for name in LAUNCHERS}
    tested |= {"fixed_point_operator"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == tested


@pytest.mark.slow
@pytest.mark.parametrize("script, framework", EXAMPLES)
def test_example(script, framework, tmp_path):
    for package in (framework, "matplotlib", "mlxtend", "tqdm"):
        pytest.importorskip(package)
    picture = tmp_path / "picture.png"
    choice = ("--framework", framework) if (script, "jax") in EXAMPLES else ()
    output = run(script, "--quick", *choice, "--output", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    CHECKS[script](output)


@pytest.mark.slow
@pytest.mark.parametrize("framework", LAUNCHERS)
def test_losses_do_not_depend_on_the_number_of_devices(framework, tmp_path):
    for package in (framework, "matplotlib", "tqdm"):
        pytest.importorskip(package)
    picture = tmp_path / "picture.png"
    options = ("--quick", "--output", str(picture))
    output = run(f"data_parallel_{framework}", *options, launcher=LAUNCHERS[framework])
    assert picture.read_bytes().startswith(b"\x89PNG")
    one, several = rows(output).values()
    first, last, difference = map(float, several[-4:-1])
    assert difference <= 1e-12
    assert last < first / 2
    assert len(one) == len(several)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_fixed_point_operator_equals_the_library(framework):
    pytest.importorskip(framework)
    table = rows(run("fixed_point_operator", "--framework", framework), width=28)
    assert len(table) == 5
    for name, errors in table.items():
        assert max(map(float, errors)) <= (1e-8 if "differences" in name else 1e-12), name
