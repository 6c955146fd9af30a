"""`odeint`: values against closed forms and SciPy, derivatives, batches, jumps, events, what can go wrong."""

import contextlib
import copy
import pickle
import warnings
import weakref

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from checks import assert_close
from optlayers.layers.ode_adjoint import Discrete
from optlayers.layers.ode_continuous import Continuous
from optlayers.status import SolveError, Status

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
ADAPTIVE = ("bosh3", "dopri5", "tsit5", "dopri8")
FIXED = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def odeint(frontend, field, *args, jumps=None, event=None, **options):
    """`odeint` of either frontend, with functions (t, y) and (t, y, j)."""
    if frontend.name == "torch":
        return frontend.module.odeint(field, *args, jumps=jumps, event=event, **options)
    turned = jumps and (jumps[0], lambda y, t, j: jumps[1](t, y, j), *jumps[2:])
    event = event and (lambda y, t, event=event: event(t, y))
    return frontend.module.odeint(lambda y, t: field(t, y), *args, jumps=turned, event=event, **options)


def compiled(frontend, function):
    return frontend.framework.jit(function) if frontend.name == "jax" else function


def exponential(frontend, A):
    if frontend.name == "torch":
        return frontend.framework.linalg.matrix_exp(A)
    return frontend.framework.scipy.linalg.expm(A)


def spiral(rng):
    """A, y0 and times of dy/dt = A y."""
    A = np.array([[-0.1, 2.0], [-2.0, -0.1]]) + 0.1 * rng.standard_normal((2, 2))
    return A, rng.standard_normal(2), np.array([0.3, 0.5, 1.7, 2.0])


def spiral_layer(frontend, **options):
    return lambda A, y0, t: odeint(frontend, lambda t, y: A @ y, y0, t, **TIGHT | options)


def spiral_in_closed_form(frontend):
    """Derivatives of its exponentials are taken for the whole interval and for each output."""
    return lambda A, y0, t: frontend.xp.stack([exponential(frontend, A * (s - t[0])) @ y0 for s in t])


def oscillator(frontend, t, y):
    return frontend.xp.stack([y[..., 1], -4 * y[..., 0]], -1)


def lotka_volterra(frontend, t, y):
    return frontend.xp.stack([y[..., 0] * (1.5 - y[..., 1]), y[..., 1] * (y[..., 0] - 3)], -1)


