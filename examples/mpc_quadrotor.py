# %% [markdown]
# # Quadrotors that learn to fly as their expert does
#
# Sixty-four quadrotors fly home by model predictive control. Ten times a second a plan
#
#     minimise    sum_t q'x_t^2 + r'u_t^2
#     subject to  x_t = A x_{t-1} + B u_t,   |velocities|, |roll|, |pitch| bounded,   low <= u_t <= high
#
# of one second over twelve states and four rotors is solved for all of them at once, starting from the last
# plan, shifted by one step. The weights q of an expert are unknown: others are learned under which the plans
# do what it did, by gradients of the plans, and judged by the flights that come of them. Several weights may
# fly alike: the table tells how far they are from the expert's. A loop over OSQP, with a solver set up for
# each quadrotor and warm-started as well, solves the same plans for comparison. Its accuracy is the residual
# at which it stops, so it is run twice, to the tolerance of the layer and to a much smaller one; its inputs
# are less accurate than those of the layer, which ends with Newton steps, all the same.
#
#     python examples/mpc_quadrotor.py [--framework torch|jax] [--seed 0] [--output quadrotor.png] [--quick]

# %%
import argparse
import sys
import time
from typing import NamedTuple

import cvxpy as cp
import matplotlib
import numpy as np
import osqp
from scipy import sparse
from scipy.linalg import expm
from tqdm import tqdm

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt

HORIZON, STEP, EPS, FINE, NOISE = 10, 0.1, 1e-6, 1e-9, 0.01
LOW, HIGH = -1.0, 1.2  # of each rotor's thrust, in N, around that of hovering
BOUNDS = {"velocity": (slice(3, 6), 2.0), "roll and pitch": (slice(6, 8), 0.5)}  # in m/s and rad


class Size(NamedTuple):
    """Quadrotors, steps of a flight, and steps of learning."""

    batch: int = 64
    flight: int = 40
    steps: int = 150


QUICK = Size(batch=32, flight=20, steps=40)

# %% [markdown]
# ## The quadrotor
#
# Linear around hovering. The state is position, velocity, the angles of roll, pitch and yaw, and their rates.


# %%
def dynamics():
    """A (12, 12) and B (12, 4), exact for inputs that are constant during a step."""
    gravity, mass, arm, drag, inertia = 9.81, 0.5, 0.2, 0.03, (0.004, 0.004, 0.007)
    A, B = np.zeros((12, 12)), np.zeros((12, 4))
    A[0:3, 3:6] = A[6:9, 9:12] = np.eye(3)
    A[3, 7], A[4, 6] = gravity, -gravity
    B[5] = 1 / mass
    B[9:] = np.array([[0, arm, 0, -arm], [-arm, 0, arm, 0], [drag, -drag, drag, -drag]])
    B[9:] /= np.array(inertia)[:, None]
    E = expm(STEP * np.block([[A, B], [np.zeros((4, 16))]]))
    return E[:12, :12], E[:12, 12:]


A, B = dynamics()
EXPERT = np.array([4.0, 4, 8, 0.5, 0.5, 0.5, 0.2, 0.2, 1, 0.02, 0.02, 0.1])
EFFORT = np.full(4, 0.1)  # r; q counts in relation to it

# %% [markdown]
# ## The plan
#
# The layer eliminates the dynamics itself, since their coefficients are constant. All variables and
# constraints have one row for each step, so that a solution is moved on in time without a look into it.


# %%
def plan_problem():
    x, u = cp.Variable((HORIZON, 12)), cp.Variable((HORIZON, 4))
    start, q, r = cp.Parameter(12), cp.Parameter(12, nonneg=True), cp.Parameter(4, nonneg=True)
    first = cp.reshape(A @ start, (1, 12), order="C")
    before = np.eye(HORIZON, k=-1) @ x @ A.T + np.eye(HORIZON)[:, :1] @ first
    boxes = [sign * x[:, part] <= bound for part, bound in BOUNDS.values() for sign in (-1, 1)]
    cost = cp.sum(cp.square(x) @ q) + cp.sum(cp.square(u) @ r)
    problem = cp.Problem(cp.Minimize(cost), [x == before + u @ B.T, *boxes, u >= LOW, u <= HIGH])
    return problem, [start, q, r], [x, u]


