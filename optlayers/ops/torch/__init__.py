"""The seam for PyTorch: see `optlayers.ops.Ops` for what each function does."""

# ruff: noqa: F403

from .arrays import *
from .closures import *
from .context import *
from .control import *
from .leaf import *
from .linear import *
from .rules import *
