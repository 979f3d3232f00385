"""`migrate --recopy` of a source with hypertables: everything is copied again, into whatever the target has of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.settings import Settings, load_settings
from live_migration.coordinator.verify import verify
from tests.e2e.killed import COORDINATOR, run_killed
from tests.e2e.migration import Migration
from tests.e2e.processes import Cli
from tests.fixtures.fix_postgres import Server, database, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world
from tests.timescale.writer import Writer

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_CHUNK_SINCE = (
    "insert into metrics values ('2026-01-20', 1, 1, 'new')",
    "insert into events values ('2026-01-21', 'n')",
    "insert into app.readings values ('2026-01-21', 1, 1)",
)
_LOST = (
    "update metrics set temp = 5 where device = 2",
    "delete from events where ts < '2026-01-02'",
    "select drop_chunks('app.readings', older_than => '2026-01-02'::timestamptz)",
)


@asynccontextmanager
async def _lost(migration: Migration, source: str) -> AsyncIterator[None]:
    """Replay, chunks made since the plan, and then the slot is gone."""
    async with migration:
        await migration.until_phase("replay", timeout=240)
        await execute(source, *_CHUNK_SINCE)
        await migration.until("new chunks applied", "select count(*) = 1 from events where kind = 'n'")
        await migration.stop()
        await migration.producer.crash()
        migration.producer.task = None
        await execute(source, *_LOST, f"select pg_drop_replication_slot('{migration.settings.name}')")
        yield


async def test_plain_tables_are_copied_again(
    timescale_source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """A chunk that is gone since then is gone from the target, too."""
    source, target = timescale_source_database, target_database
    await world.make(source)
    options = {"pause_source_jobs": True, "flatten": True}
    migration = Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options)
    async with _lost(migration, source):
        topic = await world.value(target, "select topic_id from _live_migration.migration")
        migration.start_coordinator(recopy=True)
        await migration.until("tables voided", "select topic_id <> $1 from _live_migration.migration", topic)
        await migration.until("prepared again", "select phase <> 'prepare' from _live_migration.migration")
        migration.producer.start()
        await migration.until_phase("replay", timeout=240)
        await migration.finish()
        for table in world.TABLES:
            assert await world.all_rows(source, table) == await world.all_rows(target, table) != []
        assert await world.value(target, "select count(*) from pg_indexes where tablename = 'metrics'") == 3


_BEFORE = (
    "select drop_chunks('metrics', older_than => '2026-01-02'::timestamptz)",
    "select set_chunk_time_interval('metrics', interval '2 days')",
)
"""The first day is in aggregates alone from then on, and chunks have bounds that the interval does not give."""
_FROZEN = (
    "create table iced (ts timestamptz not null, v int)",
    "select create_hypertable('iced', 'ts', chunk_time_interval => interval '1 day')",
    "insert into iced select t, 1 from generate_series('2026-01-02'::timestamptz, '2026-01-04', '5 hours') t",
    "select _timescaledb_functions.freeze_chunk(c) from show_chunks('iced', older_than => '2026-01-03'::timestamptz) c",
)
_UNHEARD = (
    "insert into metrics select t, 6, 1, 'late' from generate_series('2026-01-02 00:05'::timestamptz, '2026-01-12', '7 hours') t",
    "select compress_chunk(c) from show_chunks('metrics', newer_than => '2026-01-03'::timestamptz, older_than => '2026-01-04'::timestamptz) c",
    "select decompress_chunk(c) from show_chunks('metrics', older_than => '2026-01-03'::timestamptz) c",
    "delete from metrics where device = 1 and time > '2026-01-03'",
    "call refresh_continuous_aggregate('hourly', '2026-01-02', '2026-01-06')",
    "insert into app.readings values ('2026-01-30', 7, 7)",
)
_HEARD = (
    "insert into metrics select t, 7, 2, 'heard' from generate_series('2026-01-02 00:05'::timestamptz, '2026-01-24', '7 hours') t",
    "update metrics set temp = temp + 1 where device = 3",
    "delete from metrics where device = 4 and time < '2026-01-04'",
    "call refresh_continuous_aggregate('hourly', '2026-01-03', '2026-01-07')",
    "insert into events select ts, 'heard' from events where ts > '2026-01-03'",
)


async def _require_equal(source: str, target: str, settings: Settings) -> None:
    assert await world.differences(source, target) == []
    assert await world.aggregates(source) == await world.aggregates(target)
    assert await world.value(target, "select count(*) from hourly where hour < '2026-01-02'")
    assert await world.compressed(source) == await world.compressed(target) != set()
    assert await world.jobs(source) != await world.jobs(target)  # ours are paused
    assert [job[0] for job in await world.jobs(source)] == [job[0] for job in await world.jobs(target)]
    report = await verify(settings)
    assert report.is_equal, report.differences


@pytest.mark.parametrize("server", ["timescale_target", "other_timescale"])
async def test_chunks_that_came_over_as_they_are_are_copied_again_through_their_hypertables(
    server: str, request: pytest.FixtureRequest, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Compressed ones, those made meanwhile, and what aggregates hold of data that are gone; writes go on."""
    both = request.getfixturevalue(server)
    async with timescale_database(both) as source, database(both) as target:
        await _copy_again_in_replay(source, target, kafka_bootstrap, unique_name, tmp_path)


