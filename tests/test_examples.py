"""Every example runs in its quick form, writes its picture and learns what it should."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = [("polytope", "torch"), ("polytope", "jax"), ("sudoku", "torch"), ("sudoku_jax", "jax")]
TORCH = (
    "deq_digits",
    "mdeq",
    "mpc_quadrotor",
    "hvac_mpc",
    "neural_ode",
    "latent_ode",
    "gru_ode_bayes",
    "neural_cde",
)
EXAMPLES += [(name, "torch") for name in TORCH]
# The suite has to stay below a quarter of an hour: of similar examples one is run by default.
SLOW = "sudoku", "latent_ode", "hvac_mpc", "gru_ode_bayes"


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


def check_sudoku_jax(output):
    before, after = (float(row[0].rstrip("%")) for row in rows(output, width=18).values())
    assert before < 20
    assert after >= 95


def check_mpc_quadrotor(output):
    first, learned, expert = (float(row[0]) for row in rows(output, width=16).values())
    assert expert < learned < expert + (first - expert) / 10
    solvers = output.split("\nsolver ")[1].split("\n\n")[0].splitlines()[1:]
    ours, loop, fine = (float(line.split()[-1]) for line in solvers)
    assert ours < 1e-6
    assert fine < loop < 1e-2  # an independent solver finds the same inputs


def check_hvac_mpc(output):
    table = {name: [float(entry) for entry in row] for name, row in rows(output, width=22).items()}
    heat, error, reward, *_ = table.pop("MPC: imitation, tuned")
    for name in ("old controller", "clone: ridge", "clone: perceptron"):
        assert heat <= 0.9 * table[name][0]
        assert error <= table[name][1]
    assert reward > table["MPC: rule of thumb"][2] / 2


def check_latent_ode(output):
    table = rows(output)
    assert float(table["latent ODE"][0]) < 0.9 * float(table["GRU"][0])


def check_neural_cde(output):
    lost = {name: float(row[2]) for name, row in rows(output).items()}
    assert lost["neural CDE"] >= 2 * lost["GRU"]
    assert lost["neural CDE"] >= 50


def check_neural_ode(output):
    table = rows(output)
    for error, reference in zip(table["neural ODE"][:2], table["GRU"][:2], strict=True):
        assert float(error) < float(reference) / 2


def check_gru_ode_bayes(output):
    table = rows(output, width=18)
    ode, gru, best = (
        [float(entry) for entry in table[name][:2]] for name in ("GRU-ODE-Bayes", "GRU", "Kalman, the best")
    )
    for error, reference, bound in zip(ode, gru, best, strict=True):
        assert bound < error < reference
    assert best[0] < float(table["last value held"][0]) / 2


def check_deq_digits(output):
    networks = rows(output)
    for accuracy, explicit, _, iterations, radius, _ in networks.values():
        assert float(accuracy) >= max(0.93, float(explicit) - 0.03)
        assert float(iterations) < 15 and float(radius) < 1
    memory = output.split("\niterations ")[1].split("\n\n")[0].splitlines()[1:]
    equilibrium, unrolled = ([float(entry) for entry in line.split()[2:]] for line in memory)
    assert equilibrium[-1] < 1.05 * equilibrium[0]
    assert unrolled[-1] > 10 * unrolled[0]


def check_mdeq(output):
    table = {name: [float(x.replace(",", "")) for x in row] for name, row in rows(output, width=24).items()}
    (accuracy, iou, _, iterations, _), (explicit, *_) = table["digits, MDEQ"], table["digits, explicit FCN"]
    assert accuracy >= max(0.93, explicit - 0.03)
    assert iou >= 0.8
    assert iterations < 8 and table["canvases, MDEQ"][3] < 8
    for task in ("digits", "canvases"):
        assert table[f"{task}, MDEQ"][2] == table[f"{task}, explicit FCN"][2]


CHECKS = {
    "deq_digits": check_deq_digits,
    "mdeq": check_mdeq,
    "hvac_mpc": check_hvac_mpc,
    "gru_ode_bayes": check_gru_ode_bayes,
    "latent_ode": check_latent_ode,
    "mpc_quadrotor": check_mpc_quadrotor,
    "neural_cde": check_neural_cde,
    "neural_ode": check_neural_ode,
    "polytope": check_polytope,
    "sudoku": check_sudoku,
    "sudoku_jax": check_sudoku_jax,
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHERS = {"torch": TORCHRUN, "jax": ()}


def test_every_example_is_run():
    tested = {script for script, _ in EXAMPLES} | {f"data_parallel_{name}" for name in LAUNCHERS}
    tested |= {"fixed_point_operator", "sudoku_puzzles"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == tested


@pytest.mark.parametrize(
    "script, framework",
    [pytest.param(*pair, marks=pytest.mark.slow if pair[0] in SLOW else ()) for pair in EXAMPLES],
)
def test_example(script, framework, tmp_path):
    for package in (framework, "matplotlib", "mlxtend", "sklearn", "tqdm"):
        pytest.importorskip(package)
    picture = tmp_path / "picture.png"
    choice = ("--framework", framework) if {(script, "torch"), (script, "jax")} <= {*EXAMPLES} else ()
    output = run(script, "--quick", *choice, "--output", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    CHECKS[script](output)


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


def test_small_puzzles_have_one_solution(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(ROOT / "examples")
    from sudoku_puzzles import make_data, solution_grids

    rng = np.random.default_rng(0)
    grids = solution_grids(4, 1000, rng)
    assert len(np.unique(grids, axis=0)) == 288  # the number of Sudoku grids of 4x4
    train, test = make_data(4, 7, (216, 72), (50, 50), rng)
    assert not {*map(tuple, train.solutions)} & {*map(tuple, test.solutions)}
    for board, solution in zip(*train, strict=True):
        assert np.count_nonzero(board) == 7
        (only,) = grids[np.all((grids == board) | (board == 0), axis=-1)]
        assert np.array_equal(only, solution)


def test_large_puzzles_have_one_solution(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(ROOT / "examples")
    from sudoku_puzzles import make_data, solutions

    for boards, grids in make_data(9, 36, (2, 1), (6, 2), np.random.default_rng(0)):
        for board, grid in zip(boards, grids, strict=True):
            assert np.count_nonzero(board) == 36
            assert solutions(board, limit=2) == [grid.tolist()]
            square = grid.reshape(9, 9)
            boxes = square.reshape(3, 3, 3, 3).swapaxes(1, 2).reshape(9, 9)
            for lines in (square, square.T, boxes):
                assert np.array_equal(np.sort(lines), np.tile(np.arange(1, 10), (9, 1)))