def van_der_pol(frontend, t, y, mu=30.0):
    return frontend.xp.stack([y[..., 1], mu * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


def reference(field, y0, t):
    """By SciPy, of fields written for NumPy's names."""
    numpy = type("Numpy", (), {"xp": np})
    options = {"method": "Radau"} if field is van_der_pol else {"method": "DOP853"}
    tight = {"rtol": 1e-12, "atol": 1e-13}
    return solve_ivp(lambda t, y: field(numpy, t, y), t[[0, -1]], y0, t_eval=t, **options, **tight).y.T


# Accuracy


@pytest.mark.parametrize("field", [oscillator, lotka_volterra])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_error_follows_the_tolerance(field, method):
    frontend = torch_frontend()
    y0, t = np.array([1.0, 2.0]), np.linspace(0, 5, 8)
    expected, errors = reference(field, y0, t), []
    tolerances = [1e-3, 1e-5, 1e-7, 1e-9] if method != "bosh3" else [1e-3, 1e-5, 1e-7]
    for tolerance in tolerances:
        y = odeint(
            frontend,
            lambda t, y: field(frontend, t, y),
            frontend.array(y0),
            frontend.array(t),
            method=method,
            rtol=tolerance,
            atol=tolerance,
            max_steps=20000,
        )
        errors.append(np.abs(frontend.numpy(y) - expected).max())
        assert errors[-1] < 60 * tolerance
    slope = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert 0.75 < slope < 1.3, errors


def torch_frontend():
    """For what does not depend on the framework."""
    pytest.importorskip("torch")
    from frontends import FRONTENDS

    return FRONTENDS["torch"]()


@pytest.mark.parametrize("method, order", FIXED.items())
def test_fixed_steps_have_their_order(method, order):
    frontend = torch_frontend()
    y0, t = np.array([1.0, 2.0]), np.linspace(0, 1, 3)
    expected, sizes, errors = reference(lotka_volterra, y0, t), [0.05, 0.025, 0.0125], []
    for size in sizes:
        y = odeint(
            frontend,
            lambda t, y: lotka_volterra(frontend, t, y),
            frontend.array(y0),
            frontend.array(t),
            method=method,
            step_size=size,
        )
        errors.append(np.abs(frontend.numpy(y) - expected).max())
    assert abs(np.polyfit(np.log(sizes), np.log(errors), 1)[0] - order) < 0.2, errors


@pytest.mark.slow_to_compile
def test_without_step_size_fixed_steps_go_from_output_to_output(frontend):
    t = frontend.array([0.0, 0.5, 1.5])
    y, info = odeint(frontend, lambda t, y: -y, frontend.array([1.0]), t, method="euler", return_info=True)
    assert_close(frontend.numpy(y)[:, 0], np.array([1.0, 0.5, 0.0]), 1e-14)
    assert int(info.steps) == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_number_of_fixed_steps(dtype):
    frontend = torch_frontend()
    for outputs in (2, 11):
        t, y0 = frontend.array(np.linspace(0, 1, outputs), dtype), frontend.array([1.0], dtype)
        options = {"method": "rk4", "step_size": 0.1, "return_info": True}
        assert int(odeint(frontend, lambda t, y: -y, y0, t, **options)[1].steps) == 10


def test_fast_start_of_a_long_interval():
    """Its steps are below the rounding of the end."""
    frontend = torch_frontend()
    t, y0 = frontend.array([0.0, 1e5], "float32"), frontend.array([1.0], "float32")
    y, info = odeint(frontend, lambda t, y: -300 * y * (-t).exp(), y0, t, return_info=True)
    assert_close(frontend.numpy(y)[-1], np.zeros(1), 1e-6)
    assert int(info.status) == Status.SOLVED.code


@pytest.mark.slow_to_compile
def test_stiff_equation(frontend):
    """Van der Pol at mu = 30, past a fast transition; an explicit method needs many more steps."""
    y0, t = np.array([2.0, 0.0]), np.array([0.0, 10.0, 40.0])
    expected, field = reference(van_der_pol, y0, t), lambda t, y: van_der_pol(frontend, t, y)
    solve = lambda **options: odeint(
        frontend, field, frontend.array(y0), frontend.array(t), return_info=True, **options
    )
    implicit = solve(method="kvaerno5", rtol=1e-5, atol=1e-6)
    assert_close(frontend.numpy(implicit[0]), expected, 1e-3)
    explicit = solve(method="dopri5", rtol=1e-5, atol=1e-6, max_steps=5000)
    assert int(explicit[1].steps) > 5 * int(implicit[1].steps)


@pytest.mark.slow
def test_stiff_gradient(frontend):
    t = frontend.array([0.0, 3.0])

    def end(mu, y0):
        field = lambda t, y: van_der_pol(frontend, t, y, mu)
        return odeint(frontend, field, y0, t, method="kvaerno5", rtol=1e-9, atol=1e-10)[-1]

    values = [np.array(10.0), np.array([2.0, 0.0])]
    _, gradients = frontend.differentiable(lambda *v: (end(*v),))(values, [np.array([1.0, 0.3])])
    y = lambda mu: reference_end(mu, values[1])
    expected = (y(10 + 1e-4) - y(10 - 1e-4)) @ [1.0, 0.3] / 2e-4
    assert_close(gradients[0], np.array(expected), 1e-6)


def reference_end(mu, y0):
    numpy = type("Numpy", (), {"xp": np})
    field = lambda t, y: van_der_pol(numpy, t, y, mu)
    return solve_ivp(field, (0, 3), y0, method="Radau", rtol=1e-12, atol=1e-13).y[:, -1]


# Derivatives


def test_linear_system_and_its_gradients(frontend, rng):
    values, cotangent = spiral(rng), rng.standard_normal((4, 2))
    layers = spiral_layer(frontend, method="tsit5"), spiral_in_closed_form(frontend)
    pairs = [
        frontend.differentiable(lambda *v, layer=layer: (layer(*v),))(values, [cotangent]) for layer in layers
    ]
    ((y,), actual), ((expected_y,), expected) = pairs
    assert_close(y, expected_y, 1e-9)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-8)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8", "rk4", "kvaerno5"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.slow_to_compile
def test_discrete_adjoint_equals_the_derivative_of_the_steps(frontend, rng, method, every):
    """At loose tolerances, where the continuous adjoint is off by far more than 1e-10."""
    values, cotangent = spiral(rng), rng.standard_normal((4, 2))
    options = {"method": method, "rtol": 1e-3, "atol": 1e-3, "max_steps": 64}
    if method == "rk4":
        options |= {"step_size": 0.2}
    if method == "kvaerno5":
        options |= {"rtol": 1e-10, "atol": 1e-10, "max_steps": 512}  # stages are solved to a thousandth
    swept = spiral_layer(frontend, adjoint=Discrete(every), **options)
    unrolled = spiral_layer(frontend, order=2, **options)
    results = [
        frontend.differentiable(lambda *v, f=f: (f(*v),))(values, [cotangent]) for f in (swept, unrolled)
    ]
    assert_close(results[0][0][0], results[1][0][0], 1e-12)
    for a, e in zip(results[0][1], results[1][1], strict=True):
        assert_close(a, e, 1e-8 if method == "kvaerno5" else 1e-11)


def gradients_both_ways(field, y0, t, weight, **options):
    """Of the sum of squares in y0 and the weight: of recorded steps, and of those that are taken again."""
    frontend = torch_frontend()
    torch, results = frontend.framework, []
    for adjoint in (Discrete(0), Discrete()):
        w, start = frontend.array(weight).requires_grad_(), frontend.array(y0).requires_grad_()
        own = {k: v(w) if callable(v) and k != "event" else v for k, v in options.items()}
        y, info = odeint(
            frontend, field(w), start, frontend.array(t), adjoint=adjoint, return_info=True, **own
        )
        outputs = [y] if info.event_time is None else [info.event_time, info.event_state]
        gradients = torch.autograd.grad(sum((x**2).sum() for x in outputs), (start, w))
        results.append(([*outputs, *gradients], info))
    return results


def assert_recorded_steps_have_the_same_gradients(*problem, **options):
    (actual, _), (expected, info) = gradients_both_ways(*problem, **options)
    for a, e in zip(actual, expected, strict=True):
        assert np.isfinite(e.detach().numpy()).all()
        assert_close(a.detach().numpy(), e.detach().numpy(), 1e-7)
    return info


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8", "rk4", "kvaerno5"])
@pytest.mark.parametrize("direction", [1, -1])
def test_recorded_steps(rng, method, direction):
    """Of many samples, which do not accept the same steps."""
    t = direction * np.linspace(0, 1, 7) * np.array([[1.0], [2.0], [5.0]])
    tolerance = 1e-7 if method == "kvaerno5" else 1e-4  # stages are solved to a thousandth
    options = {"method": method, "rtol": tolerance, "atol": tolerance, "first_step": 1.0}
    field = lambda w: lambda t, y: (y @ w).tanh() * (9 * t).cos()
    values = rng.standard_normal((3, 2)), t, rng.standard_normal((2, 2))
    info = assert_recorded_steps_have_the_same_gradients(field, *values, **options)
    assert method == "rk4" or (info.rejected > 0).any()


@pytest.mark.parametrize("of_y0", [True, False])
def test_recorded_steps_are_not_taken_again(of_y0):
    frontend, calls = torch_frontend(), []
    y0, w = frontend.array([1.0]).requires_grad_(of_y0), frontend.array(0.5).requires_grad_()
    field = lambda t, y: (calls.append(1), w * y)[1]
    y = odeint(frontend, field, y0, frontend.array([0.0, 1.0]), adjoint=Discrete(0))
    count = len(calls)
    y.sum().backward()
    assert len(calls) == count


def test_refused_steps_are_not_recorded():
    """They reach where the field has no derivative, nor a value."""
    t, y0 = np.linspace(0, 1, 3) * np.ones((2, 1)), np.array([[1.0], [9.0]])
    field = lambda w: lambda t, y: -w * y.sqrt()
    info = assert_recorded_steps_have_the_same_gradients(field, y0, t, np.array(1.5), first_step=3.0)
    assert (info.rejected > 0).all()
    one = assert_recorded_steps_have_the_same_gradients(field, y0[0], t[0], np.array(1.5), first_step=3.0)
    assert one.rejected > 0


def test_recorded_steps_with_jumps_and_an_event():
    field = lambda w: lambda t, y: -w * y
    jumps = lambda w: (torch_frontend().array([0.4, 0.7]), lambda t, y, j: y + w**2)
    values = np.array([1.0, 2.0]), np.linspace(0, 1, 4), np.array(0.5)
    assert_recorded_steps_have_the_same_gradients(field, *values, jumps=jumps)
    event = lambda t, y: y[1] - 1.5
    assert_recorded_steps_have_the_same_gradients(field, *values, event=event)


def test_second_derivatives_of_recorded_steps(rng):
    frontend = torch_frontend()
    torch, t = frontend.framework, frontend.array([0.0, 0.5, 1.0])
    A, y0 = (frontend.array(v).requires_grad_() for v in spiral(rng)[:2])
    results = []
    for adjoint in (Discrete(0), Discrete()):
        y = odeint(frontend, lambda t, y: A @ y, y0, t, order=2, adjoint=adjoint)
        (first,) = torch.autograd.grad((y**3).sum(), A, create_graph=True)
        results.append(torch.autograd.grad((first**2).sum(), (A, y0)))
    for a, e in zip(*results, strict=True):
        assert_close(a.numpy(), e.numpy(), 1e-10)


@pytest.mark.slow_to_compile
def test_forward_mode(frontend, rng):
    values = [frontend.array(v) for v in spiral(rng)]
    functions = spiral_layer(frontend), spiral_in_closed_form(frontend)
    for i in range(3):
        actual, expected = (compiled(frontend, frontend.transforms.jacfwd(f, i))(*values) for f in functions)
        assert_close(frontend.numpy(actual), frontend.numpy(expected), 1e-7)


@pytest.mark.parametrize("outer, inner", [("jacfwd", "jacrev"), ("jacrev", "jacrev"), ("jacrev", "jacfwd")])
@pytest.mark.slow_to_compile
def test_second_derivatives(frontend, rng, outer, inner):
    values, transforms = [frontend.array(v) for v in spiral(rng)], frontend.transforms
    weights = frontend.array(rng.standard_normal((4, 2)))

    def second(layer, outer, inner):
        loss = lambda *v: (weights * layer(*v) ** 2).sum()
        twice = getattr(transforms, outer)(getattr(transforms, inner)(loss, (0, 1, 2)), (0, 1, 2))
        return [frontend.numpy(x) for row in compiled(frontend, twice)(*values) for x in row]

    expected = second(spiral_in_closed_form(frontend), "jacrev", "jacrev")
    for a, e in zip(second(spiral_layer(frontend, order=2), outer, inner), expected, strict=True):
        assert_close(a, e, 1e-5)


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("method", ["dopri8", "kvaerno5", "rk4"])
def test_second_derivatives_in_times_where_steps_end_at_outputs(frontend, method):
    y0, field = frontend.array([1.0]), lambda t, y: -y
    options = {"method": method, "order": 2} | TIGHT | ({"step_size": 0.02} if method == "rk4" else {})

    def end(t):
        return odeint(frontend, field, y0, frontend.xp.stack([0 * t, t / 2, t]), **options)[1:, 0].sum()

    grad = frontend.transforms.grad
    second = compiled(frontend, grad(grad(end)))(frontend.array(1.0))
    assert_close(frontend.numpy(second), np.array(np.exp(-0.5) / 4 + np.exp(-1.0)), 1e-7)


def test_third_derivatives_in_times_raise():
    frontend = torch_frontend()
    grad, y0 = frontend.transforms.grad, frontend.array([1.0])
    end = lambda t: odeint(frontend, lambda t, y: -y, y0, frontend.xp.stack([0 * t, t]), order=3)[1, 0]
    with pytest.raises(NotImplementedError, match="times .* up to order 2"):
        grad(grad(grad(end)))(frontend.array(1.0))


@pytest.mark.slow_to_compile
def test_more_derivatives_than_asked_for_raise(frontend, rng):
    A, y0, t = (frontend.array(v) for v in spiral(rng))
    loss = lambda y0: (odeint(frontend, lambda t, y: A @ y, y0, t, method="rk4") ** 3).sum()
    with pytest.raises(NotImplementedError, match="order=2"):
        frontend.transforms.hessian(loss)(y0)


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("adjoint", [Discrete(), Discrete(0), Continuous()], ids=repr)
def test_second_derivatives_beside_others_raise(frontend, adjoint):
    """Of a sum or product with what has them, where that of the solution would be missing."""
    t = frontend.array([0.0, 1.0])

    def loss(w):
        return odeint(frontend, lambda t, y: -w * y, frontend.array([1.0]), t, adjoint=adjoint)[-1, 0] * w

    w = frontend.array(0.5)
    if frontend.name == "jax":
        twice = frontend.framework.grad(frontend.framework.grad(loss))
    else:
        grad = frontend.framework.autograd.grad
        twice = lambda w: grad(grad(loss(w.requires_grad_()), w, create_graph=True)[0], w)
    with pytest.raises(NotImplementedError, match="order=2"):
        twice(w)


@pytest.mark.slow_to_compile
def test_continuous_adjoint(frontend, rng):
    """It agrees with the discrete one as far as tolerances go, in everything, with per-sample times."""
    values = [rng.standard_normal(shape) for shape in ((3, 2), (2, 2), (3, 2))]
    t = np.array([[0.0, 1.0, 2.0], [1.0, 0.5, -1.0], [0.0, 0.7, np.nan]])

    def layer(adjoint):
        def call(y0, W, c):
            field = lambda t, y: frontend.xp.tanh(y @ W) * frontend.xp.cos(t) + c
            y = odeint(frontend, field, y0, frontend.array(t), adjoint=adjoint, rtol=1e-10, atol=1e-10)
            return (frontend.xp.where(frontend.array(np.isnan(t))[..., None] > 0, 0.0, y),)

        return frontend.differentiable(call)(values, [rng.standard_normal((3, 3, 2))])

    rng = np.random.default_rng(1)
    (y,), actual = layer(Continuous())
    rng = np.random.default_rng(1)
    (expected_y,), expected = layer(Discrete())
    assert_close(y, expected_y, 1e-14)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-7)


