"""Sessions that began on the target in TimescaleDB's restoring mode keep it: what becomes of what they write, against real servers."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from live_migration.consumer.applier import Applier
from live_migration.consumer.hypertables import session_settings
from live_migration.consumer.service import run_consumer
from live_migration.coordinator.cutover import CutoverRefused
from tests.e2e.migration import Migration, Service
from tests.fixtures.fix_postgres import execute
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_IS_RESTORING = """
    select count(*) > 0 from pg_db_role_setting where setdatabase = (select oid from pg_database where datname = current_database())
        and 'timescaledb.restoring=on' = any(setconfig)
"""
_ROW = "insert into events values ('2026-01-02 12:00', 'ours', null)"


async def test_the_cutover_waits_for_sessions_that_began_in_restoring_mode(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """What an application's pool, opened too early, would write is there for nobody else."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    options = {"pause_source_jobs": True, "consumers": 0}
    harmless = await asyncpg.connect(target, server_settings={"application_name": "before"})
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        await migration.until_phase("copy", timeout=240)
        await migration.until("restoring mode", _IS_RESTORING)
        early = await asyncpg.connect(target, server_settings={"application_name": "shop"})
        try:
            migration.consumers.append(Service(run_consumer, migration.settings))
            migration.consumers[0].start()
            await migration.until_phase("replay", timeout=240)
            with pytest.raises(CutoverRefused) as refused:
                await migration.finish()
            lines = [line for line in refused.value.message.splitlines() if "restoring" in line]
            assert [f"pid {early.get_server_pid()} (shop, user postgres)" in line for line in lines] == [True]
        finally:
            await early.close()
        migration.start_coordinator()
        await migration.finish()
        assert await world.differences(source, target) == []
        assert [each for each in migration.observer.warnings if "outside of their chunks" in each] == []
    await harmless.close()


async def test_rows_outside_of_chunks_are_named_after_the_cutover(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = timescale_source_database, target_of_timescale
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await execute(target, "set timescaledb.restoring = on", _ROW)
        await migration.finish()
        (warning,) = [each for each in migration.observer.warnings if "outside of their chunks" in each]
        assert "public.events" in warning


async def test_a_session_of_ours_leaves_restoring_mode_with_the_database(timescale_target_database: str) -> None:
    """Behind a pooler it may have begun in that mode; while the database is in it, the copy needs it."""
    uri = timescale_target_database
    await world.make(uri)
    name = uri.rsplit("/", 1)[1]
    await execute(uri, f"alter database {name} set timescaledb.restoring = on")
    kept = await asyncpg.connect(uri)
    try:
        assert await session_settings(kept)
        assert await kept.fetchval("select current_setting('timescaledb.restoring')") == "on"
        await execute(uri, f"alter database {name} reset timescaledb.restoring")
        await Applier(kept, 0).begin()
        await kept.execute(_ROW)
        await kept.execute("commit")
        assert await world.value(uri, "select count(*) from events where kind = 'ours'") == 1
        await kept.execute("set timescaledb.restoring = on")
        assert await kept.fetchval("select count(*) from only events") == 0
    finally:
        await kept.close()
