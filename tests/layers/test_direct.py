"""Programs given as matrices: the types of their arguments, and misuse that ValueError names."""

import numpy as np
import pytest
import scipy.sparse as sp

from checks import assert_close
from optlayers.cones import Cones
from optlayers.status import Status

# min |x|^2 + q'x over the box [-1, 1] is solved by -q / 2.
Q = np.array([-1, 1])


def box(frontend, q, P=None, A=None, **options):
    eye, one = frontend.array(np.eye(2)), frontend.array(np.ones(2))
    P, A = (eye * 2 if P is None else P), (eye if A is None else A)
    return frontend.module.solve_qp(P, q, A, -one, one, **options)


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("is_sparse", [False, True])
def test_integers_among_the_arguments(frontend, is_sparse):
    """The solution is not one in integers, nor of the narrower of two types."""
    matrices = {"P": sp.eye_array(2) * 2, "A": sp.eye_array(2)} if is_sparse else {}
    x = box(frontend, frontend.xp.asarray(Q), **matrices).x
    assert_close(frontend.numpy(x), -Q / 2, 1e-8)
    with frontend.mixing_types():
        assert frontend.dtype(box(frontend, frontend.array(Q, "float32"), **matrices).x) == "float64"


def test_integers_leave_gradients_of_the_others(torch_frontend):
    torch = torch_frontend.framework
    P = torch.eye(2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(box(torch_frontend, torch.tensor(Q), P=2 * P).x[0], P)
    assert_close(gradient.numpy(), np.array([[-0.5, 0.25], [0.25, 0.0]]), 1e-8)


def test_only_integers(torch_frontend):
    torch = torch_frontend.framework
    x = torch_frontend.module.solve_qp(2 * torch.eye(2, dtype=torch.int64), torch.tensor(Q)).x
    assert x.dtype == torch.get_default_dtype()
    assert_close(x.double().numpy(), -Q / 2, 1e-6)


def test_complex_arguments(frontend):
    with pytest.raises(ValueError, match="q is real, got a complex"):
        box(frontend, frontend.array(Q + 1j, "float64"))


def test_values_that_are_no_tensors(torch_frontend):
    eye = torch_frontend.array(np.eye(2))
    solve = torch_frontend.module.solve_qp
    for q, l, message in [(Q * 1.0, None, "q must .*, got ndarray"), (eye[0], -1.0, "l must .*, got float")]:
        for P in (eye, sp.eye_array(2)):
            with pytest.raises(ValueError, match=message):
                solve(P, q, eye, l)
    with pytest.raises(ValueError, match="P must be a torch tensor, got ndarray"):
        solve(np.eye(2), eye[0])
    with pytest.raises(ValueError, match="q must be a torch tensor, got NoneType"):
        solve(eye, None)


def test_different_devices(torch_frontend):
    q = torch_frontend.array(Q, "float64").to("meta")
    with pytest.raises(ValueError, match="q is on meta, but P is on cpu"):
        box(torch_frontend, q)


def test_bounds_without_rows(frontend):
    """They would bound nothing."""
    eye, q = frontend.array(np.eye(2)), frontend.array(np.ones(2))
    with pytest.raises(ValueError, match="l is given, but A is None"):
        frontend.module.solve_qp(eye, q, None, q, q)
    with pytest.raises(ValueError, match="b is given, but A is None"):
        frontend.module.solve_conic(eye, q, None, q, frontend.module.Cones(nonneg=2))


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("gradient", ["exact", "smoothed"])
def test_bounds_that_no_point_is_within_do_not_touch_the_others(frontend, gradient):
    """min |x|^2 + q'x with l <= A x, of which one l is +inf: A, which the batch shares, has the gradient of
    the others."""
    module, eye = frontend.module, frontend.array(np.eye(2))

    def solve(A, q, l):
        return module.solve_qp(eye, q, A, l, on_failure="mask", gradient=gradient)

    differentiable = frontend.differentiable(lambda *data: (solve(*data).x,))
    A, q, l = np.array([[1.0, 0.5], [0.2, 1.0]]), np.ones((3, 2)), np.full((3, 2), -0.3)
    bad = l.copy()
    bad[1, 0] = np.inf
    status = frontend.numpy(solve(*map(frontend.array, (A, q, bad))).status)
    assert status.tolist() == [Status.SOLVED.code, Status.PRIMAL_INFEASIBLE.code, Status.SOLVED.code]
    weights = np.array([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]])
    (x,), gradients = differentiable([A, q, bad], [weights])
    (expected,), exact = differentiable([A, q, l], [weights])
    assert_close(x[[0, 2]], expected[[0, 2]], 1e-12)
    assert abs(exact[0]).max() > 0.1
    for actual, other in zip(gradients, exact, strict=True):
        assert_close(actual, other, 1e-8)


def test_smoothed_second_derivatives_beside_a_failed_problem(torch_frontend):
    torch, eye = torch_frontend.framework, torch_frontend.array(np.eye(2))
    l, q = torch_frontend.array([[-1.0, -1.0], [5.0, -1.0]]), 3 * torch_frontend.array(np.ones((2, 2)))
    P, one = eye.clone().requires_grad_(), torch.ones_like(q)
    options = {"on_failure": "mask", "gradient": "smoothed"}
    x = torch_frontend.module.solve_qp(P, q, eye * 0.5, l, one, **options).x
    (first,) = torch.autograd.grad(x[0].sum(), P, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), P)
    assert first.isfinite().all() and second.isfinite().all() and second.abs().max() > 1e-6


