"""Leaves as text: what an operator can carry, and what a saved program is read back from."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def encode(x: Any) -> str:
    """Text from which `decode` makes an equal object.

    Raises:
        TypeError: what is neither number, string, tuple, mapping nor dataclass of such.

    Example:
        >>> from optlayers.cones import Cones
        >>> decode(encode(Cones(soc=(3,)))) == Cones(soc=(3,))
        True
    """
    return json.dumps(_plain(x))


def decode(text: str) -> Any:
    """The object that was encoded.

    Raises:
        ValueError: a class that is not loaded here; nothing is imported for the sake of a file.
    """
    return _object(json.loads(text))


def _plain(x: Any) -> Any:
    if is_dataclass(x) and not isinstance(x, type):
        kind = type(x)
        return {
            f"{kind.__module__}:{kind.__qualname__}": {
                f.name: _plain(getattr(x, f.name)) for f in fields(x) if f.init
            }
        }
    if isinstance(x, tuple):
        return [_plain(item) for item in x]
    if isinstance(x, Mapping):
        return {"": {key: _plain(value) for key, value in x.items()}}
    if isinstance(x, np.generic):
        return x.item()
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise TypeError(f"a leaf is made of numbers, strings, tuples, mappings and dataclasses, not of {x!r}")


def _object(x: Any) -> Any:
    if isinstance(x, list):
        return tuple(map(_object, x))
    if not isinstance(x, dict):
        return x
    ((name, content),) = x.items()
    content = {key: _object(value) for key, value in content.items()}
    return _class(name)(**content) if name else content


def _class(name: str) -> type:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and is_dataclass(found)):
        raise ValueError(f"{name} is not known here; import {module} before the program is loaded")
    return found
