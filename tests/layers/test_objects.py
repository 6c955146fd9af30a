"""Layers as objects: copies, pickles, summaries, threads, workers of a data loader, work that is skipped."""

import concurrent.futures
import copy
import pickle

import numpy as np
import pytest

from checks import assert_close
from problems import qp_shared


@pytest.fixture(scope="module")
def family():
    return qp_shared()


@pytest.fixture(scope="module")
def layer(frontend, family):
    return frontend.CvxpyLayer(family.problem, family.parameters, family.variables)


def cube(z, a):
    return z**3 - a


def root(a):
    return a ** (1 / 3)


def halve(z, x):
    return 0.5 * z + x


def test_copies_of_a_users_layer(frontend):
    a = frontend.array(np.array([[8.0], [27.0]]))
    layer = frontend.implicit(root, cube)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(frontend.numpy(duplicate(a)), [[2.0], [3.0]], 1e-14)


def test_copies_of_an_equilibrium_layer(frontend):
    x = frontend.array(np.ones((2, 3)))
    layer = frontend.module.DEQ(halve)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(frontend.numpy(duplicate(x)), 2 * np.ones((2, 3)), 1e-8)


def test_summary_tells_what_the_layer_is(layer, family):
    lines = dict(line.split(":", 1) for line in layer.summary().splitlines())
    assert all(p.name() in lines["parameters"] for p in family.parameters)
    assert "n=4" in lines["size"] and "m=6" in lines["size"]
    assert "nonneg=6" in lines["cones"]
    assert "InteriorPoint" in lines["solver"]
    assert float(lines["set up in"].split()[0]) > 0


def test_threads_share_a_layer(frontend, layer, family):
    """Gradients of different batches at the same time are those of one after another."""
    batches = [family.batch(np.random.default_rng(seed), 3) for seed in range(8)]
    call = frontend.differentiable(layer)
    gradients = lambda values: call(values, [np.ones((3, *family.variables[0].shape))])[1]
    expected = list(map(gradients, batches))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(gradients, batches))
    for pair in zip(actual, expected, strict=True):
        for a, e in zip(*pair, strict=True):
            assert_close(a, e, 1e-12)


# torch only


class Solutions:
    """A data set whose items a copy of a layer computes, made in the worker."""

    def __init__(self, layer, values):
        self.layer, self.values = layer, values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return copy.deepcopy(self.layer)(*self.values[i])[0]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*fork:DeprecationWarning",
    "ignore:os.fork:RuntimeWarning",
    "ignore:This DataLoader will create:UserWarning",  # on a single core
)
@pytest.mark.parametrize("compiled", [False, True])
def test_workers_of_a_data_loader(start, family, compiled):
    torch = pytest.importorskip("torch")
    from optlayers.torch import CvxpyLayer

    if compiled:
        pytest.importorskip("jax")
    layer = CvxpyLayer(family.problem, family.parameters, family.variables, compiled=compiled)
    rng = np.random.default_rng(0)
    values = [[torch.tensor(np.asarray(v)) for v in family.sample(rng)] for _ in range(4)]
    expected = torch.stack([layer(*v)[0] for v in values])
    loader = torch.utils.data.DataLoader(
        Solutions(layer, values), batch_size=2, num_workers=2, multiprocessing_context=start, timeout=60
    )
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def test_module_moves_and_keeps_no_state(family):
    torch = pytest.importorskip("torch")
    from optlayers.torch import CvxpyLayer

    layer = CvxpyLayer(family.problem, family.parameters, family.variables)
    values = [torch.tensor(np.asarray(v)) for v in family.sample(np.random.default_rng(0))]
    x = layer(*values)[0]
    moved = layer.to(torch.float32).to("cpu").train().eval()
    assert not moved.state_dict()
    assert torch.equal(moved(*values)[0], x)
    assert moved(*(v.float() for v in values))[0].dtype == torch.float32


def test_work_for_inputs_without_gradient_is_skipped():
    """The products of the backward pass: all of them, without those for the matrices, and none."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from optlayers.torch import solve_qp

    rng = np.random.default_rng(0)
    A, q, u = (torch.tensor(rng.standard_normal(s)) for s in ((4, 30, 20), (4, 20), (4, 30)))
    P = torch.eye(20, dtype=torch.float64).repeat(4, 1, 1)

    def products(*names):
        inputs = {"P": P, "q": q, "A": A, "u": u.abs() + 1}
        inputs = {k: v.clone().requires_grad_(k in names) for k, v in inputs.items()}
        x = solve_qp(**inputs).x
        with FlopCounterMode(display=False) as counter:
            x.sum().backward()
        assert {k for k, v in inputs.items() if v.grad is not None} == set(names)
        return counter.get_total_flops()

    matrix = 2 * 4 * 30 * 20  # an outer product in the shape of A
    assert products("P", "q", "A", "u") >= products("q", "u") + matrix
    with torch.no_grad():
        assert not solve_qp(P, q.clone().requires_grad_(), A, None, u.abs() + 1).x.requires_grad


@pytest.mark.slow
def test_exported_program_runs_in_another_process(family, tmp_path):
    """It carries the solver's settings, so that a process which has only imported the library can run it."""
    import subprocess
    import sys

    torch = pytest.importorskip("torch")
    from optlayers.torch import CvxpyLayer

    layer = CvxpyLayer(family.problem, family.parameters, family.variables)
    values = tuple(torch.tensor(np.asarray(v)) for v in family.sample(np.random.default_rng(0)))
    torch.export.save(torch.export.export(layer, values, strict=False), tmp_path / "layer.pt2")
    torch.save((values, layer(*values)[0]), tmp_path / "values.pt")
    lines = [
        "import torch, optlayers.torch",
        "values, x = torch.load('values.pt')",
        "program = torch.export.load('layer.pt2').module()",
        "torch.testing.assert_close(program(*values)[0], x)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, check=True)
