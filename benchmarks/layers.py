"""Time and accuracy of differentiable layers on ten workloads, side by side with other libraries.

    python benchmarks/layers.py [--workloads W1 ...] [--layers NAME ...] [--output FILE --title TITLE]

Every layer runs in a process of its own, on one thread, or on as many as THREADS in the environment says; the
processes take turns, of a twentieth of a second or a call, and the least of their times counts, since
machines are shared. On several threads JAX has a device for each, and `shard_map` gives each a part of the
batch, as compiled layers of torch do by themselves. What is timed is a solution of the batch, and a weighted
sum of it differentiated in all parameters.

- set-up: import, construction and first calls; in JAX with compilation, by the options that devices.md gives
- forward; both: forward and backward, and the median of its times
- solution: difference from a solution whose optimality conditions hold to 1e-11, relative
- gradient: difference of its product with a random direction from central differences of such solutions
- MB: most memory of the process

A library that is not installed, fails, or takes 90 seconds for its set-up and first call has that in place
of numbers. Moreau is called by its native interface: through cvxpylayers 1.2 and cvxpy 1.9.3 it drops
constraints. It solves W3 by its interior point, since the active-set method that it would choose takes 50
times as long there. The gradient of cvxpylayers on W5 is right with SCS at a tolerance of 1e-9, and wrong
with Clarabel.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
THREADS = int(os.environ.get("THREADS", "1"))
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[variable] = str(THREADS)
if THREADS > 1:
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import numpy as np  # noqa: E402
from report import table  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402
from workloads import WORKLOADS, build  # noqa: E402

REFERENCE_LANES, STEP = 4, 1e-5
TURN = 0.05  # seconds
FIRST_CALL_LIMIT = 90  # seconds


# Layers: (problem, parameters, variable, values, weights) to two functions of no argument, `forward`, to the
# solution (B, ...), and `both`, to the gradients.


def _torch_calls(layer, values, weights, device="cpu"):
    import torch

    values = [torch.tensor(value, device=device) for value in values]
    leaves = [value.clone().requires_grad_() for value in values]
    weights = torch.tensor(weights, device=device)

    def forward():
        with torch.no_grad():
            return layer(*values)

    def both():
        (layer(*leaves) * weights).sum().backward()
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return gradients

    return forward, both


def optlayers_torch(problem, parameters, variable, values, weights, compiled=False):
    from optlayers.torch import CvxpyLayer

    if compiled:
        import jax
        import torch

        torch.set_num_threads(1)  # each device has one already
        threadpool_limits(1)
        jax.config.update("jax_num_cpu_devices", THREADS)
    layer = CvxpyLayer(problem, parameters, [variable], compiled=compiled)
    return _torch_calls(lambda *v: layer(*v)[0], values, weights)


def optlayers_jax(problem, parameters, variable, values, weights):
    import jax

    from optlayers.jax import CvxpyLayer
    from optlayers.jax.compiled import OPTIONS

    jax.config.update("jax_enable_x64", True)
    layer = CvxpyLayer(problem, parameters, [variable])
    solve, devices = lambda *v: layer(*v)[0], THREADS if len(values[0]) % THREADS == 0 else 1
    if devices > 1:
        threadpool_limits(1)  # of LAPACK: each device has one already
        jax.config.update("jax_num_cpu_devices", devices)
        mesh, batch = jax.sharding.Mesh(jax.devices(), ("batch",)), jax.sharding.PartitionSpec("batch")
        solve = jax.shard_map(solve, mesh=mesh, in_specs=batch, out_specs=batch)
    values = [jax.numpy.asarray(value) for value in values]
    jit = functools.partial(jax.jit, compiler_options=OPTIONS)
    loss = lambda *v: (solve(*v) * weights).sum()
    forward, both = jit(solve), jit(jax.grad(loss, argnums=tuple(range(len(values)))))
    return lambda: jax.block_until_ready(forward(*values)), lambda: jax.block_until_ready(both(*values))


def cvxpylayers_with(solver):
    def make(problem, parameters, variable, values, weights):
        from cvxpylayers.torch import CvxpyLayer

        arguments = {"solve_method": solver}
        if solver == "SCS":
            arguments |= {"eps": 1e-9, "max_iters": 100_000}
        layer = CvxpyLayer(problem, parameters, [variable])
        return _torch_calls(lambda *v: layer(*v, solver_args=arguments)[0], values, weights)

    return make


def moreau(problem, parameters, variable, values, weights, device="cpu"):
    """Its native interface on "cpu" or "cuda", on the cone program that CVXPY makes of the problem."""
    import moreau
    import torch
    from moreau.torch import Solver

    from optlayers.layers.assembly import assemble, splits
    from optlayers.layers.conic import ConicSolution
    from optlayers.layers.cvxpy import entries, read
    from optlayers.ops import torch as ops
    from optlayers.torch import CvxpyLayer

    program = CvxpyLayer(problem, parameters, [variable])._program
    made, cones = program.program, program.program.cones
    flat, _ = entries(made)
    n, m, batch = made.n, made.m, len(values[0])
    # Cones in Moreau's order: those of the programs here are the same.
    # What it would choose for W3, its active-set method, takes 50 times as long there.
    solver = "ipm" if n > 200 else "auto"
    settings = moreau.Settings(solver=solver, device=device, batch_size=batch, enable_grad=True)
    names = {"num_zero_cones": cones.zero, "num_nonneg_cones": cones.nonneg, "num_exp_cones": cones.exp}
    if cones.soc:
        names["so_cone_dims"] = list(cones.soc)
    if cones.psd:
        names["psd_dims"] = list(cones.psd)
    P_where, A_where = made.P.positions, made.A.positions
    rows = lambda where, height: torch.tensor(
        np.concatenate([[0], np.bincount(where // n, minlength=height).cumsum()])
    )
    solver = Solver(
        n, m, rows(P_where, n), torch.tensor(P_where % n), rows(A_where, m), torch.tensor(A_where % n),
        moreau.Cones(**names), settings,
    )  # fmt: skip

    def layer(*values):
        rows = [value.reshape(batch, -1) for value in values]
        P, q, A, b = assemble(ops, flat, splits(flat, (True,) * len(values)), rows, values[0])
        q, b = (z.expand(batch, z.shape[-1]) for z in (q, b))
        P = P.expand(batch, -1) if A.ndim > P.ndim else P
        # On CUDA its derivative reads freed copies of what is not contiguous (0.4.1).
        x = solver.solve(*(z.contiguous() for z in (P, A, q, b))).x
        solution = ConicSolution(x, *[None] * 6)
        return read(ops, made.outputs[0], solution)

    return _torch_calls(layer, values, weights, device)


class _Quadratic:
    """1/2 x'Px + q'x subject to A x = b, G x <= h, as CVXPY writes the problem."""

    def __init__(self, ops, problem, parameters, variable):
        from optlayers.canon.cvxpy import canonicalize

        self.ops, self.program = ops, canonicalize(problem, list(parameters), [variable])
        cones = self.program.cones
        if cones.zero + cones.nonneg != cones.rows:
            raise NotImplementedError("only linear constraints")

    def data(self, values):
        """P, q, A, b, G, h with the batch in front, for values like them."""
        from optlayers.layers.assembly import assemble, splits

        batch, k, ops = len(values[0]), self.program.cones.zero, self.ops
        plan = splits(self.program, (True,) * len(values))
        data = assemble(ops, self.program, plan, [v.reshape(batch, -1) for v in values], values[0])
        own = zip(data, (2, 1, 2, 1), strict=True)
        P, q, A, b = (ops.broadcast_to(z, (batch, *z.shape[z.ndim - ndim :])) for z, ndim in own)
        return P, q, A[:, :k], b[:, :k], A[:, k:], b[:, k:]

    def read(self, x):
        from optlayers.layers.conic import ConicSolution
        from optlayers.layers.cvxpy import read

        return read(self.ops, self.program.outputs[0], ConicSolution(x, *[None] * 6))


def qpth(problem, parameters, variable, values, weights):
    from qpth.qp import QPFunction

    if len(parameters) != 6:
        raise NotImplementedError("only the workload whose data are those of its form")
    function = QPFunction(verbose=-1, check_Q_spd=False)
    return _torch_calls(lambda P, q, A, b, G, h: function(P, q, G, h, A, b), values, weights)


def proxsuite(problem, parameters, variable, values, weights):
    import torch
    from proxsuite.torch.qplayer import QPFunction

    from optlayers.ops import torch as ops

    quadratic, function = _Quadratic(ops, problem, parameters, variable), QPFunction()

    def layer(*values):
        P, q, A, b, G, h = quadratic.data(values)
        return quadratic.read(function(P, q, A, b, G, torch.full_like(h, -1e20), h)[0])

    return _torch_calls(layer, values, weights)


def _jax_calls(solve, problem, parameters, variable, values, weights, device=None):
    """`solve` is (P, q, A, b, G, h) of one problem to x; without a device it runs on JAX's own choice."""
    import jax

    from optlayers.ops import jax as ops

    jax.config.update("jax_enable_x64", True)
    quadratic = _Quadratic(ops, problem, parameters, variable)
    layer = lambda *v: quadratic.read(jax.vmap(solve)(*quadratic.data(v)))
    values = [jax.device_put(value, device) for value in values]
    forward = jax.jit(layer)
    both = jax.jit(jax.grad(lambda *v: (layer(*v) * weights).sum(), argnums=tuple(range(len(values)))))
    return lambda: jax.block_until_ready(forward(*values)), lambda: jax.block_until_ready(both(*values))


