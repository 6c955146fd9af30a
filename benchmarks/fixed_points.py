"""Time, iterations and accuracy of equilibrium layers beside those of torchdeq, jaxopt and optimistix.

    python benchmarks/fixed_points.py [--framework torch|jax] [--radius 0.9] [--output docs/fixed_points.md]

The cell is z = tanh(W z + U x + b), |W| = radius, 256 numbers a sample, 256 samples, one thread. Each method
is run at several tolerances; the row is that of the loosest one at which the solution and the gradients of W,
U, b and x, of the sum of squares of z, are right to 1e-6 (double precision), relative to a solution at 1e-14.
So times are at equal accuracy. Seconds of the CPU for forward and backward together, the least of some runs.
Memory is the peak of a process of its own above that of its start, at 10 and at 200 iterations.
"""

import argparse
import datetime
import importlib.metadata
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZE, TOLERANCES, TARGET = 256, 10.0 ** -np.arange(4.0, 10.0, 0.5), 1e-6
HEADER = ("method", "time (ms)", "iterations", "tolerance", "error of z", "error of gradients")


def make_data(radius):
    rng = np.random.default_rng(0)
    W, U, x = rng.standard_normal((3, SIZE, SIZE))
    return radius * W / np.linalg.norm(W, 2), U / SIZE**0.5, 0.1 * rng.standard_normal(SIZE), x


def torch_methods(data):
    """Name to a function of the tolerance that returns (z, gradients, iterations)."""
    import torch
    from torchdeq import get_deq

    from optlayers.torch import Anderson, Broyden, Picard, fixed_point

    torch.set_num_threads(1)
    leaves = [torch.tensor(v, requires_grad=True) for v in data]
    W, U, b, x = leaves

    def finish(z, iterations):
        gradients = torch.autograd.grad(z.square().sum(), leaves)
        return z.detach().numpy(), [g.numpy() for g in gradients], int(iterations.max())

    def cell():
        injected = x @ U.T + b
        return lambda z: torch.tanh(z @ W.T + injected)

    def ours(solver):
        def run(tol):
            z, info = fixed_point(
                cell(), torch.zeros_like(x), solver=solver, tol=tol, max_iter=300, return_info=True
            )
            return finish(z, info.iterations)

        return run

    def theirs(name):
        def run(tol):
            options = {f"{way}_{key}": value for way in "fb" for key, value in settings(tol).items()}
            z, info = get_deq(ift=True, **options)(cell(), torch.zeros_like(x))
            return finish(z[-1], info["nstep"])

        settings = lambda tol: {"solver": name, "max_iter": 300, "tol": tol, "stop_mode": "rel"}
        return run

    pairs = {"Picard": Picard(), "Anderson": Anderson(), "Broyden": Broyden()}
    names = {"Picard": "fixed_point_iter", "Anderson": "anderson", "Broyden": "broyden"}
    methods = {}
    for name, solver in pairs.items():
        methods[f"OptLayers, {name}"] = ours(solver)
        methods[f"torchdeq, {name}"] = theirs(names[name])
    return methods


def jax_methods(data):
    """As `torch_methods`; all compiled."""
    import jax
    import jax.numpy as jnp
    import jaxopt
    import optimistix

    from optlayers.jax import Anderson, Picard, fixed_point

    jax.config.update("jax_enable_x64", True)
    data = [jnp.asarray(v) for v in data]

    def cell(z, theta):
        W, U, b, x = theta
        return jnp.tanh(z @ W.T + x @ U.T + b)

    def compiled(solve):
        """`solve` is (theta, tol) to (z, iterations)."""

        def loss(theta, tol):
            z, iterations = solve(theta, tol)
            return (z**2).sum(), (z, iterations)

        call = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)

        def run(tol):
            (_, (z, iterations)), gradients = jax.block_until_ready(call(data, float(tol)))
            return np.asarray(z), [np.asarray(g) for g in gradients], int(np.max(iterations))

        return run

    def ours(solver):
        def solve(theta, tol):
            z, info = fixed_point(
                cell, jnp.zeros_like(theta[3]), theta, solver=solver, tol=tol, max_iter=300, return_info=True
            )
            return z, info.iterations

        return solve

    # jaxopt stops at an absolute residual of the whole batch, whose solutions have a norm of about 150.
    def by_jaxopt(kind, **options):
        def solve(theta, tol):
            solver = kind(cell, tol=150 * tol, maxiter=300, implicit_diff=True, **options)
            z, state = solver.run(jnp.zeros_like(theta[3]), theta)
            return z, state.iter_num

        return solve

    def by_optimistix(theta, tol):
        solver = optimistix.FixedPointIteration(rtol=tol, atol=tol)
        solution = optimistix.fixed_point(cell, solver, jnp.zeros_like(theta[3]), theta, max_steps=300)
        return solution.value, solution.stats["num_steps"]

    return {
        "OptLayers, Picard": compiled(ours(Picard())),
        "optimistix, Picard": compiled(by_optimistix),
        "jaxopt, Picard": compiled(by_jaxopt(jaxopt.FixedPointIteration)),
        "OptLayers, Anderson": compiled(ours(Anderson())),
        "jaxopt, Anderson": compiled(by_jaxopt(jaxopt.AndersonAcceleration, history_size=5)),
    }


