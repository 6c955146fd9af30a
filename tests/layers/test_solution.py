"""`CvxpyLayer.solve`: what a solution holds, warm starts; and layers as objects: copies, pickles, text."""

import copy
import io
import pickle

import numpy as np
import pytest

from checks import assert_close
from optlayers.status import Status
from problems import model_predictive_control, qp, redundant_rows


@pytest.fixture(scope="module")
def family():
    return qp()


@pytest.fixture(scope="module")
def layer(frontend, family):
    return frontend.CvxpyLayer(family.problem, family.parameters, family.variables)


@pytest.fixture(scope="module")
def values(frontend, family):
    return [frontend.array(v) for v in family.batch(np.random.default_rng(0), 4)]


@pytest.fixture(scope="module")
def solution(layer, values):
    return layer.solve(*values)


def test_fields(frontend, solution, values):
    program = {"x": (4, 4), "s": (4, 6), "y": (4, 6), "status": (4,), "iterations": (4,), "residual": (4,)}
    assert {name: tuple(getattr(solution, name).shape) for name in program} == program
    status, iterations, residual = (
        frontend.numpy(a) for a in (solution.status, solution.iterations, solution.residual)
    )
    assert (status == Status.SOLVED.code).all()
    assert [list(Status)[code] for code in status] == [Status.SOLVED] * 4
    assert (iterations >= 1).all() and np.issubdtype(iterations.dtype, np.integer)
    assert (residual >= 0).all() and (residual <= 1e-9).all()
    x, s, y = (frontend.numpy(a) for a in (solution.x, solution.s, solution.y))
    assert_close(frontend.numpy(solution.variables[0]), x, 1e-12)
    P, q, G, h, A, b = map(frontend.numpy, values)
    rows, bound = np.concatenate([A, G], 1), np.concatenate([b, h], 1)
    assert_close(np.einsum("bij,bj->bi", rows, x) + s, bound, 1e-9)
    assert_close(np.einsum("bij,bj->bi", P, x) + q + np.einsum("bij,bi->bj", rows, y), np.zeros((4, 4)), 1e-8)


@pytest.mark.slow_to_compile
def test_regularity_tells_what_is_unique(frontend, solution):
    """Multipliers of duplicate rows are not; nor is the bound that CVXPY puts into cp.abs(u) <= 1."""
    assert frontend.numpy(solution.regularity.x).all() and frontend.numpy(solution.regularity.y).all()
    for family, expected in ((redundant_rows(), (True, False)), (model_predictive_control(), (False, True))):
        layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables)
        x, y = layer.solve(*map(frontend.array, family.batch(np.random.default_rng(0), 2))).regularity
        assert x.shape == y.shape == (2,)
        assert (bool(x.all()), bool(y.any())) == expected


def test_call_returns_the_variables_of_solve(frontend, layer, values, solution):
    for a, b in zip(layer(*values), solution.variables, strict=True):
        assert_close(frontend.numpy(a), frontend.numpy(b), 0.0)


def test_warm_start_leads_to_the_same_solution(frontend, layer, values, solution):
    q = values[1] + 0.01
    cold = layer.solve(values[0], q, *values[2:])
    warm = layer.solve(values[0], q, *values[2:], warm_start=solution)
    for a, b in zip(warm.variables, cold.variables, strict=True):
        assert_close(frontend.numpy(a), frontend.numpy(b), 1e-9)
    assert (frontend.numpy(cold.iterations) > 0).all()
    assert (frontend.numpy(warm.iterations) == 0).all()  # refinement alone suffices


def test_warm_start_for_a_part_of_the_batch(frontend, layer, values, solution):
    cold = layer.solve(*values)
    lanes = np.arange(len(frontend.numpy(solution.status))) == 1
    known = lambda z: frontend.array(np.where(lanes[:, None], frontend.numpy(z), np.nan))
    start = solution._replace(x=known(solution.x), s=known(solution.s), y=known(solution.y))
    warm = layer.solve(*values, warm_start=start)
    for a, b in zip(warm.variables, cold.variables, strict=True):
        assert_close(frontend.numpy(a), frontend.numpy(b), 1e-9)
    assert (frontend.numpy(warm.iterations)[lanes] == 0).all()


def test_warm_start_of_another_problem_or_batch(layer, values, solution):
    part = solution._replace(x=solution.x[:3], s=solution.s[:3], y=solution.y[:3])
    other = solution._replace(x=solution.x[:, :-1])
    for start, message in (part, r"x of shape \(3, 4\), expected \(4, 4\)"), (other, r"x of shape \(4, 3\)"):
        with pytest.raises(ValueError, match=f"warm_start has {message}.*same problem for the same batch"):
            layer.solve(*values, warm_start=start)


def test_copies_give_equal_results(frontend, layer, values, solution):
    """Copied, pickled and unpickled after the layer has been called."""
    duplicate = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert repr(duplicate) == repr(layer)
    for a, b in zip(duplicate(*values), solution.variables, strict=True):
        assert_close(frontend.numpy(a), frontend.numpy(b), 0.0)


def test_text_names_the_parameters_and_sizes(layer):
    text = repr(layer)
    assert "P (4, 4)" in text and "n=4" in text and "m=6" in text


def test_verbose_prints_the_same(frontend, family, capsys):
    layer = frontend.CvxpyLayer(family.problem, family.parameters, family.variables, verbose=True)
    assert capsys.readouterr().out == f"{layer}\n"


def test_layer_leaves_the_problem_alone(family, solution):
    """The user's parameters and variables keep their values, here none."""
    assert solution is not None
    assert all(leaf.value is None for leaf in (*family.parameters, *family.problem.variables()))


def test_torch_module_has_no_state(family):
    torch = pytest.importorskip("torch")
    from optlayers.torch import CvxpyLayer

    layer = CvxpyLayer(family.problem, family.parameters, family.variables)
    assert not layer.state_dict() and not list(layer.parameters()) and not list(layer.buffers())
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), layer).to(torch.float64)
    model.load_state_dict(model.state_dict())
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    assert repr(torch.load(saved, weights_only=False)) == repr(layer)


def test_program_without_rows(frontend):
    """min |x|^2 / 2 + q'x is solved by x = -q; there is neither a slack nor a multiplier."""
    solution = frontend.module.solve_qp(frontend.array(np.eye(2)), frontend.array([[1.0, 2.0], [3.0, 4.0]]))
    assert_close(frontend.numpy(solution.x), [[-1.0, -2.0], [-3.0, -4.0]], 1e-12)
    assert solution.s.shape == solution.y.shape == (2, 0)
