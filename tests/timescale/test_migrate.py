"""Whole migrations from one TimescaleDB to another."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from live_migration.coordinator.clean import clean
from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]


async def test_a_quiet_database_comes_over_whole(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    jobs = await world.jobs(source)
    assert any(job[1] for job in jobs)
    async with Migration(
        source, target, kafka_bootstrap, unique_name, tmp_path, cutover="auto", pause_source_jobs=True
    ) as migration:
        await migration.until_phase("done")
        assert not [job for job in await world.jobs(source) if job[1]]
        await migration.finish()
        assert await world.differences(source, target) == []
        assert await world.jobs(target) == jobs
        assert await world.compression(source) == await world.compression(target)
        report = await verify(migration.settings)
        assert report.is_equal, report.differences
        await clean(migration.settings, prune=False, note=print)
    assert await world.jobs(source) == jobs
    connection = await asyncpg.connect(source)
    left = await connection.fetchval("select count(*) from pg_class where relreplident = 'f' and relkind = 'r'")
    setting = await connection.fetchval(
        "select count(*) from pg_db_role_setting where setdatabase = (select oid from pg_database where datname = current_database())"
    )
    await connection.close()
    assert (left, setting) == (0, 0)
