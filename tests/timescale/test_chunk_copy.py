"""Copying chunks whose rows move on the source between their two tables, or go, while they wait for their copy or are copied."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.postgres import session
from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import compressed_table
from live_migration.consumer.claims import TableClaim
from live_migration.consumer.service import run_consumer
from live_migration.consumer.table_snapshot import lock_table
from tests.e2e.migration import Migration, Service
from tests.fixtures.fix_postgres import Server, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_CHUNK_AT = """
    select format('%I.%I', chunk_schema, chunk_name) from timescaledb_information.chunks
    where hypertable_name = 'metrics' and range_start <= $1::text::timestamptz and range_end > $1::text::timestamptz
"""


async def test_chunks_that_are_not_as_planned_when_they_are_copied(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Compressed, decompressed and dropped between plan and copy: no twin on the target for where the rows lie now, or nothing to copy."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    options = {"pause_source_jobs": True, "consumers": 0}
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        await migration.until_phase("copy")
        connection = await asyncpg.connect(source)
        packed, plain = [await connection.fetchval(_CHUNK_AT, f"2026-01-{day} 12:00") for day in ("01", "04")]
        await connection.close()
        await execute(
            source,
            f"select decompress_chunk('{packed}')",
            f"select compress_chunk('{plain}')",
            "select drop_chunks('events', older_than => '2026-01-02'::timestamptz)",
        )
        migration.consumers.append(Service(run_consumer, migration.settings))
        migration.consumers[0].start()
        await migration.until_phase("replay", timeout=60)
        await migration.finish()
        assert await world.differences(source, target) == []


@pytest.mark.parametrize("move", ["decompress_chunk", "compress_chunk"])
async def test_rows_that_move_between_a_chunk_and_its_compressed_rows_are_seen_under_our_lock(
    timescale_source_database: str, move: str
) -> None:
    await _move_under_lock(timescale_source_database, move)


@pytest.mark.parametrize("move", ["decompress_chunk", "compress_chunk"])
async def test_rows_that_move_are_seen_under_our_lock_on_another_version(other_timescale: Server, move: str) -> None:
    async with timescale_database(other_timescale) as source:
        await _move_under_lock(source, move)


async def _move_under_lock(source: str, move: str) -> None:
    """Whoever moves rows waits for us, or they are found where our snapshot shows them; nobody is refused."""
    await world.make(source)
    async with session(source, "source") as ours, session(source, "source") as other:
        await other.execute("set search_path = public; set lock_timeout = '1s'")
        chunk = await other.fetchval(_CHUNK_AT, "2026-01-01 12:00")
        if move == "compress_chunk":
            await other.execute("insert into metrics values ('2026-01-01 12:00:01', 3, 9, 'beside')")
        oid = await other.fetchval("select $1::regclass::oid", chunk)
        compressed = await compressed_table(other, oid)
        assert compressed is not None
        rows = f"""select (select count(*) from only {chunk}), (select sum(_ts_meta_count) from only {compressed[0]}),
                          (select count(*) from {chunk})"""
        before = await other.fetchrow(rows)
        assert before[2] == before[0] + before[1]
        claim = TableClaim(
            oid, QualifiedName(*chunk.split(".")), 1, has_parts=False, is_chunk=True, compressed=compressed
        )
        await lock_table(ours, claim, 5)
        with suppress(asyncpg.LockNotAvailableError):
            await other.execute(f"select {move}('{chunk}')")
        assert await ours.fetchrow(rows) == before
        await ours.execute("rollback")
