"""`fixed_point`: derivatives of all orders and modes, closures, containers, and what happens on failure."""

import copy
import importlib
import warnings

import numpy as np
import pytest

from checks import assert_close
from optlayers.layers.adjoint import Exact, Neumann, OneStep, Phantom, Shine
from optlayers.solvers.fixed_point import Anderson, Broyden, NewtonKrylov, Picard, Problem, run
from optlayers.status import SolveError, Status

TIGHT = {"tol": 1e-13, "max_iter": 100}


def inputs(rng, batch=2, k=3):
    """A with norm 0.5, and x (batch, k)."""
    A = rng.standard_normal((k, k))
    return 0.5 * A / np.linalg.norm(A, 2), rng.standard_normal((batch, k))


def linear(frontend, **options):
    """z = A z + x for (A, x), with A in the closure of the cell and x as argument."""

    def call(A, x):
        return frontend.module.fixed_point(lambda z, x: z @ A.mT + x, 0 * x, x, **TIGHT | options)

    return call


def closed_form(frontend):
    xp = frontend.xp

    def call(A, x):
        identity = frontend.array(np.eye(A.shape[-1]))
        return xp.linalg.solve(identity - A, x.mT).mT

    return call


def tanh_cell(frontend, z, A, x):
    return frontend.xp.tanh(z @ A.mT + x)


def tanh_layer(frontend, **options):
    def call(A, x):
        cell = lambda z, x: tanh_cell(frontend, z, A, x)
        return frontend.module.fixed_point(cell, 0 * x, x, **TIGHT | options)

    return call


def unrolled(frontend, steps=60):
    def call(A, x):
        z = 0 * x
        for _ in range(steps):
            z = tanh_cell(frontend, z, A, x)
        return z

    return call


def jitted(frontend, function):
    return frontend.framework.jit(function) if frontend.name == "jax" else function


def gradients(frontend, function, values, cotangent):
    return frontend.differentiable(lambda *v: (function(*v),))(values, [cotangent])


def weighted(frontend, function, weights):
    """A scalar function of (A, x) whose Hessian involves second derivatives of every output."""
    return lambda A, x: (weights * function(A, x)).sum()


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), NewtonKrylov()], ids=repr)
def test_gradient_of_a_linear_map(frontend, rng, solver):
    values, cotangent = inputs(rng), rng.standard_normal((2, 3))
    (z,), actual = gradients(frontend, linear(frontend, solver=solver), values, cotangent)
    (expected_z,), expected = gradients(frontend, closed_form(frontend), values, cotangent)
    assert_close(z, expected_z, 1e-11)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-10)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), NewtonKrylov()], ids=repr)
def test_rows_that_depend_on_each_other(frontend, rng, solver):
    """A state without batch axis, of which one entry starts at what a row alone would take for its solution.

    Least squares and Krylov spaces of each row by itself need not converge: then that is said.
    """
    A, x = inputs(rng, 1, 5)
    x, cotangent = np.append(0.0, x[0, 1:]), np.array([1.0, -2.0, 3.0, 1e-6, 10.0])
    options = TIGHT | {"max_iter": 300, "solver": solver, "on_failure": "nan"}

    def layer(A, x):
        return frontend.module.fixed_point(lambda z, x: A @ z + x, 0 * x, x, **options)

    exact, expected = np.linalg.solve(np.eye(5) - A, x), np.linalg.solve(np.eye(5) - A.T, cotangent)
    z = frontend.numpy(layer(*map(frontend.array, (A, x))))
    if isinstance(solver, (Anderson, NewtonKrylov)):
        assert np.isnan(z).any() or abs(z - exact).max() < 1e-11
        return
    assert_close(z, exact, 1e-11)
    (_,), (A_bar, x_bar) = gradients(frontend, layer, (A, x), cotangent)
    assert_close(x_bar, expected, 1e-10)
    assert_close(A_bar, np.outer(expected, exact), 1e-10)


def test_forward_mode_of_a_linear_map(frontend, rng):
    values = [frontend.array(v) for v in inputs(rng)]
    for i in (0, 1):
        actual, expected = (
            jitted(frontend, frontend.transforms.jacfwd(layer, i))(*values)
            for layer in (linear(frontend), closed_form(frontend))
        )
        assert_close(frontend.numpy(actual), frontend.numpy(expected), 1e-10)


