"""Who is awake when, in the faults that stop a process and let another take over."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from tests.chaos import stops
from tests.chaos.fault import Missed, Scene
from tests.chaos.stops import SecondProducer, StopConsumer


class FakeProcess:
    def __init__(self, pid: int, events: list[str]) -> None:
        self.pid = pid
        self._events = events
        self.is_gone = False

    def send_signal(self, number: signal.Signals) -> None:
        if self.is_gone:
            raise psutil.NoSuchProcess(self.pid)
        self._events.append(f"{number.name} {self.pid}")


class FakeFleet:
    """So many processes of any kind; what happens to them is told in `events`."""

    def __init__(self, count: int) -> None:
        self.events: list[str] = []
        self._processes = [FakeProcess(pid, self.events) for pid in range(1, count + 1)]
        self.dies_at_once = False

    def choose(self, kind: str, rng: random.Random, *, but: Collection[int] = ()) -> FakeProcess | None:
        return next((each for each in self._processes if each.pid not in but), None)

    def processes(self, kind: str) -> list[FakeProcess]:
        return self._processes

    @asynccontextmanager
    async def extra(self, kind: str) -> AsyncIterator[object]:
        self.events.append(f"another {kind} begins")
        if not self.dies_at_once:
            self._processes.append(FakeProcess(99, self.events))
        yield SimpleNamespace(is_running=not self.dies_at_once)
        self.events.append("it ends")


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> FakeFleet:
    async def pass_at_once(seconds: float) -> None:
        fleet.events.append(f"{'more' if seconds > stops.SESSION_SECONDS else 'less'} than a session")

    fleet = FakeFleet(1)
    monkeypatch.setattr(stops, "asyncio", SimpleNamespace(sleep=pass_at_once, timeout=asyncio.timeout))
    return fleet


def scene_of(fleet: FakeFleet) -> Scene:
    world = SimpleNamespace(uri=lambda *_: "postgresql://127.0.0.1:1/nobody")
    return Scene(cast(Any, world), cast(Any, fleet), "nobody", 3.0)


class Sure(random.Random):
    """Takes what has a chance, and the middle of a range."""

    def random(self) -> float:
        return 0.0

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


async def test_an_old_producer_wakes_up_beside_its_living_successor(fleet: FakeFleet) -> None:
    await SecondProducer(Sure()).inject(scene_of(fleet))
    assert [each for each in fleet.events if "session" not in each] == [
        "SIGSTOP 1",
        "another producer begins",
        "SIGCONT 1",
        "it ends",
    ]
    assert "session" in fleet.events[fleet.events.index("SIGCONT 1") + 1]


async def test_a_successor_that_does_not_live_is_no_hit(fleet: FakeFleet) -> None:
    fleet.dies_at_once = True
    with pytest.raises(Missed, match="the successor does not run"):
        await SecondProducer(Sure()).inject(scene_of(fleet))
    assert "SIGCONT 1" in fleet.events


async def test_the_only_consumer_stops_for_longer_than_its_session_beside_another(fleet: FakeFleet) -> None:
    await StopConsumer(Sure()).inject(scene_of(fleet))
    assert fleet.events == [
        "SIGSTOP 1",
        "another consumer begins",
        "more than a session",
        "SIGCONT 1",
        "less than a session",
        "it ends",
    ]


def answering(monkeypatch: pytest.MonkeyPatch, *answers: object) -> None:
    """Let source and target answer so, one question after the other; the last answer holds."""
    left = list(answers)

    async def ask(*_: object) -> object:
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(stops, "_ask", ask)


async def test_a_consumer_that_held_nothing_is_no_hit(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, 0)
    with pytest.raises(Missed, match="held no claim"):
        await StopConsumer(Sure()).inject(scene_of(fleet))
    assert fleet.events == ["SIGSTOP 1", "SIGCONT 1"]
    answering(monkeypatch, 2, 0)
    assert "held 2 and then 0 claims" in await StopConsumer(Sure()).inject(scene_of(fleet))


async def test_producers_that_read_no_slot_are_no_hit(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, None)
    with pytest.raises(Missed, match="nobody read the slot"):
        await SecondProducer(Sure()).inject(scene_of(fleet))
    answering(monkeypatch, None, 7)
    assert "by pid None, then by pid 7" in await SecondProducer(Sure()).inject(scene_of(fleet))


async def test_where_two_consumers_run_no_other_is_started(fleet: FakeFleet) -> None:
    fleet.processes("consumer").append(FakeProcess(2, fleet.events))
    await StopConsumer(Sure()).inject(scene_of(fleet))
    assert fleet.events == ["SIGSTOP 1", "more than a session", "SIGCONT 1", "less than a session"]


async def test_most_stops_are_short(fleet: FakeFleet) -> None:
    for seed in range(60):
        await StopConsumer(random.Random(seed)).inject(scene_of(fleet))
    assert 8 < sum(each == "more than a session" for each in fleet.events) < 40


async def test_one_that_a_fault_keeps_stopped_is_not_stopped_again(fleet: FakeFleet) -> None:
    scene = scene_of(fleet)
    scene.stopped.add(1)
    with pytest.raises(Missed, match="nobody there"):
        await StopConsumer(Sure()).inject(scene)
    assert fleet.events == []


async def test_one_that_has_just_ended_is_no_hit(fleet: FakeFleet) -> None:
    [victim] = fleet.processes("consumer")
    victim.is_gone = True
    scene = scene_of(fleet)
    with pytest.raises(Missed, match="nobody there any more"):
        await StopConsumer(Sure()).inject(scene)
    assert not scene.stopped
