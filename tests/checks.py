"""What tests assert, and the oracle: CVXPY's cone program, solved by Clarabel and then on its active rows."""

from types import SimpleNamespace

import clarabel
import cvxpy as cp
import numpy as np
import scipy.sparse as sp


def assert_close(actual, expected, tolerance, what=""):
    """Same shape, and no entry off by more than `tolerance`, relative to the largest expected one or to 1."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    if actual.size:
        error = np.abs(actual - expected).max() / max(1.0, np.abs(expected).max())
        assert error <= tolerance, f"{what}: error {error:.1e} above {tolerance:.0e}"


def assert_kkt(program, x, y, s, tolerance):
    """(x, y, s) satisfies the optimality conditions of a `problems.Program`, all relative to its data."""
    P, q, A, b, zero = program[:5]
    unit = 1 + max(np.abs(v).max(initial=0) for v in (q, b, P @ x, A.T @ y, A @ x))
    assert_close((P @ x + q + A.T @ y) / unit, np.zeros_like(q), tolerance, "stationarity")
    assert_close((A @ x + s - b) / unit, np.zeros_like(b), tolerance, "primal equation")
    assert_close(s[:zero], np.zeros(zero), tolerance, "slack of equalities")
    for name, values in (("slack", s[zero:]), ("multiplier", y[zero:])):
        assert values.min(initial=0) >= -tolerance * unit, f"negative {name}: {values.min():.1e}"
    assert_close(s * y / unit, np.zeros_like(s), tolerance, "complementarity")


def solve_exactly(problem, parameters, variables, values, margin=1e-6):
    """The variables at these parameter values, right to about 1e-12 relative.

    Clarabel's solution tells which rows are active; then the optimality conditions are linear equations.
    Asserts that the solution of these satisfies all conditions and has strictly complementary rows by
    `margin`, so that it is differentiable, too. Polyhedral problems only.
    """
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value
    data, chain, inverse_data = problem.get_problem_data(cp.CLARABEL, canon_backend="SCIPY", solver_opts={})
    q, A, b, dims = data["c"], data["A"].tocsc(), data["b"], data["dims"]
    P = sp.csc_array(data["P"]) if "P" in data else sp.csc_array((q.size, q.size))
    assert dims.zero + dims.nonneg == b.size, "not polyhedral"

    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    cones = [clarabel.ZeroConeT(dims.zero), clarabel.NonnegativeConeT(dims.nonneg)]
    raw = clarabel.DefaultSolver(sp.triu(P).tocsc(), q, A, b, cones, settings).solve()
    assert "Solved" in str(raw.status), raw.status
    is_active = np.array(raw.z) > np.array(raw.s)
    is_active[: dims.zero] = True

    x, z = _polish(P.toarray(), q, A.toarray(), b, is_active, np.array(raw.x), np.array(raw.z))
    s = b - A @ x
    assert np.abs(P @ x + q + A.T @ z).max() <= 1e-11 * (1 + np.abs(q).max() + np.abs(A.T @ z).max())
    assert np.where(is_active, z, s)[dims.zero :].min(initial=np.inf) > margin, "not strictly complementary"
    solution = SimpleNamespace(status="Solved", x=x, z=z, s=s, obj_val=0.0, solve_time=0.0, iterations=0)
    problem.unpack_results(solution, chain, inverse_data)
    return [np.asarray(variable.value) for variable in variables]


def _polish(P, q, A, b, is_active, x, z):
    """The point nearest to (x, z) with P x + q + A'z = 0, A x = b on active rows and z = 0 on the others."""
    n, active = q.size, A[is_active]
    K = np.block([[P, active.T], [active, np.zeros((len(active), len(active)))]])
    rhs, w = np.concatenate([-q, b[is_active]]), np.concatenate([x, z[is_active]])
    for _ in range(2):
        w = w + np.linalg.lstsq(K, rhs - K @ w)[0]
    z = np.zeros_like(z)
    z[is_active] = w[n:]
    return w[:n], z


def closed_form_gradients(program, x_bar, y_bar):
    """Gradients in (P, q, A, b) of x_bar'x + y_bar'y at the solution of a `problems.Program`.

    With K = [P A'; A 0] of the active rows, K (x, y) = (-q, b); so K w = (x_bar, y_bar) gives the gradients
    w of the right-hand side and -w (x, y)' of K, of whose two triangles P and A are made.
    """
    P, q, A, _, zero, x, y, _ = program
    n, is_active = q.size, y != 0
    is_active[:zero] = True
    active, y = A[is_active], y[is_active]
    K = np.block([[P, active.T], [active, np.zeros((len(active), len(active)))]])
    w = np.linalg.solve(K, np.concatenate([x_bar, y_bar[is_active]]))
    wx, wy = w[:n], w[n:]
    A_bar, b_bar = np.zeros_like(A), np.zeros(len(A))
    A_bar[is_active], b_bar[is_active] = -np.outer(y, wx) - np.outer(wy, x), wy
    return -(np.outer(wx, x) + np.outer(x, wx)) / 2, -wx, A_bar, b_bar


def direction_of(rng, parameter, value):
    """A random direction of unit size in which a symmetric parameter stays so, and a PSD one its rank."""
    d = rng.standard_normal(value.shape)
    if parameter.is_complex():
        d = d + 1j * rng.standard_normal(value.shape)
    if parameter.ndim == 2 and (parameter.is_symmetric() or parameter.is_hermitian()):
        d = d + np.swapaxes(d, -1, -2).conj()
    if parameter.attributes["PSD"]:
        d = value @ d @ value
    return d / np.abs(d).max()


def directional_derivatives(solve, values, parameters, cotangents, rng, step=1e-5):
    """For each parameter a random direction, and the derivative (B,) of the weighted outputs in it.

    Central differences: `solve`, from values to outputs (B, ...), must be right to about 1e-12; then rounding
    costs 1e-7 absolute, and truncation less.
    """
    derivatives = []
    for i, (value, parameter) in enumerate(zip(values, parameters, strict=True)):
        direction = direction_of(rng, parameter, value)
        ahead, behind = (solve([*values[:i], value + h * direction, *values[i + 1 :]]) for h in (step, -step))
        change = sum(inner(c, a - b) for c, a, b in zip(cotangents, ahead, behind, strict=True))
        derivatives.append((direction, change / (2 * step)))
    return derivatives


def assert_directional_derivatives(gradients, derivatives, parameters, tolerance=1e-5):
    """Gradients against `directional_derivatives`, for each parameter and each problem by itself.

    So a wrong gradient of one parameter, or of one problem, cannot hide behind the others.
    """
    for gradient, (direction, expected), parameter in zip(gradients, derivatives, parameters, strict=True):
        is_shared = gradient.ndim == parameter.ndim
        actual = inner(gradient[None], direction[None])[0] if is_shared else inner(gradient, direction)
        expected = expected.sum() if is_shared else expected
        error = np.abs(actual - expected).max() / (np.abs(expected).max() + 1e-2)
        assert error <= tolerance, f"{parameter.name()}: gradient off by {error:.1e} relative"


def inner(a, b):
    """Real inner products (B,) of the rows of two arrays of one shape."""
    return (a.conj() * b).real.reshape(len(a), -1).sum(-1)
