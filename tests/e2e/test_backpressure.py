"""What is slow or away holds the others up and costs no memory: a broker that is gone, a target that crawls, a thousand tables."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import asyncpg
import pytest

from live_migration.common.local_kafka import LocalKafka
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.settings import load_settings
from tests.e2e.processes import Cli, Migrate
from tests.fixtures.change_log import wait_for
from tests.fixtures.fix_postgres import SETTINGS
from tests.support.memory import MIB, Bounds, watched_memory
from tests.support.walsender import PATIENCE, STATUS_SECONDS, TIMEOUT_MESSAGE, walsender_pid, watched_walsender
from tests.support.workload import TABLES, Workload, differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

AWAY_SECONDS = float(os.environ.get("LIVE_MIGRATION_TEST_AWAY_SECONDS", "12"))
"""How long the broker is away; wal_sender_timeout is a quarter of it."""
CLIENT_SECONDS = 20
"""Kafka's client gives up after 30 s without an answer."""
TABLE_COUNT = int(os.environ.get("LIVE_MIGRATION_TEST_TABLES", "1000"))
BOUNDS = Bounds(lanes=load_settings({}).partitions)
BULK = "public.bulk"
ROW_BYTES = 1024


class BulkWriter:
    """Inserts about 1 MiB a transaction, as fast as `pause` lets it, and updates some of it."""

    def __init__(self, uri: str, pause: float) -> None:
        self._uri, self._pause = uri, pause
        self.transactions = 0

    async def __aenter__(self) -> Self:
        self._task = asyncio.ensure_future(self._write())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        if not self._task.done():
            self._task.cancel()
        await asyncio.wait([self._task])

    async def _write(self) -> None:
        connection = await asyncpg.connect(self._uri)
        try:
            while True:
                async with connection.transaction():
                    await connection.execute(
                        f"insert into {BULK} (v, n) select repeat(md5(i::text), {ROW_BYTES // 32}), i from generate_series(1, 1024) i"
                    )
                    await connection.execute(f"update {BULK} set n = -n where id % 97 = 0 and id > $1", 0)
                self.transactions += 1
                await asyncio.sleep(self._pause)
        finally:
            await connection.close()


async def create_bulk(source: str) -> None:
    connection = await asyncpg.connect(source)
    await connection.execute(f"create table {BULK} (id bigserial primary key, v text, n int)")
    await connection.execute(f"alter table {BULK} alter v set storage external")
    await connection.close()


async def applied(target: str, rows: int, *, seconds: float = 120) -> None:
    """Wait until the bulk table has so many rows on the target."""
    connection = await asyncpg.connect(target)

    async def is_applied() -> bool:
        return bool(await connection.fetchval(f"select count(*) >= $1 from {BULK}", rows))

    await wait_for(is_applied, seconds=seconds)
    await connection.close()


@asynccontextmanager
async def away(broker: LocalKafka, how: str) -> AsyncIterator[None]:
    """Let the broker hang, or be gone."""
    if how == "stopped":
        os.kill(broker.pid, signal.SIGSTOP)
    else:
        await broker.kill()
    try:
        yield
    finally:
        if how == "stopped":
            os.kill(broker.pid, signal.SIGCONT)
        else:
            await broker.start()


@asynccontextmanager
async def migrating(cli: Cli, *options: str) -> AsyncIterator[Migrate]:
    migrate = await cli.migrate("--consumers", "2", *options)
    try:
        await migrate.until_phase("replay")
        yield migrate
    finally:
        await migrate.close()


async def finish(cli: Cli, migrate: Migrate, timeout: float = 300) -> None:
    code, _, err = await cli.run("cutover")
    assert code == 0, err
    assert await migrate.wait(timeout=timeout) == 0, migrate.log()


async def assert_equal(source: str, target: str) -> None:
    tables = (*TABLES, BULK)
    found = differences(await read_rows(source, tables), await read_rows(target, tables))
    assert not found, found