@pytest.mark.slow_to_compile
def test_continuous_adjoint_that_fails_says_so(frontend):
    """Backwards in time, what is off the slow solution of a stiff equation grows beyond all numbers."""
    rate, t = frontend.array([[50.0], [1.0]]), frontend.array([[0.0, 20.0]] * 2)
    field = lambda t, y: rate * (frontend.xp.cos(t) - y)

    def layer(y0):
        return (odeint(frontend, field, y0, t, adjoint=Continuous(), rtol=1e-3, atol=1e-3),)

    # JAX cannot warn while it differentiates.
    told = contextlib.nullcontext() if frontend.name == "jax" else pytest.warns(match="1 of 2 samples")
    with told:
        (y,), (gradient,) = frontend.differentiable(layer)([np.ones((2, 1))], [np.ones((2, 2, 1))])
    assert np.isfinite(y).all()
    assert np.isnan(gradient[0]).all() and np.isfinite(gradient[1]).all()


def test_continuous_adjoint_is_of_first_order(frontend):
    t = frontend.array([0.0, 1.0])
    with pytest.raises(ValueError, match="order=1"):
        odeint(frontend, lambda t, y: -y, frontend.array([1.0]), t, adjoint=Continuous(), order=2)


def test_gradient_through_values_that_were_computed():
    """What the field closes over may itself depend on something else that it closes over."""
    frontend = torch_frontend()
    torch = frontend.framework
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    v, y0, t = 2 * w, frontend.array([1.0]), frontend.array([0.0, 1.0])
    y = odeint(frontend, lambda t, y: (w + v) * y, y0, t, **TIGHT)[-1]
    assert_close(frontend.numpy(torch.autograd.grad(y.sum(), w)[0]), np.array(3 * np.exp(0.9)), 1e-9)


