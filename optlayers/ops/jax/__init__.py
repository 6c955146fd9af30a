"""The seam for JAX: see `optlayers.ops.Ops` for what each function does."""

# ruff: noqa: F403

from .arrays import *
from .control import *
from .linear import *
from .rules import *
