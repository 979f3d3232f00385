"""A writer on hypertables: rows of every chunk, compressed ones too, new chunks, compression, recompression, decompression."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

import asyncpg

from tests.e2e.migration import Migration
from tests.timescale.acts import AGGREGATE_MADE, HYPERTABLE_MADE, compress, decompress, watched


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
        self._statements = _STATEMENTS
        self._pids: set[int] = set()
        self._refreshing = asyncio.Lock()  # two refreshes of one aggregate refuse one another
        self.done: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.excused: Counter[str] = Counter()
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
        self._pids.add(connection.get_server_pid())
        try:
            while not self._stop.is_set():
                name = rng.choices([n for n, _ in self._statements], [w for _, w in self._statements])[0]
                await self._run(connection, rng, name)
                await asyncio.sleep(self._pause * rng.random() * 2)
        finally:
            await connection.close()

    async def _run(self, connection: asyncpg.Connection, rng: random.Random, name: str) -> None:
        seen: list[str] = []
        try:
            if name.startswith("refresh"):
                async with self._refreshing:
                    await connection.execute(_MAKE[name](self, rng))
            else:
                async with connection.transaction():
                    seen = await self._act(connection, rng, name)
                    if rng.random() < 0.5:
                        await connection.execute(_MAKE["insert metrics"](self, rng))
                        if rng.random() < 0.1:
                            raise _Undo
        except _Undo:
            self.done["rolled back"] += 1
        except asyncpg.PostgresError as error:
            if self._is_own(error, name):
                self.excused[f"{name}: {error.sqlstate}"] += 1
            else:
                self.failures.append(f"{name}: {error!r} {error.detail}")
        else:
            self.done[name] += 1
            self.seen.update(seen)

    def _is_own(self, error: asyncpg.PostgresError, name: str) -> bool:
        """Tell whether a statement would have failed without a migration, too.

        That is a deadlock among our own sessions, with nobody else's in it; rows that two of them change at the same time (nobody
        else writes any); and a row that is to leave a compressed batch for another segment, which TimescaleDB never allows.
        """
        if isinstance(error, asyncpg.DeadlockDetectedError):
            return {int(pid) for pid in re.findall(r"[Pp]rocess (\d+)", error.detail or "")} <= self._pids
        if name == "move metrics" and isinstance(error, asyncpg.FeatureNotSupportedError):
            return True
        return isinstance(error, asyncpg.SerializationError)

    async def _act(self, connection: asyncpg.Connection, rng: random.Random, name: str) -> list[str]:
        """Do one thing; give what the server says that it did to compressed rows and chunks."""
        if name in _TURN:
            act, table = _TURN[name]
            return await act(connection, table, self.day(rng))
        statement = _MAKE[name](self, rng)
        if name not in _WATCHED:
            await connection.execute(statement)
            return []
        return await watched(connection, statement)

    async def make_newcomers(self) -> None:
        """Make a hypertable and an aggregate on it, with policies, and write to them from now on, like to the others."""
        connection = await asyncpg.connect(self._uri)
        try:
            for statement in NEWCOMERS:
                await connection.execute(statement)
            for act, query in _MADE.items():
                self.seen[act] += await connection.fetchval(query)
        finally:
            await connection.close()
        self._statements = _STATEMENTS + _LATE_STATEMENTS

    async def go_on(self, migration: Migration, count: int) -> None:
        """Wait until `count` things more are done, or a part of the migration fails."""
        before = self.done.total()
        while self.done.total() < before + count:
            migration.raise_failures()
            await asyncio.sleep(0.1)

    async def settle(self) -> None:
        """Leave one chunk compressed, of the old hypertable and of the new, that was not, and one not compressed that was."""
        connection = await asyncpg.connect(self._uri)
        try:
            for table in ("metrics", "late"):
                await connection.execute(
                    f"""insert into {table} (time, device, temp) select t, d, d
                        from generate_series('2026-01-07'::timestamptz, '2026-01-07 20:00', '30 min') t, generate_series(1, 4) d
                        on conflict do nothing"""
                )
                async with connection.transaction():
                    await compress(connection, table, 6)
            async with connection.transaction():
                await decompress(connection, "metrics", 1)
        finally:
            await connection.close()

    # statements

    def time(self, rng: random.Random) -> str:
        return f"'2026-01-01'::timestamptz + interval '{rng.randrange(self._days * 24 * 60 * 60)} s'"

    def day(self, rng: random.Random) -> int:
        return rng.randrange(self._days)


class _Undo(Exception):
    pass


def _insert_metrics(w: Writer, rng: random.Random) -> str:
    rows = ", ".join(
        f"({w.time(rng)}, {rng.randrange(1, 9)}, {rng.randrange(1600) / 16}, {rng.choice(('null', repr('x' * rng.randrange(40)), repr('y')))})"
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
    """Of one day, or of all days: 2.24 takes only those for whole batches."""
    day = w.day(rng)
    times = f"""and time >= '2026-01-01'::timestamptz + interval '{day} days'
                and time < '2026-01-01'::timestamptz + interval '{day + 1} days'"""
    return f"delete from metrics where device = {rng.randrange(1, 9)} {rng.choice((times, times, ''))}"


def _move_metrics(w: Writer, rng: random.Random) -> str:
    return f"""update metrics set device = 1 + (device + {rng.randrange(7)}) % 8 where time = (
                   select time from metrics m where time >= {w.time(rng)} and not exists (
                       select from metrics o where o.time = m.time and o.device <> m.device) order by time limit 1)"""


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


def _insert_samples(w: Writer, rng: random.Random) -> str:
    rows = ", ".join(f"({w.time(rng)}, {_place(rng)}, {rng.randrange(1000)})" for _ in range(rng.choice((1, 20))))
    return f"insert into samples values {rows}"


def _delete_samples(w: Writer, rng: random.Random) -> str:
    """Whole batches where the chunks are compressed."""
    return f"delete from samples where place is not distinct from {_place(rng)} and at < {w.time(rng)}"


def _place(rng: random.Random) -> str:
    """Now and then none, which the hypertable is cut by."""
    return rng.choice(("null", "'p1'", "'p2'", "'p3'", "'p4'"))


def _insert_late(w: Writer, rng: random.Random) -> str:
    rows = ", ".join(
        f"({w.time(rng)}, {rng.randrange(1, 9)}, {rng.randrange(1600) / 16})" for _ in range(rng.choice((1, 20)))
    )
    return f"insert into late values {rows} on conflict do nothing"


_MAKE: dict[str, Callable[[Writer, random.Random], str]] = {
    "insert metrics": _insert_metrics,
    "update metrics": _update_metrics,
    "delete metrics": _delete_metrics,
    "delete batches": _delete_batches,
    "move metrics": _move_metrics,
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
    "insert samples": _insert_samples,
    "update samples": lambda w, rng: (
        f"update samples set v = v + 1 where place is not distinct from {_place(rng)} and at < {w.time(rng)}"
    ),
    "delete samples": _delete_samples,
    "compress samples": lambda w, rng: (
        f"select compress_chunk(c, true) from (select c from show_chunks('samples', older_than => {w.time(rng)}) c order by c desc limit 1) one"
    ),
    "insert late": _insert_late,
    "update late": lambda w, rng: (
        f"update late set temp = temp + 1 where device = {rng.randrange(1, 9)} and time < {w.time(rng)}"
    ),
    "delete late": lambda w, rng: f"delete from late where device = {rng.randrange(1, 9)} and time > {w.time(rng)}",
    "refresh late": lambda w, rng: "call refresh_continuous_aggregate('late_hourly', null, '2026-01-08')",
}
_STATEMENTS = [
    ("insert metrics", 12), ("update metrics", 4), ("delete metrics", 4), ("delete batches", 1), ("move metrics", 2),
    ("compress", 1), ("decompress", 0.5), ("insert events", 4), ("delete events", 1), ("insert readings", 5),
    ("update readings", 2), ("delete readings", 0.5), ("plain", 4), ("refresh", 0.3), ("truncate", 0.3),
    ("insert samples", 3), ("update samples", 0.5), ("delete samples", 0.5), ("compress samples", 0.3),
]  # fmt: skip
_LATE_STATEMENTS = [
    ("insert late", 5),
    ("update late", 2),
    ("delete late", 0.5),
    ("compress late", 0.5),
    ("refresh late", 0.3),
]
_WATCHED = ("update metrics", "delete batches")
_TURN = {"compress": (compress, "metrics"), "decompress": (decompress, "metrics"), "compress late": (compress, "late")}
NEWCOMERS = (
    """create table late (time timestamptz not null, device int not null references devices, temp float8, primary key (device, time))""",
    "select create_hypertable('late', 'time', chunk_time_interval => interval '1 day')",
    "alter table late set (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time')",
    """insert into late select t, d, d
       from generate_series('2026-01-01'::timestamptz, '2026-01-04', '30 min') t, generate_series(1, 4) d""",
    """create materialized view late_hourly with (timescaledb.continuous) as
       select time_bucket('1 hour', time) as hour, device, sum(temp) as sum, count(*) as n from late group by 1, 2 with no data""",
    "call refresh_continuous_aggregate('late_hourly', null, '2026-01-03')",
    "select add_compression_policy('late', interval '1000 days', initial_start => now() + interval '1 day')",
    "select alter_job(add_retention_policy('late', interval '1100 days'), scheduled => false)",
    """select add_continuous_aggregate_policy('late_hourly', null, interval '1 hour', interval '2 hours',
                                              initial_start => now() + interval '1 day')""",
)
_MADE = {
    HYPERTABLE_MADE: "select count(*) from timescaledb_information.hypertables where hypertable_name = 'late'",
    AGGREGATE_MADE: "select count(*) from timescaledb_information.continuous_aggregates where view_name = 'late_hourly'",
}
