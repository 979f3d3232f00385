"""After the cutover a continuous aggregate's own refresh policy brings what changed before the migration and during it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import pytest

from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import Server, database, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world
from tests.timescale.writer import NEWCOMERS

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_POLICIES = (
    "select remove_continuous_aggregate_policy('hourly')",
    *(
        f"select alter_job(add_continuous_aggregate_policy('{name}', null, interval '1 hour', interval '1 day'), scheduled => false)"
        for name in ("hourly", "daily")
    ),
)
"""Off, so that none runs before the test has looked."""
_BEFORE = ("update metrics set temp = 1000 where device = 1 and time = '2026-01-01 03:10'",)
"""In a bucket that is materialized, and no refresh follows."""
_DURING = (
    "update metrics set temp = 2000 where device = 2 and time >= '2026-01-02 10:00' and time < '2026-01-02 10:30'",  # compressed rows
    "delete from metrics where device = 3 and time >= '2026-01-03 05:00' and time < '2026-01-03 07:00'",
    "insert into metrics values ('2026-01-02 20:05', 4, 3000, 'during'), ('2026-01-06 01:00', 4, 3000, 'above the watermark')",
    # This takes note of all changes for good and materializes none of them: they wait in a log of the aggregate's own.
    "call refresh_continuous_aggregate('hourly', '2026-01-03 12:00', '2026-01-03 15:00')",
    "update metrics set temp = 4000 where device = 5 and time = '2026-01-01 23:50'",
    "delete from metrics where device = 2 and time < '2026-01-02'",  # whole compressed batches
    "update late set temp = 500 where device = 1 and time = '2026-01-01 10:00'",
    "delete from late where device = 2 and time >= '2026-01-02' and time < '2026-01-02 05:00'",
)
_LEFT_BEHIND = (
    "update metrics set temp = 5000 where device = 1 and time = '2026-01-01 05:10'",
    "delete from _timescaledb_catalog.continuous_aggs_hypertable_invalidation_log",
    """insert into _timescaledb_catalog.continuous_aggs_materialization_ranges
       select mat_hypertable_id, _timescaledb_functions.to_unix_microseconds('2026-01-01 05:00'::timestamptz),
              _timescaledb_functions.to_unix_microseconds('2026-01-01 06:00'::timestamptz)
       from _timescaledb_catalog.continuous_agg where user_view_name = 'hourly'""",
)
"""What a refresh of 2.24 leaves that has taken note of a change and died before it materialized it."""
_RUNNING = """
    insert into _timescaledb_catalog.continuous_aggs_jobs_refresh_ranges
    select mat_hypertable_id, -9223372036854775808, 9223372036854775807, {pid}, 1000, now()
    from _timescaledb_catalog.continuous_agg where user_view_name = 'hourly'
"""
_FRESH = {
    "hourly": "(select time_bucket('1 hour', time), device, avg(temp), count(*) from metrics group by 1, 2)",
    "late_hourly": "(select time_bucket('1 hour', time), device, sum(temp), count(*) from late group by 1, 2)",
    "daily": """(select time_bucket('1 day', hour), device, sum(n) from
                 (select time_bucket('1 hour', time) as hour, device, count(*) as n from metrics group by 1, 2) h group by 1, 2)""",
}
"""What each aggregate is to give, computed from the rows; parents first."""
_JOB_OF = """
    select job_id from timescaledb_information.jobs j join timescaledb_information.continuous_aggregates a
        on j.hypertable_name in (a.view_name, a.materialization_hypertable_name)
    where a.view_name = $1 and j.proc_name = 'policy_refresh_continuous_aggregate'
"""
_FOLLOWED = "select count(*) = 2 from _live_migration.tables where newcomer = 'followed' and rebuild is null"


@pytest.fixture(params=["timescale_source", "other_timescale"], ids=["same version", "another version"])
async def source(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    async with timescale_database(request.getfixturevalue(request.param)) as uri:
        await world.make(uri)
        await execute(uri, *_POLICIES, *_BEFORE)
        yield uri


async def test_one_run_of_each_policy_covers_what_changed(
    source: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Until then each is as stale as on the source; afterwards each gives what its rows give."""
    target = target_of_timescale
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(source, *NEWCOMERS)
        await migration.until("newcomers followed", _FOLLOWED)
        await execute(source, *_DURING)
        await migration.finish()
        assert await world.differences(source, target, tables=(*world.TABLES, "late")) == []
        ours, theirs = await world.aggregates(source), await world.aggregates(target)
        assert ours == theirs
        for name, (stored, *_) in theirs.items():
            assert stored != await world.all_rows(target, _FRESH[name]), f"{name} has nothing to refresh"
        for name, fresh in _FRESH.items():
            for uri in (source, target):
                await _run_policy(uri, name)
                stored = (await world.aggregates(uri))[name][0]
                assert stored == await world.all_rows(uri, fresh) != [], name


@pytest.mark.parametrize("same", [True, False], ids=["same version", "another version"])
async def test_what_a_refresh_that_died_had_still_to_materialize(
    same: bool,
    other_timescale: Server,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """Of another version the target's refresh never looks at the ranges that the source's would."""
    target = target_of_timescale
    async with timescale_database(other_timescale) as source, AsyncExitStack() as stack:
        if same:
            target = await stack.enter_async_context(database(other_timescale))
        await world.make(source)
        await execute(source, *_POLICIES, *_LEFT_BEHIND)
        async with Migration(
            source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
        ) as migration:
            await migration.finish()
            for uri in (source, target):
                stored = (await world.aggregates(uri))["hourly"][0]
                assert stored != await world.all_rows(uri, _FRESH["hourly"])
                await _run_policy(uri, "hourly")
            ours, theirs = [(await world.aggregates(uri))["hourly"] for uri in (source, target)]
            assert theirs[1] == ours[1]
            assert "5000" in str([row for row in await world.all_rows(target, "metrics") if "05:10" in row])
            fresh = f"(select * from {_FRESH['hourly']} f where time_bucket < '2026-01-02')"
            stored = [row for row in theirs[0] if row.startswith('("2026-01-01')]
            assert stored == await world.all_rows(target, fresh) != []


async def test_a_refresh_that_ran_on_the_source_blocks_none_on_the_target(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """What it holds is known by its process, and the target has another one of that number."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    await execute(source, *_POLICIES)
    other = await asyncpg.connect(target)
    try:
        await execute(source, _RUNNING.format(pid=other.get_server_pid()))
        async with Migration(
            source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
        ) as migration:
            await migration.finish()
            await _run_policy(target, "hourly")
    finally:
        await other.close()


async def _run_policy(uri: str, aggregate: str) -> None:
    connection = await asyncpg.connect(uri)
    try:
        await connection.execute(f"call run_job({await connection.fetchval(_JOB_OF, aggregate)})")
    finally:
        await connection.close()
