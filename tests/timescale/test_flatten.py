"""Whole migrations from TimescaleDB to a plain PostgreSQL (`--flatten`): hypertables become plain tables, row for row."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute
from tests.timescale import world
from tests.timescale.writer import Writer

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

STANDS_ON_IT = (
    "create view busy as select device, count(*) as n from metrics group by 1",
    "comment on view busy is 'of plain tables alone'",
    "create view by_day as select time_bucket('1 day', time) as day, count(*) as n from metrics group by 1",
    "comment on view by_day is 'needs TimescaleDB'",
    "comment on view hourly is 'an aggregate'",
    "create materialized view kept as select count(*) as n from plain",
    "create materialized view gone as select * from hourly",
    "create index metrics_by_day on metrics (time_bucket('1 day', time, 'UTC'))",
    "comment on index metrics_by_day is 'needs TimescaleDB'",
    "create index events_kind on events (kind)",
    "alter table app.readings add constraint positive check (val > -1000)",
    "create table alarms (id int primary key, device int, time timestamptz)",
    "insert into alarms select 1, device, time from metrics limit 1",
    "alter table alarms add foreign key (device, time) references metrics (device, time) on delete cascade on update cascade",
    "create publication theirs for table metrics, plain",
)
_NO_CHUNKS = "select count(*) from pg_inherits"
_OBJECTS = """
    select r.oid::regclass::text as on, k.conname::text as name, pg_get_constraintdef(k.oid) as is
    from pg_constraint k join pg_class r on r.oid = k.conrelid where r.oid = any($1::text[]::regclass[]) and k.contype <> 'n' and k.conparentid = 0
    union all select r.oid::regclass::text, i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid)
    from pg_index i join pg_class r on r.oid = i.indrelid
    where r.oid = any($1::text[]::regclass[]) and i.indexrelid::regclass::text <> 'metrics_by_day'
    union all select r.oid::regclass::text, g.tgname, g.tgenabled::text
    from pg_trigger g join pg_class r on r.oid = g.tgrelid
    where r.oid = any($1::text[]::regclass[]) and not g.tgisinternal and g.tgname !~ '^ts_'
    union all select a.attrelid::regclass::text, a.attname, format('%s %s', format_type(a.atttypid, a.atttypmod), a.attnotnull)
    from pg_attribute a where a.attrelid = any($1::text[]::regclass[]) and a.attnum > 0
    order by 1, 2, 3
"""
TABLES = (*world.TABLES, "alarms")


async def _fetch(uri: str, query: str, *arguments: object) -> list[tuple[object, ...]]:
    connection = await asyncpg.connect(uri)
    try:
        return [tuple(row) for row in await connection.fetch(query, *arguments)]
    finally:
        await connection.close()


async def _different(source: str, target: str, tables: tuple[str, ...] = TABLES) -> list[str]:
    """Compare every row of each table."""
    found = []
    ours, theirs = await asyncpg.connect(source), await asyncpg.connect(target)
    for table in tables:
        here, there = await world.rows_of(ours, table), await world.rows_of(theirs, table)
        if here != there or not here:
            missing, extra = sorted(set(here) - set(there)), sorted(set(there) - set(here))
            found.append(
                f"{table}: {len(here)} rows here, {len(there)} there; missing {missing[:3]}, extra {extra[:3]}"
            )
    await ours.close()
    await theirs.close()
    return found


async def _require_plain(source: str, target: str, tables: tuple[str, ...] = TABLES) -> None:
    """The same columns, keys, indexes, constraints and triggers; no part of TimescaleDB's."""
    ours, theirs = [await _fetch(uri, _OBJECTS, list(tables)) for uri in (source, target)]
    assert ours == theirs
    assert await _fetch(target, _NO_CHUNKS) == [(0,)]
    assert await _fetch(target, "select nspname::text from pg_namespace where nspname ~ 'timescale'") == []


