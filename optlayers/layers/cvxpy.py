"""What the CvxpyLayer of every framework shares: from parameter values to program data, and back to outputs.

The docstring of `CvxpyProgram` is that of the layers; each frontend adds its example.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from ..canon.program import Output, Program
from ..linalg.kkt import Problem
from ..linalg.sensitivity import Regularity
from ..ops import Array, Ops
from ..ops import numpy as host
from ..solvers.host import INFINITE
from ..status import batch_axes
from .assembly import assemble, splits
from .conic import (
    ConicLayer,
    ConicSolution,
    conic_layer,
    flatten_batch,
    flatten_warm,
    restore_array,
    restore_batch,
)
from .direct import curved_part, polyhedral_bounds
from .elimination import eliminate, elimination
from .grouping import arranged, compacted
from .ranges import ranges
from .sparse import Entries, SparseLayer, can_be_sparse, layer_of_size


def _is_for_sparse(program: Program) -> bool:
    """Whether sparse factorisations of single problems are faster than dense ones of the batch.

    With variables in groups it is the compact program that counts: regressions on 1,000 to 3,000 samples took
    a third to an eighth of the time of sparse factorisations, only one that goes to the interior point more.
    """
    size, columns = program.n + program.m, program.A.shape[1]
    count = len(program.P.positions) + len(program.A.positions)
    return size >= SPARSE_FROM and count <= SPARSE_DENSITY * columns * size


def entries(program: Program) -> tuple[Program, list[tuple[Any, Any]]]:
    """The program with P and A as vectors of their entries, and (rows, columns) of these."""
    maps = program.P, program.A
    flat = [replace(m, shape=m.positions.shape, positions=np.arange(len(m.positions))) for m in maps]
    places = [np.divmod(m.positions, m.shape[1]) for m in maps]
    return replace(program, P=flat[0], A=flat[1]), places


def _is_convex(program: Program) -> bool:
    """Whether P has no parameters and is positive semidefinite, so that no call needs to look."""
    if len(program.P.rows) or program.n > LARGEST_FACTORED:
        return False
    P = np.zeros(program.P.shape)
    P.flat[program.P.positions] = program.P.constant
    shift = 1e-12 * max(abs(P).max(initial=0.0), np.finfo(float).tiny)
    return bool(np.linalg.eigvalsh(P).min(initial=0.0) >= -shift)


def _without_far_bounds(program: Program) -> Program:
    """The program with infinity for constant bounds that count as infinite."""
    b, (zero, nonneg) = program.b, (program.cones.zero, program.cones.nonneg)
    is_bound = (b.positions >= zero) & (b.positions < zero + nonneg)
    constant = np.where(is_bound & (b.constant >= INFINITE), np.inf, b.constant)
    return replace(program, b=replace(b, constant=constant))


def _bounds(program: Program) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the slack on the polyhedral rows; none where b is infinite, which says nothing."""
    lower, upper = polyhedral_bounds(host, program.cones, program.q.constant)
    free = program.b.positions[np.isinf(program.b.constant)]
    lower[free] = -np.inf
    return lower, upper


def _chosen(program: Program) -> tuple[np.ndarray | None, tuple[Output, ...]]:
    """Which entries of x the outputs are made of, and the outputs in terms of these; None if of y as well."""
    if any(output.source != "x" for output in program.outputs):
        return None, program.outputs
    parts = [part for o in program.outputs for part in (o.indices, o.imag_indices) if part is not None]
    used = np.unique(np.concatenate(parts))
    chosen = used[used >= 0]
    place = lambda part: None if part is None else np.where(part < 0, -1, np.searchsorted(chosen, part))
    outputs = (
        replace(o, indices=place(o.indices), imag_indices=place(o.imag_indices)) for o in program.outputs
    )
    return chosen, tuple(outputs)


def read(ops: Ops, output: Output, solution: ConicSolution) -> Array:
    """One output (B, *shape) of the layer."""
    source = solution.x if output.source == "x" else solution.y
    padded = ops.concat([source, 0 * ops.full((source.shape[0], 1), 1.0, source)], -1)

    def pick(indices, coefs):
        # Index -1 is a structural zero: the padding behind the last entry.
        where = np.where(indices < 0, source.shape[-1], indices)
        return ops.take(padded, ops.constant(where, source)) * ops.constant(coefs, source)[None]

    value = pick(output.indices, output.coefs)
    if output.imag_indices is not None:
        value = ops.complex_number(value, pick(output.imag_indices, output.imag_coefs))
    if output.exp:
        value = ops.exp(value)
    return ops.reshape(value, (source.shape[0], *output.shape))


