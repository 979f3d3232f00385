"""Whole migrations from one TimescaleDB to another."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from live_migration.coordinator.clean import clean
from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration
from tests.timescale import world
from tests.timescale.writer import Writer

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


@pytest.mark.parametrize("seed", range(2))
async def test_a_database_under_load_comes_over_exactly(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    seed: int,
) -> None:
    """None of the writer's statements fails; every row and every aggregate's result is equal after the cutover."""
    print(f"seed {seed}")
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    jobs = await world.jobs(source)
    writer = Writer(source, seed)
    async with Migration(
        source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True, partitions=3
    ) as migration:
        async with writer:
            await migration.until_phase("replay", timeout=240)
            before = writer.done.total()
            await migration.until("rows under load", "select sum(change_count) > 500 from _live_migration.checkpoints")
            while writer.done.total() < before + 300:
                migration.raise_failures()
                await asyncio.sleep(0.1)
        print(writer.done)
        assert writer.failures == []
        await migration.finish(timeout=400)
        print("\n".join(migration.observer.notes + migration.observer.warnings))
        assert await world.differences(source, target) == []
        assert await world.jobs(target) == jobs
        ours, theirs = await world.compression(source), await world.compression(target)
        assert [c for c in ours if c[3]] == [c for c in theirs if c[3] and c in ours]
        assert all(writer.done[kind] for kind in ("compress", "decompress", "delete batches", "update metrics"))
