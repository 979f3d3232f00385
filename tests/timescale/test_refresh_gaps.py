"""Jobs that were paused for longer than refresh policies reach back leave no buckets out: on the target, and on the source after `clean`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from live_migration.common.settings import Settings
from live_migration.common.timescale import read_layout
from live_migration.coordinator.aggregate_refresh import keep_watermarks
from live_migration.coordinator.aggregate_state import read_state
from live_migration.coordinator.clean import clean
from live_migration.coordinator.source_jobs import hold_target_jobs, pause_source_jobs, read_jobs
from live_migration.coordinator.timescale_handover import release_jobs
from tests.fixtures.fix_postgres import Server, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.support.begun import begun
from tests.timescale import world

SCHEMA = (
    "create table metrics (time timestamptz not null, v int)",
    "select create_hypertable('metrics', 'time')",
    "create table counts (n bigint not null, v int)",
    "select create_hypertable('counts', 'n', chunk_time_interval => 1000)",
    "create table present (n bigint)",
    "insert into present values (1000)",
    "create function present_time() returns bigint language sql stable as 'select n from public.present'",
    "select set_integer_now_func('counts', 'present_time')",
    """create materialized view hourly with (timescaledb.continuous, timescaledb.materialized_only = false) as
       select time_bucket('1 hour', time) as at, sum(v) as v from metrics group by 1 with no data""",
    """create materialized view halves with (timescaledb.continuous, timescaledb.materialized_only = true) as
       select time_bucket('2 hours', at) as at, sum(v) as v from hourly group by 1 with no data""",
    """create materialized view tens with (timescaledb.continuous) as
       select time_bucket(10::bigint, n) as at, sum(v) as v from counts group by 1 with no data""",
    """create materialized view young with (timescaledb.continuous) as
       select time_bucket('1 hour', time) as at, sum(v) as v from metrics group by 1 with no data""",
    "insert into metrics select t, 1 from generate_series(now() - interval '30 hours', now() - interval '9 hours', '10 min') t",
    "insert into counts select n, 1 from generate_series(900, 980) n",
    "call refresh_continuous_aggregate('hourly', null, now() - interval '8 hours')",
    "call refresh_continuous_aggregate('halves', null, now() - interval '8 hours')",
    "call refresh_continuous_aggregate('tens', null, 980)",
    # What is older has lost its rows, and its buckets are all that is left.
    "select drop_chunks('metrics', older_than => now() - interval '9 hours'), set_chunk_time_interval('metrics', interval '1 day')",
    "delete from counts where n < 910",
    "select add_continuous_aggregate_policy('hourly', interval '2 hours', interval '0', interval '1 day', initial_start => now() + interval '1 day')",
    "select add_continuous_aggregate_policy('halves', interval '6 hours', interval '0', interval '1 day', initial_start => now() + interval '1 day')",
    "select add_continuous_aggregate_policy('tens', 30, 0, interval '1 day', initial_start => now() + interval '1 day')",
    "select add_continuous_aggregate_policy('young', interval '2 hours', null, interval '1 day', initial_start => now() + interval '1 day')",
)
DURING = (
    "insert into metrics select t, 1 from generate_series(now() - interval '8 hours', now(), '10 min') t",
    "insert into counts select n, 1 from generate_series(1000, 1200) n",
    "update present set n = 1200",
)
TOO_LOW = """
    update _timescaledb_catalog.continuous_aggs_watermark w set watermark = _timescaledb_functions.time_to_internal(timestamptz '{}')
    from _timescaledb_catalog.continuous_agg a where a.mat_hypertable_id = w.mat_hypertable_id and a.user_view_name = 'hourly'
"""
SET_ZONE = "do $$ begin execute format('alter database %I set timezone to %L', current_database(), '{}'); end $$"
LOCAL = (
    "create table spots (time timestamp not null, v int)",
    "select create_hypertable('spots', 'time')",
    """create materialized view local with (timescaledb.continuous) as
       select time_bucket('1 hour', time) as at, sum(v) as v from spots group by 1 with no data""",
    """insert into spots select t, 1
       from generate_series(localtimestamp - interval '30 hours', localtimestamp - interval '9 hours', '10 min') t""",
    "call refresh_continuous_aggregate('local', null, localtimestamp - interval '7 hours')",
    "select add_continuous_aggregate_policy('local', interval '2 hours', interval '0', interval '1 day', initial_start => now() + interval '1 day')",
)
LOCAL_DURING = "insert into spots select t, 1 from generate_series(localtimestamp - interval '7 hours', localtimestamp, '10 min') t"
LONG_AGO = "update _live_migration.migration set created_at = now() - interval '10 hours'"
"""The jobs are off since then."""
EXPECTED = {
    "hourly": "select time_bucket('1 hour', time) as at, sum(v) as v from metrics where time >= now() - interval '8 hours' group by 1",
    "halves": "select time_bucket('2 hours', time) as at, sum(v) as v from metrics where time >= now() - interval '8 hours' group by 1",
    "tens": "select time_bucket(10::bigint, n) as at, sum(v)::bigint as v from counts where n >= 980 group by 1",
    "young": "select time_bucket('1 hour', time) as at, sum(v) as v from metrics where time >= now() - interval '8 hours' group by 1",
}
POLICIES = "select job_id from timescaledb_information.jobs where proc_name = 'policy_refresh_continuous_aggregate' order by job_id"


@pytest.fixture(params=["timescale_source", "other_timescale"])
async def uri(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A database whose jobs are to be off for a while, of either version."""
    server: Server = request.getfixturevalue(request.param)
    async with timescale_database(server) as made:
        await execute(made, *SCHEMA)
        yield made


