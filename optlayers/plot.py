"""Pictures of what solvers did; needs Matplotlib."""

from __future__ import annotations

from typing import Any

import numpy as np

from .layers.fixed_point import FixedPointInfo
from .status import Status


def plot_convergence(info: FixedPointInfo, axes: Any = None, label: str | None = None) -> Any:
    """Draw the residuals of a batch against the number of steps, and return the Matplotlib axes.

    A line for the median of the samples, a dark band for their middle half and a light one for all. Crosses
    mark where samples ended that did not converge.

    Args:
        info: from `fixed_point(..., return_info=True)` or `DEQ.solve`.
        axes: where to draw; None makes a new figure.
        label: of the line, for a legend.

    Example:
        >>> import torch
        >>> from optlayers.torch import DEQ, plot_convergence
        >>> deq = DEQ(lambda z, x: torch.tanh(0.9 * z + x))
        >>> axes = plot_convergence(deq.solve(torch.ones(5, 3))[1])
        >>> axes.get_yscale()
        'log'
    """
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.figure(layout="constrained").add_subplot()
    status, iterations, history = (_numpy(x) for x in (info.status, info.iterations, info.history))
    end = max(1, int(iterations.max()))
    steps, history = np.arange(1, end + 1), np.where(np.isfinite(history), history, np.nan)[:, :end]
    least, lower, median, upper, most = np.nanpercentile(history, (0, 25, 50, 75, 100), axis=0)
    (line,) = axes.plot(steps, median, label=label)
    axes.fill_between(steps, least, most, color=line.get_color(), alpha=0.15, lw=0)
    axes.fill_between(steps, lower, upper, color=line.get_color(), alpha=0.3, lw=0)
    failed = (status != Status.SOLVED.code) & (iterations > 0)
    ends = iterations[failed]
    axes.plot(ends, history[failed, ends - 1], "x", color=line.get_color())
    axes.set(xlabel="step", ylabel="relative residual |f(z) - z| / |f(z)|", yscale="log")
    return axes


def _numpy(x: Any) -> np.ndarray:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
