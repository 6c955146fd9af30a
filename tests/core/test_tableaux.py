"""Runge-Kutta tableaux: the conditions of their orders, measured orders, stability."""

import numpy as np
import pytest

from optlayers.solvers.tableaux import TABLEAUX


def dense(tableau):
    """A (S, S), b (S,) and c (S,)."""
    A = np.zeros((len(tableau.c),) * 2)
    for s, row in enumerate(tableau.a):
        A[s, : len(row)] = row
        A[s, s] = tableau.diagonal if s else 0.0
    return A, A[-1], np.array(tableau.c)


def conditions(A, b, c):
    """(order, what must be one) of trees up to order 5, and of the bushy ones up to 8."""
    Ac, Ac2 = A @ c, A @ c**2
    values = [
        (1, b.sum()),
        (2, 2 * b @ c),
        (3, 3 * b @ c**2),
        (3, 6 * b @ Ac),
        (4, 4 * b @ c**3),
        (4, 8 * b @ (c * Ac)),
        (4, 12 * b @ Ac2),
        (4, 24 * b @ (A @ Ac)),
        (5, 10 * b @ (c**2 * Ac)),
        (5, 15 * b @ (c * Ac2)),
        (5, 30 * b @ (c * (A @ Ac))),
        (5, 20 * b @ Ac**2),
        (5, 20 * b @ (A @ c**3)),
        (5, 40 * b @ (A @ (c * Ac))),
        (5, 60 * b @ (A @ Ac2)),
        (5, 120 * b @ (A @ (A @ Ac))),
    ]
    return values + [(n, n * b @ c ** (n - 1)) for n in range(5, 9)]


@pytest.mark.parametrize("name", TABLEAUX)
def test_order_conditions(name):
    tableau = TABLEAUX[name]
    A, b, c = dense(tableau)
    np.testing.assert_allclose(A.sum(1), c, atol=1e-14)
    for order, value in conditions(A, b, c):
        if order <= tableau.order:
            assert abs(value - 1) < 1e-12, (order, value)
    assert any(abs(value - 1) > 1e-3 for n, value in conditions(A, b, c) if n == tableau.order + 1) or (
        tableau.order == 8
    )


@pytest.mark.parametrize("name", [n for n, tableau in TABLEAUX.items() if tableau.error is not None])
def test_embedded_method_is_of_one_order_less(name):
    tableau = TABLEAUX[name]
    A, b, c = dense(tableau)
    for order, value in conditions(A, b - tableau.error, c):
        if order < tableau.order:
            assert abs(value - 1) < 1e-11, (order, value)
    assert max(abs(np.array(tableau.error))) > 1e-3


@pytest.mark.parametrize("name", TABLEAUX)
def test_interpolant(name):
    """It meets the step's result and slopes at both ends, and in between is of its order."""
    tableau = TABLEAUX[name]
    (A, b, c), weights = dense(tableau), tableau.weights
    powers = np.arange(1, len(weights) + 1)
    first, last = np.eye(len(b))[[0, -1]]
    np.testing.assert_allclose(weights.sum(0), b, atol=1e-11)
    np.testing.assert_allclose(weights[0], first, atol=1e-11)
    np.testing.assert_allclose(powers @ weights, last, atol=1e-10)
    order = {"bosh3": 3, "dopri5": 4, "tsit5": 4}.get(name, min(tableau.order, 3))
    theta = 0.37
    at = theta**powers @ weights
    for n, value in conditions(A, at, c):
        if n <= order:
            assert abs(value - theta**n) < 1e-12, (n, value)


def test_stiff_method_is_l_stable():
    A, b, _ = dense(TABLEAUX["kvaerno5"])
    stability = lambda z: 1 + z * b @ np.linalg.solve(np.eye(len(b)) - z * A, np.ones(len(b)))
    assert max(abs(stability(1j * w)) for w in np.logspace(-3, 6, 400)) <= 1 + 1e-12
    assert abs(stability(-1e8)) < 1e-6
