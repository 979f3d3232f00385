"""Which faults of servers count: those that somebody met."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import asyncpg
import pytest

from tests.chaos import fleet_faults, server_faults
from tests.chaos.fault import LogEnd, Missed, Scene
from tests.chaos.fleet_faults import ClockJump
from tests.chaos.server_faults import BrokerDiskFull, BrokerReadOnly, LockTarget, NoConnections, TargetDiskFull


class Told:
    """A proxy past which the server tells of so many errors."""

    def __init__(self, count: int) -> None:
        self._count = count

    @contextmanager
    def counting_errors(self, sqlstate: str) -> Iterator[Counter[bytes]]:
        yield Counter({sqlstate.encode(): self._count})

    def cut(self) -> None:
        pass


class Full:
    """A world whose disks are full at once and whose broker's log is here."""

    def __init__(self, folder: Path, count: int) -> None:
        self.disks = {"target": folder, "broker": folder}
        self.proxies = {"target": Told(count)}
        self.busy = {"target": asyncio.Lock(), "broker": asyncio.Lock()}
        self.log = folder / "broker.log"
        self.broker: Any = None
        self.restart_broker: Any = None

    def logs(self) -> dict[str, Path]:
        return {"broker.log": self.log}

    def uri(self, *_: object) -> str:
        return "postgresql://127.0.0.1:1/nobody"


def scene_of(world: object, fleet: object = None) -> Scene:
    return Scene(cast(Any, world), cast(Any, fleet), "nobody", 3.0)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Let waits end at once; gives what lets something happen meanwhile."""
    happens: list[Callable[[], None]] = []

    async def pass_at_once(seconds: float) -> None:
        for each in happens:
            each()

    loop = SimpleNamespace(time=iter(range(100)).__next__)
    fake = SimpleNamespace(sleep=pass_at_once, get_running_loop=lambda: loop)
    monkeypatch.setattr(server_faults, "asyncio", fake)
    monkeypatch.setattr(fleet_faults, "asyncio", fake)
    monkeypatch.setattr(server_faults, "_fill", lambda *_: None)
    return happens.append


def locking(monkeypatch: pytest.MonkeyPatch, *, fails_at: str) -> None:
    class Connection:
        async def execute(self, statement: str) -> None:
            if fails_at in statement:
                raise asyncpg.LockNotAvailableError("canceling statement due to lock timeout")

    @asynccontextmanager
    async def direct(*_: object) -> AsyncIterator[Connection]:
        yield Connection()

    monkeypatch.setattr(server_faults, "direct", direct)


async def test_a_lock_that_was_not_got_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    locking(monkeypatch, fails_at="lock table")
    with pytest.raises(Missed, match="could not be locked"):
        await LockTarget(random.Random(1)).inject(scene_of(None))
    locking(monkeypatch, fails_at="rollback")
    assert "until LockNotAvailableError" in await LockTarget(random.Random(1)).inject(scene_of(None))


@pytest.mark.parametrize("fault", [TargetDiskFull, NoConnections])
async def test_what_the_target_told_nobody_is_no_hit(
    fault: type[TargetDiskFull | NoConnections], tmp_path: Path
) -> None:
    await fault(random.Random(1)).inject(scene_of(Full(tmp_path, 1)))
    with pytest.raises(Missed, match="nobody"):
        await fault(random.Random(1)).inject(scene_of(Full(tmp_path, 0)))


async def test_a_full_disk_that_the_broker_does_not_tell_of_is_no_hit(
    tmp_path: Path, at_once: Callable[[Callable[[], None]], None]
) -> None:
    world = Full(tmp_path, 0)
    world.log.write_text("java.io.IOException: No space left on device\n")
    with pytest.raises(Missed, match="nobody wanted more"):
        await BrokerDiskFull(random.Random(1)).inject(scene_of(world))

    def meet() -> None:
        with world.log.open("a") as log:
            log.write("java.io.IOException: No space left on device\n")

    at_once(meet)
    await BrokerDiskFull(random.Random(1)).inject(scene_of(world))


@pytest.mark.parametrize(
    ("tells", "runs", "restarts"), [(True, True, 1), (True, False, 1), (False, False, 1), (False, True, 0)]
)
async def test_a_broker_whose_disk_was_read_only_is_started_again_once_it_is_mended(
    tells: bool,
    runs: bool,
    restarts: int,
    tmp_path: Path,
    at_once: Callable[[Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    monkeypatch.setattr(server_faults, "lay_read_only", lambda _: events.append("read-only"))
    monkeypatch.setattr(server_faults, "lift_read_only", lambda _: events.append("writable"))

    async def restart() -> None:
        events.append("started")

    async def to_its_end(work: Coroutine[None, None, None]) -> None:
        await work

    monkeypatch.setattr(server_faults, "to_its_end", to_its_end)
    world = Full(tmp_path, 0)
    world.broker = SimpleNamespace(is_running=runs)
    world.restart_broker = restart
    if tells:
        at_once(lambda: world.log.write_text("java.nio.file.FileSystemException: x: Read-only file system"))
    injecting = BrokerReadOnly(random.Random(1)).inject(scene_of(world))
    if tells:
        assert ("lived" in await injecting) == runs
    else:
        with pytest.raises(Missed, match="wanted to write nothing"):
            await injecting
    assert events == ["read-only", "writable", *["started"] * restarts]


async def test_a_clock_that_nobody_wore_for_long_enough_is_no_hit() -> None:
    pids = iter([1, 1, 1, 2, 3, 4, 5, 6])
    worn: list[int | None] = []
    fleet = SimpleNamespace(
        clocks=lambda: {"migrate": SimpleNamespace(set=worn.append)}, wearer=lambda _: next(pids), no_clocks=""
    )
    jump = ClockJump(random.Random(3))
    jump.offsets = [5, -5]
    jump.rng = cast(Any, SimpleNamespace(choice=lambda names: names[0], uniform=lambda *_: 2.0))
    assert "lived through 1" in await jump.inject(scene_of(None, fleet))
    with pytest.raises(Missed, match="did not live through"):
        await jump.inject(scene_of(None, fleet))


def test_a_log_tells_what_came_since(tmp_path: Path) -> None:
    path, word = tmp_path / "log", re.compile("word")
    assert not LogEnd(path).tells(word)
    path.write_text("a word\n")
    log = LogEnd(path)
    assert not log.tells(word)
    path.write_text("word\n")  # begun anew
    assert log.tells(word)
