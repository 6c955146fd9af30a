"""`implicit`: a user's own solver and residual become a layer with derivatives."""

import numpy as np
import pytest

from checks import assert_close

A = np.array([8.0, -27.0, 1.0])  # cubes
ROOTS = np.array([2.0, -3.0, 1.0])


def cube_root(frontend, **options):
    def solve(a):
        return frontend.xp.sign(a) * abs(a) ** (1 / 3)

    return frontend.implicit(solve, lambda z, a: z**3 - a, **options)


def matrices(rng):
    """Three positive definite systems of four equations."""
    roots = rng.standard_normal((3, 4, 4))
    return roots @ np.swapaxes(roots, 1, 2) + 2 * np.eye(4), rng.standard_normal((3, 4))


def linear_system(frontend, **options):
    xp = frontend.xp
    return frontend.implicit(
        lambda M, b: xp.linalg.solve(M, b[..., None])[..., 0],
        lambda z, M, b: (M @ z[..., None])[..., 0] - b,
        **options,
    )


def conjugate_gradient(J, r):
    """J^-1 r for symmetric positive definite J, row by row, in as many steps as a row has entries."""

    def dot(a, b):
        return (a * b).sum(-1)[..., None]

    x, p, residual = 0 * r, r, r
    for _ in range(r.shape[-1]):
        Jp = J(p)
        step = dot(residual, residual) / dot(p, Jp)
        x, new = x + step * p, residual - step * Jp
        p = new + dot(new, new) / dot(residual, residual) * p
        residual = new
    return x


def test_value_is_that_of_the_solver(frontend):
    root = cube_root(frontend)(frontend.array(A[:, None]))
    assert_close(frontend.numpy(root), ROOTS[:, None], 1e-14)


def test_gradient_of_cube_root(frontend):
    layer = cube_root(frontend)
    (root,), (gradient,) = frontend.differentiable(lambda a: (layer(a),))([A[:, None]], [np.ones((3, 1))])
    assert_close(gradient, 1 / (3 * ROOTS[:, None] ** 2), 1e-12)


def test_second_derivative_of_cube_root(frontend):
    layer, transforms = cube_root(frontend), frontend.transforms
    a = frontend.array(A[:1, None])
    for outer in (transforms.jacfwd, transforms.jacrev):
        for inner in (transforms.jacfwd, transforms.jacrev):
            second = outer(inner(layer))(a)
            assert_close(frontend.numpy(second).ravel(), -2 / 9 * ROOTS[:1] ** -5.0, 1e-12)


def test_derivatives_of_a_linear_system_equal_differences(frontend, rng):
    frontend.check_derivatives(linear_system(frontend), matrices(rng), order=2)


def test_gradient_of_a_linear_system(frontend, rng):
    """b_bar = M^-T z_bar and M_bar = -b_bar z', for each system of the batch."""
    M, b = matrices(rng)
    M = M + 0.3 * rng.standard_normal(M.shape)
    layer, cotangent = linear_system(frontend), rng.standard_normal((3, 4))
    (z,), (M_bar, b_bar) = frontend.differentiable(lambda M, b: (layer(M, b),))([M, b], [cotangent])
    expected = np.linalg.solve(np.swapaxes(M, 1, 2), cotangent[..., None])[..., 0]
    assert_close(b_bar, expected, 1e-12)
    assert_close(M_bar, -expected[:, :, None] * z[:, None, :], 1e-12)


def test_linear_solve_of_the_user(frontend, rng):
    """Conjugate gradients in place of the factorisation; they see as many right-hand sides as derivatives."""
    calls = []

    def counted(J, r):
        calls.append(r.shape)
        return conjugate_gradient(J, r)

    M, b = matrices(rng)
    cotangent = rng.standard_normal((3, 4))
    results = []
    for options in ({}, {"linear_solve": counted}):
        layer = linear_system(frontend, **options)
        results.append(frontend.differentiable(lambda M, b, f=layer: (f(M, b),))([M, b], [cotangent]))
    assert set(calls) == {(3, 4)}
    for plain, own in zip(*(gradients for _, gradients in results), strict=True):
        assert_close(own, plain, 1e-9)


def test_linear_solve_is_given_the_transpose_and_not_differentiated(frontend, rng):
    """For matrices without symmetry, by a solver that has derivatives in nothing."""
    xp = frontend.xp

    def by_columns(J, r):
        rows = [J(0 * r + frontend.array(e)[None]) for e in np.eye(4)]
        return xp.round(xp.linalg.solve(xp.stack(rows, -1), r[..., None])[..., 0] * 2.0**40) / 2.0**40

    M, b = matrices(rng)
    M = M + 0.3 * rng.standard_normal(M.shape)
    frontend.check_derivatives(linear_system(frontend, linear_solve=by_columns), (M, b), order=2)


