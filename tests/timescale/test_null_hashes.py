"""Rows without the value that a hypertable is cut by: they lie in one chunk, and pass the constraints of all."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from live_migration.consumer.service import run_consumer
from tests.e2e.migration import Migration, Service
from tests.fixtures.fix_postgres import Server, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world
from tests.timescale.acts import DELETED, watched

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_TABLES = """
    create table spaced (at timestamptz not null, place text, v int);
    select create_hypertable('spaced', 'at', partitioning_column => 'place', number_partitions => 2,
                             chunk_time_interval => interval '1 day', create_default_indexes => false);
    alter table spaced set (timescaledb.compress, timescaledb.compress_segmentby = 'place', timescaledb.compress_orderby = 'at');
    insert into spaced select t, nullif('p' || d, 'p0'), d
        from generate_series('2026-01-02'::timestamptz, '2026-01-03 23:00', '1 hour') t, generate_series(0, 6) d;
"""
_FULL = "alter table spaced replica identity full"
_COMPRESS = "select compress_chunk(c, true) from show_chunks('spaced') c"


async def _require_equal(source: str, target: str) -> None:
    ours, theirs = [await world.all_rows(uri, "spaced") for uri in (source, target)]
    assert any(row.split(",")[1] == "" for row in ours)
    assert ours == theirs


async def _delete_batches(source: str) -> None:
    """Delete whole batches of each chunk, so that each is copied anew."""
    connection = await asyncpg.connect(source)
    seen = [await watched(connection, f"delete from spaced where place = 'p{d}'") for d in range(1, 7)]
    await connection.close()
    assert all(DELETED in each for each in seen)


async def test_chunks_that_are_copied_anew_during_replay(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Of a hypertable with REPLICA IDENTITY FULL, the chunks compressed on both ends."""
    source, target = timescale_source_database, target_of_timescale
    await execute(source, _TABLES, _FULL, _COMPRESS)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await _delete_batches(source)
        await migration.finish()
        await _require_equal(source, target)


async def test_chunks_that_are_copied_behind_the_last_barrier(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Of a hypertable without identity, in all of whose chunks rows were changed."""
    source, target = timescale_source_database, target_of_timescale
    await execute(source, _TABLES)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(source, "update spaced set v = v + 100 where v < 3 or place is null")
        await migration.finish()
        await _require_equal(source, target)


async def test_chunks_whose_copy_begins_again(
    other_timescale: Server, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """From another version, so that they are copied through the hypertable: what the first attempt wrote is committed."""
    target = target_of_timescale
    async with timescale_database(other_timescale) as source:
        await execute(source, _TABLES, _FULL)
        options = {"pause_source_jobs": True, "consumers": 0}
        async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
            await migration.until_phase("copy", timeout=240)
            await migration.stop()
            migration.consumers.append(Service(run_consumer, migration.settings))
            migration.consumers[0].start()
            await migration.until("the first attempt", _IS_COPIED, timeout=240)
            await migration.consumers[0].crash()
            await execute(target, "update _live_migration.tables set state = 'planned' where kind = 'chunk'")
            migration.consumers[0].start()
            migration.start_coordinator()
            await migration.until_phase("replay", timeout=240)
            attempts = "select min(attempt) from _live_migration.tables where kind = 'chunk'"
            assert await world.value(target, attempts) == 2
            await execute(source, _COMPRESS)
            await _delete_batches(source)
            await migration.finish()
            await _require_equal(source, target)


_IS_COPIED = "select bool_and(state in ('copied', 'ready')) from _live_migration.tables where kind = 'chunk'"


async def test_chunks_that_are_merged(
    source_of_either_version: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """By compression, which alone merges chunks of a hash: those with rows that lack a place before they are copied, the others when they are."""
    source, target = source_of_either_version, target_of_timescale
    await execute(
        source, _TABLES, _FULL, "alter table spaced set (timescaledb.compress_chunk_time_interval = '2 days')"
    )
    options = {"pause_source_jobs": True, "consumers": 0}
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        await migration.until_phase("copy", timeout=240)
        await _merge(source, lacking=True)
        migration.consumers.append(Service(run_consumer, migration.settings))
        migration.consumers[0].start()
        await migration.until_phase("replay", timeout=240)
        await _merge(source, lacking=False)
        assert await world.value(source, "select count(*) from show_chunks('spaced')") == 2
        await execute(source, "update spaced set v = v + 100 where v < 3", _COMPRESS)
        await _delete_batches(source)
        await migration.finish()
        await _require_equal(source, target)


async def _merge(source: str, *, lacking: bool) -> None:
    """Merge the chunks of two days that hold the same places: those that have rows without any, or the others."""
    connection = await asyncpg.connect(source)
    chunks = [row[0] for row in await connection.fetch("select c::text from show_chunks('spaced') c order by c")]
    found = [await connection.fetchval(f"select exists (select from {c} where place is null)") for c in chunks]
    for chunk in [chunk for chunk, is_lacking in zip(chunks, found, strict=True) if is_lacking == lacking]:
        await connection.execute(f"select compress_chunk('{chunk}')")
    await connection.close()