@pytest.mark.parametrize(
    "cones",
    [
        *(
            {"nonneg": -1},
            {"zero": 1.0},
            {"exp": (1,)},
            {"soc": 3},
            {"soc": (0,)},
            {"psd": (0,)},
            {"soc": "3"},
        ),
        *({"pow": (w,)} for w in ((0.5, 0.6), (-0.5, 1.5), (0.0, 1.0), (np.nan, 0.5), (), 1.0, "ab")),
    ],
    ids=str,
)
def test_cones_that_are_none(cones):
    with pytest.raises(ValueError, match=f"{[*cones][0]} must be a"):
        Cones(**cones)


def test_cones_given_as_lists_of_numpy_numbers():
    cones = Cones(np.int64(1), soc=[np.int64(3)], psd=np.array([2, 2]), pow=[np.array([0.25, 0.75])])
    assert cones == Cones(1, soc=(3,), psd=(2, 2), pow=((0.25, 0.75),)) and hash(cones)


def test_something_else_for_cones(frontend):
    eye = frontend.array(np.eye(2))
    for A in (eye, sp.eye_array(2)):
        with pytest.raises(ValueError, match=r"cones must be Cones\(...\), got \{'soc'"):
            frontend.module.solve_conic(eye, eye[0], A, eye[0], {"soc": [2]})


def test_settings_out_of_their_range(frontend):
    module, eye = frontend.module, frontend.array(np.eye(2))
    records = [(module.Smoothed, "mu", (0.0, -1.0, np.nan, np.inf)), (module.LPGD, "tau", (0.0, np.nan))]
    for record, name, values in [*records, (module.ADMM, "rho", (0.0, -1.0, np.nan))]:
        for value in values:
            with pytest.raises(ValueError, match=f"{name} must be"):
                record(**{name: value})
    with pytest.raises(ValueError, match="gradient must be a record"):
        module.solve_qp(eye, eye[0], gradient=module.LPGD)
    for P in (eye, sp.eye_array(2)):
        for eps in (0.0, -1.0, np.nan):
            with pytest.raises(ValueError, match="eps must be positive"):
                module.solve_qp(P, eye[0], eps=eps)


def third_derivative(torch_frontend, cones, order):
    """d^3 x_0 / dt^3 of the projection x of (0.1, t, 1) onto the cone, for t = 0.3."""
    torch, eye = torch_frontend.framework, torch_frontend.array(np.eye(3))
    t = torch_frontend.array(0.3).requires_grad_()
    q = -torch.stack([0 * t + 0.1, t, 0 * t + 1])
    y = torch_frontend.module.solve_conic(eye, q, -eye, 0 * q, cones, order=order).x[0]
    for _ in range(3):
        (y,) = torch.autograd.grad(y, t, create_graph=True)
    return y.item()


def test_orders_of_derivatives(torch_frontend):
    """Second-order cones have any; those of which derivatives are Taylor polynomials say that they end."""
    exact = -1.5 * 0.3 / 1.09**2.5  # x_0 = (0.1 + sqrt(t^2 + 1)) / 2
    assert_close(third_derivative(torch_frontend, Cones(soc=(3,)), 3), exact, 1e-8)
    for cones in (Cones(psd=(2,)), Cones(exp=1), Cones(pow=((0.3, 0.7),))):
        with pytest.raises(ValueError, match="at most 2 beside semidefinite, exponential and power"):
            third_derivative(torch_frontend, cones, 3)
        with pytest.raises(NotImplementedError, match="above 2 were asked for; this layer has none"):
            third_derivative(torch_frontend, cones, 2)


def test_orders_that_are_none(frontend):
    eye = frontend.array(np.eye(2))
    for order in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match="order must be a whole number from 1 on"):
            frontend.module.solve_qp(eye, eye[0], order=order)


def test_warm_start_of_another_problem(frontend):
    solve, eye = frontend.module.solve_qp, frontend.array(np.eye(3))
    start = solve(eye[:2, :2], eye[:, :2])
    with pytest.raises(ValueError, match=r"warm_start has x of shape \(3, 2\), expected \(3, 3\)"):
        solve(eye, eye, warm_start=start)


def test_no_variables(frontend):
    empty = frontend.array(np.zeros((0, 0)))
    for P in (empty, sp.coo_array((0, 0))):
        with pytest.raises(ValueError, match="nothing to solve for"):
            frontend.module.solve_qp(P, frontend.array(np.zeros(0)))


def test_a_batch_of_none_that_shares_its_matrices():
    """Beside a cone, where bounds are scaled for each problem; in JAX all of a solver is traced."""
    jax = pytest.importorskip("jax")
    from optlayers.jax import Cones, solve_conic

    solve = lambda b: solve_conic(None, np.ones(2), -np.eye(4, 2), b, Cones(nonneg=1, soc=(3,))).x
    assert jax.eval_shape(solve, jax.ShapeDtypeStruct((0, 4), float)).shape == (0, 2)
