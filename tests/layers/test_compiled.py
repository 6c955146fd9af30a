"""Layers of PyTorch as programs of XLA: the same numbers, errors and objects as without."""

import copy
import pickle

import cvxpy as cp
import numpy as np
import pytest

from checks import assert_close
from cone_problems import CONE_FAMILIES
from problems import FAMILIES, qp_shared

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from optlayers.torch import LPGD, Cones, CvxpyLayer, SolveError, solve_conic, solve_qp  # noqa: E402

ALL = FAMILIES | CONE_FAMILIES
QUICK = ("qp", "mixture", "complex_fit")
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ALL]


def tensors(values, dtype=torch.float64):
    cast = lambda x: torch.tensor(x).to(dtype if np.isrealobj(x) else torch.complex128)
    return [cast(np.asarray(value)).requires_grad_() for value in values]


def build(family, **options):
    gp = getattr(family, "gp", False)
    return CvxpyLayer(family.problem, family.parameters, family.variables, gp=gp, **options)


def outputs_and_gradients(layer, values, rng, dtype=torch.float64):
    """Of a weighted sum of squares, which has complex cotangents where outputs are complex."""
    parameters = tensors(values, dtype)
    outputs = layer(*parameters)
    total = sum((torch.tensor(rng.uniform(1, 2, x.shape)) * x.abs() ** 2).sum() for x in outputs)
    return outputs, torch.autograd.grad(total, parameters, materialize_grads=True)


