"""Which solver works on a problem, and with which settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..cones import Cones
from .admm import ADMM
from .base import Solver
from .host import OSQP, SCS, Clarabel, Host
from .interior_point import InteriorPoint

NAMED = {"ADMM": ADMM, "CLARABEL": Clarabel, "DIFFCP": SCS, "OSQP": OSQP, "SCS": SCS}
ALIASES = {
    "eps_abs": "eps",
    "eps_rel": "eps",
    "tol_gap_abs": "eps",
    "tol_gap_rel": "eps",
    "max_iters": "max_iter",
}
EPS = 1e-9
AUTOMATIC = (None, "auto")


def choose(cones: Cones, linear: bool, solver: Any, rescue: bool = False) -> tuple[Solver, ...]:
    """The solvers to try in turn on what the earlier ones leave unfinished; the last may come to the rescue.

    By default, from measurements on random problems of 10 to 100 variables: on a linear program ADMM rarely
    finds the vertex in 100 iterations, the interior point in 10 to 15. On quadratic ones 25 iterations of it
    and the active-set finish solve 9 of 10 with up to one row per variable, 100 nearly all, at a third of the
    interior point's time; with two or more rows per variable most are left to it. rho = 2 suits the
    equilibrated P, of size one: with 0.5 nearly all of 128 portfolios took more than 25, with 1 nine in ten,
    with 2 four; with 4 fewer still, but more of dense problems with many rows. Where 3 of Newton's steps do
    not end them, 5 rarely do: 21 families took 0.95 of the time with 3. On curved cones up to 7 of
    Newton's steps end 15 iterations with rho = 0.3 for all problems of most families, in 0.85 of the time of
    20 iterations and 5 steps; with 12, or with rho = 0.1 or 1, more problems need a second round. Those that
    4 rounds leave, mostly of exponential cones with exponents of 100 and more, Clarabel solves in a tenth to
    a hundredth of the time that more rounds would take. And it solves one problem in a third of the time that
    these take for one, of exponential and power cones up to 4, up to the sizes that `most` tells.
    """
    if solver in AUTOMATIC:
        few, last = ((Clarabel(most=10_000),), (Clarabel(),)) if rescue else ((), ())
        if cones.rows:
            limit, most = {"max_iter": 60} if rescue else {}, 25_000 if cones.exp or cones.pow else 10_000
            admm = ADMM(check_every=15, rho=0.3, refine=7, **limit)
            # The first solver's equilibration serves the next one, and its steps a warm start.
            few = tuple(replace(s, most=most, refine=admm.refine, scaling=admm.scaling) for s in few)
            return (*few, admm, *last)
        first = () if linear else (ADMM(max_iter=100, rho=2.0, refine=3),)
        return (*first, *few, InteriorPoint(), *last)
    if isinstance(solver, str):
        if solver.upper() not in NAMED:
            raise ValueError(
                f"solver {solver!r} is unknown; expected 'auto', one of {sorted(NAMED)} or a record"
            )
        return (NAMED[solver.upper()](),)
    if isinstance(solver, InteriorPoint) and cones.rows:
        raise ValueError("InteriorPoint solves problems with linear constraints only; use ADMM or Clarabel")
    if isinstance(solver, Solver) and not isinstance(solver, type):
        return (solver,)
    raise ValueError(
        f"solver must be 'auto', one of {sorted(NAMED)}, or a record such as ADMM(), got {solver!r}"
    )


def configure(solvers: tuple[Solver, ...], settings: Mapping[str, Any]) -> tuple[tuple[Solver, ...], float]:
    """The solvers with `settings`, and the accuracy `eps` among them.

    A name that is a field of a solver sets it; a host solver takes other names as options of its library.
    Names without meaning here are reported and ignored, as settings written for another library would be.
    """
    eps = EPS
    for name, value in settings.items():
        key = ALIASES.get(name, name)
        if key == "eps":
            eps = float(value)
            continue
        known = [key in {field.name for field in fields(solver)} for solver in solvers]
        # The rescue behind other solvers takes no options: a misspelt name would go to it unnoticed.
        hosts = [isinstance(s, Host) and len(solvers) == 1 and key not in ALIASES.values() for s in solvers]
        if not any(known) and not any(hosts):
            warnings.warn(f"solver_args: no solver here has a setting {name!r}; it is ignored", stacklevel=5)
        solvers = tuple(
            replace(s, **{key: value}) if k else s.with_option(key, value) if h else s
            for s, k, h in zip(solvers, known, hosts, strict=True)
        )
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    return solvers, eps