def test_outside_reference():
    jax = pytest.importorskip("jax")
    diffrax = pytest.importorskip("diffrax")
    from optlayers.jax import odeint

    y0, t = jax.numpy.array([1.0, 2.0]), jax.numpy.linspace(0, 3, 5)
    rates = jax.numpy.array([1.5, 3.0])

    def field(y, t, rates):
        return jax.numpy.stack([y[0] * (rates[0] - y[1]), y[1] * (y[0] - rates[1])])

    def peer(y0, rates):
        term = diffrax.ODETerm(lambda t, y, rates: field(y, t, rates))
        control = diffrax.PIDController(rtol=1e-11, atol=1e-11)
        save = diffrax.SaveAt(ts=t)
        options = {"args": rates, "saveat": save, "stepsize_controller": control}
        return diffrax.diffeqsolve(term, diffrax.Dopri5(), t[0], t[-1], None, y0, **options).ys

    ours = lambda y0, rates: odeint(field, y0, t, rates, rtol=1e-11, atol=1e-11)
    gradients = [
        jax.jit(jax.grad(lambda *v, f=f: (f(*v) ** 2).sum(), (0, 1)))(y0, rates) for f in (ours, peer)
    ]
    for a, e in zip(*gradients, strict=True):
        assert_close(a, e, 1e-7)


# Batches


def test_batch_of_times_and_directions(frontend, rng):
    """NaN-padded times of each sample, forwards and backwards; one sample has no time but its start."""
    A = spiral(rng)[0]
    y0 = rng.standard_normal((4, 2))
    t = np.array([[0.0, 1.0, 3.0], [0.0, -0.5, -2.0], [1.0, 1.5, np.nan], [2.0, np.nan, np.nan]])
    y, info = odeint(
        frontend,
        lambda t, y: y @ frontend.array(A.T),
        frontend.array(y0),
        frontend.array(t),
        return_info=True,
        **TIGHT,
    )
    expected = np.stack([[expm(A * (s - t[b, 0])) @ y0[b] for s in np.nan_to_num(t[b])] for b in range(4)])
    asked = ~np.isnan(t)
    assert_close(frontend.numpy(y)[asked], expected[asked], 1e-10)
    assert np.isnan(frontend.numpy(y)[~asked]).all()
    assert_close(frontend.numpy(info.time), np.array([3.0, -2.0, 1.5, 2.0]), 1e-14)


