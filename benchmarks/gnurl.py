"""Gnu-RL's imitation stage (Chen et al. 2019) on its published logs, with its published losses beside.

    python benchmarks/gnurl.py FOLDER [--seed 0] [--epochs 20]

FOLDER holds `Sim-TMY2.npz`, logs of a building of five zones in steps of 15 minutes, and `Imit_loss_rl.npz`,
the losses of each epoch that were published with them (github.com/INFERLab/Gnu-RL, agent/results); each has
the arrays `values` and `columns`. A plan over three hours

    minimise    sum_t eta_t (x_t - setpoint_t)^2 / 2 + u_t
    subject to  x_t = A x_{t-1} + B_u u_t + B_d d_t,   0 <= u_t <= 5

with eta_t = 5 while the building is occupied and 0.1 otherwise, is fitted to what the controller did: u is by
how much the supply air was heated, x the indoor temperature, d the weather and the occupancy, each scaled to
[0, 1]. The first 70 % of the logs are for training, the rest for validation.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from optlayers.torch import CvxpyLayer

HORIZON, HIGH, ETA, BATCH, RATE, TRAINING = 12, 5.0, 5.0, 128, 5e-4, 0.7
STATE_WEIGHT = 20.0  # of the squared error of the next state in the loss, beside that of the action
WEATHER = (
    "Outdoor Temp.",
    "Outdoor RH",
    "Wind Speed",
    "Wind Direction",
    "Diff. Solar Rad.",
    "Direct Solar Rad.",
)


class Logs(NamedTuple):
    """For each step (n, ...): state, action and next state (n,), and what the plan sees (n, horizon, ...)."""

    state: Tensor
    action: Tensor
    after: Tensor
    disturbances: Tensor
    occupied: Tensor
    setpoint: Tensor


def read_logs(path):
    data = np.load(path)
    columns = dict(zip(data["columns"].tolist(), torch.from_numpy(data["values"].T).double(), strict=True))
    windows = lambda z: torch.cat([z, z[-1:].expand(HORIZON - 2, *z.shape[1:])]).unfold(0, HORIZON, 1)
    d = torch.stack([columns[name] for name in (*WEATHER, "Occupancy Flag")], -1)
    d = (d - d.amin(0)) / (d.amax(0) - d.amin(0))
    heated = columns["Sys Out Temp."] - columns["MA Temp."]
    setpoint, occupied = columns["Indoor Temp. Setpoint"], columns["Occupancy Flag"]
    state = columns["Indoor Temp."]
    parts = (windows(d).mT, windows(occupied)[..., None], windows(setpoint)[..., None])
    return Logs(state[:-1], heated[:-1], state[1:], *parts)


class Plan(nn.Module):
    """The plan. At first the zone forgets a tenth, warms by 0.3 K per K of the supply air, and sees no d."""

    def __init__(self, disturbances):
        super().__init__()
        x, u = cp.Variable((HORIZON, 1)), cp.Variable((HORIZON, 1))
        A, B, drift = cp.Parameter((1, 1)), cp.Parameter((1, 1)), cp.Parameter((HORIZON, 1))
        weight, pull = cp.Parameter((HORIZON, 1), nonneg=True), cp.Parameter((HORIZON, 1))
        cost = cp.sum(cp.multiply(weight, cp.square(x))) / 2 - cp.sum(cp.multiply(pull, x)) + cp.sum(u)
        dynamics = x == np.eye(HORIZON, k=-1) @ x @ A + u @ B + drift
        problem = cp.Problem(cp.Minimize(cost), [dynamics, u >= 0, u <= HIGH])
        parameters, settings = [A, B, drift, weight, pull], {"eps": 1e-6}
        self.layer = CvxpyLayer(problem, parameters, [x, u], solver_args=settings, order=1)
        self.A, self.B_u = (nn.Parameter(torch.tensor([[value]])) for value in (0.9, 0.3))
        self.B_d = nn.Parameter(torch.zeros(disturbances, 1))

    def forward(self, logs, warm_start=None):
        drift = logs.disturbances @ self.B_d
        first = drift[:, :1] + logs.state[:, None, None] * self.A
        weight = torch.where(logs.occupied > 0, ETA, 0.1)
        data = (self.A, self.B_u, torch.cat([first, drift[:, 1:]], 1), weight, weight * logs.setpoint)
        return self.layer.solve(*data, warm_start=warm_start)


def part(record, rows):
    return type(record)(*(z[rows] for z in record))


def errors(solution, logs):
    """Squared errors of the next state and of the action (n,)."""
    x, u = (z[:, 0, 0] for z in solution.variables)
    return (x - logs.after).square(), (u - logs.action).square()


def train(model, logs, epochs):
    """Each problem starts from its own solution of the epoch before."""
    optimizer, solutions = torch.optim.RMSprop(model.parameters(), lr=RATE), None
    for _ in tqdm(range(epochs), unit="epoch", ncols=88):
        for rows in torch.randperm(len(logs.state)).split(BATCH):
            solution = model(part(logs, rows), solutions and Point(*(z[rows] for z in solutions)))
            state, action = errors(solution, part(logs, rows))
            optimizer.zero_grad()
            (STATE_WEIGHT * state + action).mean().backward()
            optimizer.step()
            if solutions is None:
                empty = (torch.full((len(logs.state), z.shape[-1]), torch.nan) for z in solution[1:4])
                solutions = Point(*empty)
            for kept, z in zip(solutions, solution[1:4], strict=True):
                kept[rows] = z.detach()


class Point(NamedTuple):
    """What a solution can be started from: x, slacks s and multipliers y of the cone program."""

    x: Tensor
    s: Tensor
    y: Tensor


def main():
    parser = argparse.ArgumentParser(description="The imitation stage of Gnu-RL on its published logs.")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.folder is None or not (arguments.folder / "Sim-TMY2.npz").is_file():
        print("Skipped: give the folder with the published logs; see the first lines of this script.")
        return
    torch.manual_seed(arguments.seed)
    torch.set_default_dtype(torch.float64)
    logs = read_logs(arguments.folder / "Sim-TMY2.npz")
    count = int(TRAINING * len(logs.state))
    training, validation = part(logs, slice(count)), part(logs, slice(count, None))
    model, start = Plan(len(WEATHER) + 1), time.perf_counter()
    train(model, training, arguments.epochs)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        ours = [e.mean().item() for logs in (training, validation) for e in errors(model(logs), logs)]
    published = np.load(arguments.folder / "Imit_loss_rl.npz")["values"][-1]
    print(f"\n{'':<24}{'training':>20}{'validation':>22}")
    print(f"{'squared error of':<24}{'state':>10}{'action':>10}{'state':>12}{'action':>10}{'seconds':>10}")
    for name, losses, taken in (
        ("Gnu-RL, as published", published, "-"),
        ("CvxpyLayer", ours, f"{seconds:.0f}"),
    ):
        a, b, c, d = losses
        print(f"{name:<24}{a:>10.3f}{b:>10.3f}{c:>12.3f}{d:>10.3f}{taken:>10}")
    parts = [*model.A[0].tolist(), *model.B_u[0].tolist()], model.B_d[:, 0].tolist()
    print("\nA, B_u: {}; B_d: {}".format(*(", ".join(f"{z:.3f}" for z in part) for part in parts)))


if __name__ == "__main__":
    main()
