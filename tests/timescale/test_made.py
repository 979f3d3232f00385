"""Whole migrations to a TimescaleDB of another version, where hypertables are made anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import read_layout
from live_migration.consumer.service import run_consumer
from live_migration.coordinator import timescale_handover
from live_migration.coordinator.aggregate_state import read_state
from live_migration.coordinator.hypertable_definitions import Definitions
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration, Service
from tests.fixtures.fix_postgres import Server, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world
from tests.timescale.test_definitions import AFTER, AGGREGATES, FUNCTIONS, HYPERTABLES, TABLES
from tests.timescale.writer import Writer

pytestmark = [pytest.mark.e2e, pytest.mark.integration]


@pytest.fixture
async def older(other_timescale: Server) -> AsyncIterator[str]:
    async with timescale_database(other_timescale) as uri:
        yield uri


async def test_a_quiet_database_comes_over(
    older: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = older, target_of_timescale
    await world.make(source)
    await execute(source, world.LATER)
    await execute(source, _NO_REFRESHES, *_OLD_AND_COMPRESSED)
    jobs = await world.jobs(source)
    assert {job[1] for job in jobs} == {True, False}
    options = {"cutover": "auto", "pause_source_jobs": True}
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        for step in ("hypertables", "aggregates", "chunks"):  # a coordinator that dies goes on where it was
            await migration.until(step, "select exists (select from _live_migration.steps where name = $1)", step)
            await _die(migration)
            migration.start_coordinator()
        await migration.until_phase("done")
        await migration.finish()
        assert await world.differences(source, target) == []
        assert await world.jobs(target) == jobs
        starts = [await world.value(uri, world.NEXT_START) for uri in (source, target)]
        assert starts[0] == starts[1] is not None
        assert await world.compression(source) == await world.compression(target)
        assert await world.all_rows(source, _MATERIALIZED) == await world.all_rows(target, _MATERIALIZED) != []
        report = await verify(migration.settings)
        assert report.is_equal, report.results
        ours, theirs = await _state(source), await _state(target)
        assert ours == theirs
        assert len(ours) == 5
    # What a refresh does on the source, to rows whose data are gone, too, it does on the target.
    for uri in (source, target):
        await execute(uri, "call refresh_continuous_aggregate('hourly', null, null)")
    assert await world.differences(source, target) == []
    assert not [each for each in migration.observer.warnings if "left out" in each]


_NEWCOMERS = (
    "create table late (time timestamptz not null, v int, primary key (time, v))",
    "select create_hypertable('late', 'time', chunk_time_interval => interval '1 day')",
    "insert into late select t, 1 from generate_series('2026-01-01'::timestamptz, '2026-01-04', '1 hour') t",
    """create materialized view by_hour with (timescaledb.continuous) as
       select time_bucket('1 hour', time) as hour, sum(v) as v from late group by 1 with no data""",
    "call refresh_continuous_aggregate('by_hour', null, null)",
    "update late set v = 2 where time < '2026-01-02'",
)
_FOLLOWED = "select count(*) = 2 from _live_migration.tables where newcomer = 'followed' and rebuild is null"
_NO_REFRESHES = """
    select alter_job(job_id, scheduled => false) from timescaledb_information.jobs
    where proc_name = 'policy_refresh_continuous_aggregate'
"""
_OLD_AND_COMPRESSED = (
    "alter materialized view hourly set (timescaledb.compress)",
    "select compress_chunk(c) from show_chunks('hourly') c",
    "select drop_chunks('metrics', older_than => '2026-01-02'::timestamptz)",
)
_MATERIALIZED = """(
    select a.view_name, c.range_start, c.is_compressed from timescaledb_information.chunks c
    join timescaledb_information.continuous_aggregates a on a.materialization_hypertable_name = c.hypertable_name)
