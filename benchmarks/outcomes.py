"""What becomes of infeasible, unbounded, non-finite, empty, enormous and tiny problems: docs/outcomes.md.

    python benchmarks/outcomes.py [--output docs/outcomes.md]

Each situation is put into one lane of a batch of three; a cell is the status of that lane. The script stops
if the two other lanes are not solved as they are without it, to the last bit.
"""

import argparse
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402

from frontends import FRONTENDS  # noqa: E402
from optlayers.status import from_code  # noqa: E402
from outcome_problems import KINDS  # noqa: E402

BAD, GOOD = 1, [0, 2]


def scaled(kind, which, factor):
    values = [value.copy() for value in kind.good]
    values[which][BAD] *= factor
    return values


def with_entry(kind, entry):
    values = [value.copy() for value in kind.good]
    values[kind.costs][BAD].flat[0] = entry
    return values


SITUATIONS = {
    "no feasible point": lambda kind: (kind.with_lane(kind.infeasible, BAD), {}),
    "objective unbounded": lambda kind: (kind.with_lane(kind.unbounded, BAD), {}),
    "NaN in the data": lambda kind: (with_entry(kind, np.nan), {}),
    "infinity in the data": lambda kind: (with_entry(kind, np.inf), {}),
    "costs times 1e8": lambda kind: (scaled(kind, kind.costs, 1e8), {}),
    "costs times 1e-8": lambda kind: (scaled(kind, kind.costs, 1e-8), {}),
    "sizes times 1e8": lambda kind: (scaled(kind, kind.sizes, 1e8), {}),
    "sizes times 1e-8": lambda kind: (scaled(kind, kind.sizes, 1e-8), {}),
    "all costs zero": lambda kind: (scaled(kind, kind.costs, 0.0), {}),
    "a limit of one iteration, no refinement": lambda kind: (
        kind.good,
        {"solver": "ADMM", "solver_args": {"max_iter": 1, "check_every": 1, "refine": 0}},
    ),
}


def outcome(frontend, kind, situation):
    """Name of the status of the changed lane."""
    values, options = SITUATIONS[situation](kind)
    layer = kind.layer(frontend, on_failure="ignore", **options)
    good, solution = (layer.solve(*map(frontend.array, v)) for v in (kind.good, values))
    for a, b in zip((good.x, good.y), (solution.x, solution.y), strict=True):
        if not np.array_equal(frontend.numpy(a)[GOOD], frontend.numpy(b)[GOOD]):
            raise AssertionError(f"{situation}: the other lanes are changed")
    return from_code(int(solution.status[BAD])).name


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "outcomes.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    frontend = FRONTENDS["torch"]()
    kinds = {name.upper(): build() for name, build in KINDS.items()}
    rows = [[name, *(outcome(frontend, kind, name) for kind in kinds.values())] for name in SITUATIONS]
    header = ["one lane of three has", *kinds]
    lines = [
        "# Outcomes",
        "",
        "Written by `benchmarks/outcomes.py`: the `Status` of a problem in a batch. The other problems",
        "of the batch keep their solutions to the last bit. An empty batch has an empty solution.",
        "A `P` with a negative eigenvalue is `NON_CONVEX`, bounds `l > u` are `PRIMAL_INFEASIBLE`, values of",
        "a sign that their parameter was declared not to have (`nonneg=True`) count as not finite.",
        "",
        *("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)),
        "",
        "| `on_failure` | value of a problem that was not solved | its gradient |",
        "| --- | --- | --- |",
        '| `"raise"` (default; inside a JAX trace as `"nan"`) | `SolveError` names the problems and why | |',
        '| `"nan"` | NaN | zero |',
        '| `"mask"` | the last iterate | zero |',
        '| `"ignore"` | the last iterate | as if it were the solution |',
    ]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
