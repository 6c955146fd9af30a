"""From a modelling language to a framework-free `Program`: no torch and no jax in here."""

from .cvxpy import canonicalize
from .program import AffineMap, Block, Output, Program

__all__ = ["AffineMap", "Block", "Output", "Program", "canonicalize"]
