"""Time, iterations and accuracy of equilibrium layers beside those of torchdeq, jaxopt and optimistix.

    python benchmarks/fixed_points.py [--framework torch|jax] [--radius 0.9] [--output docs/fixed_points.md]

The cell is z = tanh(W z + U x + b), |W| = radius, 256 numbers a sample, 256 samples, one thread. Each method
is run at several tolerances; the row is that of the loosest one at which the solution and the gradients of
W, U, b and x, of the sum of squares of z, are right to 1e-6 (double precision), relative to a solution at
1e-14. So times are at equal accuracy. They are those of the CPU, for forward and backward together: the least
of some calls, in which the methods take turns. Memory is the peak of a process of its own above that of its
start, at 10 and at 200 iterations.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from report import table, write_section  # noqa: E402

SIZE, TOLERANCES, TARGET = 256, 10.0 ** -np.arange(4.0, 10.0, 0.5), 1e-6
HEADER = ("method", "time (ms)", "iterations", "tolerance", "error of z", "error of gradients")
PEERS = {"torch": ("torchdeq",), "jax": ("jaxopt", "optimistix")}
TITLE = """# Equilibria beside other libraries

z = tanh(W z + U x + b) with 256 numbers a sample, 256 samples, in double precision on one thread. Each method
is run at falling tolerances; its row is that of the first one at which the solution and the gradients of W,
U, b and x are right to 1e-6. So the times, of the CPU, forward and backward together, are at equal accuracy.

- time: the least of several calls, which the methods take in turns; none where no tolerance was enough
- iterations: of the sample that takes most
- tolerance: each library's own; what it bounds differs between them
"""


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
    import lineax
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

    # By default optimistix would form the Jacobian of the whole batch, of 65,536 by 65,536 entries.
    def by_optimistix(theta, tol):
        solver = optimistix.FixedPointIteration(rtol=tol, atol=tol)
        adjoint = optimistix.ImplicitAdjoint(linear_solver=lineax.GMRES(rtol=tol, atol=tol))
        options = {"max_steps": 300, "adjoint": adjoint}
        solution = optimistix.fixed_point(cell, solver, jnp.zeros_like(theta[3]), theta, **options)
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


def loosest(method, expected):
    """The first tolerance that is accurate enough, or the last; whether it is; the columns from there."""
    for tol in TOLERANCES:
        z, gradients, iterations = method(tol)
        errors = error(z, expected[0]), max(map(error, gradients, expected[1]))
        if max(errors) <= TARGET:
            break
    return tol, max(errors) <= TARGET, (str(iterations), *(f"{entry:.0e}" for entry in (tol, *errors)))


def measure(methods, expected, repeats):
    """The rows of the table. The methods take turns, since a shared machine is fast and slow at times."""
    found = {name: loosest(method, expected) for name, method in methods.items()}
    least = dict.fromkeys(methods, np.inf)
    for _ in range(repeats):
        for name, method in methods.items():
            start = time.process_time()
            method(found[name][0])
            least[name] = min(least[name], time.process_time() - start)
    return [
        (name, f"{1e3 * least[name]:.0f}" if is_accurate else "-", *columns)
        for name, (_, is_accurate, columns) in found.items()
    ]


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--framework", choices=PEERS, default="torch")
    parser.add_argument("--radius", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="of memory, in torch, and nothing else")
    parser.add_argument("--output", type=Path, help="the report of which to write a section")
    options = parser.parse_args()
    if options.memory:
        header = ("method", "10 iterations (MB)", "200 iterations (MB)")
        kinds = ("equilibrium", "unrolled")
        rows = [(kind, *(f"{peak_memory(kind, n):.0f}" for n in (10, 200))) for kind in kinds]
        lines = table([header, *rows])
    else:
        data = make_data(options.radius)
        methods = {"torch": torch_methods, "jax": jax_methods}[options.framework](data)
        lines = table([HEADER, *measure(methods, reference(data), options.repeats)])
    print("\n".join(lines))
    if options.output:
        packages = PEERS[options.framework]
        write_section(options.output, TITLE, "fixed_points.py", options.framework, lines, packages)


if __name__ == "__main__":
    main()