"""


async def _state(uri: str) -> dict[str, list[tuple[QualifiedName, tuple[int, ...]]]]:
    connection = await asyncpg.connect(uri)
    try:
        layout = await read_layout(connection)
        assert layout is not None
        return {table: sorted(rows) for table, rows in (await read_state(connection, layout)).rows.items()}
    finally:
        await connection.close()


_ROWS = """
    insert into names select g, 'n' || g from generate_series(1, 4) g;
    insert into metrics select t, g, g, 'x' from generate_series('2026-01-01'::timestamptz, '2026-03-03', '7 hours') t, generate_series(1, 4) g;
    insert into "Odd Schema"."we""ird Ta'ble" select t, 'd' || g, g
        from generate_series('2026-01-01'::timestamp, '2026-01-03', '1 hour') t, generate_series(1, 3) g;
    insert into ticks select g * 7, g % 3, g from generate_series(1, 900) g;
    insert into small select g, g from generate_series(1, 300) g;
    insert into days select '2026-01-01'::date + g, g from generate_series(1, 100) g;
    insert into by_text values ('a', 1), ('b', 2);
    insert into four select t, t + g * interval '1 day', g, 'j' from generate_series('2026-01-01'::timestamptz, '2026-01-05', '8 hours') t, generate_series(1, 3) g;
"""
_NO_RUNS = "select alter_job(job_id, scheduled => false) from timescaledb_information.jobs where job_id >= 1000"
_MORE = (
    "call refresh_continuous_aggregate('hourly', null, '2026-02-20')",
    """call refresh_continuous_aggregate('"Odd Schema"."a daily"', null, '2026-02-10')""",
    "call refresh_continuous_aggregate('monthly', null, null)",
    "call refresh_continuous_aggregate('tick_counts', null, 3000::bigint)",
    "select compress_chunk(c, true) from show_chunks('metrics', older_than => '2026-02-01'::timestamptz) c",
    """select compress_chunk(c) from show_chunks('"Odd Schema"."we""ird Ta''ble"') c""",
    "select compress_chunk(c) from show_chunks('hourly') c",
)
_ODD = (
    "metrics", """"Odd Schema"."we""ird Ta'ble\"""", "ticks", "small", "days", "by_text", "four", "hourly", '"Odd Schema"."a daily"',
    "monthly", "tick_counts",
)  # fmt: skip


async def test_hypertables_of_every_kind_come_over(
    older: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Integers, dates, functions of the user's, several dimensions, names that need quotes, schemas and prefixes of chunks."""
    source, target = older, target_of_timescale
    await execute(source, FUNCTIONS, TABLES, HYPERTABLES, *AGGREGATES, AFTER, _NO_RUNS, _ROWS, *_MORE)
    there = await _definitions(source)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(
            source,
            "update metrics set v = v + 1 where device = 2",
            """update "Odd Schema"."we""ird Ta'ble" set "O\\B" = 7 where "dev'ice,1" = 'd2'""",
            "insert into ticks values (100000, 1, 1), (-5, 1, 1)",
            "insert into four values ('2026-02-01', '2026-02-01', 1, 'z')",
            "call refresh_continuous_aggregate('hourly', null, null)",
        )
        await migration.finish()
        here = await _definitions(target)
        assert here.hypertables == there.hypertables
        assert here.aggregates == there.aggregates
        assert here.jobs == there.jobs
        assert await world.differences(source, target, tables=_ODD, aggregates=()) == []
        assert await _state(source) == await _state(target)
        ours, theirs = await world.compression(source), await world.compression(target)
        assert ours == theirs
    assert not [each for each in migration.observer.warnings if "is not restored" in each]


async def test_aggregates_are_refreshed_where_the_catalog_may_not_be_written(
    older: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*_: object) -> None:
        raise asyncpg.InsufficientPrivilegeError("permission denied for table continuous_aggs_watermark")

    monkeypatch.setattr(timescale_handover, "write_state", refuse)
    source, target = older, target_of_timescale
    await world.make(source)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, cutover="auto") as migration:
        await migration.until_phase("done")
        await migration.finish()
        assert await world.differences(source, target, aggregates=("daily",)) == []
        query = "(select hour, device, round(avg::numeric, 6), n from hourly)"
        assert await world.all_rows(source, query) == await world.all_rows(target, query)
        ours, theirs = await _state(source), await _state(target)
        print("\n".join(migration.observer.notes + migration.observer.warnings))
        watermarks = "_timescaledb_catalog.continuous_aggs_watermark"
        assert ours[watermarks] == theirs[watermarks]
    assert [each for each in migration.observer.warnings if "may not write TimescaleDB's catalog" in each]


