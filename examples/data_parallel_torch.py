# %% [markdown]
# # Train on several processes, with PyTorch
#
# A linear map turns features f into scores z, and a quadratic program the scores into an allocation
#
#     x(z) = argmin_x |x - z|^2  subject to  sum(x) = 1,  0 <= x <= cap,
#
# whose caps are learned, too, and shared by all problems of a batch. DistributedDataParallel gives each
# process a part of every batch and averages the gradients. The layer needs nothing for that: it holds no
# state. The first process then trains alone on whole batches, and the losses have to be the same:
#
#     torchrun --standalone --nproc-per-node 2 examples/data_parallel_torch.py [--output losses.png] [--quick]

# %%
import argparse
import os
import sys
import time

import cvxpy as cp
import matplotlib
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

IS_NOTEBOOK = "ipykernel" in sys.modules
if not IS_NOTEBOOK:
    matplotlib.use("Agg")

import matplotlib.pyplot as plt

from optlayers.torch import CvxpyLayer

FEATURES, ASSETS, BATCH = 4, 6, 64


# %%
def allocation_layer():
    x, z, cap = cp.Variable(ASSETS), cp.Parameter(ASSETS), cp.Parameter(ASSETS)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - z)), [cp.sum(x) == 1, x >= 0, x <= cap])
    return CvxpyLayer(problem, parameters=[z, cap], variables=[x])


class Allocation(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.scores = nn.Linear(FEATURES, ASSETS, dtype=torch.float64)
        self.slack = nn.Parameter(torch.randn(ASSETS, dtype=torch.float64))
        self.layer = allocation_layer()

    def forward(self, features):
        cap = 0.2 + nn.functional.softplus(self.slack) / 4  # more than 1 / ASSETS: there is an allocation
        return self.layer(self.scores(features), cap)[0]


def batches(steps):
    """Features and the answers of a hidden model."""
    hidden = Allocation(seed=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        features = torch.randn(BATCH, FEATURES, dtype=torch.float64, generator=generator)
        yield features, hidden(features).detach()


# %% [markdown]
# Every process makes the same batches and takes its part of them. The mean of the parts' losses is the loss
# of the batch, since the parts have the same size; DistributedDataParallel averages the gradients likewise.


# %%
def train(model, steps, rank=0, processes=1):
    """The loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    part, losses = slice(rank, None, processes), []
    for features, targets in tqdm(batches(steps), total=steps, disable=rank > 0):
        loss = ((model(features[part]) - targets[part]) ** 2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(total.item() / processes)
    return losses


def timed(train, *args):
    start = time.perf_counter()
    return train(*args), time.perf_counter() - start


# %%
def report(runs, output):
    """The table of what each way of training gave, and a picture of the losses."""
    print(f"\n{'method':<14}{'first loss':>12}{'last loss':>12}{'difference':>12}{'seconds':>9}")
    (_, reference, _), *_ = runs
    for name, losses, seconds in runs:
        difference = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        print(f"{name:<14}{losses[0]:>12.6f}{losses[-1]:>12.6f}{difference:>12.1e}{seconds:>9.1f}")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, losses, _), style, width in zip(runs, ("-", "--"), (5, 2), strict=False):
        axes.semilogy(range(1, len(losses) + 1), losses, style, linewidth=width, label=name)
    axes.set(xlabel="step", ylabel="loss", title="Losses do not depend on the number of devices")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=150)


def main(steps, output):
    processes, rank = (
        int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0))
    )
    runs = []
    if processes > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(Allocation(seed=2))
        runs.append((f"{processes} processes", *timed(train, model, steps, rank, processes)))
        dist.barrier()  # a thread of the group that still holds a tensor when Python ends would abort
        dist.destroy_process_group()
    if rank == 0:
        report([("1 process", *timed(train, Allocation(seed=2), steps)), *runs], output)


# %%
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Data-parallel training with torch.")
    parser.add_argument("--output", default="losses.png", help="where to save the picture")
    parser.add_argument("--quick", action="store_true", help="a few steps, for tests")
    options = parser.parse_args([] if IS_NOTEBOOK else None)
    torch.set_num_threads(1)
    main(10 if options.quick else 100, options.output)