@pytest.mark.slow_to_compile
def test_samples_do_not_feel_their_batch_mates(frontend):
    """A fast sample takes many steps, the slow ones few; each as by itself."""
    rates, t = np.array([[1.0], [50.0], [3.0]]), np.linspace(0, 2, 4) * np.ones((3, 1))

    def solve(rows):
        rate, times = frontend.array(rates[rows]), frontend.array(t[rows])
        field = lambda t, y: frontend.xp.cos(rate * t) * rate - y
        y0 = frontend.array(np.ones((len(rows), 1)))
        y, info = odeint(frontend, field, y0, times, return_info=True)
        return frontend.numpy(y), frontend.numpy(info.steps)

    (y, steps), (y_slow, steps_slow) = solve([0, 1, 2]), solve([0, 2])
    assert steps[1] > 8 * steps[0]
    assert (steps[[0, 2]] == steps_slow).all()
    assert_close(y[[0, 2]], y_slow, 1e-14)


@pytest.mark.slow_to_compile
def test_containers_and_float32(frontend, rng):
    p, q = rng.standard_normal((3, 2)), rng.standard_normal((3, 1, 2))
    state = {"p": frontend.array(p, "float32"), "q": (frontend.array(q, "float32"),)}
    field = lambda t, y: {"p": -y["p"], "q": (-2 * y["q"][0],)}
    for lead, t in (((4,), np.linspace(0, 1, 4)), ((3, 4), np.linspace(0, 1, 4) * np.ones((3, 1)))):
        y = odeint(frontend, field, state, frontend.array(t))
        assert {frontend.dtype(y["p"]), frontend.dtype(y["q"][0])} == {"float32"}
        p_end, q_end = (y["p"][-1], y["q"][0][-1]) if lead == (4,) else (y["p"][:, -1], y["q"][0][:, -1])
        assert y["q"][0].shape == (*lead, *q.shape[len(lead) - 1 :])
        assert_close(frontend.numpy(p_end), np.exp(-1) * p, 2e-5)
        assert_close(frontend.numpy(q_end), np.exp(-2) * q, 2e-5)


@pytest.mark.parametrize("outputs", [1, 2, 400])
@pytest.mark.slow_to_compile
def test_number_of_outputs(frontend, outputs):
    t = np.linspace(0, 2, outputs)
    y = odeint(frontend, lambda t, y: -y, frontend.array([1.0]), frontend.array(t), **TIGHT)
    assert_close(frontend.numpy(y)[:, 0], np.exp(-t), 1e-9)


@pytest.mark.slow_to_compile
def test_vmap_equals_batch(frontend, rng):
    A, y0, t = (frontend.array(v) for v in (spiral(rng)[0], rng.standard_normal((3, 2)), spiral(rng)[2]))
    single = lambda y0: odeint(frontend, lambda t, y: A @ y, y0, t)
    mapped = compiled(frontend, frontend.transforms.vmap(single))(y0)
    times = frontend.xp.stack([t] * 3)
    batch = odeint(frontend, lambda t, y: y @ A.mT, y0, times)
    assert_close(frontend.numpy(mapped), frontend.numpy(batch), 1e-12)


# Jumps and events


def jump_problem(rng):
    """y0, A, C, data of the jumps, and their times: unsorted, masked, one at the start and one at the end."""
    y0, X = rng.standard_normal((2, 2)), rng.standard_normal((2, 4, 2))
    A, C = spiral(rng)[0], 0.5 * rng.standard_normal((2, 2))
    times = np.array([[0.2, 1.1, 0.6, 9.0], [0.9, 0.0, 0.4, np.nan]])
    mask = np.array([[True, True, False, True], [True, True, True, True]])
    return [y0, A, C, X, times], mask, np.array([[0.0, 0.5, 1.3], [0.0, 0.6, 0.9]])


def test_jumps_and_their_gradients(frontend, rng):
    values, mask, t = jump_problem(rng)
    batch, xp = frontend.array([0, 1]).astype(int) if frontend.name == "jax" else [0, 1], frontend.xp

    def jump(y, C, X, t):
        return y @ C.mT + X * (1 + t)

    def layer(y0, A, C, X, times):
        fn = lambda t, y, j: jump(y, C, X[batch, j], t)
        jumps = (times, fn, frontend.array(mask) > 0)
        y, info = odeint(
            frontend, lambda t, y: y @ A.mT, y0, frontend.array(t), jumps=jumps, return_info=True, **TIGHT
        )
        happened = frontend.array(np.isfinite(values[4]) & mask & (values[4] < 2))[..., None] > 0
        return y, xp.where(happened, info.before, 0.0), xp.where(happened, info.after, 0.0)

    def closed_form(y0, A, C, X, times):
        """Sample by sample, piece by piece."""
        rows, before, after = [], [[0 * y0[0]] * 4, [0 * y0[0]] * 4], [[0 * y0[0]] * 4, [0 * y0[0]] * 4]
        for b, order in enumerate(([0, 1], [1, 2, 0])):
            now, y, outputs = t[b, 0], y0[b], []
            for s, j in sorted([(s, -1) for s in t[b]] + [(values[4][b, j], j) for j in order]):
                when = times[b, j] if j >= 0 else s
                y, now = exponential(frontend, A * (when - now)) @ y, when
                if j < 0:
                    outputs.append(y)
                    continue
                before[b][j] = y
                y = jump(y[None], C, X[b, j][None], when)[0]
                after[b][j] = y
            rows.append(xp.stack(outputs))
        return xp.stack(rows), *(xp.stack([xp.stack(r) for r in rows]) for rows in (before, after))

    cotangents = [rng.standard_normal(shape) for shape in ((2, 3, 2), (2, 4, 2), (2, 4, 2))]
    finite = [*values[:4], np.nan_to_num(values[4], nan=99.0)]
    outputs, actual = frontend.differentiable(layer)(finite, cotangents)
    expected_outputs, expected = frontend.differentiable(closed_form)(finite, cotangents)
    for a, e in zip(outputs, expected_outputs, strict=True):
        assert_close(a, e, 1e-9)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-8)


