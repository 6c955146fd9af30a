"""`odeint`: values against closed forms, gradients in everything, batches and jumps."""

import numpy as np

from checks import assert_close

TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def odeint(frontend, field, *args, jumps=None, **options):
    """`odeint` of either frontend, with functions (t, y) and (t, y, j)."""
    if frontend.name == "torch":
        return frontend.module.odeint(field, *args, jumps=jumps, **options)
    turned = jumps and (jumps[0], lambda y, t, j: jumps[1](t, y, j), *jumps[2:])
    return frontend.module.odeint(lambda y, t: field(t, y), *args, jumps=turned, **options)


def spiral(rng):
    """A, y0 and times of dy/dt = A y."""
    A = np.array([[-0.1, 2.0], [-2.0, -0.1]]) + 0.1 * rng.standard_normal((2, 2))
    return A, rng.standard_normal(2), np.array([0.3, 0.5, 1.7, 2.0])


def exponential(frontend, A):
    if frontend.name == "torch":
        return frontend.framework.linalg.matrix_exp(A)
    return frontend.framework.scipy.linalg.expm(A)


def test_linear_system_and_its_gradients(frontend, rng):
    values, cotangent = spiral(rng), rng.standard_normal((4, 2))

    def layer(A, y0, t):
        return (odeint(frontend, lambda t, y: A @ y, y0, t, **TIGHT),)

    def closed_form(A, y0, t):
        return (frontend.xp.stack([exponential(frontend, A * (s - t[0])) @ y0 for s in t]),)

    (y,), actual = frontend.differentiable(layer)(values, [cotangent])
    (expected_y,), expected = frontend.differentiable(closed_form)(values, [cotangent])
    assert_close(y, expected_y, 1e-10)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-8)
