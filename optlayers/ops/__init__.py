"""The seam between the algorithms and the frameworks.

`optlayers.ops.torch` and `optlayers.ops.jax` define the same functions; a solver takes one of the two
modules as its first argument `ops` and is written once. `optlayers.ops.numpy` has the part of them that
solvers of cone programs need, which torch hands over to it on a CPU. Arithmetic, comparison, `abs`, `@`,
`.mT`, `.shape`, `.dtype` and basic slicing are used directly; `Ops` lists all that the frameworks name
differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

Array = Any

NO_SECOND_DERIVATIVE = (
    "this gradient has no derivative of its own; use gradient='exact' or 'smoothed' of an optimisation "
    "layer, adjoint=Discrete() and order=2 of a differential equation"
)


class Leaf(Protocol):
    """A computation that is never differentiated: a solver, and the shapes of what it returns.

    Leaves are frozen dataclasses of numbers, strings, functions, tuples and further such dataclasses; equal
    leaves compute the same function. An input may carry one batch axis in front of its own `input_ndims`
    axes; the others are shared by the batch.
    """

    @property
    def in_numpy(self) -> bool:
        """Whether on a CPU it takes NumPy arrays: faster where many operations are small, and rows long."""
        ...

    @property
    def input_ndims(self) -> tuple[int, ...]:
        """Number of axes of each input without its batch axis; the last inputs may be left out."""
        ...

    def output_shapes(self, shapes: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], str]]:
        """Shape and kind ("float", "int") of each output, for inputs of these shapes.

        Every output has the batch axis in front, of size 1 if no input has one.
        """
        ...

    def __call__(self, ops: Ops, *inputs: Array) -> list[Array]: ...


class Ops(Protocol):
    """What a framework provides. `like` is any array whose device and dtype are to be taken over."""

    inf: float
    nan: float

    def constant(self, values: np.ndarray, like: Array) -> Array:
        """`values` on the device of `like`: floats in the dtype of `like`, integers as int64 or int32."""
        ...

    def full(self, shape: Sequence[int], value: float, like: Array) -> Array: ...
    def eye(self, n: int, like: Array) -> Array: ...
    def eps(self, x: Array) -> float:
        """Spacing of 1 in the dtype of `x`."""
        ...

    def widest(self, x: Array) -> Array:
        """`x` in float64 where the device and the framework's settings allow it, else unchanged."""
        ...

    def cast(self, x: Array, like: Array) -> Array:
        """`x` in the dtype of the real `like`, or its complex counterpart where `x` is complex."""
        ...

    def to_int(self, x: Array) -> Array: ...
    def where(self, condition: Array, x: Array, y: Array | float) -> Array: ...
    def maximum(self, x: Array, y: Array | float) -> Array: ...
    def minimum(self, x: Array, y: Array | float) -> Array: ...
    def sqrt(self, x: Array) -> Array: ...
    def exp(self, x: Array) -> Array: ...
    def log(self, x: Array) -> Array: ...
    def sin(self, x: Array) -> Array: ...
    def cos(self, x: Array) -> Array: ...
    def arctan2(self, y: Array, x: Array) -> Array: ...
    def real(self, x: Array) -> Array: ...
    def imag(self, x: Array) -> Array: ...
    def complex_number(self, real: Array, imag: Array) -> Array: ...
    def isfinite(self, x: Array) -> Array: ...
    def sum(self, x: Array, axis: int, keepdims: bool = False) -> Array: ...
    def norm(self, x: Array) -> Array:
        """Euclidean norm along the last axis."""
        ...

    def multiply_add(self, x: Array, y: Array, z: Array) -> Array:
        """x + y * z, in one pass over memory."""
        ...

    def amax(self, x: Array, axis: int, keepdims: bool = False) -> Array:
        """Largest entry along `axis`; zero where the axis is empty (used for norms)."""
        ...

    def any(self, x: Array, axis: int | None = None) -> Array: ...
    def all(self, x: Array, axis: int | None = None) -> Array: ...
    def concat(self, arrays: Sequence[Array], axis: int) -> Array: ...
    def stack(self, arrays: Sequence[Array], axis: int) -> Array: ...
    def reshape(self, x: Array, shape: Sequence[int]) -> Array: ...
    def broadcast_to(self, x: Array, shape: Sequence[int]) -> Array: ...
    def moveaxis(self, x: Array, source: int, destination: int) -> Array: ...
    def put(self, x: Array, index: int | Array, value: Array) -> Array:
        """`x` with `value` as entry `index` of its first axis; `x` itself may be overwritten."""
        ...

    def take(self, x: Array, indices: Array, axis: int = -1) -> Array:
        """Entries of one axis, the last one by default."""
        ...

    def argsort(self, x: Array) -> Array:
        """Indices that sort the last axis, ascending; equal entries keep their order."""
        ...

    def scatter_add(self, values: Array, indices: Array, size: int, start: Array | None = None) -> Array:
        """Sum of `values` (..., k) into a last axis of length `size`, entry j at `indices[j]`.

        Each row is added to `start`, (size,) or (..., size), or to zeros.
        """
        ...

    def diagonal(self, x: Array) -> Array:
        """The diagonals (..., n) of matrices (..., n, n)."""
        ...

    def add_diagonal(self, x: Array, values: Any) -> Array:
        """`x` plus diagonal matrices, `values` a number or (..., n). torch writes into `x`, a temporary."""
        ...

    def rows_in_use(self, A: Array, weights: Array) -> tuple[Array, Array]:
        """A (m, n) or (B, m, n) and its `weights` (B, m), or both without rows of weight zero.

        NumPy leaves these out where they are the most, and gives (B, k, n) and (B, k); elsewhere no shape may
        depend on values.
        """
        ...

    def cholesky(self, x: Array) -> Array:
        """Lower factor of each matrix; NaN throughout where it is not positive definite."""
        ...

    def cholesky_solve(self, factor: Array, rhs: Array) -> Array:
        """Solve L L' X = rhs for lower factors (..., n, n) and `rhs` (..., n, k)."""
        ...

    def inverse_triangular(self, factor: Array) -> Array:
        """Inverse of lower triangular matrices (..., n, n)."""
        ...

    def lu_factor(self, x: Array) -> tuple[Array, Array]: ...
    def lu_solve(self, factor: tuple[Array, Array], rhs: Array, transpose: bool = False) -> Array: ...
    def eigh(self, x: Array) -> tuple[Array, Array]:
        """Ascending eigenvalues and eigenvectors of the lower triangles; NaN for matrices not finite."""
        ...

    def while_loop(self, condition: Callable, body: Callable, state: Any) -> Any:
        """Repeat `state = body(state)` while `condition(state)`, a scalar; `state` is a tuple of arrays."""
        ...

    def repeat(self, count: int, body: Callable, state: Any) -> Any:
        """`state = body(state)`, `count` times."""
        ...

    def repeat_while(self, count: int, needed: Callable, body: Callable, state: Any) -> Any:
        """As `repeat`, for a `body` that leaves alone what `needed(state)`, a mask, does not name.

        It ends when that names nothing, but where the host would have to wait for a device to tell.
        """
        ...

    def cond(self, condition: Array, true: Callable, false: Callable, *operands: Any) -> Any:
        """`true(*operands)` or `false(*operands)`; both return the same structure."""
        ...

    def on_rows(
        self,
        mask: Array,
        function: Callable[[Sequence[Array], Any], Any],
        data: Sequence[Array],
        ndims: Sequence[int],
        state: Any,
    ) -> Any:
        """`function(data, state)` if any of the `mask` (B,) holds, else `state`.

        The state is a tree of arrays (B, ...), or (1, ...) for what the batch shares.

        The function treats rows by themselves and leaves those outside the mask alone, which may be left out.

        Args:
            ndims: numbers of axes of the data; one axis more, in front, is the batch, of length B or 1.
        """
        ...

    def repeat_on_rows(
        self, needed: Callable, function: Callable, data: Sequence[Array], ndims: Sequence[int], state: Any
    ) -> Any:
        """`state = function(k, data, state)` for k = 1, 2, ... while any row of `needed(state)` (B,) holds.

        As with `on_rows`, rows that are not needed stay as they are, from then on, and may be left out. All
        of the state is batched.
        """
        ...

    def in_blocks(
        self, function: Callable, arrays: Sequence[Array], ndims: Sequence[int], size: int
    ) -> list[Array]:
        """`function(*arrays)` for a batch, on a CPU in blocks of rows that its caches can hold, side by side.

        Arrays with more axes than `ndims` have a row for each problem; its largest array is a matrix of
        `size` numbers. Where matrices are shared, blocks are long, since each repeats the work on these.
        """
        ...

    def holds(self, condition: Array) -> bool:
        """Whether `condition`, a scalar, is known to hold, and not only traced or mapped."""
        ...

    def remembered(self, function: Callable, settings: tuple, *arrays: Array) -> Any:
        """`function(*settings, *arrays)`; on the host as it was computed before, if for equal arguments.

        For what a batch shares and takes long. The settings are hashable, the arrays in the result not to be
        written to.
        """
        ...

    def solve_small(
        self, inputs: Sequence[Array], settings: Sequence[float], counts: Sequence[int]
    ) -> list[Array] | None:
        """Solutions of small quadratic programs by one kernel; None where there is none for these inputs.

        See `optlayers.ops.torch.fused.solve`.
        """
        ...

    def cond_or_both(self, condition: Array, both: Callable, false: Callable, operand: Any) -> Any:
        """`false(operand)` where `condition` is known to be false, or at run time; else `both(operand)`.

        Differentiable; `both` covers either case.
        """
        ...

    def stop_gradient(self, x: Array) -> Array: ...
    def on_host(self, function: Callable, *arrays: Array) -> None:
        """`function` of the arrays as NumPy arrays, now, or never where they are only traced."""
        ...

    def call_host(
        self, function: Callable, shapes: Sequence[Sequence[int]], active: Array, *arrays: Array
    ) -> list[Array]:
        """`function` of NumPy arrays, its results (float arrays of these shapes) back on the device.

        Args:
            active: which problems matter; under a vectorising map all arrays get its axes in front as well.
        """
        ...

    def run_on_host(self, function: Callable, shapes: Sequence[Sequence[int]], *arrays: Array) -> list[Array]:
        """As `call_host`, but not of a leaf: without derivatives, and what is not mapped is not copied.

        Under a vectorising map the function may get further axes in front, of equal length or of length 1.
        """
        ...

    def call_detached(self, function: Callable, *args: Any) -> Array:
        """`function(*args)` with no derivative with respect to anything."""
        ...

    def increment(self, solve: Callable[..., Array], r: Array, *frozen: Array) -> Array:
        """Zero, whose derivative in r is a linear map: solve(r, False, *frozen) of a tangent.

        Nothing is computed before a derivative is. All modes nest to any order; `frozen` are constants.

        Args:
            solve: (r, transposed, *frozen) to a linear map of r, or to its transpose. With `frozen` it has
                all arrays that it needs.
        """
        ...

    def implied(
        self, residual: Callable[[Array], Array], solve: Callable[[Array], Array], root: Array, order: int
    ) -> Array:
        """The detached `root`, with its derivatives up to `order`; for the arguments see `attach`."""
        ...

    def jacobian(self, function: Callable, x: Array) -> Array:
        """Jacobians (B, k, k) of a map of (B, ...) to itself that treats each row of the batch by itself.

        They have no derivatives themselves.
        """
        ...

    def surrogate_gradient(
        self, values: Sequence[Array], inputs: Sequence[Array], backward: Callable
    ) -> Sequence[Array]:
        """`values`, with `backward(values, inputs, cotangents)` as the cotangents of `inputs`.

        Reverse mode and first order only: other derivatives raise.
        """
        ...

    def leaf(self, solve: Leaf, inputs: Sequence[Array]) -> list[Array]:
        """Outputs of `solve` on detached inputs, opaque to every transformation of the framework."""
        ...

    def deferred(
        self,
        function: Callable,
        order: int,
        values: Sequence[Array],
        inputs: Sequence[Array],
        constants: Sequence[Array],
        adjoint: Callable | None = None,
    ) -> Sequence[Array]:
        """`function(order, inputs, constants)`, known to be `values`, with derivatives in the inputs.

        These are right up to `order`. Where torch records for its backward pass, the function is called
        there, or, if the result is not to be differentiated further, with order 1, or else `adjoint(ops,
        needed, inputs, constants, cotangents)`: the cotangents of those of the inputs that are needed.
        """
        ...

    def guard(self, x: Array, order: int, message: str) -> Array:
        """`x` itself; its derivatives beyond `order` raise NotImplementedError with `message`."""
        ...


