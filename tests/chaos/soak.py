"""One migration kept in replay for long, under a heavy writer and steady kills: memory, lag, and every row at the end."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg
import psutil

from tests.chaos import checks
from tests.chaos.fault import Fault, Scene
from tests.chaos.faults import KillConsumer, KillCoordinator, KillProducer
from tests.chaos.fleet import Kind
from tests.chaos.net_faults import Cut, CutAfterBytes, LoseCommitAnswer
from tests.chaos.plan import Plan, Step
from tests.chaos.round import Round
from tests.chaos.world import World
from tests.support.workload import TABLES

_KINDS: tuple[Kind, ...] = ("producer", "consumer", "migrate")
_FAULTS: tuple[type[Fault], ...] = (KillConsumer, KillConsumer, KillConsumer, Cut, CutAfterBytes, LoseCommitAnswer)
_RARE_FAULTS: tuple[type[KillProducer | KillCoordinator], ...] = (KillProducer, KillCoordinator)
_RARE_SECONDS = 600.0
"""Between kills of producer and coordinator, so that their memory has time to grow."""
_SAMPLE_SECONDS = 2.0
_KEPT_ROWS = 100_000
_SCHEMA = """
    create table app.stream (id bigint primary key, n int not null default 0, at timestamptz not null default clock_timestamp(), note text);
    create table app.marker (id int primary key, at timestamptz not null);
    insert into app.marker values (1, clock_timestamp());
"""
_WRITE = """
    insert into app.stream (id, note) select i, repeat('x', 80) from generate_series($1::bigint, $1 + $2 - 1) i
