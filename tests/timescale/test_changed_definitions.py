"""Settings, policies and chunks that change on the source during a migration whose catalog came over, against real servers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from live_migration.coordinator import cutover, handover
from live_migration.coordinator.hypertable_definitions import Definitions
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.run import Run
from tests.e2e.migration import Migration
from tests.e2e.test_cutover import wait_for
from tests.fixtures.fix_postgres import execute
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_SCHEDULED = "select array_agg(proc_name::text order by proc_name) from timescaledb_information.jobs where job_id >= 1000 and scheduled"
_LEAVE_SCHEMAS = """
    select format('alter publication %I drop tables in schema %s', p.pubname, string_agg(format('%I', n.nspname), ', '))
    from pg_publication_namespace r join pg_publication p on p.oid = r.pnpubid join pg_namespace n on n.oid = r.pnnspid
    group by p.pubname
"""
_CHANGES = (
    "select remove_retention_policy('events')",
    """select alter_job(job_id, config => jsonb_set(config, '{compress_after}', '"2000 days"'), schedule_interval => interval '7 hours',
                        max_retries => 3, retry_period => interval '9 minutes')
       from timescaledb_information.jobs where proc_name = 'policy_compression'""",
    "select alter_job(add_reorder_policy('app.readings', 'readings_time_idx'), scheduled => false)",
    "select add_retention_policy('app.readings', interval '3000 days')",
    "alter table events set (timescaledb.compress, timescaledb.compress_segmentby = 'kind')",
    "select compress_chunk(c) from show_chunks('events', older_than => '2026-01-03'::timestamptz) c",
    "select set_chunk_time_interval('app.readings', interval '2 days')",
    "alter materialized view hourly set (timescaledb.materialized_only = false)",
)


async def definitions(uri: str) -> Definitions:
    connection = await asyncpg.connect(uri)
    try:
        found = await read_definitions(connection)
    finally:
        await connection.close()
    assert found is not None
    jobs = sorted((replace(each, is_scheduled=False) for each in found.jobs), key=str)
    return replace(found, jobs=tuple(sorted(jobs, key=lambda job: (job.procedure, str(job.relation)))))


async def test_what_is_set_during_the_migration_is_so_on_the_target(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """A policy that was removed on the source must never run on the target: it would drop what its user wants to keep."""
    source, target = timescale_source_database, target_of_timescale
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await execute(source, *_CHANGES)
        await migration.finish()
        assert await definitions(target) == await definitions(source)
        assert await world.value(target, _SCHEDULED) == [
            "policy_compression",
            "policy_refresh_continuous_aggregate",
            "policy_retention",
        ]
        assert await world.compression(target) == await world.compression(source)
        assert await world.differences(source, target) == []
        assert not [each for each in migration.observer.warnings if "by hand" in each]


async def test_a_chunk_that_the_target_does_not_compress_leaves_no_job_off(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    compress = handover.compress_like_source

    async def compress_less(run: Run) -> None:
        await execute(target, "alter table events set (timescaledb.compress = false)")
        await compress(run)

    monkeypatch.setattr(handover, "compress_like_source", compress_less)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(source, *_CHANGES[4:6])
        await migration.finish()
        assert any("chunks are not compressed as on the source" in each for each in migration.observer.warnings)
        assert len(await world.value(target, _SCHEDULED)) == 3  # type: ignore[arg-type]
        assert await world.all_rows(target, "events") == await world.all_rows(source, "events")


async def test_a_chunk_that_is_made_unseen_between_the_barriers_refuses_the_cutover(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its session publishes no new chunks, and our role is one that may publish no schemas: nothing of its rows is in the stream."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    changes_between = cutover.changes_between

    async def write_unseen(*arguments: object) -> object:
        found = await changes_between(*arguments)  # type: ignore[arg-type]
        await execute(
            source,
            "set timescaledb.enable_chunk_auto_publication = off; insert into metrics values ('2031-01-01', 1, 1, 'unseen')",
        )
        return found

    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(source, str(await world.value(source, _LEAVE_SCHEMAS)))
        with monkeypatch.context() as late:
            late.setattr(cutover, "changes_between", write_unseen)
            migration.ask_cutover.set()
            warning = await wait_for(migration, "warnings", "no cutover")
        assert "to chunks that were made meanwhile: _timescaledb_internal" in warning
        await migration.finish()
        assert await world.differences(source, target) == []
