"""Rules of chunks that are made, published and merged while a migration is under way, against real servers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.consumer.chunk_marks import NOT_KNOWN_YET
from live_migration.consumer.service import run_consumer
from live_migration.coordinator import chunk_watch
from live_migration.producer.publication import PublishedTable
from tests.e2e.migration import Migration, Service
from tests.fixtures.fix_postgres import Server, database, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_NEW_CHUNK = """
    begin;
    insert into metrics select t, 1, 1, 'new' from generate_series('2026-02-01'::timestamptz, '2026-02-01 10:00', '1 hour') t;
    update metrics set temp = 2 where time > '2026-02-01 03:00';
    delete from metrics where time > '2026-02-01 07:00';
    commit
"""


class Died(Exception):
    """The coordinator is gone at this point."""


async def test_a_coordinator_that_dies_when_it_has_published_a_chunk_loses_nothing_of_it(
    other_timescale: Server,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A version without publishing of its own: updates and deletes of the new chunk are not in the stream, and afterwards it looks whole."""
    add_tables = chunk_watch.add_tables

    async def publish_and_die(
        source: asyncpg.Connection, publication: str, tables: Sequence[PublishedTable], **options: float
    ) -> None:
        await add_tables(source, publication, tables, **options)
        if tables:
            raise Died

    async with timescale_database(other_timescale) as source, database(other_timescale) as target:
        await world.make(source)
        async with Migration(
            source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
        ) as migration:
            await migration.until_phase("replay", timeout=240)
            with monkeypatch.context() as death:
                death.setattr(chunk_watch, "add_tables", publish_and_die)
                await execute(source, _NEW_CHUNK)
                assert migration.coordinator is not None
                with pytest.raises(Died):
                    await asyncio.wait_for(migration.coordinator, 60)
            marked = (
                "select unseen_lsn = '0/0'::pg_lsn + $1::numeric from _live_migration.tables where rebuild is not null"
            )
            assert await world.value(target, marked, NOT_KNOWN_YET)
            migration.start_coordinator()
            await migration.finish()
            assert await world.differences(source, target) == []


_CHUNK_AT = """
    select format('%I.%I', chunk_schema, chunk_name) from timescaledb_information.chunks
    where hypertable_name = $1 and range_start <= $2::text::timestamptz and range_end > $2::text::timestamptz
"""
_DAYS = {"metrics": ("2026-01-05 12:00", "2026-01-06 12:00"), "events": ("2026-01-04 12:00", "2026-01-05 12:00")}
"""In the last chunk of the plan, and in the next one."""
_ROWS = (
    "insert into metrics select t, d, 7, 'm' from generate_series('2026-01-06'::timestamptz, '2026-01-06 20:00', '1 hour') t, generate_series(1, 3) d",
    "insert into events select t, 'm', '{}' from generate_series('2026-01-05'::timestamptz, '2026-01-05 20:00', '1 hour') t",
)
_ROWS_AFTER = (
    "update metrics set temp = 8 where time between '2026-01-05' and '2026-01-06 03:00' and device = 1",
    "delete from metrics where time between '2026-01-05 23:00' and '2026-01-06 05:00' and device = 2",
    "insert into metrics values ('2026-01-05 12:00', 3, 9, 'after'), ('2026-01-06 22:00', 3, 9, 'after')",
    "insert into events values ('2026-01-04 12:00', 'after'), ('2026-01-05 22:00', 'after')",
)


async def _merge(source: str, places: Mapping[str, Sequence[str]] = _DAYS) -> None:
    """Merge two chunks of either hypertable, which hold these moments. The older one stays: in whatever order they are named (seen)."""
    connection = await asyncpg.connect(source)
    for table, moments in places.items():
        first, second = [await connection.fetchval(_CHUNK_AT, table, at) for at in moments]
        await connection.execute(f"call merge_chunks('{first}', '{second}')")
    await connection.close()