@pytest.mark.parametrize("name", CASES)
def test_as_without(name):
    """Over the four devices that the tests have."""
    family = ALL[name]()
    values = family.batch(np.random.default_rng(0), 4)
    results = [
        outputs_and_gradients(build(family, compiled=compiled), values, np.random.default_rng(1))
        for compiled in (False, True)
    ]
    for expected, actual in zip(*results, strict=True):
        for x, y in zip(expected, actual, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            assert_close(y.detach().numpy(), x.detach().numpy(), 1e-6)


@pytest.fixture(scope="module")
def family():
    return qp_shared()


@pytest.fixture(scope="module")
def layer(family):
    return build(family, compiled=True)


@pytest.mark.parametrize(
    ("lead", "dtype"),
    [((), torch.float32), ((0,), torch.float64), ((3,), torch.float64), ((2, 2), torch.float32)],
)
def test_axes_and_types(family, layer, lead, dtype):
    rng = np.random.default_rng(0)
    values = family.batch(rng, max(int(np.prod(lead)), 1))
    values = [
        v[: int(np.prod(lead))].reshape(*lead, *p.shape) if v.ndim > p.ndim else v
        for v, p in zip(values, family.parameters, strict=True)
    ]
    (x,), gradients = outputs_and_gradients(layer, values, np.random.default_rng(1), dtype)
    (y,), expected = outputs_and_gradients(build(family), values, np.random.default_rng(1))
    assert x.dtype == dtype and x.shape == y.shape
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    for actual, right in zip((x, *gradients), (y, *expected), strict=True):
        assert actual.dtype == dtype
        assert_close(actual.detach().numpy(), right.detach().numpy(), tolerance)


def test_the_whole_solution_and_a_warm_start(family, layer):
    values = family.batch(np.random.default_rng(0), 4)
    plain, compiled = (build_.solve(*tensors(values)) for build_ in (build(family), layer))
    for expected, actual in zip(plain[1:], compiled[1:], strict=True):
        for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (expected, actual)), strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            assert_close(1.0 * y.detach().numpy(), 1.0 * x.detach().numpy(), 1e-8)
    weights = torch.randn(compiled.y.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for key in ("x", "s", "y"):
        gradients = []
        for solver in (build(family), layer):
            parameters = tensors(values)
            z = getattr(solver.solve(*parameters), key)
            total = (weights[..., : z.shape[-1]] * z).sum()
            gradients.append(torch.autograd.grad(total, parameters, materialize_grads=True))
        for expected, actual in zip(*gradients, strict=True):
            assert_close(actual.numpy(), expected.numpy(), 1e-7)
    again = layer.solve(*tensors(values), warm_start=compiled)
    assert (again.iterations == 0).all() and (compiled.iterations > 0).all()
    few = [v[:3] if v.ndim > p.ndim else v for v, p in zip(values, family.parameters, strict=True)]
    start = compiled._replace(**{key: getattr(compiled, key)[:3] for key in ("x", "s", "y")})
    again = layer.solve(*tensors(few), warm_start=start)
    assert again.iterations.tolist() == [0, 0, 0]
    assert_close(again.x.detach().numpy(), compiled.x[:3].detach().numpy(), 1e-12)


def test_batches_are_filled_up_to_the_size_of_a_program():
    """A last problem is repeated, and counts once: in gradients of shared parameters and in errors, too."""
    family = qp_shared()
    layers = [build(family, compiled=compiled) for compiled in (False, True)]
    programs = []
    for batch in (3, 2, 5, 7, 20, 15):
        values = family.batch(np.random.default_rng(batch), batch)
        results = [outputs_and_gradients(layer, values, np.random.default_rng(1)) for layer in layers]
        for expected, actual in zip(*results, strict=True):
            for x, y in zip(expected, actual, strict=True):
                assert x.shape == y.shape
                assert_close(y.detach().numpy(), x.detach().numpy(), 1e-8)
        programs.append(layers[1]._compiled._run._forward._cache_size())
    assert programs == [1, 1, 2, 2, 3, 3]
    values = tensors(family.batch(np.random.default_rng(0), 3))
    with torch.no_grad():
        values[1][2, 0] = torch.nan
    with pytest.raises(SolveError, match=r"^1 of 3 problems were not solved:\s+batch index \(2,\)"):
        layers[1](*values)


def test_sizes_of_programs_while_another_thread_adds_one():
    from optlayers.jax.compiled import CompiledFunction

    function = CompiledFunction(lambda *args: None, [1])
    fill = lambda batch: function._filled((), [np.zeros((batch, 2))], [(batch,)])

    class Interrupted(int):
        """The other thread has its turn when this number is compared."""

        def __le__(self, other):
            fill(40)
            return super().__le__(other)

    fill(2)
    (array,), rows = fill(Interrupted(3))
    assert len(array) == 4 and rows == slice(3)


def test_what_it_does_not_serve_goes_the_usual_way(family, layer):
    P, q, *rest = tensors(family.sample(np.random.default_rng(0)))
    fixed = [x.detach() for x in (P, *rest)]
    detached = lambda x: x.detach().numpy()
    of_q = lambda q: layer(fixed[0], q, *fixed[1:])[0]
    assert torch.autograd.gradgradcheck(of_q, (q,))
    forward, reverse = torch.func.jacfwd(of_q)(q.detach()), torch.autograd.functional.jacobian(of_q, q)
    assert_close(detached(forward), detached(reverse), 1e-8)
    several = torch.stack([q.detach(), 2 * q.detach()])
    assert_close(detached(torch.func.vmap(of_q)(several)), detached(of_q(several)), 1e-8)


def test_recorded_derivatives_go_the_usual_way():
    """A graph of torch.fx would hold what XLA has made of the cotangents of the example."""
    from torch.fx.experimental.proxy_tensor import make_fx

    I, q = torch.eye(2, dtype=torch.double), torch.tensor([0.5, -2.0], dtype=torch.double).requires_grad_()
    x = solve_qp(I, q, compiled=True).x
    pull = lambda bar: torch.autograd.grad(x, q, bar, retain_graph=True)[0]
    assert_close(make_fx(pull)(I[0])(I[1]).numpy(), -I[1].numpy(), 1e-12)


def test_gradients_of_another_kind_go_the_usual_way(family):
    """Perturbed problems of LPGD may need Clarabel too, without which their gradients would be zero."""
    values = family.batch(np.random.default_rng(0), 2)
    (_, expected), (_, actual) = (
        outputs_and_gradients(build(family, gradient=LPGD(0.1), compiled=c), values, np.random.default_rng(1))
        for c in (False, True)
    )
    assert all(torch.equal(x, y) for x, y in zip(expected, actual, strict=True))


def test_later_solvers_are_compiled_when_they_are_needed():
    """Many rows are for the interior point, which ADMM's program has not."""
    rng = np.random.default_rng(0)
    x, q, b = cp.Variable(10), cp.Parameter(10), cp.Parameter(60)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 + q @ x), [rng.standard_normal((60, 10)) @ x <= b])
    plain, compiled = (CvxpyLayer(problem, [q, b], [x], compiled=c) for c in (False, True))
    programs = []
    for bound in (100, 0.1, 100):
        values = 10 * rng.standard_normal((8, 10)), rng.uniform(0.5, 1, (8, 60)) * bound
        (expected, *right), (actual, *gradients) = (
            [layer.solve(*(p := tensors(values))), *p] for layer in (plain, compiled)
        )
        for solution in (expected, actual):
            (solution.variables[0] ** 2).sum().backward()
        assert (actual.status == 0).all() and torch.equal(actual.iterations, expected.iterations)
        assert_close(actual.x.detach().numpy(), expected.x.detach().numpy(), 1e-8)
        for got, want in zip(gradients, right, strict=True):
            assert_close(got.grad.numpy(), want.grad.numpy(), 1e-7)
        programs.append(compiled._compiled._run._forward._cache_size())
    assert programs == [1, 2, 2]