def batch_shape(shapes: Sequence[tuple[int, ...]], parameters: Sequence[Any]) -> tuple[int, ...]:
    """The leading axes that the given values have in common.

    Raises:
        ValueError: wrong number of values, a shape that does not end in the parameter's, or batch axes that
            differ; the message names the parameter.
    """
    if len(shapes) != len(parameters):
        names = ", ".join(name(parameter) for parameter in parameters)
        raise ValueError(
            f"expected {len(parameters)} parameter values ({names}), got {len(shapes)}; "
            "pass one value for each parameter, in the order given to the constructor"
        )
    common: tuple[int, ...] = ()
    for shape, parameter in zip(shapes, parameters, strict=True):
        own = tuple(parameter.shape)
        lead = shape[: len(shape) - len(own)]
        if shape[len(lead) :] != own:
            raise ValueError(
                f"parameter {name(parameter)} has shape {own}; expected a value of that shape, perhaps with "
                f"batch axes in front, got {shape}"
            )
        if lead and common and lead != common:
            raise ValueError(
                f"parameter {name(parameter)} has batch axes {lead}, but an earlier one has {common}; "
                "give every batched parameter the same leading axes"
            )
        common = lead or common
    return common


def name(parameter: Any) -> str:
    return f"{parameter.name()} {tuple(parameter.shape)}"


SPARSE_FROM, SPARSE_DENSITY = 1500, 0.02  # rows and columns, entries that are not zero
LARGEST_FACTORED = 1000  # above it eigenvalues would take longer than a second
SIGNS = {"nonneg": 1, "pos": 1, "boolean": 1, "nonpos": -1, "neg": -1}
SIGN_TOLERANCE = 1e-10  # CVXPY's own


def _declared(parameter: Any) -> tuple[str, int] | None:
    """The attribute that tells the sign of a parameter, and the sign."""
    # Else boolean may be a list of the entries that are.
    is_set = lambda key: parameter.attributes[key] in (True,)
    return next(((key, sign) for key, sign in SIGNS.items() if is_set(key)), None)


def _of_declared_sign(ops: Ops, value: Array, parameter: Any) -> Array:
    """`value` with NaN for entries of a sign that the parameter was declared not to have.

    Its problem was found convex on that word: for other values the program is another one.
    """
    declared = _declared(parameter)
    if declared is None:
        return value
    return ops.where(declared[1] * value >= -SIGN_TOLERANCE, value, ops.nan)


class Solution(NamedTuple):
    """Result of `CvxpyLayer.solve`; every field has the batch axes of the parameters in front.

    Attributes:
        variables: what calling the layer returns.
        x: (n,), s and y: (m,), the solution of the layer's cone program, slacks and multipliers.
        status: code of `Status` per problem: `list(Status)[code]`.
        iterations: iterations per problem.
        residual: relative KKT residual per problem.
        regularity: `regularity.x` and `regularity.y` tell whether x and y are locally unique.

    Example:
        >>> import cvxpy as cp, torch
        >>> from optlayers.torch import CvxpyLayer
        >>> x, p = cp.Variable(2), cp.Parameter(2)
        >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [x >= 0])
        >>> solution = CvxpyLayer(problem, [p], [x]).solve(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        >>> solution.variables[0].shape, solution.status.tolist()
        (torch.Size([2, 2]), [0, 0])
    """

    variables: tuple[Array, ...]
    x: Array
    s: Array
    y: Array
    status: Array
    iterations: Array
    residual: Array
    regularity: Regularity