@pytest.mark.parametrize("moment", ["before it is copied", "when both are applied", "at once"])
async def test_a_chunk_made_after_the_plan_and_merged_into_a_planned_one(
    moment: str,
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """Its rows are in the stream under its own name, and in the copy of the other: once on the target, with a key and without one."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    is_early = "before" in moment
    options = {"pause_source_jobs": True, "consumers": 0 if is_early else 2}
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        await migration.until_phase("copy" if is_early else "replay", timeout=240)
        await execute(source, *_ROWS)
        if moment == "when both are applied":
            await migration.until("rows applied", "select count(*) >= 21 from events where kind = 'm'")
            await migration.until("rows applied", "select count(*) >= 63 from metrics where note = 'm'")
        await _merge(source)
        if is_early:
            migration.consumers.append(Service(run_consumer, migration.settings))
            migration.consumers[0].start()
            await migration.until_phase("replay", timeout=240)
        await execute(source, *_ROWS_AFTER)
        await migration.finish()
        assert await world.differences(source, target) == []


_UNPUBLISHED = "set timescaledb.enable_chunk_auto_publication = off"
_MET = (
    _UNPUBLISHED,
    "insert into metrics select t, d, 7, 'm' from generate_series('2026-01-06'::timestamptz, '2026-01-06 09:00', '1 hour') t, generate_series(1, 3) d",
    "insert into events select t, 'm', '{}' from generate_series('2026-01-05'::timestamptz, '2026-01-05 09:00', '1 hour') t",
)
_UNTOLD = (
    _UNPUBLISHED,
    "update metrics set temp = 8 where time >= '2026-01-06' and device = 1",
    "delete from metrics where time >= '2026-01-06' and device = 2",
    "insert into metrics select t, 3, 9, 'late' from generate_series('2026-01-06 10:00'::timestamptz, '2026-01-06 20:00', '1 hour') t",
    "insert into events select t, 'late', '{}' from generate_series('2026-01-05 10:00'::timestamptz, '2026-01-05 20:00', '1 hour') t",
)


async def _nobody_looks(*_: object, **__: object) -> int:
    return 0


async def test_a_chunk_that_was_met_changed_untold_and_merged_before_anybody_looked(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the range of what it was merged into tells of it; the copy of that holds rows which still stand in the stream under its name."""
    source, target = timescale_source_database, target_of_timescale
    has_looked, follow_chunks = asyncio.Event(), chunk_watch.follow_chunks

    async def look(*arguments: Any, **options: Any) -> int:
        found = await follow_chunks(*arguments, **options)
        has_looked.set()
        return found

    await world.make(source)
    monkeypatch.setattr(chunk_watch, "follow_chunks", _nobody_looks)
    async with Migration(
        source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True, consumers=1
    ) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(source, *_MET)
        await migration.until("rows applied", "select count(*) = 10 from events where kind = 'm'")
        await migration.until("rows applied", "select count(*) = 30 from metrics where note = 'm'")
        await migration.consumers[0].drain()
        await execute(source, *_UNTOLD)
        await _merge(source)
        await migration.stop()
        monkeypatch.setattr(chunk_watch, "follow_chunks", look)
        migration.start_coordinator()
        await asyncio.wait_for(has_looked.wait(), 120)
        migration.consumers[0].start()
        await migration.finish()
        assert await world.differences(source, target) == []


async def test_a_chunk_that_its_lane_met_and_that_is_compressed_then_is_copied_anew_once(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where schemas cannot be published it lies in another file than when it was made, for good: in the one that it was copied from."""
    source = await world.as_owner(timescale_source_database, target_of_timescale, unique_name)
    target = target_of_timescale
    await world.make(source)
    looks: list[int] = []
    follow_chunks = chunk_watch.follow_chunks

    async def look(*arguments: Any, **options: Any) -> int:
        looks.append(await follow_chunks(*arguments, **options))
        return looks[-1]

    monkeypatch.setattr(chunk_watch, "follow_chunks", look)
    monkeypatch.setattr(chunk_watch, "INTERVAL_SECONDS", 1.0)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(source, *(rows.replace("2026-02-02 20:00", "2026-02-01 20:00") for rows in _NEW_ROWS))
        met = "select count(*) = 2 from _live_migration.tables where newcomer = 'met' and rebuild is null"
        await migration.until("its lane has met the chunk", met)
        chunk = await world.value(source, _CHUNK_AT, "metrics", "2026-02-01 12:00")
        await execute(source, f"select compress_chunk('{chunk}')")
        copied = "select count(*) = 1 from _live_migration.tables where newcomer = 'met' and rebuild is null and file_mark is not null"
        await migration.until("the chunk is copied anew", copied)
        before = len(looks)
        async with asyncio.timeout(60):
            while len(looks) < before + 4:
                migration.raise_failures()
                await asyncio.sleep(0.1)
        assert looks[before + 1 :] == [0] * len(looks[before + 1 :])
        await migration.finish()
        assert await world.differences(source, target) == []


async def test_a_transaction_that_makes_a_chunk_behind_rows_of_others_comes_once(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Where the catalog is not in the stream the producer begins a new session at such a chunk, in the midst of the transaction."""
    source = await world.as_owner(timescale_source_database, target_of_timescale, unique_name)
    target = target_of_timescale
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        for day in range(1, 6):
            await execute(
                source,
                f"""begin; insert into events select '2026-01-04 12:00'::timestamptz, 'row ' || g from generate_series(1, 5) g;
                    insert into plain values ({5000 + day}, 'm'); insert into events values ('2026-02-0{day}', 'made'); commit""",
            )
            await migration.until("a chunk's row", f"select count(*) = {day} from events where kind = 'made'")
        await migration.finish()
        assert await world.differences(source, target) == []


async def test_rows_that_come_to_a_compressed_chunk_between_plan_and_copy(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """They lie beside the compressed ones, which the catalog, that was read with the plan, does not say."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    options = {"pause_source_jobs": True, "consumers": 0}
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        await migration.until_phase("copy", timeout=240)
        await execute(source, "insert into metrics values ('2026-01-01 12:00:01', 3, 9, 'between')")
        migration.consumers.append(Service(run_consumer, migration.settings))
        migration.consumers[0].start()
        await migration.until_phase("replay", timeout=240)
        await migration.finish()
        assert await world.differences(source, target) == []


_SKIPPED = (
    "set timescaledb.enable_chunk_skipping = on",
    "create table skipped (time timestamptz not null, device int not null, v int)",
    "select create_hypertable('skipped', 'time', chunk_time_interval => interval '1 day', create_default_indexes => false)",
    "alter table skipped set (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time')",
    "select enable_chunk_skipping('skipped', 'v')",
    "insert into skipped select t, 1, 10 from generate_series('2026-01-01'::timestamptz, '2026-01-02 23:00', '1 hour') t",
    "select compress_chunk(c) from show_chunks('skipped') c",
)
_BESIDE = "insert into skipped values ('2026-01-01 12:30', 1, 500), ('2026-01-02 12:30', 1, 500)"
_COMPRESS_AGAIN = "select compress_chunk(c) from show_chunks('skipped', older_than => '2026-01-02'::timestamptz) c"
_COUNT = "select count(*) from skipped where v = $1"


async def test_rows_beside_compressed_ones_are_not_skipped(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Between plan and copy, one of the chunks being compressed again then, and during replay: queries leave chunks out by bounds that must hold."""
    source, target = timescale_source_database, target_of_timescale
    connection = await asyncpg.connect(source)
    for statement in _SKIPPED:
        await connection.execute(statement)
    await connection.close()
    options = {"pause_source_jobs": True, "consumers": 0}
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        await migration.until_phase("copy", timeout=240)
        await execute(source, _BESIDE, _COMPRESS_AGAIN)
        await _consume(migration)
        connection = await asyncpg.connect(target)
        await connection.execute("set timescaledb.enable_chunk_skipping = on")
        assert await connection.fetchval(_COUNT, 500) == 2
        await execute(source, _BESIDE.replace("500", "900"))
        await migration.until("rows applied", "select count(*) = 2 from skipped where v = 900")
        assert await connection.fetchval(_COUNT, 900) == 2
        await migration.finish()
        assert [await connection.fetchval(_COUNT, v) for v in (500, 900)] == [2, 2]
        assert await world.all_rows(target, "skipped") == await world.all_rows(source, "skipped")
        await connection.close()


_NEW_ROWS = (
    """insert into metrics select t, d, 7, 'm' from generate_series('2026-02-01'::timestamptz, '2026-02-02 20:00', '1 hour') t,
       generate_series(1, 3) d""",
    "insert into events select t, 'm', '{}' from generate_series('2026-02-01'::timestamptz, '2026-02-02 20:00', '1 hour') t",
)
_NEW_ROWS_AFTER = (
    "update metrics set temp = 8 where time between '2026-02-01 20:00' and '2026-02-02 03:00' and device = 1",
    "delete from metrics where time between '2026-02-01 23:00' and '2026-02-02 05:00' and device = 2",
    "insert into metrics values ('2026-02-01 12:30', 3, 9, 'after'), ('2026-02-02 22:00', 3, 9, 'after')",
    "insert into events values ('2026-02-01 12:00', 'after'), ('2026-02-02 22:00', 'after')",
)


async def test_two_chunks_made_after_the_plan_and_merged_before_their_lane_met_them(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """One is gone when its rows come by in the stream, and nothing tells what range it had; its rows are in the other."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    async with Migration(
        source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True, consumers=0
    ) as migration:
        await migration.until_phase("copy", timeout=240)
        await execute(source, *_NEW_ROWS)
        await _merge(source, dict.fromkeys(_DAYS, ("2026-02-01 12:00", "2026-02-02 12:00")))
        await execute(source, *_NEW_ROWS_AFTER)
        await _consume(migration)
        await migration.finish()
        assert await world.differences(source, target) == []


async def test_a_chunk_that_nobody_published_and_merged_into_a_new_one_before_anybody_looked(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a source whose role is no superuser. Nothing of it is in the stream, and what it was merged into had no range that was known."""
    source = await world.as_owner(timescale_source_database, target_of_timescale, unique_name)
    target = target_of_timescale
    monkeypatch.setattr(chunk_watch, "follow_chunks", _nobody_looks)
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await execute(source, *(rows.replace("2026-02-02 20:00", "2026-02-01 20:00") for rows in _NEW_ROWS))
        await execute(source, _UNPUBLISHED, *(rows.replace("2026-02-01", "2026-02-02") for rows in _NEW_ROWS))
        await _merge(source, dict.fromkeys(_DAYS, ("2026-02-01 12:00", "2026-02-02 12:00")))
        await execute(source, *_NEW_ROWS_AFTER)
        await migration.finish()
        assert await world.differences(source, target) == []


@pytest.mark.parametrize("then", ["nothing", "one half emptied", "merged again"])
async def test_a_chunk_that_is_split_before_it_is_copied(
    then: str,
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """The new half is in no plan, and the stream has nothing of how its rows came into it."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    async with Migration(
        source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True, consumers=0
    ) as migration:
        await migration.until_phase("copy", timeout=240)
        connection = await asyncpg.connect(source)
        for table in _DAYS:
            planned = await connection.fetchval(_CHUNK_AT, table, "2026-01-03 12:00")
            await connection.execute(f"call split_chunk('{planned}', '2026-01-03 12:00'::timestamptz)")
        await connection.close()
        if then == "one half emptied":
            await execute(source, "delete from metrics where time between '2026-01-03 12:00' and '2026-01-03 23:59:59'")
        if then == "merged again":
            await _merge(source, dict.fromkeys(_DAYS, ("2026-01-03 06:00", "2026-01-03 18:00")))
        await execute(
            source,
            "update metrics set temp = 8 where time between '2026-01-03 06:00' and '2026-01-03 18:00' and device = 1",
            "insert into events values ('2026-01-03 06:00', 'after'), ('2026-01-03 18:00', 'after')",
        )
        await _consume(migration)
        await migration.finish()
        assert await world.differences(source, target) == []


async def _consume(migration: Migration) -> None:
    """Let a consumer begin, and have it copy everything."""
    migration.consumers.append(Service(run_consumer, migration.settings))
    migration.consumers[0].start()
    await migration.until_phase("replay", timeout=240)


@pytest.mark.parametrize("is_split", [False, True], ids=["whole", "split"])
async def test_rows_changed_in_a_new_chunk_without_identity(
    is_split: bool,
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """The stream has its inserts alone: what was updated and deleted is seen by a copy behind the last barrier. Of a new half it has nothing."""
    source, target = timescale_source_database, target_of_timescale
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await execute(source, *_NEW_ROWS)
        await migration.until("rows applied", "select count(*) = 45 from events where kind = 'm'")
        if is_split:
            chunk = await world.value(source, _CHUNK_AT, "events", "2026-02-02 12:00")
            await execute(source, f"call split_chunk('{chunk}', '2026-02-02 12:00'::timestamptz)")
        await execute(
            source,
            "update events set kind = 'changed' where ts between '2026-02-02 10:00' and '2026-02-02 14:00'",
            "delete from events where ts >= '2026-02-02 16:00'",
        )
        await migration.finish()
        assert await world.differences(source, target) == []