@pytest.mark.parametrize("outer", ["jacfwd", "jacrev"])
@pytest.mark.parametrize("inner", ["jacfwd", "jacrev"])
@pytest.mark.parametrize("make, reference", [(linear, closed_form), (tanh_layer, unrolled)])
def test_second_derivatives(frontend, rng, outer, inner, make, reference):
    values = [frontend.array(v) for v in inputs(rng)]
    weights = frontend.array(rng.standard_normal((2, 3)))

    def second(function, outer, inner):
        transforms, scalar = frontend.transforms, weighted(frontend, function, weights)
        twice = getattr(transforms, outer)(getattr(transforms, inner)(scalar, (0, 1)), (0, 1))
        return [frontend.numpy(block) for row in jitted(frontend, twice)(*values) for block in row]

    # Reverse mode for the reference: torch.linalg.solve itself is wrong where forward mode is differentiated.
    expected = second(reference(frontend), "jacrev", "jacrev")
    for a, e in zip(second(make(frontend, order=2, solver=Picard()), outer, inner), expected, strict=True):
        assert_close(a, e, 1e-10)


def test_gradient_of_a_tanh_cell_equals_that_of_unrolling(frontend, rng):
    values, cotangent = inputs(rng), rng.standard_normal((2, 3))
    (z,), actual = gradients(frontend, tanh_layer(frontend), values, cotangent)
    (expected_z,), expected = gradients(frontend, unrolled(frontend), values, cotangent)
    assert_close(z, expected_z, 1e-12)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-11)


def test_derivatives_equal_differences(frontend, rng):
    layer = jitted(frontend, tanh_layer(frontend, order=2, solver=Picard()))
    frontend.check_derivatives(layer, inputs(rng), order=2)


def test_vmap_equals_batch(frontend, rng):
    (A, x), transforms = inputs(rng, batch=6), frontend.transforms
    layer = jitted(frontend, tanh_layer(frontend))
    A, x = frontend.array(A), frontend.array(x)
    mapped = lambda A, x: transforms.vmap(layer, (None, 0))(A, x.reshape(3, 2, 3)).reshape(6, 3)
    assert_close(frontend.numpy(jitted(frontend, mapped)(A, x)), frontend.numpy(layer(A, x)), 1e-12)
    loss = lambda f: lambda A, x: (f(A, x) ** 2).sum()
    actual, expected = (
        jitted(frontend, transforms.grad(loss(f), (0, 1)))(A, x) for f in (mapped, unrolled(frontend))
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(frontend.numpy(a), frontend.numpy(e), 1e-11)


def test_first_order_layer_refuses_second_derivatives(frontend, rng):
    A, x = (frontend.array(v) for v in inputs(rng))
    loss = lambda x: linear(frontend)(A, x).sum()
    with pytest.raises(NotImplementedError, match="order=2"):
        frontend.transforms.jacfwd(frontend.transforms.jacrev(loss))(x)


def test_nested_containers(frontend, rng):
    """A state of two arrays of several axes equals the same state as one matrix."""
    A, x = inputs(rng, k=7)
    cotangent = rng.standard_normal((2, 7))

    def split(A, x):
        def cell(state, x):
            z = frontend.xp.concatenate([state["a"].reshape(2, 4), state["b"][0]], 1)
            z = tanh_cell(frontend, z, A, x)
            return {"a": z[:, :4].reshape(2, 2, 2), "b": (z[:, 4:],)}

        start = {"a": 0 * x[:, :4].reshape(2, 2, 2), "b": (0 * x[:, 4:],)}
        z = frontend.module.fixed_point(cell, start, x, **TIGHT)
        return frontend.xp.concatenate([z["a"].reshape(2, 4), z["b"][0]], 1)

    actual = gradients(frontend, split, (A, x), cotangent)
    expected = gradients(frontend, tanh_layer(frontend), (A, x), cotangent)
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_close(a, e, 1e-12)


# Adjoints that are approximations equal what they approximate


def series(frontend, terms):
    """z0 + (I + A + ... ) (A z0 + x - z0) with the solution z0 as a constant."""

    def call(A, x):
        z = frontend.module.fixed_point(lambda z: z @ A.mT + x, 0 * x, **TIGHT)
        z = z.detach() if frontend.name == "torch" else frontend.framework.lax.stop_gradient(z)
        constant = A.detach() if frontend.name == "torch" else frontend.framework.lax.stop_gradient(A)
        step = z @ A.mT + x
        total, term = step, step - z
        for _ in range(terms - 1):
            term = term @ constant.mT
            total = total + term
        return total

    return call


@pytest.mark.parametrize("name, options, terms", [("Neumann", {"terms": 4}, 4), ("OneStep", {}, 1)])
def test_truncated_series(frontend, rng, name, options, terms):
    values, cotangent = inputs(rng), rng.standard_normal((2, 3))
    layer = linear(frontend, adjoint=getattr(frontend.module, name)(**options))
    _, actual = gradients(frontend, layer, values, cotangent)
    _, expected = gradients(frontend, series(frontend, terms), values, cotangent)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-11)