class CvxpyProgram:
    """The solution of a parametrised convex problem, as a function of its parameters.

    From 1,500 variables and rows on, problems with few coefficients (2 % of the matrices, without columns
    that solvers eliminate) are solved and differentiated on the host, one by one with sparse factorisations:
    by Clarabel, or by the host solver that is asked for. `solver=ADMM()` and `InteriorPoint()` keep the
    batched dense way.

    Args:
        problem: a DPP problem, or a geometric program with `gp`.
        parameters: all its parameters; the layer takes their values in this order.
        variables: what it returns: variables, or `constraint.dual_variables[i]`.
        solver: None or "auto" chooses; or a record such as `ADMM(...)`, or a name of CVXPY (`cp.CLARABEL`).
        gp: whether the problem is a geometric program.
        verbose: print a summary of the layer when it is built.
        canon_backend: CVXPY's canonicalisation backend.
        solver_args: settings of the solver: `eps`, the relative residual of a solution, `max_iter`, and the
            fields of the solver's record; for a host solver also the options of its library.
        order: highest derivative order, from 1 on, and at most 2 beside semidefinite, exponential and power
            cones; beyond it NotImplementedError is raised.
        on_failure: what becomes of problems without solution, or with data that are not finite or not of the
            sign that a parameter was declared to have. "raise": SolveError names them; "nan": their
            outputs are NaN; "mask": the last iterate, with zero gradient; "ignore": the last iterate.
        rescue: hand problems that stay unfinished to Clarabel on the host, if `solver` was not given.
        gradient: "exact"; or, where that is zero or jumps as for linear programs, "smoothed" (`Smoothed(mu)`)
            or "lpgd" (`LPGD(tau)`).

    Raises:
        ValueError: the problem or the lists cannot be used; the message says why, and what to do.
    """

    def __init__(
        self, problem, parameters, variables, gp, canon_backend, solver_args, choices: Mapping[str, Any]
    ):
        from ..canon.cvxpy import canonicalize  # not before: to import CVXPY takes seconds

        start = time.perf_counter()
        self.parameters, self.variables = tuple(parameters), tuple(variables)
        program = canonicalize(problem, list(parameters), list(variables), gp, canon_backend)
        if not self.variables:
            raise ValueError("variables is empty; list those whose values the layer is to return")
        program = _without_far_bounds(program)
        is_exact = choices["gradient"] == "exact"  # other gradients are for whole matrices
        self.program = arranged(program, ranges(program)) if is_exact else program
        self.ranges = ranges(self.program)
        self.solved = self.program if self.ranges is None else self.ranges.program
        self.pattern, compact = None, compacted(self.solved)
        if _is_for_sparse(compact) and can_be_sparse(choices["solver"], choices["gradient"]):
            self.solved, self.pattern = entries(self.solved)
        else:
            self.solved = compact
        self.elimination = elimination(self.solved) if self.pattern is None else None
        chosen, self._outputs = _chosen(self.program)
        self._chosen = None
        if self.elimination is not None and chosen is not None:
            self._chosen = self.elimination.parts(chosen)
        self.solver_args = dict(solver_args or {})
        self._choices = dict(choices)
        self._convex = self.pattern is None and _is_convex(self.program)
        self._layer = self._configured({})
        self._seconds = time.perf_counter() - start

    @property
    def is_sparse(self) -> bool:
        """Whether the problem is solved on the host, by sparse factorisations."""
        return self.pattern is not None

    def layer(self, solver_args: Mapping[str, Any] | None) -> ConicLayer | SparseLayer:
        """The settings of one call, in which `solver_args` go before those of the constructor."""
        return self._configured(solver_args) if solver_args else self._layer

    def like(self, common: Callable[..., Array], values: Sequence[Array]) -> Array:
        """A real scalar with the type of the results, by `common` of the frontend's `arguments`."""
        label = lambda i: f"parameter {name(self.parameters[i])}"
        return common(values[: len(self.parameters)], label, lambda i: self.parameters[i].is_complex())

    # Frontends may compile what calls these two; they are functions of constants, to be run and not traced.
    def splits(self, batched: tuple[bool, ...]) -> tuple[Any, ...]:
        return splits(self.solved, batched)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        lower, upper = _bounds(self.solved)
        return lower, upper if self.ranges is None else np.minimum(upper, self.ranges.width[: len(upper)])

    def _configured(self, solver_args: Mapping[str, Any]) -> ConicLayer | SparseLayer:
        cones = curved_part(self.solved.cones)
        linear = not len(self.program.P.positions)
        arguments = self.solver_args | dict(solver_args)
        if self.pattern is not None:
            choices = {key: self._choices[key] for key in ("solver", "order", "on_failure")}
            cones = replace(cones, groups=())  # of which sparse factorisations need not know
            return layer_of_size(self.solved.m, self.solved.n, cones, solver_args=arguments, **choices)
        return conic_layer(cones, linear, convex=self._convex, solver_args=arguments, **self._choices)

    def solve(
        self,
        ops: Ops,
        layer: ConicLayer | SparseLayer,
        values: Sequence[Array],
        warm: Sequence[Array],
        like: Array,
    ) -> Solution:
        """The solution for values with any batch axes in front, in the dtype of the real `like`."""
        lead = batch_shape([tuple(value.shape) for value in values], self.parameters)
        solution = self._solution(ops, layer, values, warm, like, lead, chosen=None)
        variables = self._read(ops, self.program.outputs, solution, lead, like)
        return Solution(variables, *restore_batch(ops, solution, lead, like))

    def call(
        self, ops: Ops, layer: ConicLayer | SparseLayer, values: Sequence[Array], like: Array
    ) -> tuple[Array, ...]:
        """The variables of `solve` alone, without what only the rest of it takes."""
        lead = batch_shape([tuple(value.shape) for value in values], self.parameters)
        solution = self._solution(ops, layer, values, (), like, lead, self._chosen)
        outputs = self.program.outputs if self._chosen is None else self._outputs
        return self._read(ops, outputs, solution, lead, like)

    def _read(self, ops, outputs, solution, lead, like) -> tuple[Array, ...]:
        variables = (read(ops, output, solution) for output in outputs)
        return tuple(restore_array(ops, x, lead, like) for x in variables)

    def _solution(
        self, ops, layer, values, warm, like, lead, chosen: tuple[np.ndarray, np.ndarray] | None
    ) -> ConicSolution:
        """The solution with one batch axis; after an elimination of `chosen` entries of x alone, if given."""
        flat = []
        for value, own in zip(values, self.parameters, strict=True):
            value = flatten_batch(ops, value, own.ndim)
            value = ops.widest(ops.reshape(value, (*value.shape[: value.ndim - own.ndim], own.size)))
            flat.append(_of_declared_sign(ops, value, own))
        batched = tuple(value.ndim == 2 for value in flat)
        bounds = (ops.constant(bound, ops.widest(like)) for bound in self.bounds())
        P, q, A, b = self.splits(batched)
        is_batched = any(split.batched for split in (P, q, A, b))
        if chosen is not None and self.elimination is not None and self.elimination.shifts is not None:
            P = A = None
        data = Problem(*assemble(ops, self.solved, (P, q, A, b), flat, ops.widest(like)), *bounds)
        if lead and not is_batched:  # as by a constant of the objective alone
            data = data._replace(q=ops.broadcast_to(data.q, (math.prod(lead), data.q.shape[-1])))
        warm = list(flatten_warm(ops, warm, lead, self.program.n, self.program.m))
        if self.ranges is not None and warm:
            warm[1:] = self.ranges.merge(ops, *warm[1:])
        with batch_axes(lead):
            if self.pattern is not None:
                solution = self._solve_sparse(ops, layer, data, warm)
            elif self.elimination is None:
                solution = layer(ops, data, *warm)
            else:
                data, warm, restore = eliminate(ops, self.elimination, data, warm)
                back = lambda solution: restore(solution, layer.is_derived(solution.status), chosen)
                solution = layer(ops, data, *warm, restore=back)
        if self.ranges is not None and chosen is None:
            solution = self.ranges.restore(ops, solution)
        return solution

    def _solve_sparse(self, ops, layer, data, warm) -> ConicSolution:
        """As `layer(ops, data, *warm)`, for data of which P and A are entries."""
        P, q, A, b, l, u = (z[None] if z.ndim == 1 else z for z in data)
        P, A = (
            Entries(values, *(ops.constant(index, q) for index in places))
            for values, places in zip((P, A), self.pattern, strict=True)
        )
        return layer(ops, P, A, (q, b, l, u), [z[None] if z.ndim == 1 else z for z in warm])

    def faults(self, values: Sequence[np.ndarray]) -> Iterator[str]:
        """What makes values of the parameters unusable, a sentence for each parameter that has such."""
        in_logarithms = {block.parameter for block in self.program.blocks if block.part == "log"}
        for i, (value, parameter) in enumerate(zip(values, self.parameters, strict=True)):
            label, declared = f"parameter {name(parameter)}", _declared(parameter)
            if not np.isfinite(value).all():
                yield f"{label} contains NaN or infinity"
            elif declared and (declared[1] * value < -SIGN_TOLERANCE).any():
                worst = declared[1] * (declared[1] * value).min()
                yield f"{label} was declared with {declared[0]}=True, but contains {worst:g}"
            elif i in in_logarithms and (value <= 0).any():
                yield f"{label} contains {value.min():g}, of which there is no logarithm"

    def headline(self) -> str:
        """Sizes of the problem in one line."""
        return "; ".join(f"{key}: {value}" for key, value in self._facts()[:3])

    def summary(self) -> str:
        """Parameters, sizes, cones, outputs, solvers and set-up time, one a line."""
        return "\n".join(f"{key + ':':<13}{value}" for key, value in self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        program, layer = self.program, self._layer
        counts = {
            field.name: getattr(program.cones, field.name) for field in fields(program.cones) if field.init
        }
        del counts["groups"]
        note = f" ({program.cones.local} eliminated)" if program.cones.local else ""
        cones = [f"{k}={v if isinstance(v, int) else len(v)}" for k, v in counts.items() if v]
        entries = f"{len(program.P.positions)} entries of P, {len(program.A.positions)} of A"
        solvers = ", then ".join(type(solver).__name__ for solver in layer.solve.solvers)
        kind = " with sparse matrices" if self.is_sparse else ""
        return [
            ("parameters", ", ".join(map(name, self.parameters))),
            ("size", f"n={program.n} variables{note}, m={program.m} rows"),
            ("cones", ", ".join(cones) or "none"),
            ("nonzeros", entries),
            ("outputs", ", ".join(str(output.shape) for output in program.outputs)),
            ("solver", f"{solvers}{kind}, to a residual of {layer.solve.eps:g}"),
            ("derivatives", f"up to order {layer.order}"),
            ("set up in", f"{self._seconds:.2g} s"),
        ]
