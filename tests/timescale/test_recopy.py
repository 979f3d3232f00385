"""`migrate --recopy` of a source with hypertables: everything is copied again, into whatever the target has of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from live_migration.common.errors import LiveMigrationError
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute
from tests.timescale import world

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


async def test_chunks_that_came_over_as_they_are_are_not_copied_again_once_rows_are_routed(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    migration = Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True)
    async with _lost(migration, source):
        before = await world.all_rows(target, "metrics")
        migration.start_coordinator(recopy=True)
        assert migration.coordinator is not None
        with pytest.raises(LiveMigrationError, match="cannot be copied again once replay has begun") as refused:
            await asyncio.wait_for(migration.coordinator, 60)
        migration.coordinator = None
        assert "live-migration clean" in refused.value.hint
        assert await world.all_rows(target, "metrics") == before
