# %% [markdown]
# # Learn to heat an office by model predictive control
#
# Every hour a controller sees the temperature of the air, and forecasts d of weather and people. It plans the
# heat u of the next twelve hours, and applies that of the first:
#
#     minimise    sum_t w_t x_t^2 / 2 + u_t + penalty slack_t
#     subject to  x_t = A x_{t-1} + B_u u_t + B_d d_t + e,   0 <= u_t <= high,
#                 low_t - slack_t <= x_t <= up_t + slack_t
#
# with x the difference from the target, w_t > 0 while people are there, and e the error of the model in the
# last hour. This plan is a layer whose weights are the model A, B_u, B_d of the office (Gnu-RL, Chen et al.
# 2019). It first imitates logs of the old controller, which heats by the clock, then is tuned through the
# closed loop on what counts: heat and comfort. No such model is right, as the walls of the office store heat,
# and no controller sees them.
#
# Baselines are the old controller, its clones (ridge, and a multilayer perceptron), and the same plan with a
# model by rule of thumb, and with one by least squares. Clones copy what the old controller does better than
# a plan that is made to save; the plans save heat.
#
#     python examples/hvac_mpc.py [--seed 0] [--output hvac.png] [--quick]

# %%
import argparse
import sys
import time
from typing import NamedTuple

import cvxpy as cp
import matplotlib
import numpy as np
import torch
from scipy.linalg import expm
from torch import nn
from tqdm import tqdm

from optlayers.torch import CvxpyLayer

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt

DAY, HORIZON, HIGH = 24, 12, 8.0  # hours of a day and of a plan, most heat in kW
TARGET, COMFORT, LEAST = 21.5, 1.0, 16.0  # degrees; TARGET -+ COMFORT with people there, LEAST without
NIGHT = 18.0  # degrees, of the old controller
WEIGHT = 5.0  # kWh that an hour with people there, one degree off, is worth
STATE_WEIGHT = 100.0  # in imitation, of the squared error of the air beside that of the heat


class Size(NamedTuple):
    """Weeks of logs, epochs of imitation, days of tuning and offices in it, offices and days of the test."""

    weeks: int = 8
    epochs: int = 6
    days: int = 42
    offices: int = 16
    test: tuple = (12, 7)


QUICK = Size(weeks=3, epochs=2, days=3, offices=6, test=(2, 2))

# %% [markdown]
# ## The plan


# %%
def mpc_layer(states, inputs, horizon, high, penalty=10.0):
    """The plan as a layer: A, B and, for each step, drift, weight, low and up to x and u.

    x and u are (horizon, states or inputs), as are the four; the known start is part of the drift. All
    variables and constraints have one row for each step, so that `shifted` can move a solution on in time.
    """
    x, u = cp.Variable((horizon, states)), cp.Variable((horizon, inputs))
    slack = cp.Variable((horizon, states), nonneg=True)
    A, B = cp.Parameter((states, states)), cp.Parameter((states, inputs))
    drift, low, up = (cp.Parameter((horizon, states)) for _ in range(3))
    weight = cp.Parameter((horizon, states), nonneg=True)
    discomfort = cp.sum(cp.multiply(weight, cp.square(x))) / 2 + penalty * cp.sum(slack)
    effort = cp.sum(u) + 1e-3 * cp.sum_squares(u)  # the squares choose among plans of equal heat
    before = np.eye(horizon, k=-1) @ x
    constraints = [x == before @ A.T + u @ B.T + drift, x + slack >= low, x - slack <= up, u >= 0, u <= high]
    problem, parameters = (
        cp.Problem(cp.Minimize(discomfort + effort), constraints),
        [A, B, drift, weight, low, up],
    )
    return CvxpyLayer(problem, parameters, [x, u], solver_args={"eps": 1e-6})


def shifted(solution, horizon):
    """A solution of a plan, one step later: where the next one starts."""
    later = lambda z: z.unflatten(-1, (-1, horizon))[..., [*range(1, horizon), horizon - 1]].flatten(-2)
    return solution._replace(x=later(solution.x), s=later(solution.s), y=later(solution.y))


