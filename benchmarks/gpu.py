"""Checks the library on a GPU, then times it beside its peers and what the device could do at best.

    python benchmarks/gpu.py [--device cuda] [--batch 4096] [--no-tests]
                             [--frameworks torch "torch, fused" jax Moreau qpax]

The tests marked `gpu` come first. Then dense programs, simplex projections and predictive control of
`benchmarks/layers.py` (W1, W2, W3), forward and backward, all on the device: through `CvxpyLayer` in torch,
also with `fused=True`, and in JAX, and by two peers, both called as in `benchmarks/layers.py`,

- Moreau, its native interface in torch: `pip install moreau-cuda13` (Python 3.12 or later), or `moreau`
  for the CPU alone
- qpax, in JAX, its differentiable solve under `jax.vmap`: `pip install qpax`

What is not installed has no row. Every row is made in a process of its own. One that fails has its error in
place of numbers, and so has a peer that takes more than 60 s for its process, set-up included. A row has

- forward; both: least of some runs, each of which ends with a synchronisation
- error: of the first 16 solutions and their gradients from those of `CvxpyLayer` on the CPU, relative; it
  is in torch for the peers
- flops: the least time of the arithmetic of one factorisation for each problem, and two solutions with it
- bytes: the least time of reading the data and writing as many gradients once

with the rates of this device for a product of matrices and for a copy, both in double precision, which are
measured before each row. It takes a few minutes; with `--device cpu --batch 32` it runs where there is no
GPU, on one thread in torch.
"""

import argparse
import datetime
import importlib.util
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import workloads  # noqa: E402
from report import table  # noqa: E402

import layers  # noqa: E402
from optlayers.layers.cvxpy import CvxpyProgram  # noqa: E402

WORKLOADS = ("W1", "W2", "W3")
CHECKED = 16
PEER_LIMIT, RUNS_LIMIT = 60, 5  # seconds


class Torch:
    """The layer in torch, on a device."""

    package, settings = "torch", {}

    def __init__(self, device):
        import torch

        self.torch, self.device = torch, torch.device(device)

    def array(self, x):
        return self.torch.tensor(x, device=self.device)

    def wait(self, _):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def product(self, a, b):
        return a @ b

    def copy(self, a):
        return a.clone()

    def calls(self, problem, parameters, variable, values, weights):
        from optlayers.torch import CvxpyLayer

        layer = CvxpyLayer(problem, parameters, [variable], solver_args=self.settings)
        weights = self.array(weights)
        plain = [self.array(value) for value in values]
        live = [value.clone().requires_grad_() for value in plain]

        def forward():
            with self.torch.no_grad():
                return layer(*plain)[0]

        def both():
            return self.torch.autograd.grad((layer(*live)[0] * weights).sum(), live)

        return forward, both

    def numpy(self, x):
        return x.detach().cpu().numpy()


class Jax:
    """The layer in JAX, on a device."""

    package = "jax"

    def __init__(self, device):
        import jax

        jax.config.update("jax_enable_x64", True)
        self.jax, self.device = jax, jax.devices({"cuda": "gpu"}.get(device, device))[0]
        self.product, self.copy = jax.jit(lambda a, b: a @ b), jax.jit(lambda a: a + 0)

    def array(self, x):
        return self.jax.device_put(x, self.device)

    def wait(self, result):
        self.jax.block_until_ready(result)

    def calls(self, problem, parameters, variable, values, weights):
        from optlayers.jax import CvxpyLayer

        layer, weights = CvxpyLayer(problem, parameters, [variable]), self.array(weights)
        values = [self.array(value) for value in values]
        loss = lambda *v: (layer(*v)[0] * weights).sum()
        forward = self.jax.jit(lambda *v: layer(*v)[0])
        gradient = self.jax.jit(self.jax.grad(loss, tuple(range(len(values)))))
        return lambda: forward(*values), lambda: gradient(*values)

    def numpy(self, x):
        return np.asarray(x)


class Fused(Torch):
    """With one kernel for small programs, such as those of W2; on a CPU there is none."""

    settings = {"fused": True}


class Moreau(Torch):
    package = "moreau"

    def calls(self, *workload):
        return layers.moreau(*workload, device=self.device.type)


class Qpax(Jax):
    package = "qpax"

    def calls(self, *workload):
        return layers.qpax(*workload, device=self.device)


OURS = {"torch": Torch, "torch, fused": Fused, "jax": Jax}
FRAMEWORKS = OURS | {"Moreau": Moreau, "qpax": Qpax}


