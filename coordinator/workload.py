"""The demo's database and its writer: several tables of different kinds, changed at random from several connections."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Self

import asyncpg

SCHEMA = """
    create schema demo;
    create table demo.metrics (
        device integer, at timestamptz, value double precision, note text, primary key (device, at)
    );
    create table demo.events (
        id bigint generated always as identity primary key, kind text not null, body jsonb not null,
        created timestamptz not null default now()
    );
    create index events_kind on demo.events (kind);
    create table demo.orders (id bigserial primary key, customer text not null, total numeric(12, 2) not null default 0);
    create table demo.order_lines (
        order_id bigint not null references demo.orders on delete cascade, line integer not null, article text not null,
        price numeric(10, 2) not null, primary key (order_id, line)
    );
    create table demo.log (at timestamptz not null, level text, message text);   -- no key: rows are only added
"""

_DEVICES = 100
_START = datetime(2026, 1, 1, tzinfo=UTC)

_FILL = """
    insert into demo.metrics
    select i % 100, timestamptz '2026-01-01 00:00:00+00' + make_interval(secs => i / 100), sin(i) * 100, case when i % 10 = 0 then 'note ' || i end
    from generate_series(0, $1::bigint / 2 - 1) i;
    insert into demo.events (kind, body)
    select (array['click', 'view', 'buy', 'leave'])[1 + i % 4],
           jsonb_build_object('user', i % 5000, 'path', '/page/' || i % 300, 'tags', jsonb_build_array('a', i, null))
    from generate_series(1, $1::bigint / 5) i;
    insert into demo.orders (customer, total) select 'customer ' || i % 2000, i % 1000 + 0.50 from generate_series(1, $1::bigint / 20) i;
    insert into demo.order_lines
    select i / 3 + 1, i % 3 + 1, 'article ' || i % 700, i % 90 + 0.99 from generate_series(0, $1::bigint / 20 * 3 - 1) i;
    insert into demo.log
    select timestamptz '2026-01-01 00:00:00+00' + make_interval(secs => i), 'info', 'request ' || i % 100 || ' served' from generate_series(1, $1::bigint / 10) i
"""

_RETRIED = (asyncpg.DeadlockDetectedError, asyncpg.UniqueViolationError, asyncpg.ForeignKeyViolationError)


async def fill(uri: str, row_count: int) -> None:
    """Create the demo's tables with about `row_count` rows in all."""
    connection = await asyncpg.connect(uri)
    try:
        await connection.execute(SCHEMA)
        for statement in _FILL.split(";\n"):
            await connection.execute(statement.replace("$1", str(row_count)))
        await connection.execute("analyze")
    finally:
        await connection.close()


class Writer:
    """Changes the demo's tables from several connections, in transactions of several statements, some rolled back.

    `async with` starts it; `stop` ends it after the present transactions.
    """

    def __init__(self, uri: str, *, connections: int = 4, pause_seconds: float = 0.01, seed: int = 1) -> None:
        self._uri = uri
        self._connections = connections
        self._pause_seconds = pause_seconds
        self._seed = seed
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.commits = 0

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.ensure_future(self._write(number)) for number in range(self._connections)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Return when the last transaction has ended; raise what broke a connection."""
        self._stopping.set()
        tasks, self._tasks = self._tasks, []
        await asyncio.gather(*tasks)

    async def _write(self, number: int) -> None:
        choose = random.Random(f"{self._seed}/{number}")
        connection = await asyncpg.connect(self._uri)
        try:
            while not self._stopping.is_set():
                with suppress(*_RETRIED):
                    await self._transaction(connection, choose)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), choose.random() * 2 * self._pause_seconds)
        finally:
            connection.terminate()

    async def _transaction(self, connection: asyncpg.Connection, choose: random.Random) -> None:
        transaction = connection.transaction()
        await transaction.start()
        try:
            for _ in range(choose.choice((1, 1, 2, 5))):
                await choose.choice(_STATEMENTS)(connection, choose)
        except _RETRIED:
            await transaction.rollback()
            raise
        if choose.random() < 0.05:
            await transaction.rollback()
        else:
            await transaction.commit()
            self.commits += 1


async def _add_metrics(connection: asyncpg.Connection, choose: random.Random) -> None:
    at = datetime.now(UTC)
    rows = [
        (device, at + timedelta(microseconds=choose.randrange(10**6)), choose.random(), None) for device in range(20)
    ]
    await connection.executemany("insert into demo.metrics values ($1, $2, $3, $4)", rows)


async def _correct_metrics(connection: asyncpg.Connection, choose: random.Random) -> None:
    await connection.execute(
        "update demo.metrics set value = value + 1, note = 'corrected' where device = $1 and at >= $2 and at < $2 + interval '10 s'",
        choose.randrange(_DEVICES),
        _START + timedelta(seconds=choose.randrange(5_000)),
    )


async def _delete_metrics(connection: asyncpg.Connection, choose: random.Random) -> None:
    await connection.execute(
        "delete from demo.metrics where device = $1 and at >= $2 and at < $2 + interval '3 s'",
        choose.randrange(_DEVICES),
        _START + timedelta(seconds=choose.randrange(5_000)),
    )


async def _add_event(connection: asyncpg.Connection, choose: random.Random) -> None:
    body = json.dumps({"user": choose.randrange(5_000), "note": "ü" * choose.randrange(400), "tags": []})
    await connection.execute("insert into demo.events (kind, body) values ('live', $1)", body)


async def _change_event(connection: asyncpg.Connection, choose: random.Random) -> None:
    await connection.execute(
        "update demo.events set body = body || '{\"seen\": true}', kind = 'seen' where id = $1",
        choose.randrange(1, 200_000),
    )


async def _order(connection: asyncpg.Connection, choose: random.Random) -> None:
    order = await connection.fetchval(
        "insert into demo.orders (customer) values ($1) returning id", f"customer {choose.randrange(2_000)}"
    )
    await connection.execute(
        "insert into demo.order_lines select $1, i, 'article ' || i, 1.99 * i from generate_series(1, $2::integer) i",
        order,
        choose.randrange(1, 6),
    )
    await connection.execute(
        "update demo.orders set total = (select sum(price) from demo.order_lines where order_id = $1) where id = $1",
        order,
    )


async def _cancel_order(connection: asyncpg.Connection, choose: random.Random) -> None:
    await connection.execute("delete from demo.orders where id = $1", choose.randrange(1, 50_000))


async def _move_line(connection: asyncpg.Connection, choose: random.Random) -> None:
    await connection.execute(
        "update demo.order_lines set line = line + 100 where order_id = $1 and line < 100", choose.randrange(1, 50_000)
    )


async def _log(connection: asyncpg.Connection, choose: random.Random) -> None:
    await connection.execute(
        "insert into demo.log select now(), 'warning', 'the same' from generate_series(1, $1::integer)",
        choose.randrange(1, 5),
    )


_STATEMENTS = (
    _add_metrics,
    _correct_metrics,
    _delete_metrics,
    _add_event,
    _change_event,
    _order,
    _cancel_order,
    _move_line,
    _log,
)
