"""A writer on hypertables: rows of every chunk, compressed ones too, new chunks, compression, recompression, decompression."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

import asyncpg

_PASSING = (asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError, asyncpg.SerializationError)
"""What concurrent statements of the writer itself do to one another."""
_OWN = (
    "of a compressed chunk",
    "already compressed",
    "not compressed",
    "chunk not found",
    "does not exist",
    "tuple concurrently",
    "could not be found",
    "being",
)
"""Errors of two of the writer's own statements that meet in one chunk."""


class Writer:
    """Runs random statements on `connections` sessions until left; `failures` are statements that failed for no reason of their own."""

    def __init__(self, uri: str, seed: int, *, connections: int = 3, pause: float = 0.02, days: int = 8) -> None:
        self._uri = uri
        self._rng = random.Random(seed)
        self._connections = connections
        self._pause = pause
        self._days = days
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.ensure_future(self._work(self._rng.getrandbits(32))) for _ in range(self._connections)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _work(self, seed: int) -> None:
        rng = random.Random(seed)
        connection = await asyncpg.connect(self._uri)
        try:
            while not self._stop.is_set():
                name = rng.choices([n for n, _ in _STATEMENTS], [w for _, w in _STATEMENTS])[0]
                await self._run(connection, rng, name)
                await asyncio.sleep(self._pause * rng.random() * 2)
        finally:
            await connection.close()

    async def _run(self, connection: asyncpg.Connection, rng: random.Random, name: str) -> None:
        statement = _MAKE[name](self, rng)
        try:
            if name.startswith("refresh") or rng.random() < 0.5:
                await connection.execute(statement)
            else:
                async with connection.transaction():
                    await connection.execute(statement)
                    await connection.execute(_MAKE["insert metrics"](self, rng))
                    if rng.random() < 0.1:
                        raise _Undo
        except _Undo:
            self.done["rolled back"] += 1
        except asyncpg.PostgresError as error:
            if not isinstance(error, _PASSING) and not any(own in str(error) for own in _OWN):
                self.failures.append(f"{statement}: {error!r}")
        else:
            self.done[name] += 1

    # statements

    def time(self, rng: random.Random) -> str:
        return f"'2026-01-01'::timestamptz + interval '{rng.randrange(self._days * 24 * 60 * 60)} s'"

    def day(self, rng: random.Random) -> int:
        return rng.randrange(self._days)


class _Undo(Exception):
    pass


def _insert_metrics(w: Writer, rng: random.Random) -> str:
    rows = ", ".join(
        f"({w.time(rng)}, {rng.randrange(1, 9)}, {rng.random():.4f}, {rng.choice(('null', repr('x' * rng.randrange(40)), repr('y')))})"
        for _ in range(rng.choice((1, 5, 50)))
    )
    return f"insert into metrics values {rows} on conflict (device, time) do update set temp = excluded.temp, note = excluded.note"


def _update_metrics(w: Writer, rng: random.Random) -> str:
    day, device = w.day(rng), rng.randrange(1, 9)
    return f"""update metrics set temp = temp + 1, note = 'u' || device
               where device = {device} and time >= '2026-01-01'::timestamptz + interval '{day} days {rng.randrange(20)} hours'
                 and time < '2026-01-01'::timestamptz + interval '{day} days {rng.randrange(4, 24)} hours'"""


def _delete_metrics(w: Writer, rng: random.Random) -> str:
    return f"""delete from metrics where device = {rng.randrange(1, 9)} and time = (
                   select time from metrics where time >= {w.time(rng)} order by time limit 1)"""


def _delete_batches(w: Writer, rng: random.Random) -> str:
    day = w.day(rng)
    return f"""delete from metrics where device = {rng.randrange(1, 9)}
               and time >= '2026-01-01'::timestamptz + interval '{day} days'
               and time < '2026-01-01'::timestamptz + interval '{day + 1} days'"""


def _move_metrics(w: Writer, rng: random.Random) -> str:
    return f"""update metrics set device = 1 + (device + {rng.randrange(7)}) % 8 where time = (
                   select time from metrics m where time >= {w.time(rng)} and not exists (
                       select from metrics o where o.time = m.time and o.device <> m.device) order by time limit 1)"""


def _chunk(rng: random.Random, w: Writer, function: str) -> str:
    day = w.day(rng)
    return f"""select {function} from show_chunks('metrics', newer_than => '2026-01-01'::timestamptz + interval '{day} days',
                                                older_than => '2026-01-01'::timestamptz + interval '{day + 1} days') c"""


def _insert_events(w: Writer, rng: random.Random) -> str:
    rows = ", ".join(
        f"({w.time(rng)}, 'e{rng.randrange(5)}', '{{\"a\": {rng.randrange(3)}}}')" for _ in range(rng.choice((1, 20)))
    )
    return f"insert into events values {rows}"


def _insert_readings(w: Writer, rng: random.Random) -> str:
    rows = ", ".join(
        f"({w.time(rng)}, {rng.randrange(1, 30)}, {rng.randrange(1000)}.{rng.randrange(100):03})"
        for _ in range(rng.choice((1, 20)))
    )
    return f"insert into app.readings values {rows} on conflict do nothing"


def _update_readings(w: Writer, rng: random.Random) -> str:
    return f"update app.readings set val = val + 1 where sensor = {rng.randrange(1, 30)} and time < {w.time(rng)}"


def _delete_readings(w: Writer, rng: random.Random) -> str:
    return f"delete from app.readings where sensor = {rng.randrange(1, 30)} and time > {w.time(rng)}"


_MAKE: dict[str, Callable[[Writer, random.Random], str]] = {
    "insert metrics": _insert_metrics,
    "update metrics": _update_metrics,
    "delete metrics": _delete_metrics,
    "delete batches": _delete_batches,
    "move metrics": _move_metrics,
    "compress": lambda w, rng: _chunk(rng, w, "compress_chunk(c, if_not_compressed => true)"),
    "decompress": lambda w, rng: _chunk(rng, w, "decompress_chunk(c, if_compressed => true)"),
    "insert events": _insert_events,
    "truncate": lambda w, rng: f"truncate {rng.choice(('events', 'app.readings'))}",
    "delete events": lambda w, rng: f"delete from events where kind = 'e{rng.randrange(5)}' and ts > {w.time(rng)}",
    "insert readings": _insert_readings,
    "update readings": _update_readings,
    "delete readings": _delete_readings,
    "plain": lambda w, rng: (
        f"insert into plain values ({rng.randrange(500)}, 'w') on conflict (id) do update set v = plain.v || 'x'"
    ),
    "refresh": lambda w, rng: "call refresh_continuous_aggregate('hourly', '2026-01-01', '2026-01-10')",
}
_STATEMENTS = [
    ("insert metrics", 12), ("update metrics", 4), ("delete metrics", 4), ("delete batches", 1), ("move metrics", 2),
    ("compress", 1), ("decompress", 0.5), ("insert events", 4), ("delete events", 1), ("insert readings", 5),
    ("update readings", 2), ("delete readings", 0.5), ("plain", 4), ("refresh", 0.3), ("truncate", 0.3),
]  # fmt: skip