def test_phantom_is_the_derivative_of_damped_steps(frontend, rng):
    values, cotangent = inputs(rng), rng.standard_normal((2, 3))

    def damped(A, x):
        z = linear(frontend)(A, x)
        z = z.detach() if frontend.name == "torch" else frontend.framework.lax.stop_gradient(z)
        for _ in range(3):
            z = 0.4 * z + 0.6 * (z @ A.mT + x)
        return z

    layer = linear(frontend, adjoint=frontend.module.Phantom(3, 0.6))
    _, actual = gradients(frontend, layer, values, cotangent)
    _, expected = gradients(frontend, damped, values, cotangent)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-11)


def test_shine_uses_the_matrix_of_broyden(frontend, rng):
    """For f = A z + x the gradient in x is that matrix, transposed, times the cotangent."""
    (A, x), cotangent = inputs(rng), rng.standard_normal((2, 3))
    layer = linear(frontend, solver=Broyden(), adjoint=frontend.module.Shine())
    _, (_, actual) = gradients(frontend, layer, (A, x), cotangent)
    ops = importlib.import_module(f"optlayers.ops.{frontend.name}")
    A, x = frontend.array(A), frontend.array(x)
    state = run(ops, Broyden(), Problem(lambda z: z @ A.mT + x, None), 0 * x, 1e-13, 100).state
    U, V = frontend.numpy(state.U), frontend.numpy(state.V)
    H = -np.eye(3) + np.swapaxes(U, 1, 2) @ V
    assert np.abs(H + np.eye(3)).max() > 0.1
    assert_close(actual, -np.einsum("bij,bi->bj", H, cotangent), 1e-11)


def test_shine_needs_broyden(frontend, rng):
    A, x = (frontend.array(v) for v in inputs(rng))
    with pytest.raises(ValueError, match="Broyden"):
        linear(frontend, adjoint=frontend.module.Shine())(A, x)


# Failure


def one_diverging(frontend, on_failure):
    """Three samples, z = a z + 1, of which the middle one diverges."""

    def call(a):
        return frontend.module.fixed_point(
            lambda z: a * z + 1, 0 * a, solver=Picard(), on_failure=on_failure, tol=1e-12, return_info=True
        )

    return call


SLOPES = np.array([[0.1], [-3.0], [0.2]])
USABLE = [0, 2]


def test_failed_sample_is_named(frontend):
    with pytest.raises(SolveError, match=r"1 of 3 problems.*\n.*batch index \(1,\).*iteration limit"):
        one_diverging(frontend, "raise")(frontend.array(SLOPES))


@pytest.mark.parametrize("policy", ["nan", "mask"])
def test_failed_sample_leaves_the_others_alone(frontend, policy):
    layer = one_diverging(frontend, policy)
    _, info = layer(frontend.array(SLOPES))
    assert frontend.numpy(info.status).tolist() == [
        Status.SOLVED.code,
        Status.ITERATION_LIMIT.code,
        Status.SOLVED.code,
    ]
    (z,), (slope_bar,) = gradients(frontend, lambda a: layer(a)[0], [SLOPES], np.ones((3, 1)))
    assert_close(z[USABLE], 1 / (1 - SLOPES[USABLE]), 1e-11)
    assert_close(slope_bar[USABLE], 1 / (1 - SLOPES[USABLE]) ** 2, 1e-10)
    assert slope_bar[1] == 0
    assert np.isnan(z[1]) if policy == "nan" else np.isfinite(z[1])