def test_rows_may_have_several_axes(frontend, rng):
    a = rng.uniform(1, 2, (2, 3, 2))
    layer = cube_root(frontend)
    _, (gradient,) = frontend.differentiable(lambda a: (layer(a),))([a], [np.ones_like(a)])
    assert_close(gradient, a ** (-2 / 3) / 3, 1e-12)


def test_vmap_equals_batch(frontend, rng):
    M, b = map(frontend.array, matrices(rng))
    layer = linear_system(frontend)
    mapped = frontend.transforms.vmap(lambda M, b: layer(M[None], b[None])[0])(M, b)
    assert_close(frontend.numpy(mapped), frontend.numpy(layer(M, b)), 1e-12)


def test_rows_that_depend_on_one_another(frontend, rng):
    """A single system (k,) where a batch of them is expected, the gradient of which was wrong in silence."""
    M, b = (frontend.array(x[0]) for x in matrices(rng))
    M, solve = M + 0.3 * frontend.array(rng.standard_normal((4, 4))), frontend.xp.linalg.solve
    with pytest.raises(ValueError, match="axis of size 1 in front"):
        frontend.implicit(lambda b: solve(M, b), lambda z, b: M @ z - b)(b)
    layer = frontend.implicit(lambda b: solve(M, b), lambda z, b: M @ z - b, lambda J, r: solve(mapped(J), r))
    mapped = lambda J: frontend.xp.stack([J(frontend.array(e)) for e in np.eye(4)], -1)
    assert_close(
        frontend.numpy(frontend.transforms.jacrev(layer)(b)), np.linalg.inv(frontend.numpy(M)), 1e-12
    )


def test_rows_that_depend_on_one_another_under_jit(rng):
    jax = pytest.importorskip("jax")
    from optlayers.jax import implicit

    M, b = (x[0] for x in matrices(rng))
    layer = implicit(lambda b: jax.numpy.linalg.solve(M, b), lambda z, b: M @ z - b)
    assert np.isnan(jax.jit(jax.grad(lambda b: layer(b).sum()))(b)).all()


def test_scalar_solution(frontend):
    layer = frontend.implicit(lambda a: a ** (1 / 3), lambda z, a: z**3 - a)
    with pytest.raises(ValueError, match="batch axis"):
        layer(frontend.array(8.0))


def test_wrong_shape_of_residual(frontend):
    layer = frontend.implicit(lambda a: a ** (1 / 3), lambda z, a: (z**3 - a).sum(-1))
    with pytest.raises(ValueError, match=r"shape of z, \(1, 2\), but has \(1,\)"):
        layer(frontend.array(np.ones((1, 2))))


def test_first_order_layer_refuses_second_derivatives(frontend):
    layer, transforms = cube_root(frontend, order=1), frontend.transforms
    a = frontend.array(A[:1, None])
    assert_close(frontend.numpy(transforms.jacrev(layer)(a)).ravel(), [1 / 12], 1e-12)
    with pytest.raises(NotImplementedError, match="order=2"):
        transforms.jacfwd(transforms.jacrev(layer))(a)


def test_solver_is_not_differentiated(frontend):
    """A solver through whose operations the gradient would be zero, or NaN."""
    xp = frontend.xp
    layer = frontend.implicit(lambda a: xp.round(xp.sqrt(a * 0) + 2), lambda z, a: z**3 - a)
    _, (gradient,) = frontend.differentiable(lambda a: (layer(a),))([np.array([[8.0]])], [np.ones((1, 1))])
    assert_close(gradient, [[1 / 12]], 1e-12)


def test_gradient_reaches_parameters_of_a_module():
    """z = W z / 4 + b, with W in a closure over a torch module."""
    torch = pytest.importorskip("torch")
    from optlayers.torch import implicit

    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 3, bias=False, dtype=torch.float64)
    layer = implicit(
        lambda b: torch.linalg.solve(torch.eye(3, dtype=b.dtype) - linear.weight / 4, b.mT).mT,
        lambda z, b: z - linear(z) / 4 - b,
    )
    b = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    weight_bar, b_bar = torch.autograd.grad(layer(b).square().sum(), [linear.weight, b])

    explicit = torch.linalg.solve(torch.eye(3, dtype=b.dtype) - linear.weight / 4, b.mT).mT
    expected = torch.autograd.grad(explicit.square().sum(), [linear.weight, b])
    assert_close(weight_bar, expected[0], 1e-12)
    assert_close(b_bar, expected[1], 1e-12)


def test_gradient_reaches_traced_values_of_a_closure():
    jax = pytest.importorskip("jax")
    from optlayers.jax import implicit

    def loss(scale, a):
        layer = implicit(lambda a: (a / scale) ** (1 / 3), lambda z, a: scale * z**3 - a)
        return layer(a).sum()

    a = jax.numpy.array([[8.0], [1.0]])
    value, gradient = jax.jit(jax.value_and_grad(loss))(2.0, a)
    explicit = jax.grad(lambda scale: ((a / scale) ** (1 / 3)).sum())(2.0)
    assert_close(gradient, explicit, 1e-12)
