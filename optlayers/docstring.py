"""Documentation that the two frontends have in common is written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def continues(first: object) -> Callable[[T], T]:
    """Decorator: the docstring of `first`, which both frontends share, comes before the object's own."""

    def decorate(target: T) -> T:
        target.__doc__ = f"{inspect.getdoc(first)}\n\n{inspect.getdoc(target)}"
        return target

    return decorate