@pytest.mark.timeout(600 + 2 * AWAY_SECONDS)
@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_a_broker_away_for_longer_than_the_walsenders_patience(
    how: str, target_database: str, unique_name: str, tmp_path: Path
) -> None:
    """The source's walsender is answered all the while, and nothing piles up here: what Kafka does not take is not read."""
    is_long = AWAY_SECONDS > 4 * 60  # with the defaults
    patience = {} if is_long else {"wal_sender_timeout": f"{AWAY_SECONDS / 4}s"}
    async with LocalPostgres(settings=SETTINGS | patience) as source, LocalKafka() as broker:
        workload = Workload(source.uri(), seed=7, connections=2, pause=0.1)
        await workload.create(rows=300)
        await create_bulk(source.uri())
        cli = Cli(source.uri(), target_database, broker.bootstrap, unique_name, tmp_path / "data")
        if not is_long:
            cli.environment["LIVE_MIGRATION_STATUS_INTERVAL"] = str(AWAY_SECONDS / 24)
        async with workload, migrating(cli, *BOUNDS.options) as migrate, watched_memory(migrate) as peaks:
            async with BulkWriter(source.uri(), pause=AWAY_SECONDS / 100) as bulk:
                await applied(target_database, 3 * 1024)
                before, written = await walsender_pid(source.uri(), unique_name), bulk.transactions
                assert before is not None
                seen, began = set(), time.monotonic()
                async with away(broker, how):
                    while (passed := time.monotonic() - began) < AWAY_SECONDS:
                        seen.add(await walsender_pid(source.uri(), unique_name))
                        if passed < CLIENT_SECONDS:
                            assert seen == {before}
                        await asyncio.sleep(AWAY_SECONDS / 100)
                    written = bulk.transactions - written
            await workload.stop()
            began = time.monotonic()
            await finish(cli, migrate)
            print(f"{how}: {written} MiB written meanwhile; cut over {time.monotonic() - began:.0f} s after its return")
        # Once Kafka's client has given up, the producer leaves in order, and comes back when the broker does.
        assert seen <= {before, None}
        assert written * MIB > 3 * BOUNDS.flush_bytes, "more than the producer holds"
        assert TIMEOUT_MESSAGE not in source.log_path.read_text()
        BOUNDS.require(peaks)
        await assert_equal(source.uri(), target_database)


SLOW_TARGET = """
create table public.slowness (seconds float8);
insert into public.slowness values (0.05);
create function public.slow() returns trigger language plpgsql as $$
begin
    perform pg_sleep(s.seconds) from public.slowness s;
    return new;
end $$;
"""


async def make_slow(target: str, tables: list[str]) -> None:
    """Let each row take 50 ms, until `public.slowness` is emptied: a running transaction notices that too."""
    connection = await asyncpg.connect(target)
    await connection.execute(SLOW_TARGET)
    for table in tables:
        await connection.execute(f"""
            create trigger slow before insert on {table} for each row execute function public.slow();
            alter table {table} enable always trigger slow;
        """)
    await connection.close()


