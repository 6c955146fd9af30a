"""The cone program as a differentiable map (P, q, A, b, l, u) to (x, s, y).

    minimise 1/2 x'Px + q'x  subject to  A x + s = b,  l <= s <= u on the first k rows, s in K on the rest

with multipliers y of the rows: P x + q + A'y = 0. Shapes: q (n,), b (m,), l and u (k,), P (n, n), A (m, n),
each shared by the batch, or with a batch axis B in front. Where variables are in groups P and A are compact,
see `optlayers.linalg.products`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

from ..cones import Cones
from ..linalg import normal
from ..linalg.kkt import Factor, Problem, factorize_at
from ..linalg.products import batched, split_hessian
from ..linalg.rows import flatten, project_linearized, shapes
from ..linalg.sensitivity import Regularity, prepare
from ..ops import Array, Ops, select
from ..solvers.admm import ADMM
from ..solvers.base import RUNNING, Solver, advance, conclude, rounds, run, start, tolerances
from ..solvers.choice import choose, configure
from ..solvers.host import Host
from ..solvers.refinement import Point, smallest_regularization
from ..solvers.scaling import Scaling, equilibrate
from ..status import FAILURE_POLICIES, Status, check, is_usable
from .approximate import LPGD, Smoothed, lpgd, smoothed
from .conic_derivative import adjoint, cleaned, derived, finite_entries


class ConicSolution(NamedTuple):
    """The solution of each problem of a batch.

    Attributes:
        x: (B, n), s and y: (B, m).
        status: code of `Status`: `list(Status)[code]` (B,).
        iterations: (B,).
        residual: relative KKT residual (B,).
        regularity: `regularity.x` and `regularity.y` tell whether x and y are locally unique (B,). Where one
            is not, its derivative is the one of least norm.

    Example:
        >>> import torch
        >>> from optlayers.torch import Status, solve_qp
        >>> solution = solve_qp(torch.eye(2), torch.ones(2))
        >>> solution.x, list(Status)[solution.status]
        (tensor([-1., -1.]), <Status.SOLVED: 'solved to the requested accuracy'>)
    """

    x: Array
    s: Array
    y: Array
    status: Array
    iterations: Array
    residual: Array
    regularity: Regularity


MOST_TURNS = 4  # of ADMM with one penalty: what is left then needs another, or another solver


@dataclass(frozen=True)
class ConicSolve:
    """The solver as an opaque leaf: (P, q, A, b, l, u) and perhaps (x, s, y) to the solution.

    It returns x, s, y; residual, status, iterations; whether x and y are unique; the rest is for `derived`.

    Args:
        cones: the curved cones, in the last rows.
        linear: P is zero.
        convex: P is known to be positive semidefinite, else that is checked.
        solvers: tried in turn on the problems that the earlier ones leave unfinished.
        eps: relative residual of a solution.
        check: raise SolveError for problems that were not solved, where the framework allows it.
    """

    cones: Cones = Cones()
    linear: bool = False
    convex: bool = False
    solvers: tuple[Solver, ...] = (ADMM(),)
    eps: float = 1e-9
    check: bool = False

    in_numpy = True

    @property
    def input_ndims(self) -> tuple[int, ...]:
        return (*Problem.ndims, 1, 1, 1)

    def output_shapes(self, inputs):
        batch = max((s[0] for s, k in zip(inputs, self.input_ndims, strict=False) if len(s) > k), default=1)
        m, n, k = inputs[3][-1], inputs[1][-1], inputs[4][-1]
        floats = lambda *own: [((batch, *shape), "float") for shape in own]
        return (
            floats((n,), (m,), (m,), ())
            + [((batch,), "int")] * 5
            + floats((n,), (m,), (n,), (m,), (1,), (1,), *normal.shapes(self.cones, n))
            + shapes(self.cones, batch, k)
        )

    def __call__(self, ops: Ops, *inputs: Array) -> list[Array]:
        outputs = self._solve_fused(ops, inputs)
        if outputs is None:
            (m, n), n_P = inputs[2].shape[-2:], inputs[0].shape[-1]
            size = n_P * n_P if inputs[2].ndim == 2 else n * max(n_P, m)
            outputs = ops.in_blocks(lambda *part: self._solve(ops, *part), inputs, self.input_ndims, size)
        if self.check:
            residual, status = outputs[3:5]
            ops.on_host(check, status, residual)
        return outputs

    def _solve_fused(self, ops: Ops, inputs: Sequence[Array]) -> list[Array] | None:
        """As `_solve`, where one kernel can solve most of the problems; None where there is none for them."""
        admm, is_warm = self.solvers[0], len(inputs) > len(Problem.ndims)
        if self.cones.rows or self.cones.groups or is_warm or not (isinstance(admm, ADMM) and admm.fused):
            return None
        e = ops.eps(inputs[1]) ** 0.5
        target, accept, _ = tolerances(ops, self.eps, inputs[1])
        settings = admm.rho, admm.sigma, admm.alpha, e, max(1e-6, e), target, accept
        counts = admm.check_every, min(rounds(admm), MOST_TURNS), admm.refine, admm.scaling
        solved = ops.solve_small(inputs, settings, counts)
        if solved is None:
            return None
        *solution, residual, iterations, x, v, D, E, c, cholesky, free, lower = solved
        unique = 0 * iterations + 1
        facts = residual, 0 * iterations + Status.SOLVED.code, iterations, unique, unique, 0 * iterations
        root = x, v, D, E, c, 0 * c + e, cholesky, free, lower
        rest = lambda data, _: tuple(self._solve(ops, *data))
        return [*ops.on_rows(iterations == 0, rest, inputs, Problem.ndims, (*solution, *facts, *root))]

    def _solve(self, ops: Ops, P, q, A, b, l, u, *warm) -> list[Array]:
        batch = self.output_shapes([tuple(x.shape) for x in (P, q, A, b, l, u, *warm)])[0][0][0]
        q, b, *warm = (ops.broadcast_to(x, (batch, x.shape[-1])) for x in (q, b, *warm))
        l, u = (x[None] if x.ndim == 1 else x for x in (l, u))
        problem, finite, crossed = _replace_non_finite(ops, Problem(P, q, A, b, l, u))
        problem, scaling = equilibrate(ops, self.cones, problem, self.solvers[0].scaling, self.linear)
        if warm:
            x, s, y = warm
            point = x / scaling.D, s * scaling.E - y * scaling.c / scaling.E
            point = tuple(ops.where(ops.isfinite(z), z, 0.0) for z in point)
        else:
            point = 0 * problem.q, 0 * problem.b
        none = 0 * ops.cast(finite, q)[:, None]  # which in JAX differs by device if any of the data do
        point = tuple(z + none for z in point)
        progress = start(ops, self.cones, problem, *point)
        status = ops.where(crossed, Status.PRIMAL_INFEASIBLE.code, progress.status)
        status = ops.where(finite, status, Status.NON_FINITE.code)
        if not (self.linear or self.convex):
            status = ops.where(_is_convex(ops, problem.P) | ~finite, status, Status.NON_CONVEX.code)
        progress = progress._replace(status=status)
        if warm:
            steps = self.solvers[0].refine
            progress = advance(ops, self.cones, problem, scaling, progress, point, steps, self.eps)
        for solver in self.solvers:
            running = progress.status == RUNNING
            if isinstance(solver, Host) and not solver.takes(ops, problem, running):
                continue

            def work(data, progress, solver=solver):
                problem, scaling = Problem(*data[:6]), Scaling(*data[6:])
                return run(ops, solver, self.cones, problem, scaling, progress, self.eps)

            data, ndims = (*problem, *scaling), (*Problem.ndims, *Scaling.ndims)
            progress = ops.on_rows(running, work, data, ndims, progress)
        best, status, iterations = conclude(ops, progress, self.eps)
        factor = self._final_factor(ops, problem, best)
        usable = is_usable(status)
        factor, regularity, is_rough = prepare(ops, self.cones, problem, best.v, factor, usable)
        factor = _repair(ops, factor, ~usable)
        D, E, c = (ops.broadcast_to(part, (batch, part.shape[-1])) for part in scaling)
        s = project_linearized(ops, self.cones, problem.bounds, factor.linearization, best.v, 0)
        solution = scaling.restore(best.x, s, s - best.v)
        facts = best.residual, status, iterations, *map(ops.to_int, (*regularity, is_rough))
        root = best.x, best.v, D, E, c, factor.e, factor.cholesky, *factor.local
        return [*solution, *facts, *root, *flatten(factor.linearization)]

    def _final_factor(self, ops: Ops, problem: Problem, best: Point) -> Factor:
        """J at the final point. On polyhedral cones D is constant around it: refinement's factor is that."""
        if not self.cones.rows:
            # But for the bound that a row with l = u is at, which no step needs to know.
            (l, u), linearization = problem.bounds, best.factor.linearization
            lower = ops.where(best.v <= l, 1.0, ops.where(best.v >= u, 0.0, linearization.lower))
            return best.factor._replace(linearization=linearization._replace(lower=lower))
        # Refinement's is of the point before, but linearized at this one. With e = 1 it is to be made anew.
        old = best.factor
        e = ops.where(old.e < 1, smallest_regularization(ops, best.x), 1.0)
        return factorize_at(ops, self.cones, problem, old.linearization, e)