class Point(NamedTuple):
    """Where the solver starts: x, slacks s and multipliers y of the layer's cone program (n, ...)."""

    x: np.ndarray
    s: np.ndarray
    y: np.ndarray

    def shifted(self):
        """The same, a step later."""
        later = [*range(1, HORIZON), HORIZON - 1]
        return Point(*(z.reshape(len(z), -1, HORIZON)[..., later].reshape(z.shape) for z in self))


def torch_functions():
    """`plan(q, states, point)` to inputs (n, 4), point and residual, and `learn(q, batches)` to better q."""
    import torch

    from optlayers.torch import CvxpyLayer, InteriorPoint

    torch.set_num_threads(1)  # the matrices are small: threads would only wait for one another
    layer = CvxpyLayer(*plan_problem(), solver=InteriorPoint(), solver_args={"eps": EPS})
    effort = torch.from_numpy(EFFORT)

    def plan(q, states, point):
        data = (torch.from_numpy(states), torch.from_numpy(q), effort)
        warm = point and Point(*map(torch.from_numpy, point))
        with torch.no_grad():
            solution = layer.solve(*data, warm_start=warm)
        point = Point(*(z.numpy() for z in solution[1:4]))
        return solution.variables[1][:, 0].numpy(), point, solution.residual.max().item()

    def learn(q, batches):
        log_q = torch.tensor(np.log(q), requires_grad=True)
        optimizer = torch.optim.Adam([log_q], lr=0.1)
        for states, inputs in batches:
            _, u = layer(torch.from_numpy(states), log_q.exp(), effort)
            loss = (u[:, 0] - torch.from_numpy(inputs)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return log_q.detach().exp().numpy()

    return plan, learn


def jax_functions():
    """`plan(q, states, point)` to inputs (n, 4), point and residual, and `learn(q, batches)` to better q."""
    import jax
    import jax.numpy as jnp
    from jax.example_libraries.optimizers import adam

    from optlayers.jax import CvxpyLayer, InteriorPoint

    jax.config.update("jax_enable_x64", True)
    print("JAX compiles the plans and the step of learning, which takes some seconds.")
    layer = CvxpyLayer(*plan_problem(), solver=InteriorPoint(), solver_args={"eps": EPS})
    start, update, value = adam(0.1)

    @jax.jit
    def solve(q, states, point):
        solution = layer.solve(states, q, EFFORT, warm_start=point)
        return solution.variables[1][:, 0], Point(*solution[1:4]), solution.residual.max()

    def plan(q, states, point):
        inputs, point, residual = solve(q, states, point)
        return np.asarray(inputs), Point(*map(np.asarray, point)), residual.item()

    @jax.jit
    def advance(step, state, states, inputs):
        def loss(log_q):
            return jnp.mean((layer(states, jnp.exp(log_q), EFFORT)[1][:, 0] - inputs) ** 2)

        return update(step, jax.grad(loss)(value(state)), state)

    def learn(q, batches):
        state = start(jnp.log(q))
        for step, (states, inputs) in enumerate(batches):
            state = advance(step, state, states, inputs)
        return np.exp(value(state))

    return plan, learn


# %% [markdown]
# ## Flights and learning


# %%
class Flight(NamedTuple):
    """States before each step (steps, n, 12), inputs (steps, n, 4), largest residual, median seconds."""

    states: np.ndarray
    inputs: np.ndarray
    residual: float
    seconds: float

    def cost(self, q):
        return (self.states**2 @ q + self.inputs**2 @ EFFORT).sum(0).mean()


def starts(count, rng):
    """At rest, within two metres of home."""
    return np.concatenate([rng.uniform(-2, 2, (count, 3)), np.zeros((count, 9))], -1)


def fly(plan, q, states, steps, title):
    point, rows, residuals, seconds = None, [], [], []
    for _ in tqdm(range(steps), desc=f"{title:<20}", unit="step", ncols=88):
        start = time.perf_counter()
        inputs, point, residual = plan(q, states, point and point.shifted())
        seconds.append(time.perf_counter() - start)
        residuals.append(residual)
        rows.append((states, inputs))
        states = states @ A.T + inputs @ B.T
    return Flight(*map(np.stack, zip(*rows, strict=True)), max(residuals), float(np.median(seconds)))


def minibatches(flight, size, rng):
    """Situations of the expert's flights with what it did."""
    states, inputs = flight.states.reshape(-1, 12), flight.inputs.reshape(-1, 4)
    inputs = inputs + NOISE * rng.standard_normal(inputs.shape)
    for _ in tqdm(range(size.steps), desc=f"{'learning':<20}", unit="step", ncols=88):
        rows = rng.integers(len(states), size=size.batch)
        yield states[rows], inputs[rows]


# %% [markdown]
# ## The loop over OSQP


# %%
def osqp_problem(q):
    """P, A, lower and upper bounds in z = (x_1, ..., u_1, ...), without the start in the dynamics."""
    identity, inputs = sparse.eye(HORIZON), 4 * HORIZON
    before = sparse.kron(sparse.eye(HORIZON, k=-1), A)
    dynamics = sparse.hstack([sparse.eye(12 * HORIZON) - before, sparse.kron(identity, -B)])
    bound = np.full(12, np.inf)
    for part, value in BOUNDS.values():
        bound[part] = value
    boxed = np.flatnonzero(np.tile(np.isfinite(bound), HORIZON))
    bound = np.tile(bound, HORIZON)[boxed]
    rows = [dynamics, sparse.eye(16 * HORIZON, format="csr")[[*boxed, *range(12 * HORIZON, 16 * HORIZON)]]]
    zero = np.zeros(12 * HORIZON)
    lower = np.concatenate([zero, -bound, np.full(inputs, LOW)])
    upper = np.concatenate([zero, bound, np.full(inputs, HIGH)])
    P = sparse.diags(2 * np.concatenate([np.tile(q, HORIZON), np.tile(EFFORT, HORIZON)]), format="csc")
    return P, sparse.vstack(rows, format="csc"), lower, upper


def osqp_inputs(q, flight, eps):
    """The inputs for the states of a flight, the largest residual, and the median seconds of a step."""
    P, M, lower, upper = osqp_problem(q)
    solvers = [osqp.OSQP() for _ in flight.states[0]]
    for solver in solvers:
        settings = {"eps_abs": eps, "eps_rel": eps, "max_iter": 100_000, "verbose": False}
        solver.setup(P, np.zeros(P.shape[0]), M, lower, upper, **settings)
    inputs, residual, seconds = np.empty_like(flight.inputs), 0.0, []
    for states, u in zip(
        tqdm(flight.states, f"{f'OSQP, to {eps:.0e}':<20}", unit="step", ncols=88), inputs, strict=True
    ):
        start = time.perf_counter()
        for i, solver in enumerate(solvers):
            lower[:12] = upper[:12] = A @ states[i]
            solver.update(l=lower, u=upper)
            result = solver.solve()
            u[i] = result.x[12 * HORIZON :][:4]
            residual = max(residual, result.info.prim_res, result.info.dual_res)
        seconds.append(time.perf_counter() - start)
    return inputs, residual, float(np.median(seconds))


# %% [markdown]
# ## The experiment


# %%
class Result(NamedTuple):
    """Flights and weights by name, seconds of learning, and (name, seconds, residual, error) of solvers."""

    flights: dict
    weights: dict
    seconds: float
    solvers: list


def run(framework="torch", seed=0, size=None):
    """Let the expert fly, learn its weights, fly with these and with the first guess, time the solvers."""
    size, rng = size or Size(), np.random.default_rng(seed)
    plan, learn = {"torch": torch_functions, "jax": jax_functions}[framework]()
    expert = fly(plan, EXPERT, starts(size.batch, rng), size.flight, "expert")
    first, start = np.ones(12), time.perf_counter()
    learned = learn(first, minibatches(expert, size, rng))
    seconds = time.perf_counter() - start
    weights = {"first guess": first, "learned": learned, "expert": EXPERT}
    home = starts(size.batch, rng)
    flights = {name: fly(plan, q, home, size.flight, name) for name, q in weights.items()}
    flight = flights["expert"]
    loops = {eps: osqp_inputs(EXPERT, flight, eps) for eps in (EPS, FINE, 1e-11)}
    exact, *_ = loops.pop(1e-11)
    runs = {"CvxpyLayer": flight[1:]} | {f"OSQP, to {eps:.0e}": loop for eps, loop in loops.items()}
    solvers = [(name, s, residual, abs(u - exact).max()) for name, (u, residual, s) in runs.items()]
    return Result(flights, weights, seconds, solvers)


def print_table(result):
    print(f"\n{'method':<16}{'cost of flights':>17}{'error of inputs':>17}{'error of q':>12}{'seconds':>9}")
    expert = result.flights["expert"]
    for name, flight in result.flights.items():
        error = np.sqrt(np.mean((flight.inputs - expert.inputs) ** 2))
        of_q = np.median(abs(result.weights[name] / EXPERT - 1))
        seconds = f"{result.seconds:.1f}" if name == "learned" else "-"
        print(f"{name:<16}{flight.cost(EXPERT):>17.2f}{error:>17.1e}{of_q:>12.1%}{seconds:>9}")
    batch = expert.states.shape[1]
    print(f"\n{'solver':<16}{f'ms for {batch} plans':>17}{'residual':>12}{'error of inputs':>17}")
    for name, seconds, residual, error in result.solvers:
        print(f"{name:<16}{1e3 * seconds:>17.1f}{residual:>12.1e}{error:>17.1e}")


# %% [markdown]
# ## The picture

# %%
INK, GREY, ORANGE, BLUE = "#212b36", "#b6c0cb", "#e8590c", "#1c7ed6"
NAMES = ["x", "y", "z", "x'", "y'", "z'", "roll", "pitch", "yaw", "roll'", "pitch'", "yaw'"]


def draw_flights(axes, result, shown=24):
    """Paths with the learned weights over those with the first guess, from above and aside."""
    for name, color, width in (("first guess", GREY, 1.2), ("learned", ORANGE, 1.6)):
        for path in result.flights[name].states[:, :shown, :3].transpose(1, 2, 0):
            axes.plot(*path, color=color, lw=width, alpha=0.9)
        axes.plot([], [], [], color=color, lw=3, label=name)
    axes.scatter(*result.flights["learned"].states[0, :shown, :3].T, color=INK, s=14, depthshade=False)
    axes.scatter(0, 0, 0, color=INK, s=120, marker="*", depthshade=False)
    ticks = (-2, 0, 2)
    axes.set(xlabel="x (m)", ylabel="y (m)", zlabel="z (m)", xticks=ticks, yticks=ticks, zticks=ticks)
    axes.view_init(elev=22, azim=-58)
    axes.legend(loc="upper left", frameon=False)
    seconds = STEP * len(result.flights["learned"].states)
    axes.set_title(
        f"{shown} of {result.flights['learned'].states.shape[1]} flights home, {seconds:.0f} s each"
    )


def draw_weights(axes, result):
    place = np.arange(12)
    for name, color, marker, size in (
        ("first guess", GREY, "o", 60),
        ("expert", INK, "_", 500),
        ("learned", ORANGE, "o", 60),
    ):
        axes.scatter(
            place, result.weights[name], s=size, color=color, marker=marker, label=name, zorder=3, lw=2
        )
    axes.set(yscale="log", xticks=place, ylabel="weight q")
    axes.set_xticklabels(NAMES, rotation=45)
    axes.grid(axis="y", color="#e6ebf0")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    ours, *loops = (1e3 * seconds for _, seconds, *_ in result.solvers)
    times = f"{ours:.0f} ms a step, OSQP in a loop {' or '.join(f'{loop:.0f}' for loop in loops)} ms"
    axes.set_title(f"Weights learned from what the expert did\n{times}")


def draw(result, path):
    with plt.rc_context({"font.size": 12, "text.color": INK, "axes.titlesize": 14}):
        figure = plt.figure(figsize=(13.3, 6.2), layout="constrained")
        draw_flights(figure.add_subplot(1, 2, 1, projection="3d"), result)
        draw_weights(figure.add_subplot(1, 2, 2), result)
        figure.savefig(path, dpi=150)
        plt.close(figure)


# %%
def parse_arguments():
    parser = argparse.ArgumentParser(description="Learn the cost of quadrotors' predictive control.")
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="quadrotor.png", help="where to write the picture")
    parser.add_argument("--quick", action="store_true", help="fewer quadrotors and steps")
    return parser.parse_args([] if IS_NOTEBOOK else None)


if __name__ == "__main__":
    arguments = parse_arguments()
    result = run(arguments.framework, arguments.seed, QUICK if arguments.quick else Size())
    print_table(result)
    draw(result, arguments.output)
    print(f"\nPicture: {arguments.output}")