@pytest.mark.slow_to_compile
def test_jump_of_the_right_hand_side(frontend):
    """A right-hand side that jumps where the state is said to jump costs no small steps."""
    t, times = frontend.array([0.0, 2.0]), frontend.array([1.0])
    field = lambda t, y: frontend.xp.where(t < 1, 1.0, -2.0) + 0 * y
    y, info = odeint(
        frontend,
        field,
        frontend.array([0.0]),
        t,
        jumps=(times, lambda t, y, j: y),
        return_info=True,
        **TIGHT,
    )
    assert_close(frontend.numpy(y)[-1], np.array([-1.0]), 1e-12)
    assert int(info.rejected) == 0


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_gradient_in_the_time_at_which_the_right_hand_side_jumps(frontend, method, direction):
    """y' = 1 until tau and 2 afterwards: y(2) = 4 - tau; and the same backwards in time."""
    t = frontend.array([0.0, 2.0 * direction])

    def layer(tau):
        field = lambda t, y: frontend.xp.where(t * direction < tau, 1.0, 2.0) + 0 * y
        jumps = (tau[None] * direction, lambda t, y, j: y)
        return (odeint(frontend, field, frontend.array([0.0]), t, jumps=jumps, method=method)[-1],)

    (y,), (gradient,) = frontend.differentiable(layer)([np.array(0.7)], [np.ones(1)])
    assert_close(y, np.array([3.3 * direction]), 1e-12)
    assert_close(gradient, np.array(-direction), 1e-12)


def test_event_and_its_gradients(frontend):
    """A ball falls from height h with speed v: it hits the ground at a known time; the last one does not."""
    values = [np.array([[10.0, 0.0], [5.0, 3.0], [90.0, 1.0]]), np.array(9.8)]
    t, xp = np.linspace(0, 3, 4) * np.ones((3, 1)), frontend.xp

    def layer(y0, g):
        field = lambda t, y: xp.stack([y[:, 1], 0 * y[:, 1] - g], 1)
        y, info = odeint(
            frontend,
            field,
            y0,
            frontend.array(t),
            event=lambda t, y: y[:, 0],
            return_info=True,
            **TIGHT,
        )
        assert info.event_time.shape == (3,)
        return info.event_time[:2], info.event_state[:2, 1], y[:2, 1], y[2]

    def closed_form(y0, g):
        h, v = y0[:, 0], y0[:, 1]
        time = (v + (v**2 + 2 * g * h) ** 0.5) / g
        at = lambda s: xp.stack([h + v * s - g * s**2 / 2, v - g * s], 1)
        return time[:2], (v - g * time)[:2], at(1.0)[:2], xp.stack([at(s)[2] for s in t[0]])

    rng = np.random.default_rng(0)
    cotangents = [rng.standard_normal(shape) for shape in ((2,), (2,), (2, 2), (4, 2))]
    pairs = [frontend.differentiable(f)(values, cotangents) for f in (layer, closed_form)]
    for kind in (0, 1):
        for a, e in zip(pairs[0][kind], pairs[1][kind], strict=True):
            assert_close(a, e, 1e-9)


@pytest.mark.slow_to_compile
def test_after_an_event_there_are_no_outputs(frontend):
    t = frontend.array([0.0, 0.4, 1.0, 2.0])
    y, info = odeint(
        frontend, lambda t, y: 0 * y - 1, frontend.array([0.7]), t, event=lambda t, y: y[0], return_info=True
    )
    assert_close(frontend.numpy(y)[:2, 0], np.array([0.7, 0.3]), 1e-12)
    assert np.isnan(frontend.numpy(y)[2:]).all()
    assert_close(frontend.numpy(info.event_time), np.array(0.7), 1e-12)
    assert int(info.status) == Status.SOLVED.code


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("options", [{"method": "euler", "step_size": 0.25}, {"method": "dopri8"}])
def test_event_at_the_end_of_a_step(frontend, options):
    """There g is zero, or off zero by rounding; at the start it is zero and does not count."""
    y0, t = frontend.array([[-1.0], [0.0]]), frontend.array([[0.0, 1.0, 2.0]] * 2)
    event = lambda t, y: y[:, 0] * (y[:, 0] - 1.5)
    _, info = odeint(frontend, lambda t, y: 0 * y + 1, y0, t, event=event, return_info=True, **options)
    assert_close(frontend.numpy(info.event_time), np.array([1.0, 1.5]), 1e-12)


@pytest.mark.slow_to_compile
def test_jumps_across_an_event_do_not_count(frontend):
    """The first sample jumps over the threshold for good, the second one comes down to it again."""
    jumps = (frontend.array([[1.0]] * 2), lambda t, y, j: y + 5)
    rate, t = frontend.array([[1.0], [-1.0]]), frontend.array([[0.0, 9.0]] * 2)
    field, event = lambda t, y: rate + 0 * y, lambda t, y: y[:, 0] - 3
    options = {"jumps": jumps, "event": event, "return_info": True}
    _, info = odeint(frontend, field, frontend.array([[0.0], [0.0]]), t, **options)
    assert np.isnan(frontend.numpy(info.event_time)[0]) and np.isnan(frontend.numpy(info.event_state)[0])
    assert_close(frontend.numpy(info.event_time)[1], np.array(2.0), 1e-12)
    assert_close(frontend.numpy(info.event_state)[1], np.array([3.0]), 1e-12)


@pytest.mark.slow_to_compile
def test_event_that_is_piecewise_constant(frontend):
    """It is found, and has no derivative; a sample beside it keeps its own."""
    t, xp = frontend.array([[0.0, 2.0]] * 2), frontend.xp
    is_flat = frontend.array([1.0, 0.0]) > 0
    event = lambda t, y: xp.where(is_flat, xp.sign(y[:, 0] - 0.5), y[:, 0] - 0.5)

    def layer(w):
        field, y0 = lambda t, y: w + 0 * y, frontend.array([[0.0], [0.0]])
        return (odeint(frontend, field, y0, t, event=event, return_info=True)[1].event_time,)

    (time,), (gradient,) = frontend.differentiable(layer)([np.ones((2, 1))], [np.ones(2)])
    assert_close(time, np.array([0.5, 0.5]), 1e-5)
    assert np.isnan(gradient[0])
    assert_close(gradient[1], np.array([-0.5]), 1e-12)