def _repair(ops: Ops, factor: Factor, failed: Array) -> Factor:
    """Without a valid factor the derivative is masked: it must not turn into NaN."""

    def repair(cholesky, local):
        identity = ops.broadcast_to(ops.eye(cholesky.shape[-1], cholesky), cholesky.shape)
        harmless = identity, tuple(ops.full(x.shape, 0.0, x) for x in local)
        return select(ops, failed, harmless, (cholesky, local))

    parts = factor.cholesky, factor.local
    cholesky, local = ops.cond(ops.any(failed), repair, lambda *parts: parts, *parts)
    return factor._replace(cholesky=cholesky, local=local)


def _is_convex(ops: Ops, P: Array) -> Array:
    """Whether each P is positive semidefinite, up to the rounding of data computed in float32."""
    P, local = split_hessian(batched(P))
    # No entry of such a matrix is larger than the largest one of its diagonal.
    size = ops.amax(abs(ops.concat([ops.diagonal(P), local], -1)), -1, keepdims=True)
    shift = max(1e-6, ops.eps(P) ** 0.5) * ops.where(size > 0, size, 1.0)
    cholesky = ops.cholesky(ops.add_diagonal(1.0 * P, shift))
    return ops.all(ops.isfinite(ops.diagonal(cholesky)), -1) & ops.all(local + shift > 0, -1)


