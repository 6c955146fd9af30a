"""Forward and backward through an ODE beside torchdiffeq and diffrax: time, evaluations, accuracy.

    python benchmarks/ode.py [--framework torch|jax] [--tolerance 1e-5] [--repeats 5] [--output docs/ode.md]

Needs torchdiffeq or diffrax.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from report import table, write_section  # noqa: E402

BATCH, WIDTH, TIMES, END = 256, 64, 20, 5.0
TITLE = f"""# Differential equations

A field of three layers of width {WIDTH} drives a batch of {BATCH} states, seen at {TIMES} times; forward
and backward in single precision, one thread. Times are the least processor time of several runs, and
evaluations of the field those forward and backward. Memory is what a run holds at most besides its inputs:
in torch by the profiler's account of allocations, in JAX the temporary memory of the compiled function.
Errors are those of the solution, and of the gradient of its mean square in all weights relative to their
largest entry, against double precision at 1e-10.
"""
HEADER = ("solver", "ms", "MiB", "evaluations", "solution", "gradient")


def weights():
    rng = np.random.default_rng(0)
    shapes = [(2, WIDTH), (WIDTH, WIDTH), (WIDTH, 2)]
    return [rng.uniform(-1, 1, shape) / shape[0] ** 0.5 for shape in shapes], rng.standard_normal((BATCH, 2))


def field_of(tanh):
    return lambda y, W: tanh(tanh(y @ W[0]) @ W[1]) @ W[2]


def row(name, seconds, memory, evaluations, y, gradient, exact):
    error = np.sqrt(np.mean((np.asarray(y) - exact[0]) ** 2))
    off = max(abs(np.asarray(g) - e).max() / abs(e).max() for g, e in zip(gradient, exact[1], strict=True))
    numbers = f"{1e3 * seconds:.1f}", f"{memory / 2**20:.1f}", str(evaluations), f"{error:.0e}", f"{off:.0e}"
    return name, *numbers


def best(calls, repeats):
    """The least time of each call, and its result; they take turns, since machines are shared."""
    results = [call() for call in calls]
    times = []
    for _ in range(repeats):
        times.append([])
        for call in calls:
            start = time.process_time()
            call()
            times[-1].append(time.process_time() - start)
    return zip(np.min(times, 0), results, strict=True)


def run_torch(tolerance, repeats):
    import torch
    import torchdiffeq

    from optlayers import torch as optlayers

    field, (W, y0), count = field_of(torch.tanh), weights(), [0]

    def solve(odeint, dtype, tolerance):
        Ws = [torch.tensor(w, dtype=dtype, requires_grad=True) for w in W]
        module = torch.nn.Module()
        module.Ws = torch.nn.ParameterList(Ws)

        def call():
            count[0] = 0

            def forward(t, y):
                count[0] += 1
                return field(y, module.Ws)

            module.forward = forward
            times = torch.linspace(0, END, TIMES, dtype=dtype)
            y = odeint(module, torch.tensor(y0, dtype=dtype), times, tolerance)
            y.square().mean().backward()
            gradient = [w.grad.numpy() for w in module.Ws]
            module.zero_grad()
            return y.detach().numpy(), gradient

        return call

    def peak(call):
        with torch.profiler.profile(profile_memory=True) as recorded:
            call()
        events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        return max(np.cumsum([size for _, size in changes]))

    def with_options(odeint, each=False, stricter=1, **options):
        def solve(f, y, t, tol):
            t = t.expand(BATCH, TIMES) if each else t
            y = odeint(f, y, t, rtol=tol / stricter, atol=tol / stricter, **options)
            return y.transpose(0, 1) if each else y

        return solve

    ours, peer, kept = optlayers.odeint, torchdiffeq.odeint, {"adjoint": optlayers.Discrete(0)}
    peers = {
        "OptLayers": with_options(ours),
        "OptLayers, steps of each sample": with_options(ours, each=True),
        "OptLayers, all stages kept": with_options(ours, **kept),
        "OptLayers, all kept, steps of each sample": with_options(ours, each=True, **kept),
        "OptLayers, all kept, tolerance*10": with_options(ours, stricter=0.1, **kept),
        "torchdiffeq, adjoint": with_options(torchdiffeq.odeint_adjoint),
        "torchdiffeq, all stages kept": with_options(peer),
        "torchdiffeq, all kept, tolerance/30": with_options(peer, stricter=30),
        "OptLayers, rk4": with_options(ours, method="rk4"),
        "OptLayers, rk4, all stages kept": with_options(ours, method="rk4", **kept),
        "torchdiffeq, rk4, all stages kept": with_options(peer, method="rk4"),
    }
    exact, rows = solve(next(iter(peers.values())), torch.float64, 1e-10)(), []
    calls = [solve(odeint, torch.float32, tolerance) for odeint in peers.values()]
    for name, call, (seconds, (y, gradient)) in zip(peers, calls, best(calls, repeats), strict=True):
        rows.append(row(name, seconds, peak(call), count[0], y, gradient, exact))
    return rows


def run_jax(tolerance, repeats):
    import diffrax
    import jax

    from optlayers import jax as optlayers

    jax.config.update("jax_enable_x64", True)
    xp, (W, y0), field = jax.numpy, weights(), field_of(jax.numpy.tanh)

    def ours(W, y0, t, tolerance):
        options = {"rtol": tolerance, "atol": tolerance, "return_info": True, "max_steps": 256}
        y, info = optlayers.odeint(lambda y, t: field(y, W), y0, t, **options)
        return y, info.evaluations

    def peer(W, y0, t, tolerance):
        control = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        term, save = diffrax.ODETerm(lambda t, y, W: field(y, W)), diffrax.SaveAt(ts=t)
        options = {"args": W, "saveat": save, "stepsize_controller": control, "max_steps": 256}
        solution = diffrax.diffeqsolve(term, diffrax.Dopri5(), t[0], t[-1], None, y0, **options)
        return solution.ys, 6 * solution.stats["num_steps"] + 2

    def solve(layer, dtype, tolerance):
        arrays = (
            [xp.asarray(w, dtype) for w in W],
            xp.asarray(y0, dtype),
            xp.linspace(0, END, TIMES, dtype=dtype),
        )

        def loss(W):
            y, evaluations = layer(W, *arrays[1:], tolerance)
            return (y**2).mean(), (y, evaluations)

        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(arrays[0]).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        return lambda: jax.block_until_ready(compiled(arrays[0])), memory

    (_, (y, _)), gradient = solve(ours, xp.float64, 1e-10)[0]()
    exact, rows = (np.asarray(y), [np.asarray(g) for g in gradient]), []
    calls, memories = zip(*(solve(layer, xp.float32, tolerance) for layer in (ours, peer)), strict=True)
    for name, memory, (seconds, result) in zip(
        ("OptLayers", "diffrax"), memories, best(calls, repeats), strict=True
    ):
        (_, (y, evaluations)), gradient = result
        rows.append(row(name, seconds, memory, evaluations, y, gradient, exact))
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "ode.md")
    options = parser.parse_args()
    run, peer = {"torch": (run_torch, "torchdiffeq"), "jax": (run_jax, "diffrax")}[options.framework]
    lines = table([HEADER, *run(options.tolerance, options.repeats)])
    print("\n".join(lines))
    write_section(options.output, TITLE, "ode.py", options.framework, lines, (peer,))


if __name__ == "__main__":
    main()
