"""Whole migrations from one TimescaleDB to another."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection
from pathlib import Path

import asyncpg
import pytest

from live_migration.coordinator.clean import clean
from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import Server, database, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world
from tests.timescale.acts import DELETED, EVERYTHING
from tests.timescale.writer import Writer

pytestmark = [pytest.mark.e2e, pytest.mark.integration]


async def test_a_quiet_database_comes_over_whole(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    await execute(source, world.LATER, world.CONSTRAINT_TRIGGER)
    jobs = await world.jobs(source)
    assert any(job[1] for job in jobs)
    before = await world.value(source, _FULL)
    async with Migration(
        source, target, kafka_bootstrap, unique_name, tmp_path, cutover="auto", pause_source_jobs=True
    ) as migration:
        await migration.until_phase("done")
        assert not [job for job in await world.jobs(source) if job[1]]
        await migration.finish()
        assert await world.differences(source, target) == []
        assert await world.jobs(target) == jobs
        starts = [await world.value(uri, world.NEXT_START) for uri in (source, target)]
        assert starts[0] == starts[1] is not None
        assert await world.compression(source) == await world.compression(target)
        report = await verify(migration.settings)
        assert report.is_equal, report.differences
        await clean(migration.settings, prune=False, note=print)
    assert await world.jobs(source) == jobs
    connection = await asyncpg.connect(source)
    left = await connection.fetchval(_FULL)
    setting = await connection.fetchval(
        "select count(*) from pg_db_role_setting where setdatabase = (select oid from pg_database where datname = current_database())"
    )
    await connection.close()
    assert (left, setting) == (before, 0)


_FULL = (
    "select string_agg(oid::regclass::text, ' ' order by oid) from pg_class where relreplident = 'f' and relkind = 'r'"
)


async def _under_load(
    source: str,
    target: str,
    kafka: str,
    name: str,
    folder: Path,
    seed: int,
    *,
    crashes: bool,
    acts: Collection[str] = EVERYTHING,
) -> None:
    """None of the writer's statements fails; rows, aggregates, jobs and chunks are equal after the cutover, of what it made, too."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    await world.make(source)
    jobs = await world.jobs(source)
    planned = await world.compressed(source)
    writer = Writer(source, seed)
    async with Migration(
        source, target, kafka, name, folder, pause_source_jobs=True, partitions=rng.choice((1, 3)), lease=3
    ) as migration:
        async with writer:
            if crashes:
                await migration.until_phase("copy", timeout=240)
                await _crash(migration, rng)
            await migration.until_phase("replay", timeout=240)
            await writer.make_newcomers()
            late = [job for job in await world.jobs(source) if str(job[4]).startswith("late")]
            assert len(late) == 3
            await migration.until("rows applied", "select sum(change_count) > 300 from _live_migration.checkpoints")
            for _ in range(4 if crashes else 1):
                await writer.go_on(migration, 100 if crashes else 300)
                if crashes:
                    await _crash(migration, rng)
            async with asyncio.timeout(240):
                while set(acts) - writer.seen.keys():
                    await writer.go_on(migration, 20)
            await migration.until("newcomers followed", _FOLLOWED)
        await writer.settle()
        print(writer.done, writer.seen, writer.excused, sep="\n")
        assert writer.failures == []
        await migration.finish(timeout=300)
        print("\n".join(migration.observer.notes + migration.observer.warnings))
        await world.require_equal(source, target)
        now = await world.compressed(source)
        assert now - planned
        assert planned - now
        assert await world.jobs(target) == sorted(jobs + late, key=str)
        await world.require_compressed_before_jobs(target)


_FOLLOWED = "select count(*) = 2 from _live_migration.tables where newcomer = 'followed' and rebuild is null"


async def _crash(migration: Migration, rng: random.Random) -> None:
    """End producer or a consumer in the middle of whatever it does, and start it again."""
    service = rng.choice([migration.producer, *migration.consumers])
    await service.crash()
    await asyncio.sleep(rng.random())
    service.start()


@pytest.mark.parametrize("seed", range(2))
async def test_a_database_under_load_comes_over_exactly(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    seed: int,
) -> None:
    await _under_load(
        timescale_source_database, target_of_timescale, kafka_bootstrap, unique_name, tmp_path, seed, crashes=False
    )


@pytest.mark.parametrize("seed", range(2, 5))
async def test_a_database_under_load_and_crashes_comes_over_exactly(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    seed: int,
) -> None:
    await _under_load(
        timescale_source_database, target_of_timescale, kafka_bootstrap, unique_name, tmp_path, seed, crashes=True
    )


async def test_a_database_of_another_version_under_load_and_crashes(
    other_timescale: Server, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    async with timescale_database(other_timescale) as source, database(other_timescale) as target:
        # 2.24.0 takes the batches of this hypertable apart to delete their rows; it deletes whole ones in test_unwatched_batches.py.
        acts = EVERYTHING - {DELETED}
        await _under_load(source, target, kafka_bootstrap, unique_name, tmp_path, 5, crashes=True, acts=acts)


async def test_a_source_whose_role_is_no_superuser(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """No schema and no catalog can be published: chunks that nobody told us of are found by looking."""
    source, role = timescale_source_database, unique_name
    database_name = source.rsplit("/", 1)[1]
    await execute(target_of_timescale, f"create role {role} login")
    await execute(
        source,
        f"create role {role} login replication",
        f"alter database {database_name} owner to {role}",
        f"grant all on schema public to {role}",
    )
    uri = source.replace("postgres@", f"{role}@")
    await _under_load(uri, target_of_timescale, kafka_bootstrap, unique_name, tmp_path, 6, crashes=True)