def _replace_non_finite(ops: Ops, problem: Problem) -> tuple[Problem, Array, Array]:
    """The problem with zeros for NaN and infinity; which problems (B,) had none; whose bounds are crossed."""
    P, q, A, b, l, u = problem
    nothing = ops.sum(0 * q, -1) + ops.sum(0 * b, -1)  # in one pass; isfinite takes torch four
    for matrix in (P, A):
        nothing = nothing + ops.sum(ops.sum(0 * matrix, -1), -1)
    # Bounds may be infinite.
    finite = (nothing == 0) & ops.all((l == l) & (u == u), -1)
    # Between bounds that have changed places the projection finds a point, which satisfies neither.
    crossed = ops.any((l > u) | (l == ops.inf) | (u == -ops.inf), -1)

    def clean(*data):
        return tuple(ops.where(*pair, 0.0) for pair in zip(finite_entries(ops, data), data, strict=True))

    problem = Problem(*ops.cond(ops.all(finite & ~crossed), lambda *data: data, clean, *problem))
    return problem, finite, crossed


def check_choices(cones: Cones, order: int, on_failure: str) -> None:
    """
    Raises:
        ValueError: an order that derivatives beside the cones do not have, or a policy that is none.
    """
    if not (isinstance(order, Integral) and 1 <= order <= cones.highest_order):
        raise ValueError(
            "order must be a whole number from 1 on, and at most 2 beside semidefinite, exponential and "
            f"power cones, got {order!r}"
        )
    if on_failure not in FAILURE_POLICIES:
        raise ValueError(f"on_failure must be one of {FAILURE_POLICIES}, got {on_failure!r}")


