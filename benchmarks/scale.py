"""How time and memory grow with the batch and with the size of a problem: docs/scale.md and its picture.

    python benchmarks/scale.py [--framework torch|jax] [--largest 1.0] [--output docs/scale.md]

Two sweeps of `CvxpyLayer`, forward and backward, in double precision on one thread: projections on a simplex
in ten variables for batches up to 65,536, and single dense programs whose data all have gradients, of up to
1,000 variables. Each point is a process of its own. Memory is what the first call of this size takes at most
besides what the process held before it. `--largest 0.1` leaves out points beyond a tenth of the largest ones.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import workloads  # noqa: E402
from report import table  # noqa: E402

import layers  # noqa: E402

MAKERS = {"torch": layers.optlayers_torch, "jax": layers.optlayers_jax}
BATCHES = [4**k for k in range(9)]
SIZES = (10, 30, 100, 300, 1000)


def memory_of(call):
    """MB that a call takes at most besides what the process holds before, on Linux."""
    held = lambda key: int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts anew
    before = held("VmRSS:")
    call()
    return held("VmHWM:") - before


def measure(framework, sweep, value):
    """Milliseconds and memory of one point, on standard output."""
    rng = np.random.default_rng(0)

    def workload(value):
        made = (
            workloads.simplex(rng, value)
            if sweep == "batch"
            else workloads.dense_qp(rng, 1, value, value // 2)
        )
        return made[3], MAKERS[framework](*made, rng.standard_normal(made[2].shape))[1]

    workload(2)[1]()
    values, both = workload(value)
    peak = memory_of(both)
    times, start = [], time.perf_counter()
    while len(times) < 3 or (len(times) < 20 and time.perf_counter() - start < 2):
        begin = time.perf_counter()
        both()
        times.append(1e3 * (time.perf_counter() - begin))
    print(json.dumps({"ms": min(times), "MB": peak, "inputs": sum(v.nbytes for v in values) / 2**20}))


def draw(points, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8, 5.5), sharex="col", layout="constrained")
    titles = {"batch": "simplex projections, n = 10", "size": "one dense program, n variables and n rows"}
    for column, (sweep, title) in enumerate(titles.items()):
        x, rows = zip(
            *((value, point) for (kind, value), point in points.items() if kind == sweep), strict=True
        )
        for row, (key, label) in enumerate({"ms": "forward + backward, ms", "MB": "memory, MB"}.items()):
            ax = axes[row, column]
            ax.loglog(x, [point[key] for point in rows], "o-", color="#1f5fa8")
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
            if column == 0:
                ax.set_ylabel(label)
        axes[1, column].loglog(
            x, [point["inputs"] for point in rows], "--", color="0.5", label="the data alone"
        )
        axes[0, column].set_title(title, fontsize=10)
        axes[1, column].set_xlabel({"batch": "batch", "size": "n"}[sweep])
    axes[1, 0].legend(frameon=False)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--framework", choices=MAKERS, default="torch")
    parser.add_argument("--largest", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "scale.md")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        return measure(options.framework, options.point[0], int(options.point[1]))
    points = {}
    for sweep, values in (("batch", BATCHES), ("size", SIZES)):
        for value in values:
            if value > options.largest * values[-1]:
                continue
            command = [
                sys.executable,
                __file__,
                "--framework",
                options.framework,
                "--point",
                sweep,
                str(value),
            ]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            points[sweep, value] = json.loads(output.splitlines()[-1])
            print(sweep, value, points[sweep, value], flush=True)
    picture = options.output.with_name(f"{options.output.stem}.svg")
    draw(points, picture)
    rows = [["sweep", "batch or n", "forward + backward, ms", "memory, MB", "data, MB"]]
    for (sweep, value), point in points.items():
        rows.append(
            [sweep, f"{value:,}", f"{point['ms']:.3g}", f"{point['MB']:.3g}", f"{point['inputs']:.2g}"]
        )
    place = f"{options.framework} on {datetime.date.today()}, {platform.machine()}, one thread"
    lines = ["# Scale", "", __doc__.split("\n\n", 2)[2].strip().rsplit(" `--largest", 1)[0], ""]
    lines += [f"Written by `benchmarks/scale.py`, {place}.", "", f"![Time and memory]({picture.name})", ""]
    options.output.write_text("\n".join([*lines, *table(rows)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
