"""`SATLayer`: against the semidefinite program in CVXPY, differences, itself in batches, and on failure."""

import cvxpy as cp
import numpy as np
import pytest

from checks import assert_close
from optlayers.status import SolveError, Status

VARIABLES, CLAUSES, AUX = 6, 8, 2
TIGHT = {"tol": 1e-12, "max_iter": 2000}
INPUTS = np.arange(VARIABLES) < 3


def values(rng, batch=3):
    """S, fractional z (batch, n), and cotangents of z."""
    S = rng.standard_normal((CLAUSES, 1 + VARIABLES + AUX))
    return S, rng.uniform(0.1, 0.9, (batch, VARIABLES)), rng.standard_normal((batch, VARIABLES))


def solver_of(frontend, is_input=INPUTS, **options):
    """(S, z) to the `SATSolution`."""
    options = TIGHT | {"solver": frontend.module.Anderson()} | options
    layer = frontend.module.SATLayer(VARIABLES, CLAUSES, AUX, **options)
    mask = frontend.xp.asarray(is_input)
    if frontend.name == "jax":
        return lambda S, z: layer.solve(S, z, mask)
    torch = frontend.framework
    layer = layer.double()
    layer.register_buffer("directions", torch.tensor(layer.settings.directions(0)))

    class Solve(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, z):
            return self.layer.solve(z, mask)

    module = Solve()
    return lambda S, z: torch.func.functional_call(module, {"layer.S": S}, (z,))


def gradients(frontend, S, z, cotangent, **options):
    solve = solver_of(frontend, **options)
    (value,), bars = frontend.differentiable(lambda S, z: (solve(S, z).z,))([S, z], [cotangent])
    return value, bars


def semidefinite_program():
    """<C, X> over Gram matrices X of all vectors, in which those of the truth and the inputs are given."""
    size, fixed = 1 + VARIABLES + AUX, 1 + INPUTS.sum()
    C, G = cp.Parameter((size, size), symmetric=True), cp.Parameter((fixed, fixed), symmetric=True)
    X = cp.Variable((size, size), PSD=True)
    constraints = [cp.diag(X)[fixed:] == 1, X[:fixed, :fixed] == G]
    return cp.Problem(cp.Minimize(cp.trace(C @ X)), constraints), C, G, X


def test_solution_and_derivatives_equal_those_of_the_semidefinite_program(rng):
    """Optimal value, all of the Gram matrix, and the derivative of its entries in S, by `CvxpyLayer`."""
    torch = pytest.importorskip("torch")
    from optlayers.torch import Anderson, CvxpyLayer, SATLayer

    S, z, _ = values(rng, batch=2)
    S = torch.tensor(S, requires_grad=True)
    layer = SATLayer(VARIABLES, CLAUSES, AUX, solver=Anderson(), **TIGHT).double()
    layer.directions = torch.tensor(layer.settings.directions(0))

    layer.S = torch.nn.Parameter(S.detach())
    V = layer.solve(torch.tensor(z), torch.tensor(INPUTS)).vectors
    gram = V @ V.mT

    problem, C, G, X = semidefinite_program()
    conic = CvxpyLayer(problem, parameters=[C, G], variables=[X], solver_args={"eps": 1e-10})
    fixed = 1 + INPUTS.sum()
    (expected,) = conic(S.mT @ S, gram[:, :fixed, :fixed].detach())
    cost = lambda x: ((S.mT @ S).detach() * x).sum((-2, -1))
    assert_close(cost(gram).detach(), cost(expected).detach(), 1e-8)
    assert_close(gram.detach(), expected.detach(), 1e-6)

    weights = torch.tensor(rng.standard_normal(gram.shape))
    weights[:, :fixed, :fixed] = 0
    (expected_bar,) = torch.autograd.grad((weights * expected).sum(), S)
    (actual,) = torch.autograd.grad((weights * gram).sum(), layer.S)
    assert expected_bar.abs().max() > 0.1
    assert_close(actual, expected_bar, 1e-5)


def test_gradients_equal_differences(frontend, rng):
    S, z, cotangent = values(rng)
    solve = solver_of(frontend)
    weighted = lambda S, z: (cotangent * frontend.numpy(solve(frontend.array(S), frontend.array(z)).z)).sum()
    _, (S_bar, z_bar) = gradients(frontend, S, z, cotangent)
    dS, dz, h = rng.standard_normal(S.shape), rng.standard_normal(z.shape), 1e-5
    in_S = (weighted(S + h * dS, z) - weighted(S - h * dS, z)) / (2 * h)
    in_z = (weighted(S, z + h * dz) - weighted(S, z - h * dz)) / (2 * h)
    assert_close((S_bar * dS).sum(), in_S, 1e-5)
    assert_close((z_bar * dz).sum(), in_z, 1e-5)
    assert (z_bar[:, ~INPUTS] == 0).all()


def test_frameworks_agree(rng):
    pytest.importorskip("torch"), pytest.importorskip("jax")
    from frontends import FRONTENDS

    S, z, cotangent = values(rng)
    (a, a_bars), (b, b_bars) = (gradients(FRONTENDS[name](), S, z, cotangent) for name in ("torch", "jax"))
    for actual, expected in zip([a, *a_bars], [b, *b_bars], strict=True):
        assert_close(actual, expected, 1e-8)


def test_accelerated_sweeps_end_at_the_same_solution(frontend, rng):
    S, z, cotangent = values(rng)
    module = frontend.module
    results = []
    for solver in (module.Picard(), module.Anderson()):
        options = {"solver": solver, "adjoint_solver": solver, "tol": 1e-10}
        results.append(gradients(frontend, S, z, cotangent, **options))
    (a, a_bars), (b, b_bars) = results
    for actual, expected in zip([a, *a_bars], [b, *b_bars], strict=True):
        assert_close(actual, expected, 1e-7)


