"""The cone program with sparse P and A as a differentiable map; see `optlayers.layers.conic` for the program.

The problem is solved on the host, where sparse factorisations serve Newton's refinement and the derivative.
That is the derivative of a residual made of gathers and scatters over the entries of P and A: gradients of
matrices are vectors of as many entries, and no matrix is ever dense.

P stands for (P + P') / 2, so that with u = J^-T (x_bar, 0) its entries have the gradient
-(u_i x_j + x_i u_j) / 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from ..cones import Cones
from ..implicit import attach
from ..linalg.rows import project_linearized, unflatten
from ..linalg.sensitivity import Regularity
from ..ops import Array, Ops
from ..solvers.choice import AUTOMATIC, NAMED, choose, configure
from ..solvers.host import OSQP, Clarabel, Host
from ..solvers.scaling import Scaling
from ..solvers.sparse import SparseSolve
from ..status import batch_axes, check
from .conic import ConicSolution, check_choices, flatten_warm, is_derived, restore_batch, with_failures
from .conic_derivative import finite_entries
from .direct import INFINITE, _prepare, polyhedral_bounds


class Entries(NamedTuple):
    """A sparse matrix: `values` (N,) at `rows` and `columns` (N,); those at the same place add up.

    Within this module `values` has a batch axis in front, of length 1 where the batch shares the matrix.
    """

    values: Array
    rows: Array
    columns: Array


@dataclass(frozen=True)
class SparseLayer:
    """The solver with its derivative and its policy, as `ConicLayer` has them.

    Args:
        has_free_row: the first row of `solve` is a free one, which the program does not have. It keeps the
            bounds from being empty: XLA aborts on slices of a concatenation with an empty array (jax 0.10).
    """

    solve: SparseSolve
    order: int = 2
    on_failure: str = "raise"
    has_free_row: bool = False

    @property
    def rows(self) -> int:
        return self.solve.m - self.has_free_row

    def __post_init__(self):
        check_choices(self.solve.cones, self.order, self.on_failure)

    def __call__(
        self,
        ops: Ops,
        P: Entries,
        A: Entries,
        vectors: Sequence[Array],
        warm: Sequence[Array],
    ) -> ConicSolution:
        """The solution, batched, for q, b, l, u and an earlier (x, s, y), each with one batch axis."""
        if self.has_free_row:
            A, vectors, warm = _add_free_row(ops, A, vectors, warm)
        solution = _differentiable(ops, self, P, A, vectors, warm)
        if self.on_failure == "raise":
            ops.on_host(check, solution.status, solution.residual)
        if self.has_free_row:
            solution = solution._replace(s=solution.s[:, 1:], y=solution.y[:, 1:])
        return with_failures(ops, self.on_failure, solution)


def _differentiable(
    ops: Ops,
    layer: SparseLayer,
    P: Entries,
    A: Entries,
    vectors: Sequence[Array],
    warm: Sequence[Array],
) -> ConicSolution:
    solve, cones = layer.solve, layer.solve.cones
    matrices = [z if z.ndim == 2 else z[None] for M in (P, A) for z in M]
    batch = next((z.shape[0] for z in (*matrices, *vectors, *warm) if z.shape[0] != 1), 1)
    shapes = solve.output_shapes(batch)
    x, v, error, iterations, *system = ops.run_on_host(solve.solve, shapes, *matrices, *vectors, *warm)
    x_unique, y_unique, status, *rest = system
    point = _restored(ops, cones, vectors[2:], rest, x, v, 0)
    rule, data = partial(_derived, ops, layer), (P.values, A.values, *vectors)
    places = [z for M in (matrices[1:3], matrices[4:6]) for z in M]
    x, s, y = ops.deferred(rule, layer.order, point, data, (x, v, *places, *system))
    regularity = Regularity(x_unique > 0, y_unique > 0)
    return ConicSolution(x, s, y, ops.to_int(status), ops.to_int(iterations), error, regularity)


def _restored(
    ops: Ops, cones: Cones, bounds: Sequence[Array], rest: Sequence[Array], x: Array, v: Array, order: int
) -> tuple[Array, Array, Array]:
    """x, s and y of a point (x, v) of the equilibrated problem, whose scaling and linearisation is `rest`."""
    scaling, linearization = Scaling(*rest[:3]), unflatten(cones, list(rest[3:]))
    l, u = (scaling.E[:, : bound.shape[1]] * bound for bound in bounds)
    s = project_linearized(ops, cones, (l, u), linearization, v, order)
    return scaling.restore(x, s, s - v)


def _derived(
    ops: Ops,
    layer: SparseLayer,
    order: int,
    data: Sequence[Array],
    constants: Sequence[Array],
) -> tuple[Array, Array, Array]:
    """x, s and y with derivatives in the entries of P and A and in q, b, l, u up to `order`."""
    solve, (x, v, *places) = layer.solve, constants[:6]
    (m, n), cones = (solve.m, solve.n), solve.cones
    x_unique, y_unique, status, *rest = constants[6:]
    D, E, c = rest[:3]
    has_derivative = is_derived(layer.on_failure, ops.to_int(status))[:, None]
    # Problems with NaN are masked, but as factors these would reach shared parameters as 0 * NaN.
    clean = (ops.where(good, z, 0.0) for good, z in zip(finite_entries(ops, data), data, strict=True))
    P_values, A_values, q, b, *bounds = clean
    bounds = [ops.where(has_derivative, bound, ops.stop_gradient(bound)) for bound in bounds]
    P, A = Entries(P_values, *(z[0] for z in places[:2])), Entries(A_values, *(z[0] for z in places[2:]))
    matrices = P_values, *places[:2], A_values, *places[2:]
    frozen = *matrices, x_unique, y_unique, ops.cast(has_derivative[:, 0], v), *rest

    def invert(r, transposed, *arrays):
        A, F1, F2 = Entries(arrays[3], arrays[4][0], arrays[5][0]), r[:, :n], r[:, n:]
        D, E, _, free = arrays[9:13]
        # In rows where s is a bound, F_2 is its change ds, and F_1 has A'ds. Not dv but dy = ds - dv is to be
        # of least norm: without the A'ds, K is solved for all of dy.
        fixed = ops.concat([1 - free, ops.full((free.shape[0], m - free.shape[1]), 0.0, free)], -1)
        moved = (1 - fixed) * F2 if transposed else fixed * F2
        F1 = F1 - D * _multiply(ops, _transpose(A), E * moved, n)
        F = ops.concat([F1, -F2 if transposed else F2], -1)
        d = ops.run_on_host(lambda *z: [solve.invert(*z)], [F.shape], F, *arrays)[0]
        dx, dy = d[:, :n], d[:, n:]
        Adx, own = E * _multiply(ops, A, D * dx, m), (1 - 2 * fixed) * F2
        return ops.concat([dx, own + (dy - fixed * Adx if transposed else (fixed - 1) * Adx - dy)], -1)

    inverse = lambda r: ops.increment(invert, r, *frozen)

    def restored(z):
        return _restored(ops, cones, bounds, rest, z[:, :n], z[:, n:], order)

    def residual(z):
        x, s, y = restored(z)
        Px = (_multiply(ops, P, x, n) + _multiply(ops, _transpose(P), x, n)) / 2
        Aty, Ax = _multiply(ops, _transpose(A), y, n), _multiply(ops, A, x, m)
        F = [c * D * (Px + q + Aty), E * (Ax + s - b)]
        return ops.where(has_derivative, ops.concat(F, -1), 0.0)

    return restored(attach(ops, residual, inverse, ops.concat([x, v], -1), order))


def _add_free_row(ops: Ops, A: Entries, vectors: Sequence[Array], warm: Sequence[Array]):
    """A, the vectors and the warm start of the program with a free row of zeros in front."""
    q, b, *_ = vectors
    before = lambda value, z: ops.concat([ops.full((z.shape[0], 1), value, q), z], -1)
    bounds = (ops.full((1, 1), bound, q) for bound in (-ops.inf, ops.inf))
    warm = [z if i == 0 else before(0.0, z) for i, z in enumerate(warm)]
    return A._replace(rows=A.rows + 1), (q, before(0.0, b), *bounds), warm


def _multiply(ops: Ops, M: Entries, x: Array, size: int) -> Array:
    """M x for vectors x (B, k): (B, size)."""
    return ops.scatter_add(M.values * ops.take(x, M.columns), M.rows, size)


def _transpose(M: Entries) -> Entries:
    return Entries(M.values, M.columns, M.rows)


def sparse_layer(
    P: Any,
    q: Array,
    A: Any,
    cones: Cones,
    solver: Any,
    eps: float,
    order: int,
    on_failure: str,
    gradient: Any,
) -> SparseLayer:
    """The layer for matrices of the shapes of `P` and `A` and a choice of host solver.

    Raises:
        ValueError: matrices that do not fit together, or an option that sparse problems do not have.
    """
    n = q.shape[-1]
    m = A.shape[-2] if A is not None and len(A.shape) == 2 else 0
    for name, matrix, shape in (("P", P, (n, n)), ("A", A, (m, n))):
        if matrix is not None and tuple(matrix.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape if name == 'P' else ('m', n)} where P or A is sparse, "
                f"got {tuple(matrix.shape)}; a batch shares them, only vectors may have batch axes"
            )
    if gradient != "exact":
        raise ValueError(
            f"gradient must be 'exact' for sparse problems, got {gradient!r}; others are for dense matrices"
        )
    return layer_of_size(m, n, cones, solver, {"eps": eps}, order, on_failure)


def can_be_sparse(solver: Any, gradient: Any) -> bool:
    """Whether sparse problems have these choices."""
    kind = NAMED.get(solver.upper()) if isinstance(solver, str) else type(solver)
    return gradient == "exact" and (solver in AUTOMATIC or (kind is not None and issubclass(kind, Host)))


def layer_of_size(
    m: int,
    n: int,
    cones: Cones,
    solver: Any,
    solver_args: Mapping[str, Any],
    order: int = 2,
    on_failure: str = "raise",
) -> SparseLayer:
    """The layer for m rows and n columns, see `choose` and `configure`; `cones` are the curved ones."""
    solvers = (Clarabel(),) if solver in AUTOMATIC else choose(cones, False, solver)
    hosts = tuple(solver for solver in solvers if isinstance(solver, Host))
    if hosts != solvers:
        raise ValueError(f"sparse problems are solved by Clarabel, OSQP or SCS, got solver={solver!r}")
    if any(isinstance(solver, OSQP) for solver in hosts) and cones.rows:
        raise ValueError("OSQP solves problems with linear constraints only; use Clarabel or SCS")
    hosts, eps = configure(hosts, solver_args)
    has_free_row = m == cones.rows
    solve = SparseSolve(m + has_free_row, n, cones, hosts, eps)
    return SparseLayer(solve, order, on_failure, has_free_row)


def solve_sparse(ops: Ops, layer: SparseLayer, cones: Cones | None, *args: Any) -> ConicSolution:
    """`_solve_cone`, or `_solve_box` where there are no cones."""
    return _solve_box(ops, layer, *args) if cones is None else _solve_cone(ops, layer, cones, *args)


def _solve_box(
    ops: Ops,
    layer: SparseLayer,
    matrices: tuple[Entries, Entries],
    data: Sequence[Array | None],
    warm: Sequence[Array],
    like: Array,
) -> ConicSolution:
    """As `solve_box`, for q, l, u in `data`."""
    m = (layer.rows,)
    q, l, u = data
    l, u = (ops.full(m, bound, like) if z is None else z for z, bound in ((l, -ops.inf), (u, ops.inf)))
    (q, l, u), lead = _vectors(ops, layer, "qlu", (q, l, u), like)
    upper = ops.where(l <= -INFINITE, ops.inf, -l)
    lower = ops.where(u >= INFINITE, -ops.inf, -u)
    warm = [-z if i == 1 else z for i, z in enumerate(_warm(ops, layer, warm, lead))]
    zero = ops.full((1, *m), 0.0, q)
    with batch_axes(lead):
        solution = layer(ops, *_widest(ops, matrices), (q, zero, lower, upper), warm)
    return restore_batch(ops, solution._replace(s=-solution.s), lead, like)


def _solve_cone(
    ops: Ops,
    layer: SparseLayer,
    cones: Cones,
    matrices: tuple[Entries, Entries],
    data: Sequence[Array | None],
    warm: Sequence[Array],
    like: Array,
) -> ConicSolution:
    """As `solve_cone`, for q, b in `data`."""
    if layer.rows != cones.rows:
        raise ValueError(f"the cones have {cones.rows} rows, but A has {layer.rows}: {cones}")
    (q, b), lead = _vectors(ops, layer, "qb", data, like)
    bounds = (bound[None] for bound in polyhedral_bounds(ops, cones, q))
    with batch_axes(lead):
        solution = layer(ops, *_widest(ops, matrices), (q, b, *bounds), _warm(ops, layer, warm, lead))
    return restore_batch(ops, solution, lead, like)


def _vectors(ops: Ops, layer: SparseLayer, names: str, data: Sequence[Array | None], like: Array):
    """The vectors with one batch axis, of length 1 where it was missing, and the batch axes as given."""
    for name, z in zip(names[1:], data[1:], strict=True):
        shape = () if z is None else tuple(z.shape)
        if shape[-1:] != (layer.rows,):
            raise ValueError(f"{name} must have shape (..., {layer.rows}) as A has rows, got {shape}")
    arrays, lead = _prepare(ops, list(names), data, ["n" if name == "q" else "m" for name in names], like)
    return [z[None] if z.ndim == 1 else z for z in arrays], lead


def _warm(ops: Ops, layer: SparseLayer, warm: Sequence[Array], lead: tuple[int, ...]) -> list[Array]:
    arrays = flatten_warm(ops, warm, lead, layer.solve.n, layer.rows)
    return [z[None] if z.ndim == 1 else z for z in arrays]


def _widest(ops: Ops, matrices: Sequence[Entries]) -> list[Entries]:
    return [M._replace(values=ops.widest(M.values)[None]) for M in matrices]
