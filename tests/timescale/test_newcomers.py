"""Hypertables, continuous aggregates and policies that are made on the source during replay come over by themselves."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

HYPERTABLES = (
    """create table app.keyed (time timestamptz not null, device int not null references devices, v float8, note text,
                               primary key (device, time))""",
    "select create_hypertable('app.keyed', 'time', chunk_time_interval => interval '1 day', create_default_indexes => false)",
    "create index keyed_note on app.keyed (note, time desc)",
    """create trigger stamp before insert on app.keyed for each row when (new.note is null) execute function stamp()""",
    "create table app.loose (ts timestamptz not null, kind text)",
    "select create_hypertable('app.loose', 'ts', chunk_time_interval => interval '1 day')",
    "create table app.packed (time timestamptz not null, sensor int not null, v numeric, primary key (sensor, time))",
    """select create_hypertable('app.packed', 'time', 'sensor', 2, chunk_time_interval => interval '1 day',
                               associated_table_prefix => 'pk')""",
    "alter table app.packed set (timescaledb.compress, timescaledb.compress_segmentby = 'sensor')",
    "create table app.plain_too (id int primary key, v text)",
)
ROWS = (
    "insert into app.keyed select t, d, d, null from generate_series('{0}'::timestamptz, '{1}', '30 min') t, generate_series(1, 4) d",
    "insert into app.loose select t, 'k' from generate_series('{0}'::timestamptz, '{1}', '20 min') t",
    "insert into app.packed select t, d, d / 3.0 from generate_series('{0}'::timestamptz, '{1}', '30 min') t, generate_series(1, 4) d",
    "insert into app.plain_too select extract(epoch from '{0}'::timestamptz)::int + g, 'v' from generate_series(1, 9) g",
)
COMPRESS = "select compress_chunk(c, if_not_compressed => true) from show_chunks('app.packed', older_than => '2026-02-03'::timestamptz) c"
AGGREGATES = (
    """create materialized view app.keyed_hourly with (timescaledb.continuous) as
       select time_bucket('1 hour', time) as hour, device, avg(v) as avg, count(*) as n from app.keyed group by 1, 2 with no data""",
    "create index keyed_hourly_n on app.keyed_hourly (n, hour)",
    """create materialized view keyed_daily with (timescaledb.continuous, timescaledb.materialized_only = false) as
       select time_bucket('1 day', hour) as day, sum(n) as n from app.keyed_hourly group by 1 with no data""",
    """create materialized view metrics_daily with (timescaledb.continuous) as
       select time_bucket('1 day', time) as day, device, max(temp) as most from metrics group by 1, 2 with no data""",
    "call refresh_continuous_aggregate('app.keyed_hourly', null, '2026-02-05')",
    "call refresh_continuous_aggregate('keyed_daily', null, '2026-02-04')",
    "call refresh_continuous_aggregate('metrics_daily', null, '2026-01-04')",
)
POLICIES = (
    """select add_compression_policy('app.packed', interval '900 days', initial_start => now() + interval '1 day')""",
    """select add_retention_policy('app.loose', interval '900 days', initial_start => now() + interval '1 day')""",
    """select add_continuous_aggregate_policy('app.keyed_hourly', interval '900 days', interval '1 hour', interval '1 hour',
                                              initial_start => now() + interval '1 day')""",
    "select add_retention_policy('metrics', interval '900 days', initial_start => now() + interval '1 day')",
    "select alter_job(add_retention_policy('app.packed', interval '950 days'), scheduled => false)",
)
TABLES = (*world.TABLES, "app.keyed", "app.loose", "app.packed", "app.plain_too")
AGGREGATE_NAMES = (*world.AGGREGATE_NAMES, "app.keyed_hourly", "keyed_daily", "metrics_daily")
_JOBS = """
    select j.proc_name, j.scheduled, j.schedule_interval::text, coalesce(a.view_schema, j.hypertable_schema),
           coalesce(a.view_name, j.hypertable_name), (j.config - 'hypertable_id' - 'mat_hypertable_id')::text
    from timescaledb_information.jobs j left join timescaledb_information.continuous_aggregates a
         on (a.materialization_hypertable_schema, a.materialization_hypertable_name) = (j.hypertable_schema, j.hypertable_name)
    where job_id >= 1000 order by 1, 4, 5, 6
