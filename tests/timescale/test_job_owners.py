"""Jobs whose owner is not the role that migrates: after the cutover each runs under the owner that it has on the target."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from live_migration.coordinator.clean import clean
from live_migration.coordinator.source_jobs import hold_target_jobs, release_target_jobs
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute
from tests.support.begun import begun
from tests.timescale import world
from tests.timescale.test_administrator import RIGHTS

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SCHEMA = """
    create table metrics (time timestamptz not null, device int, v int);
    select create_hypertable('metrics', 'time', chunk_time_interval => interval '1 day');
    alter table metrics set (timescaledb.compress, timescaledb.compress_segmentby = 'device');
    insert into metrics select t, 1, 1 from generate_series(now() - interval '9 days', now(), '1 hour') t;
"""
AGGREGATE = """
    create materialized view hourly with (timescaledb.continuous) as
    select time_bucket('1 hour', time) as at, sum(v) as v from metrics group by 1 with no data
"""
POLICIES = """
    select add_compression_policy('metrics', interval '2 days'), add_retention_policy('metrics', interval '7 days'),
           add_continuous_aggregate_policy('hourly', null, interval '1 hour', interval '1 hour');
    alter materialized view hourly set (timescaledb.compress);
    select add_compression_policy('hourly', interval '30 days');
"""
ACTION = """
    create procedure act(job_id int, config jsonb) language sql as $$ select 1 $$;
    select add_job('act', '1 hour');
"""
GRANT = "grant create on schema _timescaledb_internal to {}"
"""Who is to own an aggregate needs it."""
LATER = "select alter_job(job_id, next_start => '2100-01-01') from timescaledb_information.jobs where job_id >= 1000"
"""Leaves it to the test to run them."""
JOBS = "select job_id, owner::text, proc_name::text from timescaledb_information.jobs where job_id >= 1000 order by 1"


async def run_every_job(target: str) -> dict[str, str]:
    """Run each job as its owner, with a session of the owner's as a worker has one; give the owners by procedure."""
    connection = await asyncpg.connect(target)
    try:
        jobs = await connection.fetch(JOBS)
    finally:
        await connection.close()
    for id, owner, _ in jobs:
        await execute(target.replace("postgres@", f"{owner}@"), f"call run_job({id})")
    return {procedure: owner for _, owner, procedure in jobs}


async def require_done(target: str) -> None:
    """What the policies are there for has happened."""
    assert await world.value(
        target, "select bool_or(is_compressed) from timescaledb_information.chunks where hypertable_name = 'metrics'"
    )
    assert await world.value(target, "select min(time) > now() - interval '9 days' from metrics")
    assert await world.value(target, "select count(*) > 24 from hourly")


async def make_source(source: str, owner: str, *more: str) -> None:
    """Let a role that is no superuser own all there is."""
    await execute(source, f"create role {owner} login", f"grant all on schema public to {owner}")
    await execute(source.replace("postgres@", f"{owner}@"), SCHEMA, AGGREGATE, POLICIES, *more, LATER)


@pytest.mark.parametrize("is_there", [True, False], ids=["there", "missing"])
async def test_policies_belong_to_whom_their_tables_belong(
    is_there: bool,
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """Whether or not the target has the role that owns them on the source."""
    source, target, owner = timescale_source_database, target_of_timescale, f"{unique_name}_app"
    await make_source(source, owner, *([ACTION] if is_there else []))
    if is_there:
        await execute(target, f"create role {owner} login")
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay")
        await migration.finish()
        assert [each for each in migration.observer.warnings if "whose owners" in each] == []
        owners = await run_every_job(target)
        assert {name: one for name, one in owners.items() if name.startswith("policy_")} == dict.fromkeys(
            ("policy_compression", "policy_retention", "policy_refresh_continuous_aggregate"), "postgres"
        )
        assert owners.get("act") == (owner if is_there else None)
        await require_done(target)
        await clean(migration.settings, prune=False, note=print)


async def test_an_administrator_needs_no_rights_of_those_that_own_policies(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """On a managed service; and one aggregate is given to another role in the meantime."""
    source, target = timescale_source_database, target_of_timescale
    owner, admin, other = (f"{unique_name}_{each}" for each in ("app", "admin", "other"))
    await make_source(source, owner)
    await execute(target, RIGHTS.format(admin=admin, owner=other, database=target.rsplit("/", 1)[1]))
    await execute(target, f"create role {owner} login", f"alter role {other} login", GRANT.format(other))
    admins = target.replace("postgres@", f"{admin}@")
    async with Migration(source, admins, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay")
        await execute(admins, f"grant select on metrics to {other}; alter materialized view hourly owner to {other}")
        await migration.finish()
        assert [each for each in migration.observer.warnings if "whose owners" in each] == []
        owners = await run_every_job(target)
        assert owners["policy_retention"] == admin
        assert owners["policy_refresh_continuous_aggregate"] == other
        await require_done(target)
        await clean(migration.settings, prune=False, note=print)


async def test_jobs_that_their_owners_cannot_run_are_named(
    source_of_either_version: str, timescale_target_database: str, unique_name: str
) -> None:
    """A table was given to a role that may not log in, and an action's owner may not any more; other jobs are theirs who own their tables."""
    target, app, group = source_of_either_version, f"{unique_name}_app", f"{unique_name}_group"
    await make_source(target, app, ACTION)
    await execute(target, f"create role {group}", GRANT.format(group), f"grant create on schema public to {group}")
    async with begun(timescale_target_database, target) as (run, observer):
        async with run.target_transaction("test"):
            await hold_target_jobs(run.target)
        await execute(
            target, f"alter materialized view hourly owner to {group}", "alter table metrics owner to postgres"
        )
        await execute(target, f"alter role {app} nologin")
        await release_target_jobs(run)
        (warning,) = observer.warnings
        assert (
            warning.count(" of public.hourly (") == 2
        )  # 2.29 gives policies away with what they work on, 2.24 does not
        assert f" of public.act ({app})" in warning
        assert " of public.metrics" not in warning
        owners = {(procedure, owner) for _, owner, procedure in await run.target.fetch(JOBS)}
        assert {("policy_retention", "postgres"), ("policy_compression", "postgres"), ("act", app)} <= owners