async def test_a_target_that_crawls(
    target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """A backlog of many times what consumers may hold, at twenty rows a second and lane instead of thousands.

    It lasts for longer than the walsender would wait for an answer, and the walsender has one all the while.
    """
    tables = [f"public.slow_{number}" for number in range(8)]
    options = (*BOUNDS.options, "--status-interval", str(STATUS_SECONDS))
    async with LocalPostgres(settings=SETTINGS | {"wal_sender_timeout": f"{PATIENCE}s"}) as server:
        source = await asyncpg.connect(server.uri())
        for table in tables:
            await source.execute(f"create table {table} (id bigserial primary key, v text)")
            await source.execute(f"alter table {table} alter v set storage external")
        cli = Cli(server.uri(), target_database, kafka_bootstrap, unique_name, tmp_path / "data")
        async with migrating(cli, *options) as migrate, watched_memory(migrate) as peaks:
            await make_slow(target_database, tables)
            async with watched_walsender(server.uri(), unique_name) as pids:
                for _ in range(2):
                    for table in tables:
                        await source.execute(
                            f"insert into {table} (v) select repeat(md5(i::text), 32) from generate_series(1, 5000) i"
                        )
                await lag_of(cli, 64 * MIB)
                await asyncio.sleep(3 * PATIENCE)  # its patience is what is tried
                lag = await lag_of(cli, 64 * MIB)
                assert lag["state"] != "caught up", lag
                slot = await source.fetchrow(
                    "select active, pg_current_wal_lsn() - confirmed_flush_lsn as behind from pg_replication_slots where slot_name = $1",
                    unique_name,
                )
                assert slot["active"]
                assert slot["behind"] < 32 * MIB, "the backlog is Kafka's, not the source's"
            target = await asyncpg.connect(target_database)
            await target.execute("delete from public.slowness")
            await target.close()
            await finish(cli, migrate)
        await source.close()
        assert len(pids) == 1, pids
        assert TIMEOUT_MESSAGE not in server.log_path.read_text()
        BOUNDS.require(peaks)
        columns = tuple(f"(select count(*), sum(hashtextextended(x::text, 0)) from {table} x)" for table in tables)
        assert not differences(await read_rows(server.uri(), columns), await read_rows(target_database, columns))


async def lag_of(cli: Cli, least_bytes: int) -> dict[str, Any]:
    """Give what `status` says of the lag once the log holds that much that is not applied."""
    async with asyncio.timeout(120):
        while True:
            code, out, err = await cli.run("status", "--json")
            assert code == 0, err
            lag: dict[str, Any] = json.loads(out)["lag"] or {"replay_lag_bytes": 0}
            if lag["replay_lag_bytes"] >= least_bytes:
                return lag


async def test_a_thousand_tables(target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path) -> None:
    """The source's walsender, which waits for an answer for a few seconds only, has one all the while."""
    async with LocalPostgres(settings=SETTINGS | {"wal_sender_timeout": f"{PATIENCE}s"}) as server:
        source = await asyncpg.connect(server.uri())
        await create_many(source, TABLE_COUNT)
        cli = Cli(server.uri(), target_database, kafka_bootstrap, unique_name, tmp_path / "data")
        migrate = await cli.migrate("--consumers", "2", *BOUNDS.options, "--status-interval", str(STATUS_SECONDS))
        began = time.monotonic()
        try:
            async with watched_memory(migrate) as peaks:
                took = {}
                await migrate.until_phase("copy", timeout=300)
                took["copy"] = time.monotonic() - began
                async with watched_walsender(server.uri(), unique_name) as pids:
                    await migrate.until_phase("replay", timeout=300)
                    took["replay"] = time.monotonic() - began
                    await source.execute(change_of_all(TABLE_COUNT))  # one transaction over all of them
                    await published(source, unique_name)
                await finish(cli, migrate)
                took["done"] = time.monotonic() - began
        finally:
            await migrate.close()
        print(f"{TABLE_COUNT} tables:", ", ".join(f"{phase} after {seconds:.0f} s" for phase, seconds in took.items()))
        await source.close()
        assert len(pids) == 1, pids
        assert TIMEOUT_MESSAGE not in server.log_path.read_text()
        tables = tuple(f"public.t{n}" for n in range(TABLE_COUNT))
        assert not differences(await read_rows(server.uri(), tables), await read_rows(target_database, tables))
    BOUNDS.require(peaks)


async def create_many(source: asyncpg.Connection, count: int) -> None:
    for first in range(0, count, 100):
        await source.execute(
            "".join(
                f"create table public.t{n} (id int primary key, v text); create index on public.t{n} (v);"
                f"insert into public.t{n} select i, 'row ' || i from generate_series(1, 10) i;"
                for n in range(first, min(first + 100, count))
            )
        )


def change_of_all(count: int) -> str:
    return "".join(
        f"insert into public.t{n} values (11, 'new'); update public.t{n} set v = 'changed' where id = 3; delete from public.t{n} where id = 4;"
        for n in range(count)
    )


async def published(source: asyncpg.Connection, slot: str) -> None:
    """Wait until all that is in the source's WAL now is in Kafka."""
    end = await source.fetchval("select pg_current_wal_lsn()")

    async def is_published() -> bool:
        query = "select confirmed_flush_lsn >= $1 from pg_replication_slots where slot_name = $2"
        return bool(await source.fetchval(query, end, slot))

    await wait_for(is_published, seconds=120)