"""
_OBJECTS = """
    select conrelid::regclass::text as on, conname::text as name, pg_get_constraintdef(oid) as is from pg_constraint
    where conrelid::regclass::text like 'app.%'
    union all select tgrelid::regclass::text, tgname, tgenabled::text from pg_trigger
    where tgrelid::regclass::text like 'app.%' and not tgisinternal
    union all select tablename, indexname, indexdef from pg_indexes where schemaname = 'app'
    order by 1, 2
"""
_ALL_FOLLOWED = """
    select count(*) = 7 from _live_migration.tables where newcomer = 'followed' and rebuild is null
"""


async def _fetch(uri: str, query: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(uri)
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


class Writer:
    """Changes rows of the new hypertables, old days and new ones; an error of any statement is the test's."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        connection = await asyncpg.connect(self._uri)
        n = 0
        while not self._stopped.is_set():
            n += 1
            day, second = f"2026-02-{1 + n % 20:02}", f"{n // 20 % 60:02}:{n % 60:02}"
            at = f"'{day} 00:{second}.{n % 1000:03}5'::timestamptz"
            await connection.execute(f"insert into app.keyed values ({at}, {1 + n % 8}, {n})")
            await connection.execute(f"insert into app.loose values ({at}, 'w{n}')")
            await connection.execute(f"insert into app.packed values ({at}, {1 + n % 5}, {n})")
            await connection.execute(
                f"update app.keyed set v = v + 1, note = 'u{n}' where device = {1 + n % 4} and time < '2026-02-02'"
            )
            await connection.execute(
                f"delete from app.keyed where device = {1 + n % 4} and time = '2026-02-03'::timestamptz + interval '30 min' * {n % 90}"
            )
            await connection.execute(
                f"update app.packed set v = v + 1 where sensor = 2 and time = '2026-02-04'::timestamptz + interval '30 min' * {n % 40}"
            )
            await asyncio.sleep(0.05)
        await connection.close()

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self.run())
        try:
            yield
        finally:
            self._stopped.set()
        await task


async def _run(uri: str, statements: tuple[str, ...], *values: str) -> None:
    connection = await asyncpg.connect(uri)
    for statement in statements:
        await connection.execute(statement.format(*values) if values else statement)
    await connection.close()


async def _compare(migration: Migration) -> None:
    source, target = migration.source, migration.target
    assert await world.differences(source, target, tables=TABLES, aggregates=AGGREGATE_NAMES) == []
    assert await _fetch(source, _OBJECTS) == await _fetch(target, _OBJECTS)
    assert await world.compression(source) == await world.compression(target)
    report = await verify(migration.settings)
    assert report.is_equal, report.differences


async def test_hypertables_aggregates_and_policies_made_during_replay_come_over(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    before = await _fetch(source, _JOBS)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=300)
        await _run(source, HYPERTABLES)
        await _run(source, ROWS, "2026-02-01", "2026-02-06")
        await _run(source, (COMPRESS,))
        async with Writer(source).beside():
            await _run(source, AGGREGATES)
            await _run(source, POLICIES)
            await migration.until("all followed", _ALL_FOLLOWED, timeout=300)
            await _run(source, ROWS, "2026-02-20 12:00:01", "2026-02-24")
            await asyncio.sleep(3)
        await _run(source, ("call refresh_continuous_aggregate('app.keyed_hourly', null, null)",))
        jobs = await _fetch(source, _JOBS)
        await migration.finish(timeout=100)
        await _compare(migration)
        paused = {(name, *rest) for name, scheduled, *rest in before if scheduled}
        expected = [(name, scheduled or (name, *rest) in paused, *rest) for name, scheduled, *rest in jobs]
        assert await _fetch(target, _JOBS) == expected