async def _copy_again_in_replay(
    source: str, target: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await world.make(source)
    await execute(source, *_BEFORE, *_FROZEN)
    migration = Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True)
    async with _lost(migration, source):
        await execute(source, *_UNHEARD)
        topic = await world.value(target, "select topic_id from _live_migration.migration")
        migration.start_coordinator(recopy=True)
        await migration.until("tables voided", "select topic_id <> $1 from _live_migration.migration", topic)
        await migration.until("prepared again", "select phase <> 'prepare' from _live_migration.migration")
        migration.producer.start()
        await execute(source, *_HEARD[:3])
        await migration.until_phase("replay", timeout=240)
        await execute(source, *_HEARD[3:])
        await migration.finish()
        print("\n".join(migration.observer.notes + migration.observer.warnings))
        await _require_equal(source, target, migration.settings)
        assert await world.all_rows(source, "iced") == await world.all_rows(target, "iced") != []
        assert any("frozen on the source" in each for each in migration.observer.warnings)


async def test_it_is_exact_under_load_with_what_was_made_meanwhile(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The writer compresses, decompresses, refreshes and deletes all the while, and has made a hypertable and an aggregate before the loss."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    writer = Writer(source, 21)
    migration = Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True, partitions=3)
    async with migration:
        async with writer:
            await migration.until_phase("replay", timeout=240)
            await writer.make_newcomers()
            await migration.until("newcomers followed", _FOLLOWED)
            await writer.go_on(migration, 100)
            await migration.stop()
            await migration.producer.crash()
            migration.producer.task = None
            await writer.go_on(migration, 100)
            await execute(source, f"select pg_drop_replication_slot('{unique_name}')")
            topic = await world.value(target, "select topic_id from _live_migration.migration")
            migration.start_coordinator(recopy=True)
            await migration.until("tables voided", "select topic_id <> $1 from _live_migration.migration", topic)
            await migration.until("prepared again", "select phase <> 'prepare' from _live_migration.migration")
            migration.producer.start()
            await migration.until_phase("replay", timeout=240)
            await migration.until("newcomers followed", _FOLLOWED)
            await writer.go_on(migration, 100)
        await writer.settle()
        assert writer.failures == []
        await migration.finish(timeout=300)
        print("\n".join(migration.observer.notes + migration.observer.warnings))
        await world.require_equal(source, target)


_FOLLOWED = "select count(*) = 2 from _live_migration.tables where newcomer = 'followed' and rebuild is null"


@asynccontextmanager
async def _chunk_before_the_log(migration: Migration, source: str) -> AsyncIterator[None]:
    """While the recopy waits for its slot a chunk is made, which TimescaleDB publishes; then the log begins."""
    holder = await asyncpg.connect(source)
    try:
        async with holder.transaction():
            await holder.execute("insert into plain values (1000, 'open')")  # the slot waits for it
            yield
            slot = "select exists (select from pg_replication_slots where slot_name = $1)"
            await migration.until("slot begun", slot, migration.settings.slot, where="source")
            await execute(source, "insert into events values ('2026-02-02', 'between')")
            assert await world.value(source, _PUBLISHED, migration.settings.insert_publication)
    finally:
        await holder.close()


_PUBLISHED = """
    select count(*) = 1 from show_chunks('events', newer_than => '2026-02-01'::timestamptz) c
    join pg_publication_rel r on r.prrelid = c join pg_publication p on p.oid = r.prpubid where p.pubname = $1
"""


@pytest.mark.parametrize("flatten", [False, True])
async def test_a_chunk_that_is_made_and_published_before_the_new_log_begins_is_copied(
    flatten: bool,
    timescale_source_database: str,
    timescale_target: Server,
    target_server: Server,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """It is in no plan, its rows are not in the log, and it looks as if nothing of it had been missed."""
    source = timescale_source_database
    async with database(target_server if flatten else timescale_target) as target:
        await world.make(source)
        options = {"pause_source_jobs": True, "flatten": flatten}
        migration = Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options)
        async with _lost(migration, source):
            async with _chunk_before_the_log(migration, source):
                migration.start_coordinator(recopy=True)
            await _end_recopy(migration)
        await _require_rows_equal(source, target)