async def materialized(uri: str) -> dict[str, dict[object, object]]:
    """Give the buckets that each aggregate has stored."""
    connection = await asyncpg.connect(uri)
    try:
        rows = await connection.fetch(
            """select view_name, format('%I.%I', materialization_hypertable_schema, materialization_hypertable_name) as stored
               from timescaledb_information.continuous_aggregates"""
        )
        return {row[0]: dict(await connection.fetch(f"select at, v from {row[1]}")) for row in rows}
    finally:
        await connection.close()


async def require_no_gap(uri: str, before: dict[str, dict[object, object]]) -> None:
    """Run each policy once; then nothing that had ended before may lack, and nothing that was there may be gone."""
    connection = await asyncpg.connect(uri)
    try:
        for row in await connection.fetch(POLICIES):
            await connection.execute(f"call run_job({row[0]})")
        after = await materialized(uri)
        for name, query in EXPECTED.items():
            due = dict(await connection.fetch(query))
            last = max(due)  # may be under way
            lacking = {at: v for at, v in due.items() if at != last and after[name].get(at) != v}
            first_changed = min(due)  # a bucket of the seam may have rows of before
            assert not {at: v for at, v in lacking.items() if at != first_changed}, name
            assert len(due) > 3
            assert {at: after[name].get(at) for at in before[name]} == before[name], name
    finally:
        await connection.close()


async def test_jobs_of_the_target_are_released_when_their_policies_reach_all(
    uri: str, timescale_source_database: str
) -> None:
    async with begun(timescale_source_database, uri) as (run, observer):
        await run.target.execute(LONG_AGO)
        await run.reload()
        async with run.target_transaction("test"):
            await hold_target_jobs(run.target)
        before = await materialized(uri)
        await execute(uri, *DURING)
        await release_jobs(run)
        assert not observer.warnings
        assert all(job.is_scheduled for job in await read_jobs(run.target))
        await require_no_gap(uri, before)


async def test_buckets_whose_rows_are_gone_are_kept_where_the_catalog_tells_the_watermark_too_low(
    uri: str, timescale_source_database: str
) -> None:
    """As where our role may not write it: the newest bucket of which rows are left is all that was refreshed."""
    async with begun(timescale_source_database, uri) as (run, observer):
        await run.target.execute(LONG_AGO)
        await run.reload()
        layout = await read_layout(run.target)
        assert layout is not None
        await keep_watermarks(run, await read_state(run.target, layout))
        async with run.target_transaction("test"):
            await hold_target_jobs(run.target)
        before = await materialized(uri)
        gone = sorted(before["hourly"])[-3:]
        await execute(uri, f"delete from metrics where time >= '{gone[0]}'", TOO_LOW.format(gone[0]), *DURING[1:])
        observer.warnings.clear()
        await release_jobs(run)
        assert not observer.warnings
        after = await materialized(uri)
        assert {at: after["hourly"].get(at) for at in before["hourly"]} == before["hourly"]


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Etc/GMT+12"])
async def test_times_without_a_zone_are_those_of_the_policys_zone(
    timescale_target_database: str, timescale_source_database: str, zone: str
) -> None:
    """East of ours a policy reaches less far back than here, west of it it reached farther."""
    uri, expected = (
        timescale_target_database,
        "select time_bucket('1 hour', time) as at, sum(v) as v from spots group by 1",
    )
    await execute(uri, SET_ZONE.format(zone))
    await execute(uri, *LOCAL)
    async with begun(timescale_source_database, uri) as (run, observer):
        await run.target.execute(LONG_AGO)
        await run.reload()
        async with run.target_transaction("test"):
            await hold_target_jobs(run.target)
        await execute(uri, LOCAL_DURING)
        await release_jobs(run)
        assert not observer.warnings
        await execute(uri, f"call run_job({await world.value(uri, POLICIES)})")
        connection = await asyncpg.connect(uri)
        try:
            due = dict(await connection.fetch(expected))
        finally:
            await connection.close()
        after = (await materialized(uri))["local"]
        assert len(due) > 20
        assert {at for at, v in due.items() if after.get(at) != v} <= {max(due)}  # the last may be under way


async def test_jobs_of_the_source_are_given_back_when_their_policies_reach_all(uri: str, target_database: str) -> None:
    async with begun(uri, target_database) as (run, _):
        await run.target.execute(LONG_AGO)
        async with run.source_session("test") as source:
            await pause_source_jobs(run, source)
        before = await materialized(uri)
        await execute(uri, *DURING)
        settings: Settings = run.settings
    notes: list[str] = []
    await clean(settings, prune=False, note=notes.append)
    assert sum("was refreshed on the source" in note for note in notes) == 4
    await require_no_gap(uri, before)


async def test_what_a_policy_left_out_before_the_pause_is_left_to_it(uri: str, timescale_source_database: str) -> None:
    async with begun(timescale_source_database, uri) as (run, _):
        async with run.target_transaction("test"):
            await hold_target_jobs(run.target)
        await execute(uri, *DURING)
        await release_jobs(run)
        left = "select exists (select from unnest($1::timestamptz[]) at where at between now() - interval '7 hours' and now() - interval '4 hours')"
        assert not await world.value(uri, left, list((await materialized(uri))["hourly"]))
