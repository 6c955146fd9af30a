"""How accurate solutions and gradients are, for every family of the tests, in double and single precision.

    python benchmarks/accuracy.py [--framework torch|jax] [--output docs/accuracy.md]

For each family a batch of problems is solved and differentiated. The columns are, the worst of the batch:

    solved      problems with status SOLVED
    KKT         largest violation of an optimality condition, relative to the data, computed in NumPy
    solution    difference from Clarabel, which is itself right to about 1e-6
    gradient    against central differences of solutions for eps = 1e-12, each parameter by itself
    float32     differences of outputs and of gradients from those in double precision, relative
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

import cvxpy as cp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from report import table, write_section  # noqa: E402

from certificates import program_data, residuals  # noqa: E402
from checks import direction_of, inner  # noqa: E402
from cone_problems import CONE_FAMILIES  # noqa: E402
from frontends import FRONTENDS  # noqa: E402
from problems import FAMILIES, lane  # noqa: E402

BATCH, STEP = 8, 1e-5
TITLE = f"""# Accuracy

{BATCH} problems a family, the worst of them. KKT: violation of the optimality conditions. Solution:
difference from Clarabel, which is itself right to about 1e-6 on curved cones. Gradient: difference from
central differences. float32: differences from double precision. All relative.
"""
HEADER = ("family", "solved", "KKT", "solution", "gradient", "float32 solution", "float32 gradient")


def measure(frontend, name, family):
    """One row of the table."""
    rng = np.random.default_rng(1)
    gp = getattr(family, "gp", False)
    make = partial(frontend.CvxpyLayer, family.problem, family.parameters, family.variables, gp=gp)
    layer, exact = make(on_failure="ignore"), make(on_failure="ignore", solver_args={"eps": 1e-12})
    values = family.batch(rng, BATCH)
    cotangents = [_normal(rng, (BATCH, *v.shape), v.is_complex()) for v in family.variables]
    outputs, gradients = frontend.differentiable(layer)(values, cotangents)
    solution = layer.solve(*map(frontend.array, values))
    solved = int((frontend.numpy(solution.status) == 0).sum())
    kkt = _certify(frontend, layer, family, values, solution)
    error = _difference_from_clarabel(family, values, outputs, gp)
    derivative = 0.0
    for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        direction = direction_of(rng, family.parameters[i], value)
        moved = [
            exact(*(frontend.array(v + h * direction if i == j else v) for j, v in enumerate(values)))
            for h in (STEP, -STEP)
        ]
        ahead, behind = ([frontend.numpy(x) for x in xs] for xs in moved)
        parts = zip(cotangents, ahead, behind, strict=True)
        expected = sum(inner(c, a - b) for c, a, b in parts) / (2 * STEP)
        if gradient.ndim == family.parameters[i].ndim:
            actual, expected = inner(gradient[None], direction[None]), expected.sum()[None]
        else:
            actual = inner(gradient, direction)
        derivative = max(derivative, np.abs(actual - expected).max() / (np.abs(expected).max() + 1e-2))
    single = frontend.differentiable(layer, "float32")(values, cotangents)
    single = [_difference(*pair) for pair in zip(single, (outputs, gradients), strict=True)]
    return name, f"{solved}/{BATCH}", *(f"{x:.0e}" for x in (kkt, error, derivative, *single))


def _normal(rng, shape, is_complex):
    value = rng.standard_normal(shape)
    return value + 1j * rng.standard_normal(shape) if is_complex else value


def _certify(frontend, layer, family, values, solution):
    x, s, y = (frontend.numpy(z) for z in (solution.x, solution.s, solution.y))
    program = layer._program.program
    lanes = (program_data(program, lane(values, family.parameters, i)) for i in range(BATCH))
    return max(max(residuals(program.cones, data, x[i], s[i], y[i])) for i, data in enumerate(lanes))


def _difference_from_clarabel(family, values, outputs, gp):
    tolerances, worst = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-11), 0.0
    for i in range(BATCH):
        for parameter, value in zip(family.parameters, lane(values, family.parameters, i), strict=True):
            parameter.value = value
        family.problem.solve(solver=cp.CLARABEL, gp=gp, **tolerances)
        # The multipliers of redundant rows are not unique, and not compared.
        for variable, output in zip(family.variables, outputs, strict=True):
            worst = max(worst, _difference([output[i]], [variable.value]))
    return worst


def _difference(actual, expected):
    """Largest difference, relative to the largest expected entry or to 1, of two lists of arrays."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(actual, expected, strict=True)]
    return max(np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in pairs if b.size)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--framework", choices=FRONTENDS, default="torch")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "accuracy.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Clarabel reports that it has not reached 1e-11
    frontend = FRONTENDS[options.framework]()
    if options.framework == "jax":
        frontend.framework.config.update("jax_enable_x64", True)
    rows = [HEADER]
    for name, build in (FAMILIES | CONE_FAMILIES).items():
        rows.append(measure(frontend, name, build()))
        print(*rows[-1], sep="\t", flush=True)
        packages = ("numpy", "cvxpy", "clarabel")
        write_section(options.output, TITLE, "accuracy.py", options.framework, table(rows), packages)


if __name__ == "__main__":
    main()