def reference(data):
    """z and the gradients of the sum of its squares, in NumPy: iterated, and with a direct adjoint solve."""
    W, U, b, x = data
    z = np.zeros_like(x)
    for _ in range(2000):
        z = np.tanh(z @ W.T + x @ U.T + b)
    slope = 1 - z**2
    w = np.stack([np.linalg.solve(np.eye(SIZE) - W.T * s, 2 * v) for s, v in zip(slope, z, strict=True)])
    w = w * slope
    return z, [w.T @ z, w.T @ x, w.sum(0), w @ U]


def error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def measure(name, method, expected, repeats):
    """The row of the loosest tolerance that is accurate enough."""
    for tol in TOLERANCES:
        z, gradients, iterations = method(tol)
        of_z = error(z, expected[0])
        of_gradients = max(map(error, gradients, expected[1]))
        if max(of_z, of_gradients) <= TARGET:
            break
    else:
        return name, "-", str(iterations), f"{tol:.0e}", f"{of_z:.0e}", f"{of_gradients:.0e}"
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        method(tol)
        seconds.append(time.process_time() - start)
    least = f"{1e3 * min(seconds):.0f}"
    return name, least, str(iterations), f"{tol:.0e}", f"{of_z:.0e}", f"{of_gradients:.0e}"


def peak_memory(kind, iterations, samples=4096, width=512):
    """Megabytes above those at the start, of `iterations` in float32, each of `samples` x `width` numbers."""
    code = (
        f"from fixed_points import report_memory; report_memory({kind!r}, {iterations}, {samples}, {width})"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    command = [sys.executable, "-c", code]
    output = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True, text=True
    )
    return float(output.stdout)


def report_memory(kind, iterations, samples, width):
    import torch

    from optlayers.torch import DEQ

    torch.set_num_threads(1)
    W = torch.nn.Linear(width, width, bias=False)
    torch.nn.init.orthogonal_(W.weight)
    deq = DEQ(lambda z, x: torch.tanh(0.99 * W(z) + x), tol=1e-30, max_iter=iterations, on_failure="mask")
    x = torch.randn(samples, width, requires_grad=True)
    torch.tanh(W(x)).sum().backward()  # what is loaded at the first use counts as there at the start
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    deq(x, unroll=iterations if kind == "unrolled" else None).sum().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def table(header, rows):
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch")
    parser.add_argument("--radius", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--memory", action="store_true", help="measure the memory, in torch, and nothing else"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.memory:
        header = ("method", "10 iterations (MB)", "200 iterations (MB)")
        rows = [
            (kind, *(f"{peak_memory(kind, n):.0f}" for n in (10, 200)))
            for kind in ("equilibrium", "unrolled")
        ]
    else:
        data = make_data(options.radius)
        expected, rows, header = reference(data), [], HEADER
        methods = {"torch": torch_methods, "jax": jax_methods}[options.framework](data)
        for name, method in methods.items():
            rows.append(measure(name, method, expected, options.repeats))
            print(*rows[-1], sep="\t", flush=True)
    lines = table(header, rows)
    print("\n".join(lines))
    if options.output:
        peers = ("torchdeq",) if options.framework == "torch" else ("jaxopt", "optimistix")
        versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in (options.framework, *peers))
        title = f"`benchmarks/fixed_points.py --framework {options.framework} --radius {options.radius}`"
        head = [f"Written by {title} on {datetime.date.today()}, with {versions}.", ""]
        options.output.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