async def test_newcomers_come_over_exactly_once_whenever_the_coordinator_dies(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    seed = int(os.environ.get("LIVE_MIGRATION_TEST_SEED", random.randrange(1 << 30)))
    print(f"LIVE_MIGRATION_TEST_SEED={seed}")
    chance = random.Random(seed)
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=300)

        async def make() -> None:
            await _run(source, HYPERTABLES)
            await asyncio.sleep(chance.uniform(0, 3))
            await _run(source, ROWS, "2026-02-01", "2026-02-06")
            async with Writer(source).beside():
                await asyncio.sleep(chance.uniform(0, 5))
                await _run(source, AGGREGATES)
                await _run(source, POLICIES)
                await asyncio.sleep(chance.uniform(0, 5))
            await _run(source, (COMPRESS,))

        making = asyncio.ensure_future(make())
        for _ in range(8):
            await asyncio.sleep(chance.uniform(0.2, 6))
            assert migration.coordinator is not None
            migration.coordinator.cancel()
            with suppress(asyncio.CancelledError):
                await migration.coordinator
            migration.start_coordinator()
        await making
        await migration.until("all followed", _ALL_FOLLOWED, timeout=300)
        await migration.finish(timeout=100)
        await _compare(migration)


async def test_hypertables_and_aggregates_that_are_dropped_again_are_let_go(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    create = (
        "create table app.brief (time timestamptz not null, v int)",
        "select create_hypertable('app.brief', 'time')",
        "insert into app.brief select t, 1 from generate_series('2026-02-01'::timestamptz, '2026-02-20', '1 day') t",
    )
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=300)
        await _run(source, (*create, "drop table app.brief"))  # before anybody saw it
        await migration.until("let go", "select count(*) > 0 from _live_migration.tables where newcomer = 'gone'")
        aggregate = """create materialized view app.brief_daily with (timescaledb.continuous) as
                       select time_bucket('1 day', time) as day, sum(v) as v from app.brief group by 1"""
        await _run(source, (*create, aggregate))
        followed = "select count(*) = 2 from _live_migration.tables where newcomer = 'followed' and rebuild is null"
        await migration.until("followed", followed)
        await _run(source, ("insert into app.brief values ('2026-03-01', 2)", "drop table app.brief cascade", *create))
        await _run(source, ("insert into app.brief values ('2026-03-02', 3)",))
        await migration.finish(timeout=150)
        tables, aggregates = (*world.TABLES, "app.brief"), world.AGGREGATE_NAMES
        assert await world.differences(source, target, tables=tables, aggregates=aggregates) == []
        assert await _fetch(target, "select to_regclass('app.brief_daily') is null") == [(True,)]


@pytest.mark.parametrize("kind", ["hypertable", "table"])
async def test_a_hypertable_that_is_made_again_under_its_name_while_its_lane_lags(
    kind: str,
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """Rows of the first, whose chunks the lane has met and has not, are in the stream when the second, or a plain table, has its name."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    create = (
        "create table app.brief (time timestamptz not null, v int)",
        "select create_hypertable('app.brief', 'time', chunk_time_interval => interval '1 day')",
        "insert into app.brief select t, 1 from generate_series('2026-02-01'::timestamptz, '2026-02-04', '6 hours') t",
    )
    again = ("create table app.brief (time timestamptz not null, v int, another text not null)", create[1])
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=300)
        await _run(source, create)
        followed = """select count(*) = 1 from _live_migration.tables
                      where table_name = 'brief' and newcomer = 'followed' and {} (select count(*) = 0 from _live_migration.tables where newcomer = 'gone')"""
        await migration.until("followed", followed.format("rebuild is null and"))
        await _run(source, ("insert into app.brief select time, 2 from app.brief",))
        await migration.until("rows applied", "select count(*) = 26 from app.brief")
        for consumer in migration.consumers:
            await consumer.crash()
        await _run(
            source,
            (
                "insert into app.brief values ('2026-02-02 12:00', 3), ('2026-02-22 12:00', 3)",
                "update app.brief set v = 4 where time > '2026-02-03'",
                "drop table app.brief",
                *(again if kind == "hypertable" else again[:1]),
                "insert into app.brief select t, 5, 'new' from generate_series('2026-02-01'::timestamptz, '2026-02-04', '6 hours') t",
            ),
        )
        await migration.until("followed again", followed.format("not"))
        for consumer in migration.consumers:
            consumer.start()
        await _run(source, ("insert into app.brief values ('2026-02-25', 6, 'last')",))
        await migration.finish(timeout=150)
        assert await world.differences(source, target, tables=(*world.TABLES, "app.brief")) == []
