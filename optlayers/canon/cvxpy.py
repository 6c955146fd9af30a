"""A CVXPY problem as a `Program`: sparse affine maps from the user's parameters to P, q, A, b.

CVXPY's own parameters are pieces of the user's (one triangle of a symmetric matrix, a logarithm, a real
part), in column-major order, and its variables likewise. How the pieces, and the solution, map to what the
user knows is not worked out again here: numbered arrays are sent through CVXPY's reductions, and what
comes out tells the entries, their signs and their scale.

Symbols: n variables and m rows of the cone program, k entries of CVXPY's parameters, p of theta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.version import version as cvxpy_version

from .checks import check, text
from .program import AffineMap, Block, Output, Program
from .reduction import Reduction, cones, pieces, recover_dual, recover_primal, reduce


def canonicalize(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    variables: Sequence[cp.Variable],
    gp: bool = False,
    canon_backend: str | None = None,
) -> Program:
    """Returns `problem` as a program whose data are affine in the user's parameters.

    theta holds each parameter in full size and row-major, in the order given: its value ("real", and
    "imag" if complex), or its logarithm ("log") where a geometric program takes that. A part that the data
    do not depend on has no block. A symmetric or Hermitian parameter enters by the mean of each entry and
    its mirror image, so that its gradient has the same symmetry.

    The problem is not altered, and the values of its parameters and variables are not used.

    Args:
        problem: a DCP and DPP problem, or a DGP and DPP one with `gp`. quad_form(x, P) with a parameter P
            is possible as a term of the objective.
        parameters: all its parameters, in any order.
        variables: what the layer returns: variables of the problem, or dual variables of its constraints
            (`constraint.dual_variables[i]`), as `problem.solve` would leave them.
        gp: whether to read the problem as a geometric program.
        canon_backend: CVXPY's canonicalization backend; None takes one by the size of the parameters.

    Raises:
        ValueError: the problem or a list cannot be used; the message says what is wrong and what to do.
    """
    check(problem, parameters, variables, gp)
    reduction = reduce(problem, gp, canon_backend)
    blocks, theta = _theta(reduction, parameters)
    blocks, (P, q, A, b) = _drop_unused(blocks, _data(reduction, theta))
    _refuse_nonfinite(P, q, A, b)
    return Program(cones(reduction), P, q, A, b, blocks, _outputs(reduction, variables, gp))


def _theta(
    reduction: Reduction, parameters: Sequence[cp.Parameter]
) -> tuple[tuple[Block, ...], sp.csr_array]:
    """The blocks of theta, and the matrix (k + 1, p + 1) from (theta, 1) to (CVXPY's parameters, 1)."""
    k = reduction.cone_program.total_param_size
    blocks, entries, start = [], [], 0
    for i, parameter in enumerate(parameters):
        for part, taken in pieces(reduction, parameter):
            rows, cols, coefs = _part_entries(reduction, parameter, part, taken)
            entries.append((rows, start + cols, coefs))
            blocks.append(Block(i, part, start, start + parameter.size))
            start += parameter.size
    entries.append(([k], [start], [1.0]))
    rows, cols, coefs = (np.concatenate(arrays) for arrays in zip(*entries, strict=True))
    theta = sp.csr_array((coefs, (rows, cols)), (k + 1, start + 1))
    if np.any(np.diff(theta.indptr) == 0):
        raise ValueError(
            f"CVXPY {cvxpy_version} made a parameter of which no user's parameter is the source."
        )
    return tuple(blocks), theta


def _part_entries(
    reduction: Reduction, parameter: cp.Parameter, part: str, taken: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nonzeros of one part's columns of the matrix in `_theta`: rows, columns from 0, coefficients."""
    offsets = reduction.cone_program.param_id_to_col
    numbers = {offsets[i]: np.ravel(v, order="F") for i, v in taken.items() if i in offsets}
    rows = np.concatenate([np.zeros(0, np.int64), *(o + np.flatnonzero(v) for o, v in numbers.items())])
    signed = np.concatenate([np.zeros(0), *(v[v != 0] for v in numbers.values())])
    cols, coefs = np.abs(signed).astype(np.int64) - 1, np.sign(signed)
    if not _is_mirrored(parameter):
        return rows, cols, coefs
    mirror = np.arange(parameter.size).reshape(parameter.shape).swapaxes(-1, -2).ravel()
    sign = -1.0 if part == "imag" else 1.0
    return np.tile(rows, 2), np.append(cols, mirror[cols]), np.append(coefs / 2, sign * coefs / 2)


def _is_mirrored(parameter: cp.Parameter) -> bool:
    """Whether an entry of `parameter` is declared to be the conjugate of its mirror image."""
    return any(parameter.attributes[name] for name in ("symmetric", "PSD", "NSD", "hermitian"))


def _data(reduction: Reduction, theta: sp.csr_array) -> tuple[AffineMap, ...]:
    """P, q, A and b as affine maps of theta.

    CVXPY's tensors hold vec([q; d]), vec([A | b]) of A x + b in K, and vec(P) with half of x'Px in the
    objective, where d, a constant of the objective, has no influence on the solution.
    """
    n, m, program = reduction.n, reduction.m, reduction.cone_program
    row, cols, coefs = _entries(program.q)
    is_q = row < n
    q = _affine_map((n,), row[is_q], cols[is_q], coefs[is_q], theta)

    row, cols, coefs = _entries(program.A)
    j, i = np.divmod(row, max(m, 1))
    is_b = j == n
    A = _affine_map((m, n), (i * n + j)[~is_b], cols[~is_b], -coefs[~is_b], theta)
    b = _affine_map((m,), i[is_b], cols[is_b], coefs[is_b], theta)

    # x'Px does not know P from its transpose, but the gradient with respect to P does.
    row, cols, coefs = _entries(sp.coo_array((n * n, theta.shape[0])) if program.P is None else program.P)
    j, i = np.divmod(row, n)
    flat = np.append(i * n + j, j * n + i)
    P = _affine_map((n, n), flat, np.tile(cols, 2), np.tile(coefs / 2, 2), theta)
    return P, q, A, b


def _entries(tensor: sp.sparray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of a sparse tensor; flat positions outgrow CVXPY's 32 bit indices."""
    tensor = sp.coo_array(tensor)
    return tensor.row.astype(np.int64), tensor.col.astype(np.int64), tensor.data


def _affine_map(
    shape: tuple[int, ...], flat: np.ndarray, cols: np.ndarray, coefs: np.ndarray, theta: sp.csr_array
) -> AffineMap:
    """The map that adds `coefs` times CVXPY's parameters `cols` to the flat positions `flat`."""
    positions, row = np.unique(flat, return_inverse=True)
    entries = sp.csr_array((coefs, (row, cols)), (positions.size, theta.shape[0])) @ theta
    entries.eliminate_zeros()
    entries.sort_indices()
    used = np.flatnonzero(np.diff(entries.indptr))
    rows = np.repeat(np.arange(used.size), np.diff(entries.indptr)[used])
    is_constant = entries.indices == theta.shape[1] - 1
    constant = np.zeros(used.size)
    constant[rows[is_constant]] = entries.data[is_constant]
    varying = ~is_constant
    cols = entries.indices[varying].astype(np.int64)
    return AffineMap(shape, positions[used], constant, rows[varying], cols, entries.data[varying])


def _refuse_nonfinite(P: AffineMap, q: AffineMap, A: AffineMap, b: AffineMap) -> None:
    """Refuses constants that are not finite; only b may hold +inf, where a constraint says nothing."""
    bound = b.constant[b.constant != np.inf]
    for place, arrays in {
        "objective": (P.constant, P.coefs, q.constant, q.coefs),
        "constraints": (A.constant, A.coefs, bound, b.coefs),
    }.items():
        if not all(np.isfinite(array).all() for array in arrays):
            raise ValueError(
                f"A constant in the {place} is infinite or not a number: make it finite, or leave out the "
                "term or bound that it is in."
            )


def _drop_unused(
    blocks: tuple[Block, ...], data: tuple[AffineMap, ...]
) -> tuple[tuple[Block, ...], tuple[AffineMap, ...]]:
    """The blocks that the data depend on, and the data with theta reduced to these."""
    is_used = np.zeros(max((block.stop for block in blocks), default=0), dtype=bool)
    for affine_map in data:
        is_used[affine_map.cols] = True
    kept, start, moved = [], 0, np.zeros(is_used.size, dtype=np.int64)
    for block in blocks:
        if is_used[block.start : block.stop].any():
            stop = start + block.stop - block.start
            moved[block.start : block.stop] = np.arange(start, stop)
            kept.append(replace(block, start=start, stop=stop))
            start = stop
    return tuple(kept), tuple(replace(affine_map, cols=moved[affine_map.cols]) for affine_map in data)


def _outputs(reduction: Reduction, variables: Sequence[cp.Variable], gp: bool) -> tuple[Output, ...]:
    """One output per variable, primal or dual."""
    primal_ids = {v.id for v in reduction.problem.variables()}
    primal = [recover_primal(reduction, probe) for probe in _probes(reduction.n)]
    has_dual = any(v.id not in primal_ids for v in variables)
    dual = [recover_dual(reduction, probe) for probe in _probes(reduction.m)] if has_dual else []
    outputs = []
    for variable in variables:
        if variable.id in primal_ids:
            values = [recovered[variable.id] for recovered in primal]
            outputs.append(_output("x", values, _probes(reduction.n), exp=gp))
        elif variable.id in dual[0]:
            values = [recovered[variable.id] for recovered in dual]
            outputs.append(_output("y", values, _probes(reduction.m), exp=False))
        else:
            raise ValueError(_no_dual_message(reduction.problem, variable))
    return tuple(outputs)


def _no_dual_message(problem: cp.Problem, variable: cp.Variable) -> str:
    owner = next(c for c in problem.constraints if variable.id in {v.id for v in c.dual_variables})
    return (
        f"The dual variable {variable} of the {type(owner).__name__} constraint {text(owner)} is not "
        "available: CVXPY does not recover the duals of this constraint (as for complex second-order cones "
        "and approximated cones). Leave it out, or write the constraint in another form."
    )


def _probes(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources that tell which entry an output takes, and times what: see `_selection`."""
    numbers = np.arange(1.0, size + 1)
    return np.ones(size), numbers, np.sqrt(numbers)


def _output(source: str, values: list[np.ndarray], probes: tuple[np.ndarray, ...], exp: bool) -> Output:
    """The output whose values are `values` where the source is each of `probes`."""
    indices, coefs = _selection([np.ravel(np.real(v)) for v in values], probes)
    if not np.iscomplexobj(values[0]):
        return Output(values[0].shape, source, indices, coefs, exp=exp)
    imaginary = _selection([np.ravel(np.imag(v)) for v in values], probes)
    return Output(values[0].shape, source, indices, coefs, *imaginary, exp=exp)


def _selection(values: list[np.ndarray], probes: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Indices and coefficients of `values = coefs * probe[indices]`; an index is -1 where that is zero.

    A source of ones gives the coefficients, and one of 1, 2, ... their products with the indices. The third
    is there to catch an entry that is anything else, as a sum of two.
    """
    coefs = np.asarray(values[0], dtype=float)
    is_zero = coefs == 0
    quotients = values[1] / np.where(is_zero, 1.0, coefs)
    indices = np.where(is_zero, 0, np.rint(quotients)).astype(np.int64) - 1
    expected = np.zeros(coefs.shape)
    expected[~is_zero] = coefs[~is_zero] * probes[2][indices[~is_zero]]
    if not np.allclose(expected, values[2], rtol=1e-9, atol=0.0):
        raise ValueError(f"CVXPY {cvxpy_version} recovers an output that is not an entry of the solution.")
    return indices, coefs