# What can go wrong


def explosion(frontend, on_failure, rows=(0, 1, 2), **options):
    """dy/dt = y^2, of which the second sample ends at t = 1 and the third has no start."""
    y0 = frontend.array(np.array([[0.1], [1.0], [np.nan]])[list(rows)])
    t = frontend.array(np.linspace(0, 2, 5) * np.ones((len(rows), 1)))
    options = {"on_failure": on_failure, "return_info": True, "rtol": 1e-4, "atol": 1e-6} | options
    return odeint(frontend, lambda t, y: y**2, y0, t, **options)


def test_status_of_each_sample(frontend):
    y, info = explosion(frontend, "nan")
    expected = [Status.SOLVED.code, Status.STEP_UNDERFLOW.code, Status.NON_FINITE.code]
    assert frontend.numpy(info.status).tolist() == expected
    assert_close(frontend.numpy(info.time)[1], np.array(1.0), 1e-3)
    y = frontend.numpy(y)
    assert np.isfinite(y[0]).all() and np.isnan(y[1:]).all()
    assert_close(y[0], frontend.numpy(explosion(frontend, "nan", (0,))[0])[0], 1e-14)


@pytest.mark.slow_to_compile
def test_policies(frontend):
    with pytest.raises(SolveError, match=r"1 of 2[\s\S]*index \(1,\)[\s\S]*at t = (1|0\.99)"):
        explosion(frontend, "raise", (0, 1))
    for policy in ("mask", "ignore"):
        y = frontend.numpy(explosion(frontend, policy, (0, 1))[0])
        assert np.isfinite(y).all()
        assert_close(y[1, :2, 0], np.array([1.0, 2.0]), 1e-3)


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("adjoint", [Discrete(), Discrete(0), Continuous()], ids=repr)
def test_masked_samples_have_no_gradient(frontend, adjoint):
    """Nor a part in that of the weights: of y' = w y^2, with y = y_0 / (1 - w y_0 t), one explodes."""
    y0, t = np.array([[0.1], [1.0]]), np.linspace(0, 2, 5) * np.ones((2, 1))
    options = {"on_failure": "mask", "rtol": 1e-4, "atol": 1e-9, "adjoint": adjoint}

    def layer(y0, w):
        return (odeint(frontend, lambda t, y: w * y**2, y0, frontend.array(t), **options),)

    (_,), gradients = frontend.differentiable(layer)([y0, np.array(1.0)], [np.ones((2, 5, 1))])
    ahead = 1 - 0.1 * t[0]
    assert_close(gradients[0][0], np.array([np.sum(1 / ahead**2)]), 1e-3)
    assert (gradients[0][1] == 0).all()
    assert_close(gradients[1], np.sum(0.01 * t[0] / ahead**2), 1e-3)


@pytest.mark.parametrize("policy", ["nan", "mask"])
def test_failed_sample_does_not_spoil_shared_weights(policy):
    """Near the edge of the field's domain implicit stages, solved to a tolerance, may leave it when they are
    solved again."""
    frontend = torch_frontend()
    nan, w = frontend.array(np.nan), frontend.array(0.7).requires_grad_()
    field = lambda t, y: w * frontend.xp.where(y > 1.5, nan, y * y)
    y0, t = frontend.array([[0.5], [1.4]]), frontend.array([[0.0, 1.0]] * 2)
    options = {"method": "kvaerno5", "on_failure": policy, "max_steps": 300, "return_info": True}
    y, info = odeint(frontend, field, y0, t, **options)
    y[0, -1].sum().backward()
    assert info.status[1] != Status.SOLVED.code
    assert_close(frontend.numpy(w.grad), np.array(0.25 / 0.65**2), 1e-5)


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("order", [1, 2])
def test_cotangents_of_what_was_not_asked_for_are_not_read(frontend, order):
    """They are NaN where a loss selects among NaN and numbers computed from NaN."""
    t, xp = frontend.array([[0.0, 1.0, 2.0], [0.0, 1.0, np.nan]]), frontend.xp

    def layer(w):
        y = odeint(frontend, lambda t, y: w * y, frontend.array([[1.0], [1.0]]), t, order=order)
        return (xp.where(xp.isnan(y), 0.0, y**2).sum(),)

    _, (gradient,) = frontend.differentiable(layer)([np.array(0.5)], [np.array(1.0)])
    assert_close(gradient, np.array(4 * np.exp(1.0) + 4 * np.exp(2.0)), 1e-5)