async def test_a_quiet_database_becomes_plain(
    timescale_source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = timescale_source_database, target_database
    await world.make(source)
    await execute(source, *STANDS_ON_IT)
    options = {"cutover": "auto", "pause_source_jobs": True, "flatten": True, "part_size": 16 << 10}
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        await migration.until_phase("done", timeout=240)
        await migration.finish()
        assert await _different(source, target) == []
        await _require_plain(source, target)
        report = await verify(migration.settings)
        assert report.is_equal, report.differences
    views = "select relname::text, obj_description(oid) from pg_class where relkind in ('v', 'm') and relnamespace = 'public'::regnamespace"
    assert sorted(await _fetch(target, views)) == [("busy", "of plain tables alone"), ("kept", None)]
    assert await _fetch(target, "select * from kept") == await _fetch(source, "select count(*) from plain")
    assert await _fetch(target, "select tablename::text from pg_publication_tables order by 1") == [
        ("metrics",),
        ("plain",),
    ]
    assert not [each for each in migration.observer.warnings if "is not restored" in each or "could not be" in each]


_NEWCOMERS = (
    "create table late (time timestamptz not null, v int, primary key (time, v))",
    "select create_hypertable('late', 'time', chunk_time_interval => interval '1 day')",
    "create index late_bucket on late (time_bucket('1 day', time, 'UTC'))",
    "insert into late select t, 1 from generate_series('2026-01-01'::timestamptz, '2026-01-04', '1 hour') t",
    """create materialized view by_hour with (timescaledb.continuous) as
       select time_bucket('1 hour', time) as hour, sum(v) as v from late group by 1 with no data""",
    "call refresh_continuous_aggregate('by_hour', null, null)",
    "update late set v = 2 where time < '2026-01-02'",
)
_BROUGHT = """
    select count(*) filter (where newcomer = 'followed' and rebuild is null) = 1 and count(*) filter (where is_left_out) = 3
    from _live_migration.tables
"""


@pytest.mark.parametrize("seed", range(2))
async def test_a_database_under_load_becomes_plain_exactly(
    timescale_source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    seed: int,
) -> None:
    """A consumer is lost in the midst of the copy; chunks of time and of hash change unseen; a hypertable and an aggregate come late."""
    print(f"seed {seed}")
    source, target = timescale_source_database, target_database
    await world.make(source)
    await execute(
        source, "alter table app.readings set (timescaledb.compress, timescaledb.compress_segmentby = 'sensor')"
    )
    writer = Writer(source, seed)
    options = {"partitions": 1 + 2 * seed, "lease": 3.0, "pause_source_jobs": True, "flatten": True}
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        async with writer:
            copying = "select count(*) > 3 from _live_migration.tables where kind = 'chunk' and state = 'ready'"
            await migration.until("some chunks copied", copying, timeout=240)
            await migration.consumers[0].crash()
            migration.consumers[0].start()
            await migration.until_phase("replay", timeout=240)
            await execute(source, *_NEWCOMERS)
            await _change_unseen(source)
            before = writer.done.total()
            await migration.until("rows under load", "select sum(change_count) > 300 from _live_migration.checkpoints")
            while writer.done.total() < before + 300:
                migration.raise_failures()
                await asyncio.sleep(0.1)
            await migration.until("newcomers brought", _BROUGHT, timeout=240)
            await _change_unseen(source)
        print(writer.done)
        assert writer.failures == []
        await execute(source, *_NOT_EMPTY)  # the last thing done may have been a TRUNCATE
        await migration.finish(timeout=400)
        print("\n".join(migration.observer.notes + migration.observer.warnings))
        tables = (*world.TABLES, "late")
        assert await _different(source, target, tables) == []
        report = await verify(migration.settings)
        assert report.is_equal, report.differences
        assert await _fetch(target, _NO_CHUNKS) == [(0,)]
        assert any("by_hour, made on the source, is left out" in each for each in migration.observer.warnings)
    assert all(writer.done[kind] for kind in ("compress", "delete batches", "update metrics"))


_NOT_EMPTY = (
    "insert into app.readings values ('2026-01-03 13:00', 1, 1) on conflict do nothing",
    "insert into events values ('2026-01-03 13:00', 'e0')",
)
_COMPRESS = """
    select compress_chunk(c, if_not_compressed => true) from show_chunks('app.readings', older_than => '2026-01-02'::timestamptz) c
"""


async def _change_unseen(source: str) -> None:
    """Empty a chunk of a hash partition by itself, and take a whole compressed batch out of another; the writer may be in the way."""
    for _ in range(20):
        try:
            await execute(source, "insert into app.readings values ('2026-01-03 12:00', 1, 1) on conflict do nothing")
            ((chunk, *_),) = await _fetch(source, _ONE_CHUNK)
            await execute(source, f"truncate only {chunk}", *_TAKE_BATCH_OUT)
            return
        except asyncpg.PostgresError as error:
            print(f"the writer is in the way: {error!r}")
    raise AssertionError("the writer was in the way each time")


_ONE_CHUNK = (
    "select c::text from show_chunks('app.readings', newer_than => '2026-01-03'::timestamptz) c order by 1 limit 1"
)
_TAKE_BATCH_OUT = (
    "insert into app.readings select '2026-01-01 00:00:01'::timestamptz, d, d from generate_series(1, 5) d on conflict do nothing",
    _COMPRESS,
    "delete from app.readings where sensor = 2 and time < '2026-01-02'",
)