def with_failures(ops: Ops, on_failure: str, solution: ConicSolution) -> ConicSolution:
    """The solution, with NaN for what was not solved if the policy is "nan"."""
    if on_failure != "nan":
        return solution
    failed = ~is_usable(solution.status)[:, None]
    x, s, y = (ops.where(failed, ops.nan, z) for z in solution[:3])
    return solution._replace(x=x, s=s, y=y)


def is_derived(on_failure: str, status: Array) -> Array:
    """Which solutions (B,) have derivatives; the others have zeros."""
    return status != Status.NON_FINITE.code if on_failure == "ignore" else is_usable(status)


@dataclass(frozen=True)
class ConicLayer:
    """A solver with its derivative and its policy for problems without solution.

    Args:
        solve: the solver; with `check`, it raises for such problems.
        order: highest derivative order.
        on_failure: "nan" fills x, s, y with NaN; "mask" has zero derivatives; "ignore" derives as if solved.
        gradient: None for the exact derivative.
    """

    solve: ConicSolve
    order: int = 2
    on_failure: str = "raise"
    gradient: Smoothed | LPGD | None = None

    def __post_init__(self):
        if isinstance(self.gradient, Smoothed) and self.solve.cones.rows:
            raise ValueError("gradient='smoothed' needs linear constraints; use 'exact' or 'lpgd' on cones")
        check_choices(self.solve.cones, self.order, self.on_failure)

    def __call__(
        self,
        ops: Ops,
        data: Problem,
        *warm: Array,
        restore: Callable[[ConicSolution], ConicSolution] = lambda solution: solution,
    ) -> ConicSolution:
        """The solution, batched, for data and an earlier (x, s, y) each with one batch axis or none.

        Args:
            restore: the way back to the solution of another problem; before NaN, which as factors would reach
                the derivatives of what the batch shares.
        """
        rows = data.b.shape[-1]
        if not rows:
            data, warm = _with_free_row(ops, data, warm)
        solution = self._derive(ops, data, warm)
        solution = restore(solution._replace(s=solution.s[:, :rows], y=solution.y[:, :rows]))
        return with_failures(ops, self.on_failure, solution)

    def is_derived(self, status: Array) -> Array:
        return is_derived(self.on_failure, status)

    def _derive(self, ops: Ops, data: Problem, warm: Sequence[Array]) -> ConicSolution:
        if self.gradient is None:
            return _differentiable(ops, self, data, warm)
        detached = Problem(*(ops.stop_gradient(z) for z in data))
        solution = _differentiable(ops, self, detached, warm)
        usable, point = is_usable(solution.status), solution[:3]
        data, usable = cleaned(ops, solution.status, usable, data), usable[:, None]
        if isinstance(self.gradient, Smoothed):
            x, s, y = smoothed(ops, self.gradient, data, point, usable, self.order)
        else:
            solve = replace(self.solve, check=False)
            x, s, y = lpgd(ops, self.gradient, solve, data, point, usable)
        return solution._replace(x=x, s=s, y=y)


def _with_free_row(ops: Ops, data: Problem, warm: Sequence[Array]) -> tuple[Problem, tuple[Array, ...]]:
    """A program without rows, and a start for it, with one that says nothing: 0'x + s = 0, s free.

    JAX has no linear algebra on empty arrays.
    """
    row = lambda value: ops.full((1,), value, data.q)
    A = ops.full((1, data.q.shape[-1]), 0.0, data.q)
    data = data._replace(A=A, b=row(0.0), l=row(-ops.inf), u=row(ops.inf))
    return data, (*warm[:1], *(ops.full((*z.shape[:-1], 1), 0.0, data.q) for z in warm[1:]))