"""


@dataclass(slots=True)
class Samples:
    """What was measured: bytes by process and age, lag in seconds and in bytes of WAL, what the broker's log takes of its disk."""

    memory: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    lag_seconds: list[float] = field(default_factory=list)
    slot_bytes: list[int] = field(default_factory=list)
    broker_disk: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the first one, bytes of the broker's log."""
    rows: int = 0

    def summary(self) -> dict[str, Any]:
        """Give start, median and maximum of each kind's memory in MiB, by how much those that lived for long grew, and the longest life's
        least memory in every five minutes: what it holds for good, without what it holds while it lags."""
        kinds: dict[str, Any] = {}
        for kind in _KINDS:
            runs = [samples for (of, _), samples in self.memory.items() if of == kind]
            values = [size for samples in runs for _, size in samples]
            if values:
                kinds[kind] = {
                    "processes": len(runs),
                    "start": _mebibytes(median(samples[0][1] for samples in runs)),
                    "median": _mebibytes(median(values)),
                    "max": _mebibytes(max(values)),
                    "growth": [growth for samples in runs if (growth := _growth(samples)) is not None],
                    "each_5_min": max((_each_5_minutes(samples) for samples in runs), key=len),
                }
        lags = sorted(self.lag_seconds) or [0.0]
        return {
            "memory_mib": kinds,
            "lag_seconds": {
                "median": round(median(lags), 2),
                "p99": round(lags[len(lags) * 99 // 100], 2),
                "max": round(lags[-1], 2),
            },
            "slot_mib_max": _mebibytes(max(self.slot_bytes, default=0)),
            "broker_disk_mib": {
                "max": _mebibytes(max((size for _, size in self.broker_disk), default=0)),
                "each_5_min": _at_each_5_minutes(self.broker_disk),
            },
            "stream_rows": self.rows,
        }


def _mebibytes(size: float) -> float:
    return round(size / 2**20, 1)


def _growth(samples: list[tuple[float, int]]) -> str | None:
    """Say for a process that lived for five minutes or more how its memory went, from its second minute to its last one."""
    life = samples[-1][0]
    if life < 300:
        return None
    early = median(size for age, size in samples if 60 <= age < 120)
    late = median(size for age, size in samples if age > life - 60)
    return f"{_mebibytes(early)} to {_mebibytes(late)} in {life / 60:.0f} min"


def _each_5_minutes(samples: list[tuple[float, int]]) -> list[float]:
    slots: dict[int, int] = {}
    for age, size in samples:
        slot = int(age // 300)
        slots[slot] = min(size, slots.get(slot, size))
    return [_mebibytes(size) for size in slots.values()]


def _at_each_5_minutes(samples: list[tuple[float, int]]) -> list[float]:
    """Give the first value of every five minutes, and the last of all."""
    slots: dict[int, int] = {}
    for age, size in samples:
        slots.setdefault(int(age // 300), size)
    return [_mebibytes(size) for size in [*slots.values(), *(size for _, size in samples[-1:])]]


def disk_use(folder: Path) -> int:
    """Give the bytes that a folder's files take of the disk, holes not counted; files that go meanwhile take none."""
    used = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                used += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return used


class Soak(Round):
    """A round whose replay lasts."""

    def __init__(
        self,
        world: World,
        plan: Plan,
        folder: Path,
        *,
        minutes: float,
        rows_per_second: int,
        spared: frozenset[Kind] = frozenset(),
    ) -> None:
        """`spared` are the kinds whose oldest process is never killed, so that its memory is seen over the whole time."""
        super().__init__(world, plan, folder)
        self._spared = spared
        self.samples = Samples()
        self._minutes = minutes
        self._rows_per_second = rows_per_second
        self._rng = random.Random(plan.seed)

    async def _prepare(self) -> None:
        connection = await asyncpg.connect(self.source)
        try:
            await connection.execute(_SCHEMA)
        finally:
            await connection.close()

    async def _compare(self, *, source_crashed_late: bool) -> list[str]:
        return await checks.compare_digests(self.source, self.target, (*TABLES, "app.stream", "app.marker"))

    async def _inject_until_cutover(self, scene: Scene) -> None:
        await self._until_phase("replay")
        scene.fleet.spared = self._spared
        rare_faults = tuple(fault for fault in _RARE_FAULTS if fault.kind not in self._spared)
        beside = [asyncio.create_task(work) for work in (self._stream(), self._mark(), self._measure(scene))]
        try:
            deadline = time.monotonic() + self._minutes * 60
            rare = time.monotonic() + _RARE_SECONDS
            while time.monotonic() < deadline:
                for task in beside:
                    if task.done():
                        task.result()
                possible = _FAULTS
                if rare_faults and time.monotonic() > rare:
                    rare, possible = time.monotonic() + _RARE_SECONDS, rare_faults
                fault = self._rng.choice(possible)(random.Random(self._rng.getrandbits(64)))
                await self._inject(scene, Step("replay", self._rng.uniform(10, 30), fault, overlaps=False))
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _stream(self) -> None:
        """Insert, update and delete in one table, so many changes a second; its size stays."""
        count = max(1, self._rows_per_second // 12)  # four times a second, each row inserted, updated and deleted
        connection = await asyncpg.connect(self.source)
        try:
            first, due = 1, time.monotonic()
            while True:
                async with connection.transaction():
                    await connection.execute(_WRITE, first, count)
                    await connection.execute(
                        "update app.stream set n = n + 1 where id >= $1 and id < $2", first - count, first
                    )
                    await connection.execute("delete from app.stream where id < $1", first - _KEPT_ROWS)
                first += count
                self.samples.rows += 3 * count
                due = max(due + 0.25, time.monotonic() - 1)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        finally:
            connection.terminate()

    async def _mark(self) -> None:
        """Write the time into a row of its own each half second; how old it is on the target is the lag."""
        connection = await asyncpg.connect(self.source)
        try:
            while True:
                await connection.execute("update app.marker set at = clock_timestamp()")
                await asyncio.sleep(0.5)
        finally:
            connection.terminate()

    async def _measure(self, scene: Scene) -> None:
        source, target = await asyncpg.connect(self.source), await asyncpg.connect(self.target)
        began = time.monotonic()
        try:
            while True:
                used = await asyncio.to_thread(disk_use, self.world.broker_log)
                self.samples.broker_disk.append((time.monotonic() - began, used))
                for kind in _KINDS:
                    for process in scene.fleet.processes(kind):
                        with suppress(psutil.NoSuchProcess):
                            age = time.time() - process.create_time()
                            self.samples.memory[kind, process.pid].append((age, process.memory_info().rss))
                lag = await target.fetchval("select extract(epoch from clock_timestamp() - at)::float8 from app.marker")
                self.samples.lag_seconds.append(lag)
                self.samples.slot_bytes.append(
                    await source.fetchval(
                        """select coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)), 0)::bigint
                           from pg_replication_slots where slot_name = $1""",
                        self.name,
                    )
                )
                await asyncio.sleep(_SAMPLE_SECONDS)
        finally:
            source.terminate()
            target.terminate()