def seconds(framework, call, repeats=5):
    """Result of the last call, and the least time of one; none begins after some seconds."""
    framework.wait(result := call())
    times = []
    while len(times) < repeats and sum(times) < RUNS_LIMIT:
        start = time.perf_counter()
        result = call()
        framework.wait(result)
        times.append(time.perf_counter() - start)
    return result, min(times)


def rates(framework, size):
    """Floating-point operations and bytes in a second."""
    a = framework.array(np.random.default_rng(0).standard_normal((size, size)))
    product = seconds(framework, lambda: framework.product(a, a))[1]
    copy = seconds(framework, lambda: framework.copy(a))[1]
    return 2 * size**3 / product, 2 * a.nbytes / copy


def floors(problem, parameters, variable, values, flops, bandwidth):
    """Least milliseconds of arithmetic and of memory traffic, see the top."""
    program = CvxpyProgram(problem, parameters, [variable], False, None, None, {"gradient": "exact"})
    n, m = program.solved.n, program.solved.m
    if (plan := program.elimination) is not None:
        n, m = plan.basis.shape[1], len(plan.kept)
    work = n**3 / 3 + 2 * m * n**2 + 8 * n**2
    traffic = 2 * sum(value.nbytes for value in values)
    return 1e3 * len(values[0]) * work / flops, 1e3 * traffic / bandwidth


def error(actual, expected):
    return np.abs(actual - expected).max() / max(1.0, np.abs(expected).max())


def row(name, workload, device, batch):
    """One row, and before it a line with the rates of the device."""
    framework = FRAMEWORKS[name](device)
    host = OURS.get(name, Torch)("cpu")
    flops, bandwidth = rates(framework, 8192 if device == "cuda" else 1024)
    print(f"{name}: {flops / 1e12:.2f} Tflop/s, {bandwidth / 1e9:.0f} GB/s")
    problem, parameters, variable, values, weights, _ = workloads.build(workload, batch)
    forward, both = framework.calls(problem, parameters, variable, values, weights)
    (x, forward_time), (gradients, both_time) = (seconds(framework, call) for call in (forward, both))
    few = host.calls(problem, parameters, variable, [value[:CHECKED] for value in values], weights)
    pairs = [(x, few[0]()), *zip(gradients, few[1](), strict=True)]
    worst = np.max([error(framework.numpy(a)[:CHECKED], host.numpy(b)) for a, b in pairs])
    arithmetic, traffic = floors(problem, parameters, variable, values, flops, bandwidth)
    times = [f"{1e3 * forward_time:.3g}", f"{1e3 * both_time:.3g}", f"{worst:.0e}"]
    print(workload, batch, name, *times, f"{arithmetic:.2g}", f"{traffic:.2g}", sep="\t")


def worker(name, workload, device, batch):
    """`row`, where the last line on standard error is the first of the error."""
    try:
        row(name, workload, device, batch)
    except Exception as problem:
        traceback.print_exc()
        sys.exit(f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}")


def apart(name, workload, device, batch):
    """The row from a process of its own, or one with its error."""
    command = [sys.executable, __file__, "--device", device, "--batch", str(batch), "--row", name, workload]
    limit = None if name in OURS else PEER_LIMIT
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        fault = f"over {limit} s"
    else:
        print(done.stdout, end="", flush=True)
        if done.returncode == 0:
            return done.stdout.splitlines()[-1].split("\t")
        print(done.stderr, file=sys.stderr, flush=True)
        lines = [f"status {done.returncode}", *done.stderr.strip().splitlines()]
        fault = lines[-1] if done.returncode > 0 else lines[0]
    failed = [workload, str(batch), name, *["-"] * 4, fault.replace("|", "/")[:60]]
    print(*failed, sep="\t", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--frameworks", nargs="*", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        return worker(*options.row, options.device, options.batch)
    if not options.no_tests:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], cwd=ROOT, check=True)
    head = ["workload", "batch", "framework", "forward, ms", "both, ms", "error", "flops, ms", "bytes, ms"]
    body = []
    for name in options.frameworks:
        if importlib.util.find_spec(FRAMEWORKS[name].package) is None:
            print(f"{name}: not installed", flush=True)
            continue
        body += [apart(name, workload, options.device, options.batch) for workload in WORKLOADS]
    lines = table([head, *body])
    print("", *lines, sep="\n")
    if options.output:
        top = ["# On a GPU", "", f"Written by `benchmarks/gpu.py` on {datetime.date.today()}.", ""]
        options.output.write_text("\n".join([*top, *lines]) + "\n", encoding="utf-8")
    sys.exit(any(row[2] in OURS and row[3] == "-" for row in body))


if __name__ == "__main__":
    main()
