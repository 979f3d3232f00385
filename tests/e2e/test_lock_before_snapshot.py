"""A snapshot does not protect against rewrites and truncates: tables changed between planning and copy, and all the while."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from tests.e2e.migration import Migration
from tests.support.workload import Workload, differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

REWRITE = """
    begin;
    alter table app.by_key alter n type bigint;
    alter table app.by_key alter n type int;
    commit;
"""
TRUNCATE_AND_FILL = """
    begin;
    truncate app.by_time;
    insert into app.by_time select timestamptz '2026-02-01' + i * interval '1 second', 'again', i from generate_series(1, 500) i;
    commit;
"""


async def _keep_disturbing(uri: str, stop: asyncio.Event) -> int:
    """Rewrite one table and truncate another, over and over; gives how often."""
    connection = await asyncpg.connect(uri)
    rounds = 0
    try:
        await connection.execute("set lock_timeout = '5s'; set deadlock_timeout = '100ms'")
        while not stop.is_set():
            for script in (REWRITE, TRUNCATE_AND_FILL, "vacuum full app.insert_only"):
                try:
                    await connection.execute(script)
                except (asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError):
                    if connection.is_in_transaction():
                        await connection.execute("rollback")
            rounds += 1
            await asyncio.sleep(0.5)  # without a gap nobody else ever gets the tables, and no copy ends
    finally:
        await connection.close()
    return rounds


async def test_tables_rewritten_and_truncated_around_their_copy(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    workload = Workload(source_database, 1, connections=3)
    await workload.create(rows=3000)
    stop = asyncio.Event()
    migration = Migration(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, part_size=65536, lock_timeout=0.5
    )
    async with workload:
        disturber = asyncio.ensure_future(_keep_disturbing(source_database, stop))
        try:
            async with migration:
                await migration.until_phase("replay")
                stop.set()
                assert await disturber > 0
                await workload.stop()
                await migration.finish()
        finally:
            stop.set()
            await disturber
    found = differences(await read_rows(source_database), await read_rows(target_database))
    assert not found, found


async def test_a_column_altered_before_the_copy_stops_its_table_until_the_target_is_mended(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    workload = Workload(source_database, 2, connections=2)
    await workload.create(rows=500)
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path, consumers=1)
    async with workload, migration:
        # no consumer copies before the source has changed: the only one is stopped at once
        await migration.consumers[0].crash()
        await migration.until_phase("copy")
        source = await asyncpg.connect(source_database)
        await source.execute(
            "alter table app.by_key alter n type bigint; alter table app.by_key add column extra text default 'e'"
        )
        await source.close()
        migration.consumers[0].start()
        hint = await migration.until(
            "the table stops",
            "select hint from _live_migration.tables where table_name = 'by_key' and state = 'stopped'",
        )
        others = "select count(*) filter (where state = 'ready') = count(*) - 1 from _live_migration.tables"
        await migration.until("the others go on", others)
        target = await asyncpg.connect(target_database)
        for statement in hint[hint.index("ALTER TABLE") :].splitlines():
            if statement.strip().startswith("ALTER TABLE"):
                await target.execute(statement)
        await target.close()
        await migration.until_phase("replay")
        await workload.stop()
        await migration.finish()
    found = differences(await read_rows(source_database), await read_rows(target_database))
    assert not found, found