@pytest.mark.parametrize("policy", ["nan", "mask"])
@pytest.mark.parametrize("adjoint", [Phantom(), OneStep(), Neumann(), Exact()], ids=repr)
def test_sample_that_leaves_its_domain_does_not_spoil_shared_weights(frontend, policy, adjoint):
    """z -> w / 4 + z / 2 in the first row; the second one grows to where the map is NaN."""
    rates = frontend.array([[0.5], [1.0]])

    def layer(w):
        f = lambda z: w / 4 + rates * z + 0 * (1.1 - z) ** 0.5
        options = {"solver": Picard(), "adjoint": adjoint, "on_failure": policy, "tol": 1e-12}
        return (frontend.module.fixed_point(f, frontend.array([[0.0], [0.0]]), **options)[0],)

    (z,), (gradient,) = frontend.differentiable(layer)([np.array(1.0)], [np.ones(1)])
    expected = {Exact: 0.5, OneStep: 0.25}.get(type(adjoint), 0.5 * (1 - 0.5**5))
    assert_close(z, np.array([0.5]), 1e-11)
    assert_close(gradient, np.array(expected), 1e-11)


@pytest.mark.parametrize("adjoint", [Phantom(), OneStep(), Shine(), Exact()], ids=repr)
def test_ignored_failure_gives_the_iterate_of_its_residual(frontend, adjoint):
    f, start = lambda z: 2 * z + 1, frontend.array([[1.0]])
    options = {"solver": frontend.module.Broyden(), "max_iter": 1, "on_failure": "ignore"}
    z, info = frontend.module.fixed_point(f, start, adjoint=adjoint, return_info=True, **options)
    residual = abs(frontend.numpy(f(z) - z) / frontend.numpy(f(z)))[0]
    assert_close(residual, frontend.numpy(info.residual), 1e-14)


def test_unsolved_adjoint_is_not_silent(frontend, rng):
    values = inputs(rng)
    layer = linear(frontend, adjoint=frontend.module.Exact(Picard(), max_iter=2))
    if frontend.name == "torch":
        with pytest.warns(UserWarning, match="linear equations of the derivative"):
            gradients(frontend, layer, values, np.ones((2, 3)))
    else:
        _, (_, x_bar) = gradients(frontend, layer, values, np.ones((2, 3)))
        assert np.isnan(x_bar).all()


def test_wrong_shapes_are_named(frontend):
    fixed_point, z = frontend.module.fixed_point, frontend.array(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"shapes and dtype of z.*\(2, 3\).*\(2, 2\)"):
        fixed_point(lambda z: z[:, :2], z)
    with pytest.raises(ValueError, match="one batch axis"):
        fixed_point(lambda z: z, {"a": z, "b": z[:1]})


@pytest.mark.parametrize("dtype", ["complex128", "int32", "bool"])
def test_states_that_are_no_real_floats_are_refused(frontend, dtype):
    """Sums of squares of complex numbers may be zero: what is far from a solution would count as one."""
    z = frontend.xp.ones((2, 3), dtype=getattr(frontend.xp, dtype))
    with pytest.raises(ValueError, match=f"real floating-point numbers, got .*{dtype}"):
        frontend.module.fixed_point(lambda z: z, z)
    with pytest.raises(ValueError, match=f"real floating-point numbers, got .*{dtype}"):
        frontend.module.odeint(lambda *_: z, z, frontend.array([0.0, 1.0]))


@pytest.mark.parametrize(
    "record, settings",
    [
        (Anderson, {"memory": 0}),
        (Broyden, {"memory": 0}),
        (NewtonKrylov, {"krylov": 0}),
        (Neumann, {"terms": 0}),
        (Phantom, {"steps": 0}),
    ],
)
def test_settings_that_mean_nothing_are_refused(record, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be at least 1"):
        record(**settings)


def test_single_precision(frontend, rng):
    A, x = (frontend.array(v, "float32") for v in inputs(rng))
    z = frontend.module.fixed_point(lambda z: tanh_cell(frontend, z, A, x), 0 * x)
    assert frontend.dtype(z) == "float32"
    assert_close(frontend.numpy(z), frontend.numpy(unrolled(frontend)(A, x)), 1e-5)


# DEQ


def test_deq_is_the_fixed_point_of_its_cell(frontend, rng):
    values, cotangent = inputs(rng), rng.standard_normal((2, 3))

    def layer(A, x):
        return frontend.module.DEQ(lambda z, x: tanh_cell(frontend, z, A, x), **TIGHT)(x)

    actual = gradients(frontend, layer, values, cotangent)
    expected = gradients(frontend, unrolled(frontend), values, cotangent)
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        assert_close(a, e, 1e-11)


def test_warm_start_needs_no_step(frontend, rng):
    A, x = (frontend.array(v) for v in inputs(rng))
    deq = frontend.module.DEQ(lambda z, x: tanh_cell(frontend, z, A, x))
    z, cold = deq.solve(x)
    again, warm = deq.solve(x, z0=z)
    assert frontend.numpy(cold.iterations).min() > 1 and frontend.numpy(warm.iterations).max() == 0
    assert (frontend.numpy(z) == frontend.numpy(again)).all()


@pytest.mark.parametrize("start", [(2,), lambda x: 0 * x[:, :2] + 1])
def test_start_sets_the_shape_of_the_state(frontend, rng, start):
    _, x = inputs(rng)
    z = frontend.module.DEQ(lambda z, x: 0.5 * z + x[:, :2], start)(frontend.array(x))
    assert_close(frontend.numpy(z), 2 * x[:, :2], 1e-8)


def test_deq_module_registers_copies_and_saves(rng):
    torch = pytest.importorskip("torch")
    from optlayers.torch import DEQ

    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, z, x):
            return torch.tanh(0.5 * self.linear(z) + x)

    deq = DEQ(Cell()).double()
    assert [name for name, _ in deq.named_parameters()] == ["cell.linear.weight", "cell.linear.bias"]
    x = torch.tensor(rng.standard_normal((2, 3)))
    twin = copy.deepcopy(deq)
    assert torch.equal(twin(x), deq(x))
    deq(x).sum().backward()
    assert all(p.grad is not None for p in deq.parameters()) and twin.cell.linear.weight.grad is None


