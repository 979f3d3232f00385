"""Pauses between reads: long where a backlog gathers meanwhile, and never where that takes from what comes."""

from __future__ import annotations

import math
import random

import pytest

from live_migration.common.settings import KIB, MIB
from live_migration.producer import pace
from live_migration.producer.pace import Pace


class Sender:
    """Produces `rate` bytes a second, of which its kernel and ours hold at most `room` while nobody reads."""

    def __init__(self, rate: float, room: float = math.inf) -> None:
        self.rate, self.room = rate, room
        self.now = 0.0
        self.sent = 0.0
        self.pauses: list[float] = []

    def read(self, pace: Pace, seconds: float) -> float:
        """Read for so long; give the bytes a second that came."""
        start, before = self.now, self.sent
        self.pauses.clear()
        while self.now < start + seconds:
            pause = pace.next_pause(int(self.sent))
            self.pauses.append(pause)
            self.now += pause + 0.0001
            self.sent += min(self.room, self.rate * (pause + 0.0001))
        return (self.sent - before) / (self.now - start)


def reading(sender: Sender) -> Pace:
    return Pace(may_be_long=True, clock=lambda: sender.now)


def share_of_long(sender: Sender) -> float:
    return sum(each for each in sender.pauses if each > 2 * pace.SHORT_SECONDS) / sum(sender.pauses)


@pytest.mark.parametrize("rate", [0, 1000, 400_000, 900_000])
def test_a_steady_flow_is_never_left_to_gather(rate: float) -> None:
    sender = Sender(rate)
    sender.read(reading(sender), 20)
    assert set(sender.pauses) == {pace.SHORT_SECONDS}


@pytest.mark.parametrize("rate", [2 * MIB, 10 * MIB, 26 * MIB])
def test_a_backlog_is_read_in_gulps(rate: float) -> None:
    sender = Sender(rate)
    reader = reading(sender)
    sender.read(reader, 1)
    assert sender.read(reader, 20) == pytest.approx(rate, rel=0.01)
    assert share_of_long(sender) > 0.9
    assert max(sender.pauses) * rate <= 1.1 * pace.GULP_BYTES or max(sender.pauses) == pace.LONG_SECONDS
    assert max(sender.pauses) <= pace.LONG_SECONDS


def test_what_gathers_stays_below_what_can_be_held() -> None:
    sender = Sender(300 * MIB)
    sender.read(reading(sender), 20)
    assert max(sender.pauses) * sender.rate < 1.1 * pace.GULP_BYTES


@pytest.mark.parametrize("rate", [3 * MIB, 26 * MIB, 300 * MIB])
@pytest.mark.parametrize("room", [20 * KIB, 64 * KIB, 256 * KIB, 600 * KIB, 4 * MIB])
def test_a_sender_with_small_buffers_is_not_held_up(rate: float, room: float) -> None:
    sender = Sender(rate, room)
    reader = reading(sender)
    at_its_best = min(rate, room / (pace.SHORT_SECONDS + 0.0001))
    assert sender.read(reader, 30) >= 0.75 * at_its_best


def test_the_end_of_a_backlog_is_the_end_of_its_pauses() -> None:
    sender = Sender(26 * MIB)
    reader = reading(sender)
    sender.read(reader, 3)
    assert reader.is_long
    sender.rate = 400_000
    sender.read(reader, 0.1)
    assert share_of_long(sender) < 0.5
    assert set(sender.pauses[1:]) == {pace.SHORT_SECONDS}
    sender.read(reader, 2 * pace.KEPT_SECONDS)
    assert not reader.is_long


def test_a_backlog_that_stood_still_goes_on_in_gulps() -> None:
    sender = Sender(26 * MIB)
    reader = reading(sender)
    sender.read(reader, 3)
    sender.now += 0.1  # its process did not run
    sender.read(reader, 0.1)
    assert share_of_long(sender) > 0.9


def test_what_is_there_already_is_read_at_once() -> None:
    sender = Sender(26 * MIB)
    assert reading(sender).next_pause(MIB, may_be_more=True) == 0


def test_over_a_network_nothing_is_left_to_gather() -> None:
    sender = Sender(26 * MIB)
    sender.read(Pace(may_be_long=False, clock=lambda: sender.now), 5)
    assert set(sender.pauses) == {pace.SHORT_SECONDS}


@pytest.mark.parametrize("quiet", [0.05, 0.13, 0.21, 0.5, 1.17, 5.0])
@pytest.mark.parametrize("trickle", [0, 100_000])
def test_a_backlog_is_read_in_gulps_from_its_beginning(quiet: float, trickle: float) -> None:
    """Whenever it begins: what came before, however long, says nothing of its pauses."""
    sender = Sender(trickle)
    reader = reading(sender)
    sender.read(reader, quiet)
    sender.rate = 26 * MIB
    sender.read(reader, 0.1)
    assert share_of_long(sender) > 0.6
    sender.read(reader, 3)
    assert share_of_long(sender) > 0.8


def test_a_second_backlog_begins_as_the_first_did() -> None:
    """Nothing is received in between, and so nobody asks for a pause."""
    sender = Sender(26 * MIB)
    reader = reading(sender)
    sender.read(reader, 0.15)
    sender.now += 5
    sender.read(reader, 3)
    assert share_of_long(sender) > 0.8


@pytest.mark.parametrize(("a_second", "size"), [(200, 2 * KIB), (1000, 600)])
def test_transactions_now_and_then_are_no_backlog(a_second: float, size: int) -> None:
    rng = random.Random(1)
    sender = Sender(0)
    reader = reading(sender)
    due, late = rng.expovariate(a_second), 0.0
    while sender.now < 20:
        pause = reader.next_pause(int(sender.sent))
        late += pause if pause > pace.SHORT_SECONDS else 0
        sender.now += pause + 0.0001
        while due < sender.now:
            sender.sent += size
            due += rng.expovariate(a_second)
    assert late < 0.02 * sender.now