async def _definitions(uri: str) -> Definitions:
    connection = await asyncpg.connect(uri)
    try:
        definitions = await read_definitions(connection)
        assert definitions is not None
        return definitions
    finally:
        await connection.close()


async def _die(migration: Migration) -> None:
    assert migration.coordinator is not None
    migration.coordinator.cancel()
    await asyncio.wait([migration.coordinator])


@pytest.mark.parametrize("seed", range(2))
async def test_a_database_under_load_comes_over_exactly(
    older: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path, seed: int
) -> None:
    """A consumer is lost in the midst of the copy, chunks are copied in parts; each row and each aggregate's result is equal in the end."""
    print(f"seed {seed}")
    source, target = older, target_of_timescale
    await world.make(source)
    await _lengthen(source)
    jobs = await world.jobs(source)
    writer = Writer(source, seed)
    options = {"partitions": 3, "part_size": 64 << 10, "lease": 3.0}
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        async with writer:
            copying = "select count(*) > 3 from _live_migration.tables where kind = 'chunk' and state = 'ready'"
            await migration.until("some chunks copied", copying, timeout=240)
            await migration.consumers[0].crash()
            migration.consumers[0].start()
            await migration.until_phase("replay", timeout=240)
            await execute(source, *_NEWCOMERS)
            before = writer.done.total()
            await migration.until("rows under load", "select sum(change_count) > 500 from _live_migration.checkpoints")
            while writer.done.total() < before + 300:
                migration.raise_failures()
                await asyncio.sleep(0.1)
            await migration.until("newcomers followed", _FOLLOWED)
        print(writer.done)
        assert writer.failures == []
        await migration.finish(timeout=400)
        print("\n".join(migration.observer.notes + migration.observer.warnings))
        assert await world.differences(source, target) == []
        for relation in ("late", "by_hour"):
            assert await world.all_rows(source, relation) == await world.all_rows(target, relation) != []
        assert await world.jobs(target) == jobs
        here, there = await world.chunks(source), await world.chunks(target)
        assert {key: bool(status) for key, status in here.items()} == {
            key: bool(status) for key, status in there.items()
        }
        await world.require_compressed_before_jobs(target)
        assert all(writer.done[kind] for kind in ("compress", "decompress", "delete batches", "update metrics"))
        report = await verify(migration.settings)
        assert report.is_equal, report.results
    await _check_refreshes(source, target)


async def _lengthen(uri: str) -> None:
    """Make chunks large enough for parts."""
    await execute(
        uri,
        """insert into metrics select t, d, 1, repeat('z', 100)
           from generate_series('2026-01-01'::timestamptz, '2026-01-08', '1 min') t, generate_series(1, 2) d
           on conflict do nothing""",
    )


async def _check_refreshes(source: str, target: str) -> None:
    """Invalidate something on both ends, refresh everything there, and compare what aggregates hold then."""
    for uri in (source, target):
        await execute(
            uri,
            "insert into metrics values ('2026-01-02 10:10:10.5', 3, 1e7, 'late'), ('2026-01-07 10:10:10.5', 3, 1e7, 'late')",
        )
        assert not await _is_in(uri, "hourly", "2026-01-02 10:00")
        for name in world.AGGREGATE_NAMES:
            await execute(uri, f"call refresh_continuous_aggregate('{name}', null, null)")
        assert await _is_in(uri, "hourly", "2026-01-02 10:00")
    # A sum of floats depends on the order in which rows are read.
    for query in ("(select hour, device, round(avg::numeric, 6), n from hourly)", "daily"):
        ours, theirs = [await world.all_rows(uri, query) for uri in (source, target)]
        assert ours == theirs


async def _is_in(uri: str, aggregate: str, hour: str) -> bool:
    connection = await asyncpg.connect(uri)
    try:
        query = (
            f"select coalesce(max(avg), 0) > 10000 from {aggregate} where hour = $1::text::timestamptz and device = 3"
        )
        return bool(await connection.fetchval(query, hour))
    finally:
        await connection.close()


