"""A target whose role is no superuser, with the rights that a managed service gives its administrator: chunks come over as they are all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from live_migration.coordinator.clean import clean
from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import Server, database, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

RIGHTS = """
    create extension timescaledb;
    create role {admin} login createrole;
    do $$ begin if not exists (select from pg_roles where rolname = '{owner}') then create role {owner}; end if; end $$;
    grant {owner} to {admin};
    alter database {database} owner to {admin};
    grant set on parameter timescaledb.restoring to {admin};
    grant set on parameter session_replication_role to {admin};
    grant all on schema public to {admin}, {owner};
    grant all on schema _timescaledb_catalog, _timescaledb_config, _timescaledb_internal to {admin};
    grant all on all tables in schema _timescaledb_catalog, _timescaledb_config to {admin};
    grant all on all sequences in schema _timescaledb_catalog, _timescaledb_config to {admin};
    alter function timescaledb_pre_restore() security definer;
    alter function timescaledb_post_restore() security definer;
"""
"""What such a role may do; the last two stand for the service's way of letting it call what else asks for a superuser."""

FEW_RIGHTS = """
    create extension timescaledb;
    create role {admin} login;
    create role {owner};
    grant {owner} to {admin};
    alter database {database} owner to {admin};
    grant all on schema public to {admin}, {owner};
"""
STALE = "update metrics set temp = temp + 1 where device = 2 and time < '2026-01-02';"
"""Buckets that are materialized, and refreshed by nobody yet."""
CHANGES = """
    insert into metrics select t, 3, 7 from generate_series('2026-02-01'::timestamptz, '2026-02-03', '1 hour') t;
    delete from app.readings where sensor = 1;
    select compress_chunk(c) from show_chunks('metrics', newer_than => '2026-01-03'::timestamptz, older_than => '2026-01-04'::timestamptz) c;
"""


async def test_the_administrator_of_a_managed_target_takes_a_database_whole(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await _comes_over_whole(timescale_source_database, target_of_timescale, kafka_bootstrap, unique_name, tmp_path)


async def test_the_administrator_of_a_target_of_another_version(
    other_timescale: Server, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    async with timescale_database(other_timescale) as source, database(other_timescale) as target:
        await _comes_over_whole(source, target, kafka_bootstrap, unique_name, tmp_path)


async def test_the_owner_of_a_database_of_another_version_needs_no_right_on_the_catalog(
    other_timescale: Server, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Nor `session_replication_role`. Its aggregates are refreshed after the hand-over."""
    async with timescale_database(other_timescale) as source:
        await _comes_over_whole(
            source, target_of_timescale, kafka_bootstrap, unique_name, tmp_path, rights=FEW_RIGHTS, changes=CHANGES
        )


async def _comes_over_whole(
    source: str,
    target: str,
    kafka: str,
    name: str,
    folder: Path,
    *,
    rights: str = RIGHTS,
    changes: str = STALE + CHANGES,
) -> None:
    owner, admin = f"{name}_owner", f"{name}_admin"
    await execute(source, f"create role {owner} login superuser")
    await execute(target, rights.format(admin=admin, owner=owner, database=target.rsplit("/", 1)[1]))
    uri = source.replace("postgres@", f"{owner}@")
    await world.make(uri)
    await execute(uri, world.LATER)
    jobs = await world.jobs(uri)
    assert any(job[1] for job in jobs)
    admins = target.replace("postgres@", f"{admin}@")
    async with Migration(uri, admins, kafka, name, folder, pause_source_jobs=True) as migration:
        await migration.until_phase("replay")
        await execute(uri, changes)
        await migration.finish()
        assert await world.differences(source, target) == []
        assert await world.jobs(target) == jobs
        assert await world.compression(source) == await world.compression(target)
        report = await verify(migration.settings)
        assert report.is_equal, report.differences
        await clean(migration.settings, prune=False, note=print)