def _differentiable(ops: Ops, layer: ConicLayer, data: Problem, warm: Sequence[Array]) -> ConicSolution:
    x, s, y, error, status, iterations, *system = ops.leaf(layer.solve, (*data, *warm))
    choices = layer.solve.cones, layer.is_derived
    rule, reverse = partial(derived, ops, *choices), partial(adjoint, *choices)
    x, s, y = ops.deferred(rule, layer.order, (x, s, y), data, (status, *system), reverse)
    return ConicSolution(x, s, y, status, iterations, error, Regularity(*(k > 0 for k in system[:2])))


GRADIENTS = {"exact": None, "smoothed": Smoothed(), "lpgd": LPGD()}


def conic_layer(
    cones: Cones,
    linear: bool,
    solver: Any = None,
    solver_args: Mapping[str, Any] | None = None,
    order: int = 2,
    on_failure: str = "raise",
    rescue: bool = False,
    gradient: str | Smoothed | LPGD = "exact",
    convex: bool = False,
) -> ConicLayer:
    """The layer for a choice of solver and of its settings, see `choose` and `configure`."""
    solvers = choose(cones, linear, solver, rescue)
    solvers, eps = configure(solvers, solver_args or {})
    if isinstance(gradient, str):
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {sorted(GRADIENTS)} or a record, got {gradient!r}")
        gradient = GRADIENTS[gradient]
    elif not isinstance(gradient, (Smoothed, LPGD)):
        raise ValueError(f"gradient must be a record such as Smoothed(), got {gradient!r}")
    solve = ConicSolve(cones, linear, convex, solvers, eps, on_failure == "raise")
    return ConicLayer(solve, order, on_failure, gradient)


def flatten_batch(ops: Ops, value: Array, own: int) -> Array:
    """`value`, of which the last `own` axes are its own, with all batch axes as one; without any as it is."""
    lead = tuple(value.shape[: value.ndim - own])
    return value if len(lead) < 2 else ops.reshape(value, (math.prod(lead), *value.shape[len(lead) :]))


def flatten_warm(ops: Ops, warm: Sequence[Array], lead: tuple[int, ...], n: int, m: int) -> tuple[Array, ...]:
    """An earlier (x, s, y), perhaps none, with all batch axes as one.

    Raises:
        ValueError: it is that of another problem or batch.
    """
    for name, z, size in zip("xsy", warm, (n, m, m), strict=False):
        if tuple(z.shape) not in ((*lead, size), (size,)):
            raise ValueError(
                f"warm_start has {name} of shape {tuple(z.shape)}, expected {(*lead, size)}; "
                "it is to be an earlier solution of the same problem for the same batch"
            )
    return tuple(ops.widest(flatten_batch(ops, ops.stop_gradient(z), 1)) for z in warm)


def point_of(solution: Any) -> tuple[Array, ...]:
    """(x, s, y) of an earlier solution to start from, nothing of None."""
    return () if solution is None else (solution.x, solution.s, solution.y)


def restore_batch(ops: Ops, solution: ConicSolution, lead: tuple[int, ...], like: Array) -> ConicSolution:
    """`solution` with the batch axes `lead` and the dtype of `like`."""
    x, s, y, status, iterations, residual, regularity = solution
    x, s, y, residual = (restore_array(ops, z, lead, like) for z in (x, s, y, residual))
    counts = (ops.reshape(k, lead) for k in (status, iterations))
    return ConicSolution(x, s, y, *counts, residual, Regularity(*(ops.reshape(k, lead) for k in regularity)))


def restore_array(ops: Ops, x: Array, lead: tuple[int, ...], like: Array) -> Array:
    return ops.cast(ops.reshape(x, (*lead, *x.shape[1:])), like)