def qpax(*workload, device=None):
    import qpax

    return _jax_calls(qpax.solve_qp_primal, *workload, device=device)


def jaxopt_osqp(*workload):
    import jaxopt

    def solve(P, q, A, b, G, h):
        solver = jaxopt.OSQP(tol=1e-7, maxiter=20_000)
        return solver.run(params_obj=(P, q), params_eq=(A, b), params_ineq=(G, h)).params.primal

    return _jax_calls(solve, *workload)


def in_a_loop(solve):
    """A solver without derivatives; `solve` is (P, q, A, l, u) of l <= A x <= u to x."""

    def make(problem, parameters, variable, values, weights):
        import torch

        from optlayers.ops import torch as ops

        quadratic = _Quadratic(ops, problem, parameters, variable)
        P, q, A, b, G, h = (z.numpy() for z in quadratic.data([torch.tensor(v) for v in values]))
        rows, upper = np.concatenate([A, G], 1), np.concatenate([b, h], 1)
        lower = np.concatenate([b, np.full_like(h, -np.inf)], 1)
        data = [*zip(P, q, rows, lower, upper, strict=True)]
        return lambda: quadratic.read(torch.tensor(np.stack([solve(*one) for one in data]))), None

    return make


def osqp(P, q, A, l, u):
    import osqp
    import scipy.sparse as sp

    solver, settings = osqp.OSQP(), {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iter": 20_000}
    solver.setup(sp.csc_matrix(np.triu(P)), q, sp.csc_matrix(A), l, u, verbose=False, **settings)
    return solver.solve(raise_error=False).x


def daqp(P, q, A, l, u):
    import daqp

    sense = np.where(l == u, 5, 0).astype(np.int32)
    return daqp.solve(P, q, A, u, np.maximum(l, -1e30), sense)[0]


def piqp(P, q, A, l, u):
    import piqp

    solver, equal = piqp.DenseSolver(), l == u
    column_major = lambda rows: np.asfortranarray(A[rows])
    solver.setup(
        np.asfortranarray(P), q, column_major(equal), u[equal], column_major(~equal), None, u[~equal]
    )
    solver.solve()
    return solver.result.x


def clarabel(P, q, A, l, u):
    import clarabel
    import scipy.sparse as sp

    settings, equal = clarabel.DefaultSettings(), int((l == u).sum())
    settings.verbose = False
    kinds = [clarabel.ZeroConeT(equal), clarabel.NonnegativeConeT(len(u) - equal)]
    solver = clarabel.DefaultSolver(sp.csc_matrix(np.triu(P)), q, sp.csc_matrix(A), u, kinds, settings)
    return np.array(solver.solve().x)


LAYERS = {
    "OptLayers, torch": (optlayers_torch, ("torch",)),
    "OptLayers, torch, compiled": (functools.partial(optlayers_torch, compiled=True), ("torch", "jax")),
    "OptLayers, JAX": (optlayers_jax, ("jax",)),
    "cvxpylayers, Clarabel": (cvxpylayers_with("Clarabel"), ("cvxpylayers", "diffcp", "clarabel")),
    "cvxpylayers, SCS": (cvxpylayers_with("SCS"), ("cvxpylayers", "diffcp", "scs")),
    "Moreau": (moreau, ("moreau",)),
    "qpth": (qpth, ("qpth",)),
    "proxsuite": (proxsuite, ("proxsuite",)),
    "qpax": (qpax, ("qpax",)),
    "jaxopt, OSQP": (jaxopt_osqp, ("jaxopt",)),
    "OSQP": (in_a_loop(osqp), ("osqp",)),
    "DAQP": (in_a_loop(daqp), ("daqp",)),
    "PIQP": (in_a_loop(piqp), ("piqp",)),
    "Clarabel": (in_a_loop(clarabel), ("clarabel",)),
}


def reference(workload, batch):
    """Solutions of the first problems, and products of their gradients with the directions; certified."""
    import torch

    from certificates import program_data, residuals
    from optlayers.torch import CvxpyLayer

    problem, parameters, variable, values, weights, directions = build(workload, batch)
    layer, lanes = CvxpyLayer(problem, parameters, [variable]), slice(0, min(batch, REFERENCE_LANES))

    def solve(values):
        solution = layer.solve(*(torch.tensor(value) for value in values))
        program = layer._program.program
        for i, (x, s, y) in enumerate(zip(solution.x, solution.s, solution.y, strict=True)):
            data = program_data(program, [value[i] for value in values])
            worst = max(residuals(program.cones, data, x.numpy(), s.numpy(), y.numpy()))
            if worst > 1e-11:
                raise AssertionError(f"{workload}: the reference has a residual of {worst:.0e}")
        return solution.variables[0].numpy()

    values = [value[lanes] for value in values]
    ahead, behind = (
        solve([v + h * d for v, d in zip(values, directions, strict=True)]) for h in (STEP, -STEP)
    )
    axes = tuple(range(1, ahead.ndim))
    return solve(values), ((ahead - behind) * weights).sum(axes) / (2 * STEP)


def work(name, workload, batch):
    """Set up, then take a turn for each line on standard input; numbers to standard output."""
    warnings.simplefilter("ignore")
    make, _ = LAYERS[name]
    problem, parameters, variable, values, weights, directions = build(workload, batch)
    forward, both = make(problem, parameters, variable, values, weights)
    x, lanes = np.asarray(forward()), slice(0, min(batch, REFERENCE_LANES))
    products = np.full(lanes.stop, np.nan)
    if both is not None:
        pairs = zip(both(), directions, strict=True)
        products = sum((np.asarray(g)[lanes] * d).reshape(lanes.stop, -1).sum(1) for g, d in pairs)
    say = lambda **facts: print(json.dumps(facts), flush=True)
    say(x=x[lanes].tolist(), products=products.tolist())
    for _ in sys.stdin:
        times = {"forward": turn(forward), "both": turn(both) if both is not None else [np.nan]}
        say(**times, memory=most_memory())


def most_memory():
    """In MB. `getrusage` would count that of the driver, from which the process was forked."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024


def turn(call):
    """Milliseconds of each call."""
    times, began = [], time.perf_counter()
    while not times or time.perf_counter() - began < TURN:
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def compare(workload, batch, names, repeats):
    """The rows of one workload and batch, from workers that take turns."""
    x, products = reference(workload, batch)
    workers, facts = {}, {}
    for name in names:
        command = [sys.executable, __file__, "--work", name, workload, str(batch)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        start = time.perf_counter()
        worker = subprocess.Popen(command, text=True, **pipes)
        limit = threading.Timer(FIRST_CALL_LIMIT, worker.kill)
        limit.start()
        line = worker.stdout.readline()
        limit.cancel()
        if line:
            workers[name] = worker
            facts[name] = [json.loads(line) | {"setup": time.perf_counter() - start}]
        else:
            errors = worker.stderr.read().strip().splitlines() or [f"no answer in {FIRST_CALL_LIMIT} s"]
            yield [workload, str(batch), name, *["-"] * 6, errors[-1].replace("|", "/")[:60]]
    for _ in range(repeats):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            facts[name].append(json.loads(worker.stdout.readline()))
    for name, worker in workers.items():
        worker.stdin.close()
        worker.wait()
        first, *runs = facts[name]
        error = np.abs(np.array(first["x"]) - x).max() / max(1.0, np.abs(x).max())
        wrong = np.abs(np.array(first["products"]) - products).max() / max(1e-2, np.abs(products).max())
        forward, both = (np.concatenate([run[key] for run in runs]) for key in ("forward", "both"))
        times = [f"{first['setup']:.1f}", *(f"{t:.3g}" for t in (forward.min(), both.min(), np.median(both)))]
        memory = f"{max(run['memory'] for run in runs):.0f}"
        if np.isnan(both).all():  # there are no derivatives
            yield [workload, str(batch), name, *times[:2], "-", "-", f"{error:.0e}", "-", memory]
        else:
            yield [workload, str(batch), name, *times, f"{error:.0e}", f"{wrong:.0e}", memory]


def brief(rows):
    """The largest batch of each workload: times, and in brackets errors of the gradients."""
    names = [name for name in LAYERS if name in {row[2] for row in rows[1:] if row[5] != "-"}]
    largest = {workload: batch for workload, batch, *_ in rows[1:]}
    cells = {tuple(row[:3]): "-" if row[5] == "-" else f"{float(row[5]):,.0f} ({row[8]})" for row in rows[1:]}
    yield ["workload, batch", *names]
    for workload, batch in largest.items():
        title = WORKLOADS[workload][0].__name__.replace("_", " ")
        times = (cells.get((workload, batch, name), "") for name in names)
        yield [f"{workload}, {title}, {int(batch):,}", *times]


def write(path, title, rows, names):
    """The report of the rows so far. The landing page shows what stands between the marks."""
    packages = sorted({p for name in names for p in LAYERS[name][1]} | {"cvxpy", "numpy"})
    installed = [p for p in packages if importlib.util.find_spec(p)]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in installed)
    place = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores"
    place += f", {THREADS} thread{'s' * (THREADS > 1)}, load average {os.getloadavg()[2]:.0f}, {versions}"
    source = f"Written by `benchmarks/layers.py` on {place}."
    described = [f"- {key}: {WORKLOADS[key][0].__doc__}" for key in WORKLOADS if key in {r[0] for r in rows}]
    lines = [
        f"# {title}",
        "",
        "<!-- brief -->",
        "",
        *table([*brief(rows)]),
        "",
        source,
        "",
        "<!-- end -->",
        "",
    ]
    lines += [__doc__.split("\n\n", 2)[2].strip(), "", *described, "", *table(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--layers", nargs="*", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--title", default="Speed")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "speed.md")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, workload, batch = options.work
        return work(name, workload, int(batch))
    times, errors = ["set-up, s", "forward, ms", "both, ms", "median, ms"], ["solution", "gradient"]
    rows = [["workload", "batch", "layer", *times, *errors, "MB"]]
    for workload in options.workloads:
        function, batches = WORKLOADS[workload]
        for batch in batches:
            for row in compare(workload, batch, options.layers, options.repeats):
                rows.append(row)
                print(*row, sep="\t", flush=True)
        write(options.output, options.title, rows, options.layers)


if __name__ == "__main__":
    main()