class Hour(NamedTuple):
    """Air at its start (n,), heat in it (n,), disturbance (n, 3)."""

    air: torch.Tensor
    heat: torch.Tensor
    disturbance: torch.Tensor


class Seen(NamedTuple):
    """What is seen: air (n,), forecast (n, horizon, 4), hour since a Monday's midnight (n,), last hour."""

    air: torch.Tensor
    forecast: torch.Tensor
    hour: torch.Tensor
    last: Hour | None


class Model(NamedTuple):
    """Of the air: A and B_u (..., 1, 1), B_d (..., 1, disturbances)."""

    A: torch.Tensor
    B_u: torch.Tensor
    B_d: torch.Tensor


class MPC(nn.Module):
    """The controller, with a model as its weights; k models steer k groups of offices of equal size."""

    def __init__(self, model):
        super().__init__()
        self.A, self.B_u, self.B_d = (nn.Parameter(part.clone()) for part in model)
        self.layer = mpc_layer(1, 1, HORIZON, HIGH)

    def model(self):
        return Model(*(part.detach().clone() for part in self.parameters()))

    def models(self, offices):
        """The model of each office, or the one of all."""
        weights = self.A, self.B_u, self.B_d
        return weights if self.A.ndim == 2 else [z.repeat_interleave(offices // len(z), 0) for z in weights]

    def step(self, hour):
        """The air (n,) that the model alone expects after an hour."""
        weights = torch.cat(self.models(len(hour.air)), -1)[..., 0, :]
        inputs = torch.cat([hour.air[:, None] - TARGET, hour.heat[:, None], hour.disturbance], -1)
        return TARGET + (weights * inputs).sum(-1)

    def miss(self, air, last):
        """The error of the model in the last hour; the plan expects it again (offset-free control)."""
        return 0 * air if last is None else air - self.step(last)

    def plan(self, seen, warm_start=None):
        """The solution for what is seen."""
        A, B_u, B_d = self.models(len(seen.air))
        occupied = seen.forecast[..., :1]
        drift = disturbance(seen.forecast) @ B_d.mT + self.miss(seen.air, seen.last)[:, None, None]
        start = (seen.air - TARGET)[:, None, None] * A
        drift = drift + torch.cat([start, start.new_zeros(len(start), HORIZON - 1, 1)], 1)
        low = torch.where(occupied > 0, -COMFORT, LEAST - TARGET)
        up = torch.where(occupied > 0, COMFORT, TARGET)
        return self.layer.solve(A, B_u, drift, 2 * WEIGHT * occupied, low, up, warm_start=warm_start)

    def forward(self, seen, memory=None):
        """Heat of the next hour (n,), and what the next call may start from."""
        solution = self.plan(seen, memory)
        return solution.variables[1][:, 0, 0], shifted(solution, HORIZON)


def disturbance(forecast):
    """What acts on the air (..., 3): outdoors in tens of degrees from the target, sun, people."""
    return torch.cat([(forecast[..., 1:2] - TARGET) / 10, forecast[..., 2:]], -1)


# %% [markdown]
# ## The office
#
# Air and walls store heat, and lose it to each other and to the outside; the sun heats both, people the air.


# %%
class Office(NamedTuple):
    """(air, walls) <- F (air, walls) + G (outdoor, sun, people, heat), exact for steps of an hour."""

    F: torch.Tensor
    G: torch.Tensor

    def step(self, state, disturbance, heat):
        return state @ self.F.mT + torch.cat([disturbance, heat[:, None]], -1) @ self.G.mT


def make_office():
    air, walls = 0.6, 9.0  # capacities in kWh / K
    # Conductances in kW / K: from air to outdoors, from air to walls, from walls to outdoors.
    loss, through, outside = 0.08, 0.4, 0.06
    A = np.array([[-(loss + through) / air, through / air], [through / walls, -(through + outside) / walls]])
    B = np.array([[loss / air, 0.3 / air, 1 / air, 1 / air], [outside / walls, 0.7 / walls, 0, 0]])
    F = expm(np.block([[A, B], [np.zeros((4, 6))]]))[:2]
    return Office(*map(torch.from_numpy, (F[:, :2], F[:, 2:])))


class World(NamedTuple):
    """What comes to each office (offices, hours, 4): occupancy, temperature outdoors, sun, heat of people."""

    data: torch.Tensor

    def forecast(self, office, hour):
        """The next hours of a plan (n, horizon, 4); office and hour are arrays (n,)."""
        return self.data[office[:, None], hour[:, None] + torch.arange(HORIZON)]


def make_world(offices, days, rng):
    """Winter: fronts come and go within days, clouds within hours; people from eight to six on weekdays."""
    hours = days * DAY + HORIZON
    hour, day = np.arange(hours) % DAY, np.arange(hours) // DAY

    def wander(memory):
        """Gaussian noise of unit variance that forgets within so many hours."""
        keep, z = np.exp(-1 / memory), rng.standard_normal((offices, hours))
        for t in range(1, hours):
            z[:, t] = keep * z[:, t - 1] + (1 - keep**2) ** 0.5 * z[:, t]
        return z

    outdoor = 1 + 4 * wander(40) + 3 * np.cos(2 * np.pi * (hour - 15) / 24)
    sun = 3 * np.clip(np.sin(np.pi * (hour - 8) / 9), 0, None) * np.clip(0.5 + 0.5 * wander(6), 0, 1)
    weekday = np.broadcast_to(day % 7 < 5, (offices, hours))
    # Comfort counts at the end of each hour, from the one in which people arrive: it has to be warm by then.
    occupied = (hour >= 7) & (hour < 18) & weekday
    people = ((hour >= 8) & (hour < 18) & weekday) * (1 + 0.2 * wander(3))
    return World(torch.from_numpy(np.stack([occupied.astype(float), outdoor, sun, people], -1)))


# %% [markdown]
# ## The old controller, and its clones
#
# A timer switches to day from five in the morning to ten in the evening, weekends too, as nobody has set it
# otherwise. A heating curve follows the temperature outdoors, and the error of the air corrects it.
#
# A controller is a function of what is seen, and a memory, to heat (n,) and the memory for the next hour.


# %%
def old_controller(seen, memory=None):
    is_day = (seen.hour % DAY >= 5) & (seen.hour % DAY < 22)
    setpoint = torch.where(is_day, TARGET, NIGHT)
    return (0.08 * (setpoint - seen.forecast[:, 0, 1]) + 0.8 * (setpoint - seen.air)).clamp(0, HIGH), None


def features(seen):
    """What the plans see, and the time of the day."""
    clock = nn.functional.one_hot(seen.hour % DAY, DAY)
    return torch.cat([seen.air[:, None] - TARGET, seen.forecast.flatten(1), clock], -1)


def ridge(logs, penalty=1e-3):
    """The clone that is linear in what the plans see."""
    X = features(logs.seen)
    mean, heat = X.mean(0), logs.heat.mean()
    Z = X - mean
    gram = Z.mT @ Z + penalty * len(Z) * torch.eye(Z.shape[1])
    weights = torch.linalg.solve(gram, Z.mT @ (logs.heat - heat))
    return lambda seen, memory=None: (((features(seen) - mean) @ weights + heat).clamp(0, HIGH), None)


def perceptron(logs, epochs=60):
    """The clone that is a network of two hidden layers."""
    X = features(logs.seen)
    mean, scale = X.mean(0), X.std(0) + 1e-3
    net = nn.Sequential(nn.Linear(X.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(X)).split(64):
            loss = (net((X[rows] - mean) / scale)[:, 0] - logs.heat[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lambda seen, memory=None: (net((features(seen) - mean) / scale)[:, 0].clamp(0, HIGH), None)


# %% [markdown]
# ## The closed loop


# %%
class Path(NamedTuple):
    """What happened (n, hours): air after each hour, heat in it, occupancy; state (n, 2) after all."""

    air: torch.Tensor
    heat: torch.Tensor
    occupied: torch.Tensor
    state: torch.Tensor

    @property
    def cost(self):
        """Heat in kWh a day, and discomfort in the same unit (n,)."""
        return DAY * (self.heat + WEIGHT * self.occupied * (self.air - TARGET).square()).mean(-1)


def simulate(control, office, world, place, start, state, hours, title=""):
    """The path from `state` (n, 2) on, in the offices `place` (n,) of the world, from the hours `start`."""
    memory, last, rows = None, None, []
    for t in tqdm(range(hours), desc=f"{title:<22}", unit="hour", ncols=88, disable=not title):
        air, forecast = state[:, 0], world.forecast(place, start + t)
        heat, memory = control(Seen(air, forecast, start + t, last), memory)
        state, last = (
            office.step(state, forecast[:, 0, 1:], heat),
            Hour(air, heat, disturbance(forecast[:, 0])),
        )
        rows.append((state[:, 0], heat, forecast[:, 0, 0]))
    return Path(*(torch.stack(part, 1) for part in zip(*rows, strict=True)), state)


class Logs(NamedTuple):
    """Hours of the old controller (n, ...): what it saw and did, and the air after it."""

    seen: Seen
    heat: torch.Tensor
    after: torch.Tensor

    @property
    def hour(self):
        return Hour(self.seen.air, self.heat, disturbance(self.seen.forecast[:, 0]))


def record(office, world, hours):
    zero, hour = torch.zeros(1, dtype=int), torch.arange(hours)
    path = simulate(old_controller, office, world, zero, zero, torch.full((1, 2), NIGHT), hours)
    air, heat, forecast = path.air[0], path.heat[0], world.forecast(torch.zeros(hours, dtype=int), hour)
    last = Hour(air[:-2], heat[1:-1], disturbance(forecast[1:-1, 0]))
    return Logs(Seen(air[1:-1], forecast[2:], hour[2:], last), heat[2:], air[2:])


def part(record, choose):
    """A record with some of its rows."""
    return type(record)(*(part(z, choose) if isinstance(z, tuple) else choose(z) for z in record))


# %% [markdown]
# ## Three models of the office
#
# One by rule of thumb, which knows no sun and no people; one by least squares on the logs; and one that is
# learned through the layer.


# %%
def rule_of_thumb():
    return Model(*(torch.tensor([part]) for part in ([0.6], [0.9], [1.0, 0.0, 0.0])))


def least_squares(logs):
    """A, B_u and B_d with the least error of the change of the air from hour to hour.

    Changes, since what stays is left to the correction by the error of the last hour.
    """
    air, heat, disturbance = (now - before for now, before in zip(logs.hour, logs.seen.last, strict=True))
    X = torch.cat([air[:, None], heat[:, None], disturbance], -1)
    weights = torch.linalg.lstsq(X, (logs.after - logs.seen.air)[:, None]).solution.mT
    return Model(weights[:, :1], weights[:, 1:2], weights[:, 2:])


def imitate(mpc, logs, epochs):
    """Fit the heat of the plans to that of the logs, and the air that the model expects to what came."""
    optimizer = torch.optim.Adam(mpc.parameters(), lr=3e-2)
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(logs.heat)).split(32)]
    for rows in tqdm(batches, desc=f"{'MPC: imitation':<22}", unit="step", ncols=88):
        chosen = part(logs, lambda z, rows=rows: z[rows])
        of_heat = mpc(chosen.seen)[0] - chosen.heat
        of_air = mpc.step(chosen.hour) + mpc.miss(chosen.seen.air, chosen.seen.last) - chosen.after
        loss = (of_heat.square() + STATE_WEIGHT * of_air.square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def tune(mpc, office, world, size):
    """Lower the cost of a day in the closed loop by its gradient, day after day.

    Several offices go through the winter of the logs, each from another day on. Every day starts where the
    last one ended: the walls are as warm as this controller has left them, not as the old one did.
    """
    optimizer = torch.optim.Adam(mpc.parameters(), lr=5e-3)
    hours = 7 * size.weeks * DAY
    start = torch.arange(size.offices) * (7 * size.weeks) // size.offices * DAY
    state, place = torch.full((size.offices, 2), NIGHT), torch.zeros_like(start)
    costs = []
    with tqdm(range(size.days), desc=f"{'MPC: tuning':<22}", unit="day", ncols=88) as bar:
        for day in bar:
            path = simulate(mpc, office, world, place, (start + day * DAY) % hours, state, DAY)
            state, loss = path.state.detach(), path.cost.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            costs.append(loss.item())
            bar.set_postfix(cost=f"{np.mean(costs[-7:]):.1f}")
    return costs


# %% [markdown]
# ## The experiment


# %%
class Score(NamedTuple):
    """Of a test: heat in kWh a day, error of the occupied air, reward; squared error of actions; the path.

    `seconds` is the time of the training.
    """

    title: str
    heat: float
    error: float
    reward: float
    action: float
    seconds: float
    path: Path


def judge(titles, seconds, control, office, world, logs, days):
    """Drive the offices of the test with each controller, and ask it what to do in the situations of logs."""
    count, places = len(titles), len(world.data)
    place = torch.arange(places).repeat(count)
    state, start = torch.full((len(place), 2), NIGHT), torch.zeros_like(place)
    with torch.no_grad():
        path = simulate(control, office, world, place, start, state, days * DAY, titles[0].split(":")[0])
        heat, _ = control(part(logs.seen, lambda z: torch.cat([z] * count)))
    actions = (heat.reshape(count, -1) - logs.heat).square().mean(-1)
    paths = [Path(*parts) for parts in zip(*(z.split(places) for z in path), strict=True)]
    numbers = zip(titles, paths, actions.tolist(), seconds, strict=True)
    return [Score(title, *measure(path), action, time, path) for title, path, action, time in numbers]


def measure(path):
    error = (path.occupied * (path.air - TARGET).square()).sum() / path.occupied.sum()
    return [number.item() for number in (DAY * path.heat.mean(), error.sqrt(), -path.cost.mean())]


def run(seed=0, size=None):
    """Make office, weather and logs, train all controllers, and drive the same offices with each."""
    size, rng = size or Size(), np.random.default_rng(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the matrices are small: threads would only wait for one another
    torch.set_default_dtype(torch.float64)
    office, days = make_office(), 7 * size.weeks
    world, other, test = (make_world(*shape, rng) for shape in ((1, days), (1, 7), size.test))
    logs, other_logs = record(office, world, days * DAY), record(office, other, 7 * DAY)
    scores = []

    def add(titles, control, seconds):
        scores.extend(judge(titles, seconds, control, office, test, other_logs, size.test[1]))

    add(["old controller"], old_controller, [0.0])
    for title, train in (("clone: ridge", ridge), ("clone: perceptron", perceptron)):
        clone, seconds = timed(train, logs)
        add([title], clone, [seconds])
    models = {"MPC: rule of thumb": rule_of_thumb()}
    models["MPC: least squares"], seconds = timed(least_squares, logs)
    mpc = MPC(rule_of_thumb())
    _, imitating = timed(imitate, mpc, logs, size.epochs)
    models["MPC: imitation"] = mpc.model()
    costs, tuning = timed(tune, mpc, office, world, size)
    models["MPC: imitation, tuned"] = mpc.model()
    # All of them at once: a batch of offices, each with its model.
    fleet = MPC(Model(*map(torch.stack, zip(*models.values(), strict=True))))
    add([*models], fleet, [0.0, seconds, imitating, imitating + tuning])
    return Result(scores, test, models, costs)


def timed(work, *arguments):
    start = time.perf_counter()
    return work(*arguments), time.perf_counter() - start


class Result(NamedTuple):
    """Scores, weather of the test, A, B_u and B_d by name, and costs of the days of tuning."""

    scores: list
    test: World
    models: dict
    costs: list


def print_table(result):
    print(f"\n{'method':<22}{'kWh/day':>9}{'error, K':>10}{'reward':>9}{'action MSE':>12}{'seconds':>9}")
    for title, heat, error, reward, action, seconds, _ in result.scores:
        print(f"{title:<22}{heat:>9.1f}{error:>10.3f}{reward:>9.2f}{action:>12.3f}{seconds:>9.1f}")
    print(f"\n{'model':<22}{'A':>9}{'B_u':>10}{'B_d: outdoors, sun, people':>30}")
    for title, model in result.models.items():
        a, b, *d = torch.cat(model, -1)[0].tolist()
        print(f"{title:<22}{a:>9.3f}{b:>10.3f}" + "".join(f"{number:>10.3f}" for number in d))


# %% [markdown]
# ## The picture

# %%
INK, GREY, ORANGE, BLUE = "#212b36", "#8795a5", "#e8590c", "#1c7ed6"
COLORS = {"old controller": GREY, "MPC: imitation, tuned": ORANGE}


def draw_paths(upper, lower, result, days=4):
    """The first office of the test: air and heat with the old controller and with the tuned one."""
    hours = np.arange(min(days * DAY, result.scores[0].path.air.shape[1]))
    for score in result.scores:
        if score.title in COLORS:
            style = {"color": COLORS[score.title], "lw": 2, "label": score.title}
            upper.plot((hours + 1) / DAY, score.path.air[0, hours], **style)
            lower.step(hours / DAY, score.path.heat[0, hours], where="post", **style)
    people = result.test.data[0, hours, 3].numpy()
    for axes in (upper, lower):
        for hour in np.flatnonzero(people):
            axes.axvspan(hour / DAY, (hour + 1) / DAY, color="#fff3bf", lw=0)
        axes.set(xlim=(0, len(hours) / DAY), xticks=np.arange(len(hours) // DAY) + 0.5)
        axes.spines[["top", "right"]].set_visible(False)
    upper.axhline(TARGET, color=INK, lw=0.8, ls=":")
    upper.set(
        ylim=(15, 24),
        ylabel="air (\u00b0C)",
        xticklabels=[],
        title="An office of the test; yellow: people are there",
    )
    upper.legend(frameon=False, loc="upper left", ncols=2)
    names = ["Monday", "Tuesday", "Wednesday", "Thursday"]
    lower.set(ylabel="heat (kW)", xticklabels=names[: len(hours) // DAY])


def draw_scores(axes, result):
    """Heat and discomfort of all controllers, one bar each."""
    titles = [score.title for score in result.scores]
    colors = [COLORS.get(title, BLUE) for title in titles]
    for place, label, values in (
        (axes[0], "heat (kWh a day)", [score.heat for score in result.scores]),
        (axes[1], "error with people there (K)", [score.error for score in result.scores]),
    ):
        bars = place.barh(titles, values, color=colors, height=0.62)
        place.bar_label(bars, [f"{value:.3g}" for value in values], padding=4)
        place.invert_yaxis()
        place.set(xlabel=label, xticks=[])
        place.margins(x=0.2)
        place.tick_params(left=False)
        place.spines[:].set_visible(False)
    axes[1].set_yticklabels([])


def draw(result, path):
    with plt.rc_context({"font.size": 12, "text.color": INK, "axes.titlesize": 14}):
        figure = plt.figure(figsize=(14, 6.2), layout="constrained")
        grid = figure.add_gridspec(2, 3, width_ratios=(2.4, 1, 1), height_ratios=(1.3, 1))
        draw_paths(figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0]), result)
        draw_scores([figure.add_subplot(grid[:, column]) for column in (1, 2)], result)
        figure.savefig(path, dpi=150)
        plt.close(figure)


# %%
def parse_arguments():
    parser = argparse.ArgumentParser(description="Learn to heat an office by model predictive control.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="hvac.png", help="where to write the picture")
    parser.add_argument("--quick", action="store_true", help="fewer logs, days and offices")
    return parser.parse_args([] if IS_NOTEBOOK else None)


if __name__ == "__main__":
    arguments = parse_arguments()
    result = run(arguments.seed, QUICK if arguments.quick else Size())
    print_table(result)
    draw(result, arguments.output)
    print(f"\nPicture: {arguments.output}")
