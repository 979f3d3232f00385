"""Turns of the event loop: as long as others can wait, whatever a row costs."""

from __future__ import annotations

import pytest

from live_migration.producer import turn
from live_migration.producer.turn import Turn


class Work:
    """Takes the whole messages of what it is given, each byte in `seconds_per_byte`."""

    def __init__(self, seconds_per_byte: float, message_bytes: int = 132) -> None:
        self.seconds_per_byte = seconds_per_byte
        self.message_bytes = message_bytes
        self.now = 0.0
        self.there: int | None = None

    def take(self, byte_count: int) -> int:
        taken = byte_count if self.there is None else min(byte_count, self.there)
        taken = max(1, taken // self.message_bytes) * self.message_bytes
        self.now += taken * self.seconds_per_byte
        return taken


def after(work: Work, turns: int, of: Turn | None = None) -> Turn:
    of = of or Turn(clock=lambda: work.now)
    for _ in range(turns):
        of.take(work.take)
    return of


@pytest.mark.parametrize("message_bytes", [95, 132, 301, 7_000, 9_000, 15_000])
@pytest.mark.parametrize("nanoseconds", [4, 10, 30, 60])
def test_a_turn_takes_a_millisecond(nanoseconds: int, message_bytes: int) -> None:
    work = Work(nanoseconds * 1e-9, message_bytes)
    begun = after(work, 90)
    fitting = min(turn.TURN_SECONDS / work.seconds_per_byte, turn.MOST_BYTES)
    assert begun.byte_count == pytest.approx(fitting, rel=0.05, abs=message_bytes)


def test_what_costs_next_to_nothing_is_still_taken_in_turns() -> None:
    assert after(Work(1e-12), 90).byte_count == pytest.approx(turn.MOST_BYTES, rel=0.01)


def test_what_is_slow_still_gets_on() -> None:
    assert after(Work(1e-5), 30).byte_count == turn.LEAST_BYTES


@pytest.mark.parametrize(("before", "now"), [(4e-9, 40e-9), (1e-5, 30e-9)], ids=["dearer", "cheaper"])
def test_rows_of_another_cost_make_other_turns(before: float, now: float) -> None:
    work = Work(before)
    begun = after(work, 90)
    work.seconds_per_byte = now
    after(work, 90, begun)
    assert begun.byte_count * work.seconds_per_byte == pytest.approx(turn.TURN_SECONDS, rel=0.05)


def test_little_that_is_there_says_nothing() -> None:
    work = Work(4e-9)
    begun = after(work, 30)
    before = begun.byte_count
    work.there, work.seconds_per_byte = 100, 1e-6
    after(work, 30, begun)
    assert begun.byte_count == before
