"""How many hard quadratic programs each solver solves to 1e-3, 1e-6 and 1e-9.

    python benchmarks/hard_qps.py [--full] [--mat FOLDER] [--solvers OptLayers OSQP ...] [--output FILE]

The problems are those of `tests/qp_families.py`, by default with up to 100 variables, with --full up
to 1,000; or public ones: --mat takes a folder of .mat files as the sources of PIQP hold them (P, c, A, b, G,
h_l, h_u, x_l, x_u), for example those of Maros and Meszaros (1999) or of Netlib, up to --largest variables.

A solver is judged by the x and y that it returns, whatever it says of them: unscaled primal residual, dual
residual and duality gap, each relative as in `qp_families.residuals`. It may try a tolerance of 1e-9 and one
of 1e-11, and the better of its two answers counts. Solvers that are not installed are left out.
"""

import argparse
import datetime
import importlib.metadata
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import scipy.io
import scipy.sparse as sp

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from qp_families import FULL_SIZES, INFINITY, QP, SIZES, problems, residuals  # noqa: E402

TOLERANCES = 1e-9, 1e-11
LEVELS = 1e-3, 1e-6, 1e-9


def optlayers(qp, eps):
    import torch

    from optlayers.torch import InteriorPoint, solve_qp

    torch.set_num_threads(1)
    q, A, lo, hi = map(torch.as_tensor, qp[1:])
    P = torch.as_tensor(qp.P) if qp.P.any() else None
    with torch.no_grad():
        solution = solve_qp(P, q, A, lo, hi, solver=InteriorPoint(), eps=eps, on_failure="ignore")
    return solution.x.numpy(), solution.y.numpy()


def osqp(qp, eps):
    import osqp

    solver = osqp.OSQP()
    settings = {"verbose": False, "polishing": True, "max_iter": 10_000, "eps_abs": eps, "eps_rel": eps}
    solver.setup(sp.triu(qp.P, format="csc"), qp.q, sp.csc_matrix(qp.A), qp.lo, qp.hi, **settings)
    result = solver.solve(raise_error=False)
    return result.x, result.y


def clarabel(qp, eps):
    import clarabel

    equal = qp.lo == qp.hi
    high, low = np.isfinite(qp.hi) & ~equal, np.isfinite(qp.lo) & ~equal
    rows = np.vstack([qp.A[equal], qp.A[high], -qp.A[low]])
    rhs = np.concatenate([qp.hi[equal], qp.hi[high], -qp.lo[low]])
    cones = [clarabel.ZeroConeT(int(equal.sum())), clarabel.NonnegativeConeT(int(high.sum() + low.sum()))]
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads = False, 1
    settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = eps
    P, A = sp.triu(qp.P, format="csc"), sp.csc_matrix(rows)
    result = clarabel.DefaultSolver(P, qp.q, A, rhs, cones, settings).solve()
    y_equal, y_high, y_low = np.split(np.array(result.z), np.cumsum([equal.sum(), high.sum()]))
    y = np.zeros(equal.size)
    y[equal], y[high] = y_equal, y_high
    y[low] -= y_low
    return np.array(result.x), y


def piqp(qp, eps):
    import piqp

    equal = qp.lo == qp.hi
    rest = ~equal & (np.isfinite(qp.lo) | np.isfinite(qp.hi))
    solver = piqp.SparseSolver()
    for name in ("eps_abs", "eps_rel", "eps_duality_gap_abs", "eps_duality_gap_rel"):
        setattr(solver.settings, name, eps)
    P, A, G = (sp.csc_matrix(M) for M in (qp.P, qp.A[equal], qp.A[rest]))
    solver.setup(P, qp.q, A, qp.lo[equal], G, qp.lo[rest], qp.hi[rest])
    solver.solve()
    y = np.zeros(equal.size)
    y[equal], y[rest] = solver.result.y, np.asarray(solver.result.z_u) - np.asarray(solver.result.z_l)
    return np.array(solver.result.x), y


