"""Limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inclavare.verdict.limits import Gate, Rate, client_key


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 600), st.lists(st.floats(0, 30), max_size=200))
def test_never_more_than_so_many_a_minute(per_minute: int, pauses: list[float]) -> None:
    clock = Clock()
    rate = Rate(clock=clock)
    allowed: list[float] = []
    for pause in pauses:
        clock.now += pause
        if rate.wait("a", per_minute) == 0:
            allowed.append(clock.now)
    for start in allowed:
        # A full bucket at the beginning, and what has dripped in since.
        assert sum(start <= at < start + 60 for at in allowed) <= 2 * per_minute
    assert len(allowed) <= per_minute + clock.now * per_minute / 60 + 1


def test_waiting_as_long_as_told_is_enough() -> None:
    clock = Clock()
    rate = Rate(clock=clock)
    for _ in range(10):
        assert rate.wait("a", 10) == 0
    wait = rate.wait("a", 10)
    assert 0 < wait <= 6
    clock.now += wait + 1e-6
    assert rate.wait("a", 10) == 0
    assert rate.wait("b", 10) == 0
    assert rate.wait("c", 0) > 0


def test_memory_is_bounded() -> None:
    rate = Rate(clock=Clock(), counted=100)
    for number in range(1000):
        rate.wait(str(number), 1)
    assert len(rate._left) == 100


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::1%eth1", True),
        ("unix", "unix", True),
    ],
)
def test_what_counts_as_one_client(one: str, other: str, same: bool) -> None:
    assert (client_key(one) == client_key(other)) is same


def test_gate() -> None:
    gate = Gate(2)
    assert [gate.enter(), gate.enter(), gate.enter()] == [True, True, False]
    gate.leave()
    assert gate.inside == 1
    assert gate.enter()