_MERGING = (
    "create table many (at timestamptz not null, v int)",
    "select create_hypertable('many', 'at', chunk_time_interval => interval '1 day', create_default_indexes => false)",
    """alter table many set (timescaledb.compress, timescaledb.compress_orderby = 'at',
                            timescaledb.compress_chunk_time_interval = '2 days')""",
    "insert into many select t, 1 from generate_series('2026-01-01'::timestamptz, '2026-01-08 23:00', '1 hour') t",
    *(f"select compress_chunk(c) from show_chunks('many', older_than => '2026-01-0{day + 1}'::timestamptz, "
      f"newer_than => '2026-01-0{day}'::timestamptz) c" for day in (1, 3, 5)),
)  # fmt: skip
_CHUNK_OF = (
    "select show_chunks('many', newer_than => '{0}'::timestamptz, older_than => '{0}'::timestamptz + interval '1 day')"
)
_COPIED = """
    select exists (select from _live_migration.tables where state = 'ready' and format('%I.%I', schema_name, table_name) = $1)
"""


async def test_chunks_that_are_merged_meanwhile_are_neither_lost_nor_doubled(
    older: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Before either is copied; between the copies of the two; and when both are copied."""
    source, target = older, target_of_timescale
    await execute(source, *_MERGING)
    merging = await asyncpg.connect(source)
    try:
        first, second, third = [str(await merging.fetchval(_CHUNK_OF.format(f"2026-01-0{day}"))) for day in (2, 4, 6)]
        kept = str(await merging.fetchval(_CHUNK_OF.format("2026-01-03")))
        async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, consumers=0) as migration:
            await migration.until_phase("copy")
            await merging.execute(f"select compress_chunk('{first}')")
            async with merging.transaction():
                await merging.execute(f"lock table {kept} in access exclusive mode")
                migration.consumers.append(Service(run_consumer, migration.settings))
                migration.consumers[0].start()
                await migration.until("the other is copied", _COPIED, second)
                await merging.execute("insert into many values ('2026-01-04 12:00', 2), ('2026-01-04 13:00', 2)")
                await merging.execute(f"select compress_chunk('{second}')")
            await migration.until_phase("replay")
            await merging.execute("insert into many values ('2026-01-06 12:00', 3), ('2026-01-01 12:00', 3)")
            await merging.execute(f"select compress_chunk('{third}')")
            await merging.execute("insert into many values ('2026-01-06 12:00', 4), ('2026-01-02 12:00', 4)")
            assert len(await merging.fetch("select show_chunks('many')")) == 5
            await migration.finish()
            assert await world.all_rows(source, "many") == await world.all_rows(target, "many")
    finally:
        await merging.close()


async def test_everything_can_be_copied_again(
    older: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The slot is lost in the midst of replay: chunks that came after the plan are copied, too, and indexes are built again."""
    source, target = older, target_of_timescale
    await world.make(source)
    await execute(source, _NO_REFRESHES)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(
            source,
            "insert into metrics values ('2026-01-20', 1, 1, 'new')",
            "insert into events values ('2026-01-21', 'n')",
        )
        known = "select count(*) >= 2 from _live_migration.tables where kind = 'chunk' and range is null and rebuild is null"
        await migration.until("new chunks found", known, timeout=90)
        await migration.stop()
        await migration.producer.crash()
        migration.producer.task = None
        await execute(
            source,
            "update metrics set temp = 5 where device = 2",
            "delete from events where ts < '2026-01-02'",
            f"select pg_drop_replication_slot('{unique_name}')",
        )
        topic = await world.value(target, "select topic_id from _live_migration.migration")
        migration.start_coordinator(recopy=True)
        await migration.until("tables voided", "select topic_id <> $1 from _live_migration.migration", topic)
        await migration.until("prepared again", "select phase <> 'prepare' from _live_migration.migration")
        migration.producer.start()
        await migration.until_phase("replay", timeout=240)
        await migration.finish()
        print("\n".join(migration.observer.notes + migration.observer.warnings))
        assert await world.differences(source, target) == []
        assert await world.value(target, "select count(*) from pg_indexes where tablename = 'metrics'") == 3