def test_what_stays_unfinished_goes_the_usual_way():
    """To Clarabel, which no program of XLA holds."""
    x, c = cp.Variable(20), cp.Parameter(20)
    problem = cp.Problem(cp.Minimize(c @ x - cp.sum(cp.entr(x))), [cp.sum(x) == 1, x[0] <= 0.5])
    values = 1000 * torch.randn(8, 20, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    plain, compiled = (CvxpyLayer(problem, [c], [x], compiled=c_).solve(values) for c_ in (False, True))
    assert (compiled.status == 0).all() and (compiled.iterations == 60).any()
    assert torch.equal(plain.x, compiled.x)


def test_solvers_of_the_host(family):
    values = tensors(family.batch(np.random.default_rng(0), 4))
    plain, compiled = (build(family, solver="CLARABEL", compiled=c)(*values)[0] for c in (False, True))
    assert torch.equal(plain, compiled)


def test_failures(family):
    values = tensors(family.batch(np.random.default_rng(0), 4))
    with torch.no_grad():
        values[1][2, 0] = torch.nan
    with pytest.raises(SolveError, match=r"batch index \(2,\)") as error:
        build(family, compiled=True)(*values)
    assert any("NaN" in note for note in error.value.__notes__)
    (x,) = build(family, compiled=True, on_failure="nan")(*values)
    assert x[2].isnan().all() and x[[0, 1, 3]].isfinite().all()
    (x,) = build(family, compiled=True, on_failure="mask")(*values)
    gradients = torch.autograd.grad(x.sum(), values)
    assert all(g.isfinite().all() for g in gradients) and (gradients[1][2] == 0).all()


def box(dtype=torch.float64, **options):
    """min 1/2 x'Px + q'x with A x <= u, u and q of each problem."""
    rng = np.random.default_rng(0)
    P, A = rng.standard_normal((2, 5, 5))
    q, u = rng.standard_normal((4, 5)), rng.uniform(0.1, 1, (4, 5))
    data = tensors((P @ P.T + np.eye(5), q, A, u), dtype)
    return solve_qp(*data[:3], None, data[3], **options), data


def ball(dtype=torch.float64, **options):
    """min q'x with x_0 >= -0.1 and |A x + b| <= 1."""
    rng = np.random.default_rng(0)
    A, q = rng.standard_normal((8, 3, 3)), rng.standard_normal((8, 3))
    rows = np.zeros((8, 5, 3))
    rows[:, 0, 0], rows[:, 2:] = -1, A
    data = tensors((q, rows, np.array([0.1, 1.0, 0.1, 0.0, -0.1])), dtype)
    return solve_conic(None, *data, Cones(nonneg=1, soc=(4,)), **options), data


@pytest.mark.parametrize(
    ("solve", "dtype"),
    [
        (box, torch.float64),
        (ball, torch.float32),
        pytest.param(box, torch.float32, marks=pytest.mark.slow),
        pytest.param(ball, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_programs_given_as_matrices(solve, dtype):
    results = []
    for compiled in (False, True):
        solution, data = solve(dtype, compiled=compiled)
        total = (solution.x**2).sum() + (solution.y * solution.s.detach().cos()).sum() + solution.s.sum()
        gradients = torch.autograd.grad(total, data)
        results.append([*solution[:6], *solution.regularity, *gradients])
        again, _ = solve(dtype, compiled=compiled, warm_start=solution)
        assert (again.iterations == 0).all() and (solution.iterations > 0).all()
    for i, (x, y) in enumerate(zip(*results, strict=True)):
        assert x.dtype == y.dtype and x.shape == y.shape
        if i != 5:  # the residuals are those of rounding
            tolerance = 1e-3 if dtype == torch.float32 else 1e-8
            assert_close(1.0 * y.detach().numpy(), 1.0 * x.detach().numpy(), tolerance)


def test_second_derivatives_and_errors_of_matrices():
    P, q = torch.eye(2, dtype=torch.double), torch.tensor([0.5, -2.0], dtype=torch.double)
    bound = torch.ones(2, dtype=torch.double)
    solve = lambda q: solve_qp(P, q, P, -bound, bound, compiled=True).x
    assert torch.autograd.gradgradcheck(solve, (q.requires_grad_(),))
    assert solve_qp(P, q, compiled=True).x.tolist() == [-0.5, 2]
    messages = []
    for compiled in (False, True):
        with pytest.raises(SolveError) as error:
            solve_qp(P, q.expand(4, 2), P, bound, -bound, compiled=compiled)
        with pytest.raises(ValueError, match="batch axes") as misuse:
            solve_qp(P, q.expand(4, 2), P, bound.expand(2, 2), compiled=compiled)
        messages.append((str(error.value), str(misuse.value)))
    assert messages[0] == messages[1]


def test_changes_of_the_data_before_the_gradient_raise(family, layer):
    values = tensors(family.batch(np.random.default_rng(0), 4))
    (x,) = layer(*values)
    with torch.no_grad():
        values[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_results_are_memory_of_their_own(family, layer):
    values = family.batch(np.random.default_rng(0), 4)
    results = outputs_and_gradients(layer, values, np.random.default_rng(1))
    kept = [x.clone() for part in results for x in part]
    for x in (x for part in results for x in part):
        x.detach().zero_()
    again = outputs_and_gradients(layer, values, np.random.default_rng(1))
    assert all(torch.equal(x, y) for x, y in zip(kept, (x for part in again for x in part), strict=True))


def test_copies(family, layer):
    values = [x.detach() for x in tensors(family.batch(np.random.default_rng(0), 4))]
    expected = layer(*values)[0]
    duplicate = copy.deepcopy(pickle.loads(pickle.dumps(layer)))
    assert torch.equal(duplicate(*values)[0], expected)


def test_without_jax(family, monkeypatch):
    monkeypatch.setattr("optlayers.torch.compiled.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'optlayers\[jax\]'"):
        build(family, compiled=True)


def test_options_of_xla(monkeypatch):
    """One that a version does not have, or that the environment sets, is left out."""
    from optlayers.jax import compiled

    known = compiled._known_options.__wrapped__
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert known() == compiled.OPTIONS
    monkeypatch.setitem(compiled.OPTIONS, "xla_cpu_of_another_version", True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert known() == {"xla_cpu_use_fusion_emitters": False}