class MatrixFreeOps(Ops, Protocol):
    """What layers need besides `Ops` whose linear equations are solved without a matrix."""

    def tree_flatten(self, tree: Any) -> tuple[list[Array], Callable[[Sequence[Array]], Any]]:
        """The arrays in nested containers, and the function that puts others in their places."""
        ...

    def put_row(self, rows: Array, index: Any, row: Array) -> Array:
        """`rows` (B, m, k) with `row` (B, k) at `index` of axis 1; `rows` themselves may be overwritten."""
        ...

    def leading(self, rows: Array, count: Any) -> Array:
        """The first `count` rows of (B, m, k), or more of them where shapes cannot depend on values."""
        ...

    def any_mapped(self, mask: Array) -> Array:
        """Whether any entry holds, under a vectorising map in any of its calls: for `while_loop`."""
        ...

    def frozen(self, function: Callable[[Array], Array], x: Array) -> Callable[[Array], Array]:
        """`function` of arrays like `x` with no derivative, neither in x nor in what it closes over."""
        ...

    def tangent_map(self, function: Callable[[Array], Array], x: Array) -> Callable[[Array], Array]:
        """The map dx to (d function / dx at the detached x) dx, of a frozen function."""
        ...

    def pullback(self, function: Callable[[Array], Array], x: Array) -> Callable[[Array], Array]:
        """The map v to (d function / dx at the detached x)' v, differentiable in all but x."""
        ...

    def recorded_at(self, function: Callable[[Array], Array], x: Array) -> Callable[[Array], Array]:
        """`function`, of which torch keeps one graph at `x`, for its value and for `solve_increment`."""
        ...

    def solve_increment(
        self,
        function: Callable[[Array], Array],
        x: Array,
        solve: Callable[..., Array],
        r: Array,
        *constants: Array,
    ) -> Array:
        """Zero, whose derivative in r is a solution with J = d function / dx at the detached `x`.

        Neither J nor `solve` is differentiated; reverse mode solves with the transpose of J, and all modes
        nest to any order.

        Args:
            solve: (J, r, *constants) to a linear map of r such as (I - J)^-1 r, by any algorithm. J, given as
                a function, or its transpose make the map or its transpose.
            constants: arrays that `solve` uses besides; it may close over no others.
        """
        ...

    def take_rows(self, x: Array, rows: Array) -> Array:
        """x[b, rows[b, i]], for x (B, n, ...) and rows (B, m)."""
        ...

    def put_rows(self, x: Array, rows: Array, values: Array) -> Array:
        """`x` with x[b, rows[b, i]] = values[b, i]; where nothing is recorded, `x` itself is overwritten."""
        ...

    def rows(self, like: Array, limit: int) -> Array:
        """Room for rows like those of `like` (B, ...), put at 0, 1, ... < limit: an array (B, n, ...)."""
        ...

    def grown(self, x: Array, k: Any) -> Array:
        """`x`, made by `rows`, with room for row k of each sample."""
        ...

    def weighted_sum(self, weights: Sequence[float], arrays: Sequence[Array], start: Any = None) -> Array:
        """The sum of weights times arrays, added to `start` if there is one."""
        ...

    def largest(self, x: Array) -> Any:
        """The largest of the integers x, under a vectorising map in any of its calls: for `repeat`."""
        ...

    def is_constant(self, x: Array) -> bool:
        """Whether it is known that no derivative in x will be asked for."""
        ...

    def has_tape(self) -> bool:
        """Whether what is computed now is recorded for derivatives in reverse mode, and for no others."""
        ...

    def bounded_repeat(self, count: Any, limit: int, body: Callable, state: Any) -> Any:
        """As `repeat` with a count of at most `limit`, and differentiable in every mode."""
        ...

    def explicit(
        self, functions: Sequence[Callable], examples: Sequence[Sequence[Array]]
    ) -> tuple[list[Callable], list[Array]]:
        """Functions (*arguments, theta), and the arrays theta that they close over and may be differentiated
        in.

        Args:
            functions: functions of arrays.
            examples: arguments of each.
        """
        ...

    def vjp(self, function: Callable, x: Array, live: Sequence[Array]) -> tuple[Any, Callable]:
        """`function(x, live)`, a tuple of arrays, and its transposed derivative.

        That maps the cotangents to those of x and, as a list with None for whom nothing depends on, of live.
        """
        ...

    def replayed(
        self, values: Sequence[Array], replay: Callable, sweep: Callable, inputs: Sequence[Array]
    ) -> Sequence[Array]:
        """`values`, known to be `replay(inputs)`, with its first derivatives.

        Args:
            replay: need not be differentiable in reverse mode.
            sweep: (inputs, cotangents of the values) to the cotangents of the inputs.
        """
        ...

    def reported(self, x: Array, failed: Array, function: Callable, *arrays: Array) -> Array:
        """`x`, of which the rows `failed` are wrong: `function` of NumPy values tells the user.

        Where arrays are only traced nothing can be told, and the rows are NaN.
        """
        ...


def select(ops: Ops, mask: Array, x: Any, y: Any) -> Any:
    """Per problem, `x` where `mask` (B,) and `y` elsewhere, for two equal trees of arrays (B, ...)."""
    if isinstance(x, tuple):
        parts = (select(ops, mask, a, b) for a, b in zip(x, y, strict=True))
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if x is y:  # as what no step has touched
        return x
    return ops.where(ops.reshape(mask, (-1,) + (1,) * (x.ndim - 1)), x, y)
