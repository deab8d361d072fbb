"""The fuzzer's targets accept their own seeds and notice what they are there to notice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from inclavare.errors import IntegrityError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from targets import TARGETS, Accepted, Target


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_made_seeds_are_accepted(name: str) -> None:
    target = TARGETS[name]
    for seed in target.made():
        target.parse(seed)
        target.run(seed)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_short_and_long_inputs_raise_nothing_else(name: str) -> None:
    target = TARGETS[name]
    for data in (
        b"",
        b"\0",
        b"\xff" * 64,
        bytes(5000),
        *(seed[:-1] for seed in target.seeds()),
        *(seed + b"\0" for seed in target.seeds()),
    ):
        target.run(data)


def test_accepted_damage_and_crashes_are_noticed() -> None:
    with pytest.raises(Accepted):
        Target(lambda data: data, lambda value: value + b"\0").run(b"x")
    with pytest.raises(ZeroDivisionError):
        Target(lambda data: 1 // len(data)).run(b"")

    def refuse(data: bytes) -> None:
        raise IntegrityError("no", id="x.y")

    Target(refuse).run(b"")