def test_problems_of_a_batch_do_not_depend_on_one_another(frontend, rng):
    """Also with inputs that differ between them."""
    S, z, _ = values(rng, batch=4)
    is_input = rng.uniform(size=z.shape) < 0.4
    S = frontend.array(S)
    together = solver_of(frontend, is_input)(S, frontend.array(z)).z
    for i in range(4):
        alone = solver_of(frontend, is_input[i])(S, frontend.array(z[i])).z
        assert_close(frontend.numpy(together)[i], frontend.numpy(alone), 1e-9)
    assert (frontend.numpy(together)[is_input] == z[is_input]).all()


def test_vmap_over_clauses(frontend, rng):
    """Each problem with clauses of its own."""
    z = frontend.array(values(rng)[1])
    S = frontend.array(rng.standard_normal((3, CLAUSES, 1 + VARIABLES + AUX)))
    solve, transforms = solver_of(frontend), frontend.transforms
    loss = lambda S, z: (solve(S, z).z ** 2).sum()
    mapped = transforms.vmap(transforms.grad(loss))(S, z)
    for i in range(3):
        assert_close(frontend.numpy(mapped)[i], frontend.numpy(transforms.grad(loss)(S[i], z[i])), 1e-7)


def test_clauses_imply_what_the_inputs_leave_open(frontend):
    """x, x -> y, not (y and w): y is true and w false."""
    S = frontend.array([[-1.0, 1.0, 0.0, 0.0], [-1.0, -1.0, 1.0, 0.0], [-1.0, 0.0, -1.0, -1.0]])
    layer = frontend.module.SATLayer(3, 3, max_iter=20000)
    z, mask = frontend.array([[1.0, 0.0, 0.0]]), frontend.xp.asarray(np.array([[True, False, False]]))
    if frontend.name == "torch":
        layer = layer.double()
        layer.S.data = S
        solution = layer(z, mask)
    else:
        solution = layer(S, z, mask)
    assert (frontend.numpy(solution).round() == [[1.0, 1.0, 0.0]]).all()


def test_vector_that_nothing_pulls_stays(frontend):
    """All clauses zero: any vectors are a solution, and the derivative is finite."""
    S, z = np.zeros((CLAUSES, 1 + VARIABLES + AUX)), np.full((1, VARIABLES), 0.3)
    value, bars = gradients(frontend, S, z, np.ones_like(z))
    assert np.isfinite(value).all() and all(np.isfinite(bar).all() for bar in bars)


def test_failures_are_named_and_leave_the_others_alone(frontend, rng):
    S, z, cotangent = values(rng)
    clean, (S_bar, _) = gradients(frontend, S, z[1:], cotangent[1:])
    z[0, 0] = np.nan
    with pytest.raises(SolveError, match=r"1 of 3 problems.*\n.*batch index \(0,\).*NaN"):
        solver_of(frontend)(frontend.array(S), frontend.array(z))
    for policy in ("nan", "mask"):
        value, (bar, _) = gradients(frontend, S, z, cotangent, on_failure=policy)
        assert_close(value[1:], clean, 1e-10)
        assert_close(bar, S_bar, 1e-8)
    with pytest.raises(SolveError, match="iteration limit"):
        solver_of(frontend, max_iter=1)(frontend.array(S), frontend.array(z[1:]))
    solution = solver_of(frontend, max_iter=3, on_failure="ignore")(frontend.array(S), frontend.array(z[1:]))
    assert (frontend.numpy(solution.status) == Status.ITERATION_LIMIT.code).all()
    assert (frontend.numpy(solution.iterations) == 3).all()
    assert np.isfinite(frontend.numpy(solution.z)).all()


def test_gradients_are_linear_in_their_cotangents_and_know_the_scale_of_clauses(frontend, rng):
    S, z, cotangent = values(rng)
    _, expected = gradients(frontend, S, z, cotangent)
    _, small = gradients(frontend, S, z, 1e-15 * cotangent)
    _, large = gradients(frontend, 1e6 * S, z, cotangent)
    for actual in ([1e15 * bar for bar in small], [1e6 * large[0], large[1]]):
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 1e-9)


def test_single_precision(frontend, rng):
    S, z, _ = values(rng)
    expected = frontend.numpy(solver_of(frontend)(frontend.array(S), frontend.array(z)).z)
    layer = frontend.module.SATLayer(VARIABLES, CLAUSES, AUX, max_iter=20000)
    S, z = frontend.array(S, "float32"), frontend.array(z, "float32")
    mask = frontend.xp.asarray(INPUTS)
    if frontend.name == "torch":
        layer = layer.float()
        layer.S.data = S
        value = layer(z, mask)
    else:
        value = layer(S, z, mask)
    assert frontend.dtype(value) == "float32"
    assert_close(frontend.numpy(value), expected, 1e-4)


@pytest.mark.parametrize(
    "options, message",
    [({"rank": 1}, "rank"), ({"aux": -1}, "auxiliary"), ({"on_failure": "x"}, "on_failure")],
)
def test_misuse_is_named(frontend, options, message):
    with pytest.raises(ValueError, match=message):
        frontend.module.SATLayer(3, 3, **options)


def test_probabilities_that_are_integers_are_refused(frontend):
    z, is_input = frontend.xp.asarray([1, 0, 0]), frontend.xp.asarray([True, False, False])
    layer = frontend.module.SATLayer(3, 3)
    arguments = (z, is_input) if frontend.name == "torch" else (frontend.array(np.ones((3, 4))), z, is_input)
    with pytest.raises(ValueError, match="z must hold real floating-point numbers"):
        layer(*arguments)