def proxqp(qp, eps):
    import proxsuite

    equal = qp.lo == qp.hi
    rest = ~equal
    solver = proxsuite.proxqp.dense.QP(qp.q.size, int(equal.sum()), int(rest.sum()))
    solver.settings.check_duality_gap = True
    for name in ("eps_abs", "eps_rel", "eps_duality_gap_abs", "eps_duality_gap_rel"):
        setattr(solver.settings, name, eps)
    lo, hi = np.maximum(qp.lo, -1e30), np.minimum(qp.hi, 1e30)
    solver.init(qp.P, qp.q, qp.A[equal], lo[equal], qp.A[rest], lo[rest], hi[rest])
    solver.solve()
    y = np.zeros(equal.size)
    y[equal], y[rest] = solver.results.y, solver.results.z
    return np.array(solver.results.x), y


SOLVERS = {
    "OptLayers": (optlayers, "torch"),
    "Clarabel": (clarabel, "clarabel"),
    "PIQP": (piqp, "piqp"),
    "ProxQP": (proxqp, "proxsuite"),
    "OSQP": (osqp, "osqp"),
}


def public(folder: Path, largest: int):
    """Named problems from .mat files, bounds on variables as further rows."""
    for path in sorted(folder.glob("*.mat")):
        data = scipy.io.loadmat(path)
        q, x_lo, x_hi = (np.asarray(data[name], float).ravel() for name in ("c", "x_l", "x_u"))
        if q.size > largest or data["A"].shape[0] + data["G"].shape[0] > 2 * largest:
            continue
        P = sp.csc_matrix(data["P"]).toarray() if "P" in data else np.zeros((q.size, q.size))
        bounded = (x_lo > -INFINITY) | (x_hi < INFINITY)
        A = sp.vstack([sp.csc_matrix(data["A"]), sp.csc_matrix(data["G"]), sp.eye(q.size).tocsc()[bounded]])
        b, h_lo, h_hi = (np.asarray(data[name], float).ravel() for name in ("b", "h_l", "h_u"))
        lo, hi = np.concatenate([b, h_lo, x_lo[bounded]]), np.concatenate([b, h_hi, x_hi[bounded]])
        lo, hi = np.where(lo <= -INFINITY, -np.inf, lo), np.where(hi >= INFINITY, np.inf, hi)
        if np.linalg.eigvalsh(P)[0] >= -1e-8 * (1 + abs(P).max()):  # VALUES is not convex
            yield path.stem, QP((P + P.T) / 2, q, A.toarray(), lo, hi)


def measure(solver, named):
    """Worst residual of the better answer for each problem, and seconds a solve in the mean."""
    worst, seconds = [], 0.0
    for name, qp in named:
        best, where = np.full(3, np.inf), ""
        for eps in TOLERANCES:
            start = time.perf_counter()
            try:
                found = residuals(qp, *solver(qp, eps))
            except Exception as error:  # a solver that gives up by raising has not solved the problem
                found, where = np.full(3, np.inf), repr(error)[:80]
            seconds += time.perf_counter() - start
            best = min(best, found, key=np.max)
        worst.append(best.max())
        if best.max() > LEVELS[-1]:
            print(
                f"  {name}: primal {best[0]:.0e}, dual {best[1]:.0e}, gap {best[2]:.0e} {where}", flush=True
            )
    return np.array(worst), seconds / max(len(TOLERANCES) * len(named), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--mat", type=Path)
    parser.add_argument("--largest", type=int, default=400)
    parser.add_argument("--solvers", nargs="*", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.mat:
        named = list(public(options.mat, options.largest))
    else:
        named = list(problems(FULL_SIZES if options.full else SIZES))
    versions, rows = [f"numpy {np.__version__}"], []
    for name in options.solvers:
        solver, package = SOLVERS[name]
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
            continue
        print(name, flush=True)
        worst, seconds = measure(solver, named)
        rows.append([name, *(str(int((worst <= level).sum())) for level in LEVELS), f"{1e3 * seconds:.1f}"])
    source = options.mat.name if options.mat else "tests/qp_families.py"
    header = ["solved to", *(f"{level:.0e}" for level in LEVELS), "ms a solve, batch of one"]
    lines = [
        "# Hard quadratic programs",
        "",
        f"Written by `benchmarks/hard_qps.py{' --full' * options.full}`. A problem counts if the unscaled",
        "primal residual, dual residual and duality gap of the returned x and y, each relative, are below",
        "the level.",
        "",
        f"{len(named)} problems of {source}, {datetime.date.today()}, {', '.join(versions)}, one thread.",
        "",
        *("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)),
    ]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
