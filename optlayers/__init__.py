"""Differentiable optimisation, equilibrium and differential-equation layers for PyTorch and JAX.

Import a frontend: `optlayers.torch` or `optlayers.jax`. This package itself imports neither.
"""

__version__ = "0.1.0"