async def test_chunks_that_came_since_the_plan_are_copied_where_rows_are_not_routed_yet(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The slot is lost before anything was copied; one of them was published too late, and marked, before that."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    migration = Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True)
    migration.start_coordinator()
    try:
        await migration.until_phase("copy", timeout=240)
        await execute(source, "set timescaledb.enable_chunk_auto_publication = off", *_LATE_EVENTS)
        await migration.until(
            "chunk marked", "select count(*) = 1 from _live_migration.tables where rebuild is not null"
        )
        await migration.stop()
        await execute(source, f"select pg_drop_replication_slot('{unique_name}')", *_LATE_EVENTS)
        async with _chunk_before_the_log(migration, source):
            migration.start_coordinator(recopy=True)
        for consumer in migration.consumers:
            consumer.start()
        await _end_recopy(migration)
    finally:
        await migration.__aexit__()
    assert await world.differences(source, target) == []
    assert await world.value(target, "select count(*) from only events") == 0, "rows lie where nobody looks for them"


_LATE_EVENTS = ("insert into events values ('2026-01-25', 'marked'), ('2026-01-25', 'marked')",)


async def _end_recopy(migration: Migration) -> None:
    await migration.until("prepared again", "select phase <> 'prepare' from _live_migration.migration")
    migration.producer.start()
    await migration.until_phase("replay", timeout=240)
    await migration.finish()
    print("\n".join(migration.observer.notes + migration.observer.warnings))


async def _require_rows_equal(source: str, target: str) -> None:
    for table in world.TABLES:
        assert await world.all_rows(source, table) == await world.all_rows(target, table) != []


_STEPS_TO_THE_LOG = (
    (f"{COORDINATOR}.recopy", "_void", 1),
    (f"{COORDINATOR}.prepare", "drop_built_indexes", 1),
    (f"{COORDINATOR}.prepare", "_enter_schema", 1),
)
_STEPS = (
    (f"{COORDINATOR}.recopy_chunks", "_plan_anew", 1),
    (f"{COORDINATOR}.recopy_chunks", "_drop_chunk", 3),
    (f"{COORDINATOR}.recopy_chunks", "_drop_chunks", 1),
    (f"{COORDINATOR}.entries", "_run_batch", 1),
    (f"{COORDINATOR}.recopy_chunks", "_make_chunks", 1),
    (f"{COORDINATOR}.schema", "release_tables", 1),
)


async def test_one_that_is_killed_at_each_step_goes_on(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """In the midst of the copy, too; and a hypertable is truncated between the log's beginning and the new plan."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    await execute(source, *_BEFORE)
    cli = Cli(source, target, kafka_bootstrap, unique_name, tmp_path / "data")
    named = ["--name", unique_name, "--dir", str(tmp_path / "data")]
    options = ["--consumers", "1", "--pause-source-jobs"]
    migrate = await cli.migrate(*options)
    try:
        await migrate.until_phase("replay", timeout=240)
        await execute(source, *_CHUNK_SINCE)
        await migrate.kill()
        await execute(source, *_LOST, f"select pg_drop_replication_slot('{unique_name}')", *_UNHEARD)
        for step in _STEPS_TO_THE_LOG:
            await run_killed(cli, step, "migrate", "--recopy", *named, *options)
        # The log has it, and a chunk that is planned is younger: it must not take that chunk's rows along.
        await execute(source, "truncate events", "insert into events values ('2026-02-03', 'younger')")
        for step in _STEPS:
            await run_killed(cli, step, "migrate", "--recopy", *named, *options)
        for step in (
            (f"{COORDINATOR}.partitioned_indexes", "read_post_data", 1),
            (f"{COORDINATOR}.waiting", "end_restoring", 1),
        ):
            await run_killed(cli, step, "migrate", *named, *options)
        await execute(source, *_HEARD)
        migrate = await cli.migrate(*options)
        await migrate.until_phase("replay", timeout=240)
        code, _, err = await cli.run("cutover")
        assert code == 0, err
        assert await migrate.wait() == 0, migrate.log()
    finally:
        await migrate.close()
    names = {"source": source, "target": target, "kafka": kafka_bootstrap, "name": unique_name, "dir": tmp_path}
    await _require_equal(source, target, load_settings(names))