# torch only


def test_gradient_reaches_parameters_of_a_module(rng):
    torch = pytest.importorskip("torch")
    from optlayers.torch import fixed_point

    torch.manual_seed(0)
    cell = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()).double()
    x = torch.tensor(rng.standard_normal((2, 3)), requires_grad=True)
    wanted = [*cell.parameters(), x]
    z = fixed_point(lambda z, x: 0.7 * cell(z + x), 0 * x, x, tol=1e-13)
    actual = torch.autograd.grad(z.square().sum(), wanted)
    z = 0 * x
    for _ in range(80):
        z = 0.7 * cell(z + x)
    for a, e in zip(actual, torch.autograd.grad(z.square().sum(), wanted), strict=True):
        assert_close(a, e, 1e-10)


def test_second_derivatives_by_plain_autograd(rng):
    torch = pytest.importorskip("torch")
    from optlayers.torch import fixed_point

    A, x = (torch.tensor(v, requires_grad=True) for v in inputs(rng))
    layer = lambda A, x: fixed_point(lambda z: torch.tanh(z @ A.mT + x), 0 * x, order=2, **TIGHT)
    options = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
    assert torch.autograd.gradcheck(layer, (A, x), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, (A, x), fast_mode=True, **options)


def test_functional_call_with_all_samples_mapped(rng):
    """Per-sample gradients of module parameters, the parameters wrapped by two transformations at once."""
    torch = pytest.importorskip("torch")
    from optlayers.torch import fixed_point

    torch.manual_seed(0)
    cell = torch.nn.Linear(3, 3).double()
    parameters = dict(cell.named_parameters())
    x = torch.tensor(rng.standard_normal((4, 1, 3)))

    def loss(solve):
        def call(parameters, x):
            f = lambda z: torch.tanh(0.5 * torch.func.functional_call(cell, parameters, (z,)) + x)
            return solve(f, 0 * x).square().sum()

        return call

    def iterate(f, z):
        for _ in range(80):
            z = f(z)
        return z

    per_sample = lambda solve: torch.func.vmap(torch.func.grad(loss(solve)), (None, 0))(parameters, x)
    actual, expected = per_sample(lambda f, z: fixed_point(f, z, tol=1e-13)), per_sample(iterate)
    for name in parameters:
        assert_close(actual[name].detach(), expected[name].detach(), 1e-11)


def test_memory_does_not_grow_with_iterations(rng):
    """The tensors that autograd keeps are the same after 5 and after 200 iterations."""
    torch = pytest.importorskip("torch")
    from optlayers.torch import fixed_point

    A, x = (torch.tensor(v, requires_grad=True) for v in inputs(rng))
    counts = []
    for steps in (5, 200):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            fixed_point(
                lambda z: torch.tanh(z @ A.mT + x), 0 * x, max_iter=steps, tol=1e-16, on_failure="ignore"
            )
        counts.append(len(kept))
    assert counts[0] == counts[1] < 30


def test_no_warning_where_all_converges(rng):
    torch = pytest.importorskip("torch")
    from optlayers.torch import fixed_point

    A, x = (torch.tensor(v, requires_grad=True) for v in inputs(rng))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed_point(lambda z: torch.tanh(z @ A.mT + x), 0 * x).sum().backward()