@pytest.mark.slow_to_compile
def test_step_limit(frontend):
    y, info = explosion(frontend, "nan", (0,), max_steps=2)
    assert frontend.numpy(info.status).tolist() == [Status.STEP_LIMIT.code]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "rk5"}, "method must be one of"),
        ({"on_failure": "maybe"}, "on_failure"),
        ({"t": np.array([0.0, 1.0, 0.5])}, "ascend"),
        ({"t": np.array([0.0, np.nan, 0.5])}, "at the end"),
        ({"t": np.zeros((3, 2))}, "batch axis of size 3"),
        ({"t": np.zeros((1, 1, 1))}, "axes"),
        ({"field": lambda t, y: y[:1]}, "func's value must be like y"),
        ({"order": 0}, "order"),
        ({"step_size": 0.0}, "step_size"),
        ({"first_step": -0.1}, "first_step"),
        ({"rtol": -1e-3}, "rtol"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_misuse(frontend, change, message):
    change = {"t": np.array([0.0, 1.0]), "field": lambda t, y: -y} | change
    field, t = change.pop("field"), change.pop("t")
    with pytest.raises(ValueError, match=message):
        odeint(frontend, field, frontend.array(np.ones((2, 2))), frontend.array(t), **change)


def test_times_that_single_precision_cannot_tell_apart(frontend):
    t = 1.7e9 + np.array([0.0, 100.0])
    y0, field = frontend.array([1.0], "float32"), lambda t, y: -0.01 * y
    with pytest.raises(ValueError, match="float32.*subtract the first"):
        odeint(frontend, field, y0, frontend.array(t))
    y = odeint(frontend, field, y0, frontend.array(t - t[0]))
    assert_close(frontend.numpy(y)[-1], np.exp([-1.0]), 1e-5)


def test_traced_times_out_of_order_are_an_outcome():
    """Of each sample, where nothing can be raised."""
    jax = pytest.importorskip("jax")
    from optlayers.jax import control_path, odeint

    solve = jax.jit(lambda t: odeint(lambda y, t: y, jax.numpy.ones((4, 1)), t, return_info=True))
    y, info = solve(jax.numpy.array([[0, 2, 1], [0, np.nan, 1], [2, 1, np.nan], [0, 1, 0.5]]))
    assert info.status.tolist() == [Status.NON_FINITE.code] * 2 + [Status.SOLVED.code, Status.NON_FINITE.code]
    assert np.isnan(np.asarray(y)[[0, 1, 3]]).all() and np.isfinite(y[2, :2]).all()
    evaluate = jax.jit(lambda t: control_path(t, jax.numpy.ones((2, 3, 1))).evaluate(jax.numpy.array(0.5)))
    value = evaluate(jax.numpy.array([[0.0, 2, 1], [0, 1, 2]]))
    assert np.isnan(value[0]).all() and np.isfinite(value[1]).all()


def test_torch_layer_is_a_module():
    frontend = torch_frontend()
    torch = frontend.framework
    ode = frontend.module.ODE(Decay(torch))
    assert len(list(ode.parameters())) == 1
    y0, t = frontend.array([1.0, 2.0]), frontend.array([0.0, 1.0])
    for layer in (ode, copy.deepcopy(ode), pickle.loads(pickle.dumps(ode))):
        y, info = layer.solve(y0, t)
        y.sum().backward()
        assert_close(frontend.numpy(layer.func.rate.grad), np.array(-3 * np.exp(-0.5)), 1e-6)
        assert int(info.status) == Status.SOLVED.code


def Decay(torch):
    module = torch.nn.Module()
    module.rate = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    return _Decay(module.rate)


try:
    import torch as _torch
except ModuleNotFoundError:
    pass
else:

    class _Decay(_torch.nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.rate, self.factor = rate, 1.0

        def forward(self, t, y):
            return -self.factor * self.rate * y


@pytest.mark.slow_to_compile
def test_no_warnings_of_memory(frontend):
    """Nothing is kept of a solve whose result nobody differentiates."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = odeint(frontend, lambda t, y: -y, frontend.array([1.0]), frontend.array([0.0, 1.0]))
    assert not getattr(y, "requires_grad", False)


@pytest.mark.parametrize("adjoint", [Discrete(), Discrete(0), Continuous()], ids=repr)
def test_nothing_outlives_the_result(adjoint):
    frontend = torch_frontend()
    w = frontend.array(0.5).requires_grad_()
    field = lambda t, y: -w * y
    seen = weakref.ref(field)
    y = odeint(frontend, field, frontend.array([1.0]), frontend.array([0.0, 1.0]), adjoint=adjoint)
    y.sum().backward()
    del y, field
    assert seen() is None


@pytest.mark.parametrize("adjoint", [Discrete(), Discrete(5), Continuous()], ids=repr)
def test_constants_changed_before_the_backward_pass_raise(adjoint):
    """As in torch; but not if the field itself changes what it finds, as a count of its calls."""
    frontend = torch_frontend()
    weight, count = frontend.array([0.5, 2.0]), frontend.array(0.0)

    def field(t, y):
        count.add_(1)
        return -weight * y

    y0 = frontend.array([1.0, 1.0]).requires_grad_()
    y = odeint(frontend, field, y0, frontend.array([0.0, 1.0]), adjoint=adjoint)[-1].sum()
    (gradient,) = frontend.framework.autograd.grad(y, y0, retain_graph=True)
    assert_close(frontend.numpy(gradient), np.exp([-0.5, -2.0]), 1e-6)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("adjoint", [Discrete(), Discrete(0), Continuous()], ids=repr)
def test_modules_count_as_they_were_when_the_solve_began(adjoint):
    """With weights from elsewhere, and given another rate and other weights before the backward pass."""
    frontend = torch_frontend()
    torch, y0, t = frontend.framework, frontend.array([1.0]), frontend.array([0.0, 1.0])
    ode = frontend.module.ODE(Decay(torch), adjoint=adjoint).requires_grad_(False)
    ode.func.factor = 3.0
    rate = frontend.array(0.2).requires_grad_()
    y = torch.func.functional_call(ode, {"func.rate": rate}, (y0, t))[-1]
    ode.func.factor = 5.0
    y.backward()
    assert_close(frontend.numpy(rate.grad), np.array(-3 * np.exp(-0.6)), 1e-6)


def test_weight_that_the_first_evaluation_does_not_use():
    """Its gradient would be missing: the backward pass finds it and raises."""
    torch = pytest.importorskip("torch")
    from optlayers.torch import odeint

    early, late = (torch.tensor(-1.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t = torch.linspace(0, 1, 3, dtype=torch.float64)
    y = odeint(lambda t, y: (early if float(t) < 0.5 else late) * y, torch.ones(2, dtype=torch.float64), t)
    with pytest.raises(RuntimeError, match="its gradient would be missing"):
        y.sum().backward()
