"""Leaves as text: what is written is read back, and nothing is loaded for the sake of a text."""

import json
import sys

import numpy as np
import pytest

from optlayers.cones import Cones
from optlayers.layers.conic import ConicSolve
from optlayers.ops.encoding import decode, encode
from optlayers.solvers.host import Clarabel
from optlayers.solvers.interior_point import InteriorPoint

LEAVES = [
    ConicSolve(),
    ConicSolve(Cones(1, 2, (3, 4), (2,), 1, ((0.1, 0.9),)), True, False, (InteriorPoint(),), 1e-7, True),
    ConicSolve(solvers=(Clarabel(options={"max_threads": np.int64(2), "verbose": False}),)),
    ConicSolve(eps=float("inf")),
]


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: type(leaf).__name__)
def test_round_trip(leaf):
    again = decode(encode(leaf))
    assert again == leaf and type(again) is type(leaf)


def test_other_settings_are_other_texts():
    assert encode(ConicSolve(eps=1e-9)) != encode(ConicSolve(eps=np.nextafter(1e-9, 1).item()))


def test_what_cannot_be_written():
    with pytest.raises(TypeError, match="not of <function"):
        encode(ConicSolve(solvers=(lambda x: x,)))


@pytest.mark.parametrize("name", ["antigravity:fly", "os:system", "optlayers.cones:project", "builtins:dict"])
def test_only_known_dataclasses_are_read(name):
    with pytest.raises(ValueError, match=name):
        decode(json.dumps({name: {}}))
    assert "antigravity" not in sys.modules
