"""A hot table with several lanes: keys that change, TRUNCATE and ALTER TABLE under load, processes killed; then every row compared."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import psutil
import pytest

from tests.e2e.processes import Cli, Migrate
from tests.support.workload import differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

TABLES = ("public.hot", "public.hot_text", "public.calm")
SCHEMA = """
create table public.hot (id bigint primary key, n int, note text, big text);
alter table public.hot alter big set storage external;
create table public.hot_text (region int, code text, n int, big text, unique (region, code));
alter table public.hot_text alter region set not null, alter code set not null, alter big set storage external;
alter table public.hot_text replica identity using index hot_text_region_code_key;
create table public.calm (id bigint generated always as identity primary key, n int);
insert into public.hot select i, i, 'note ' || i, repeat('b', case when i % 5 = 0 then 4000 else 4 end) from generate_series(1, 3000) i;
insert into public.hot_text select i % 5, 'code ' || i, i, repeat('b', case when i % 5 = 0 then 4000 else 4 end) from generate_series(1, 500) i;
"""
_RETRIED = (asyncpg.UniqueViolationError, asyncpg.DeadlockDetectedError)


class Writers:
    """Random statements on the tables, by several sessions; `alter` adds a column to the hot table."""

    def __init__(self, uri: str, seed: int) -> None:
        self._uri = uri
        self._seed = seed
        self.counts: dict[str, int] = {}
        self._stop = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Writers]:
        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(self._write(random.Random(f"{self._seed}/{number}")))
            try:
                yield self
            finally:
                self._stop.set()

    async def _write(self, rng: random.Random) -> None:
        connection = await asyncpg.connect(self._uri)
        try:
            while not self._stop.is_set():
                with suppress(*_RETRIED):
                    async with connection.transaction():
                        for _ in range(rng.choice((1, 1, 3, 8))):
                            await self._statement(connection, rng)
                        await connection.execute("insert into public.calm (n) values ($1)", rng.randrange(100))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), rng.random() * 0.06)
        finally:
            await connection.close()

    async def _statement(self, c: asyncpg.Connection, rng: random.Random) -> None:
        fresh, number = rng.randrange(10_000, 10**12), rng.randrange(1, 3000)
        kind = rng.choices(
            ("insert", "update", "delete", "key", "many", "text", "truncate"), (6, 6, 3, 4, 0.5, 4, 0.05)
        )[0]
        big = "x" * rng.choice((3, 3, 3, 5000))
        match kind:
            case "insert":
                await c.execute(
                    "insert into public.hot values ($1, $2, 'new', $3)", rng.choice((fresh, number)), number, big
                )
            case "update":
                await c.execute("update public.hot set n = n + 1, note = note || '.' where id = $1", number)
            case "delete":
                await c.execute("delete from public.hot where id = $1", number)
            case "key":  # a big value that is not changed is not in the stream
                await c.execute("update public.hot set id = $2 where id = $1", number, rng.choice((fresh, number + 1)))
            case "many":
                await c.execute("update public.hot set n = n + 1 where id between $1 and $1 + 300", number)
            case "text":
                await c.execute(
                    "update public.hot_text set code = code || $2, region = (region + 1) % 5 where n = $1",
                    number % 500,
                    "+",
                )
            case "truncate":
                await c.execute("truncate public.hot")
                await c.execute("insert into public.hot select i, 0, 'again', $1 from generate_series(1, 1500) i", big)
        self.counts[kind] = self.counts.get(kind, 0) + 1


async def _alter(source: str, number: int) -> None:
    connection = await asyncpg.connect(source)
    try:
        await connection.execute(f"alter table public.hot add column c{number} int default {number}")
        await connection.execute(f"update public.hot set c{number} = -1 where id % 7 = {number}")
    finally:
        await connection.close()


async def _mend(target: str, alterations: int) -> None:
    """Alter the target as the source was, each time that a lane has stopped for it, so many times."""
    connection = await asyncpg.connect(target)
    query = "select error from _live_migration.checkpoints where error like '%columns that the target''s lacks: c%'"
    mended: set[int] = set()
    try:
        while len(mended) < alterations:
            with suppress(asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
                if error := await connection.fetchval(query):
                    number = int(error.rpartition(" c")[2])
                    await connection.execute(
                        f"alter table public.hot add column if not exists c{number} int default {number}"
                    )
                    mended.add(number)
            await asyncio.sleep(0.1)
    finally:
        connection.terminate()


async def _strike(migrate: Migrate, victim: str) -> None:
    with suppress(psutil.NoSuchProcess):  # the one killed before may not be gone yet
        for worker in migrate.children(victim)[:1]:
            worker.kill()


@pytest.mark.parametrize(("seed", "victim"), [(1, "producer"), (3, "both")])
async def test_a_split_table_is_equal_whoever_is_killed(
    seed: int,
    victim: str,
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    print(f"seed {seed}")
    rng = random.Random(f"{seed}/{victim}")
    connection = await asyncpg.connect(source_database)
    await connection.execute(SCHEMA)
    await connection.close()
    cli = Cli(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "data")
    writers = Writers(source_database, seed)
    mending = asyncio.create_task(_mend(target_database, 2))
    lanes = ("--lanes", "hot=4", "--lanes", "public.hot_text=3")
    try:
        async with writers.running():
            migrate = await cli.migrate("--consumers", "2", "--partitions", "2", *lanes)
            await migrate.until_phase("replay")
            for number in range(4):
                await asyncio.sleep(rng.random())  # a random moment of the replay
                if number in (1, 2):
                    await _alter(source_database, number)
                for kind in ("producer", "consumer") if victim == "both" else (victim,):
                    await _strike(migrate, kind)
            await asyncio.sleep(1)  # a moment of plain replay under load
        await asyncio.wait_for(mending, 90)  # the cutover is refused while shapes differ
        code, _, err = await cli.run("cutover")
        assert code == 0, err
        assert await migrate.wait() == 0, migrate.log()
    finally:
        mending.cancel()
        await migrate.close()
    found = differences(await read_rows(source_database, TABLES), await read_rows(target_database, TABLES))
    assert not found, f"seed {seed}: {found}"
    assert writers.counts["key"] > 10
    await _assert_lanes_were_used(target_database)
    code, _, err = await cli.run("verify")
    assert code == 0, err


async def _assert_lanes_were_used(target: str) -> None:
    connection = await asyncpg.connect(target)
    try:
        rows = await connection.fetch(
            "select lane, change_count, arrived_lsn from _live_migration.checkpoints order by lane"
        )
        assert len(rows) == 9
        assert all(row["change_count"] > 10 for row in rows[2:])
        # the second to last lanes of either table have waited for the first one
        assert [row["lane"] for row in rows if row["arrived_lsn"] is not None] == [3, 4, 5, 7, 8]
    finally:
        await connection.close()
