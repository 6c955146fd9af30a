"""Differential equations, in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import Array

from ..docstring import continues
from ..layers.control_path import (
    ControlPath,
    build_path,
    cdeint_doc,
    control_path_doc,
    controlled_field,
    stopped_at_knots,
)
from ..layers.ode import InitialValueProblem, Jumps, ODEInfo, ode_doc, odeint_doc
from ..layers.ode_adjoint import Adjoint, Discrete
from ..ops import jax as ops
from ..solvers.tableaux import Tableau
from .calling import in_full_precision


def _jumps(jumps: Jumps | None) -> Jumps | None:
    """With the argument order of the shared code."""
    return jumps and (jumps[0], lambda t, y, j: jumps[1](y, t, j), *jumps[2:])


def _event(event: Callable | None) -> Callable | None:
    return event and (lambda t, y: event(y, t))


@continues(odeint_doc)
@in_full_precision
def odeint(
    func: Callable,
    y0: Any,
    t: Array,
    *args: Any,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | Tableau = "dopri5",
    adjoint: Adjoint = Discrete(),
    jumps: Jumps | None = None,
    event: Callable | None = None,
    step_size: float | None = None,
    first_step: float | None = None,
    max_steps: int = 1024,
    order: int = 1,
    on_failure: str = "raise",
    return_info: bool = False,
) -> Any:
    """
    As in `jax.experimental.ode`, func is called with (y, t, *args); the function of the jumps with (y, t, j),
    where j (B,) numbers the jump of each sample. Under a transformation nothing can be raised: there the
    policy "raise" acts as "nan".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from optlayers.jax import odeint
        >>> end = lambda rate: odeint(lambda y, t: rate * y, jnp.ones(()), jnp.array([0.0, 1.0]))[-1]
        >>> y, rate_bar = jax.value_and_grad(end)(-1.0)
        >>> round(y.item(), 4), round(rate_bar.item(), 4)
        (0.3679, 0.3679)
    """
    problem = InitialValueProblem(
        method, rtol, atol, adjoint, step_size, first_step, max_steps, order, on_failure
    )
    y, info = problem(ops, lambda t, y: func(y, t, *args), y0, t, _jumps(jumps), _event(event))
    return (y, info) if return_info else y


@continues(ode_doc)
class ODE:
    """
    Example:
        >>> import jax.numpy as jnp
        >>> from optlayers.jax import ODE
        >>> ode = ODE(lambda y, t, W: jnp.tanh(y @ W))
        >>> ode(jnp.ones((3, 2)), jnp.linspace(0, 1, 5), 0.3 * jnp.eye(2)).shape
        (5, 3, 2)
    """

    def __init__(
        self,
        func: Callable,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        method: str | Tableau = "dopri5",
        adjoint: Adjoint = Discrete(),
        step_size: float | None = None,
        first_step: float | None = None,
        max_steps: int = 1024,
        order: int = 1,
        on_failure: str = "raise",
    ):
        self.func = func
        self.settings = InitialValueProblem(
            method, rtol, atol, adjoint, step_size, first_step, max_steps, order, on_failure
        )

    @in_full_precision
    def solve(
        self, y0: Any, t: Array, *args: Any, jumps: Jumps | None = None, event: Callable | None = None
    ) -> tuple[Any, ODEInfo]:
        """The solution, and what became of each sample."""
        return self.settings(ops, lambda t, y: self.func(y, t, *args), y0, t, _jumps(jumps), _event(event))

    def __call__(
        self, y0: Any, t: Array, *args: Any, jumps: Jumps | None = None, event: Callable | None = None
    ) -> Any:
        return self.solve(y0, t, *args, jumps=jumps, event=event)[0]


@continues(control_path_doc)
def control_path(t: Array, x: Array, interpolation: str = "hermite", with_time: bool = True) -> ControlPath:
    """
    Example:
        >>> import jax.numpy as jnp
        >>> from optlayers.jax import control_path
        >>> X = control_path(jnp.array([0.0, 1.0, 3.0]), jnp.array([[0.0], [jnp.nan], [6.0]]))
        >>> X.evaluate(jnp.array(1.0)).tolist()
        [1.0, 2.0]
    """
    return build_path(ops, t, x, interpolation, with_time)


@continues(cdeint_doc)
def cdeint(f: Callable, z0: Array, X: ControlPath, t: Array | None = None, *args: Any, **options: Any) -> Any:
    """
    f is called with (z, t, *args).

    Example:
        >>> import jax.numpy as jnp
        >>> from optlayers.jax import cdeint, control_path
        >>> X = control_path(jnp.linspace(0, 1, 5), jnp.ones((3, 5, 2)))
        >>> f = lambda z, t, W: jnp.tanh(z @ W).reshape(3, 4, 3)
        >>> cdeint(f, jnp.zeros((3, 4)), X, None, 0.1 * jnp.ones((4, 12))).shape
        (3, 2, 4)
    """
    options = stopped_at_knots(X, t, lambda z, t, j: z, options)
    field = controlled_field(lambda t, z: f(z, t, *args), X)
    return odeint(lambda z, t: field(t, z), z0, X.interval if t is None else t, **options)
