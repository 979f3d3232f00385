"""Jobs of a real TimescaleDB: paused, waited for and given back on the source; held and released on the target."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import asyncpg
import pytest

from live_migration.common.errors import SourceError
from live_migration.common.postgres import session
from live_migration.common.settings import load_settings
from live_migration.coordinator.clean import clean
from live_migration.coordinator.held import list_held
from live_migration.coordinator.source_jobs import (
    find_jobs_to_pause,
    give_jobs_back,
    hold_target_jobs,
    pause_source_jobs,
    read_jobs,
    release_target_jobs,
)
from tests.fixtures.change_log import wait_for
from tests.fixtures.fix_postgres import Server, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.support.begun import begin_state, begun

# The action runs for as long as the gate is closed.
SCHEMA = """
    create table metrics (time timestamptz not null, device int, v float8);
    select create_hypertable('metrics', 'time');
    alter table metrics set (timescaledb.compress, timescaledb.compress_segmentby = 'device');
    create table gate (is_open boolean not null);
    insert into gate values (true);
    create procedure act(job_id int, config jsonb) language plpgsql as $$
    begin while not (select is_open from public.gate) loop perform pg_sleep(0.1); commit; end loop; end $$;
"""
JOBS = """
    select add_compression_policy('metrics', interval '7 days', timezone => 'Europe/Berlin',
                                  initial_start => '2026-01-01 03:00+00');
    select add_retention_policy('metrics', interval '90 days');
    select add_job('act', interval '1 day', initial_start => now() + interval '1 hour');
"""
TABLE = "coalesce(to_regclass('_timescaledb_catalog.bgw_job'), to_regclass('_timescaledb_config.bgw_job'))"


@pytest.fixture(scope="module", params=["timescale_source", "other_timescale"])
def either(request: pytest.FixtureRequest) -> Server:
    """A server of either version."""
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
async def source_uri(either: Server) -> AsyncIterator[str]:
    async with timescale_database(either) as uri:
        await execute(uri, SCHEMA, *JOBS.split(";")[:-1])
        yield uri


def each_job(procedure: str, call: str) -> str:
    return f"select {call} from timescaledb_information.jobs where proc_name = '{procedure}'"


async def jobs_of(uri: str) -> dict[str, tuple[object, ...]]:
    """Give what `alter_job` can change of each job."""
    connection = await asyncpg.connect(uri)
    try:
        jobs = await connection.fetchval(f"select {TABLE}::text")
        rows = await connection.fetch(
            f"""select j.proc_name, j.scheduled, j.timezone, j.schedule_interval, j.max_runtime, j.max_retries, j.retry_period,
                       j.config, j.fixed_schedule, j.initial_start, j.application_name, j.check_name, j.hypertable_id
                from {jobs} j where j.id >= 1000"""
        )
        return {row[0]: tuple(row)[1:] for row in rows}
    finally:
        await connection.close()


async def set_gate(uri: str, *, is_open: bool) -> None:
    await execute(uri, f"update gate set is_open = {is_open}")


async def start_action(uri: str) -> int:
    """Let the user's action run and give its id, once it does."""
    connection = await asyncpg.connect(uri)
    try:
        await connection.execute("update gate set is_open = false")
        job: int = await connection.fetchval("select job_id from timescaledb_information.jobs where proc_name = 'act'")
        await connection.execute("select alter_job($1, next_start => now())", job)

        async def runs() -> bool:
            return bool(
                await connection.fetchval(
                    "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'User-Defined%'"
                )
            )

        await wait_for(runs)
        return job
    finally:
        await connection.close()


async def test_paused_jobs_come_back_as_they_were(source_uri: str, target_database: str) -> None:
    before = await jobs_of(source_uri)
    await execute(source_uri, each_job("policy_retention", "alter_job(job_id, scheduled => false)"))
    before["policy_retention"] = (False, *before["policy_retention"][1:])
    async with begun(source_uri, target_database) as (run, observer):
        async with run.source_session("test") as source:
            paused = await pause_source_jobs(run, source)
            assert [job.is_policy for job in paused] == [True, False]
            assert await pause_source_jobs(run, source) == [], "again after a crash"
        during = await jobs_of(source_uri)
        assert {name: values[0] for name, values in during.items()} == dict.fromkeys(before, False)
        assert {name: values[1:] for name, values in during.items()} == {n: v[1:] for n, v in before.items()}
        assert "public.metrics" in observer.notes[0]
        (held,) = await list_held(run.settings)
        assert held.startswith("paused jobs: ")
        assert "of public.metrics" in held
        assert "of public.act" in held
        settings = run.settings
    notes: list[str] = []
    await clean(settings, prune=False, note=notes.append)
    assert sum("is scheduled again" in note for note in notes) == 2
    assert await jobs_of(source_uri) == before


async def test_jobs_that_are_off_are_named_where_the_state_that_knows_them_is_lost(
    source_uri: str, target_database: str
) -> None:
    async with begun(source_uri, target_database) as (run, _):
        async with run.source_session("test") as source:
            await pause_source_jobs(run, source)
        settings = run.settings
    await execute(target_database, "drop schema _live_migration cascade")
    notes: list[str] = []
    assert not await clean(settings, prune=False, note=notes.append)
    (named,) = notes
    assert "jobs that are off: " in named
    assert "Retention Policy" in named


async def test_jobs_that_others_changed_or_dropped_since_are_left(source_uri: str, target_database: str) -> None:
    async with begun(source_uri, target_database) as (run, _), run.source_session("test") as source:
        await pause_source_jobs(run, source)
        await execute(
            source_uri,
            each_job("policy_compression", "alter_job(job_id, scheduled => true, schedule_interval => '3 hours')"),
            each_job("act", "delete_job(job_id)"),
        )
        since = await jobs_of(source_uri)
        lines = await give_jobs_back(run.target, source, run.settings)
        assert [line.split(" of ")[1] for line in lines] == [
            "public.metrics on the source is scheduled already, by somebody else; it was left so",
            "public.metrics on the source is scheduled again",
            "public.act is gone from the source, dropped by somebody else",
        ]
        after = await jobs_of(source_uri)
        assert after["policy_compression"] == since["policy_compression"]
        assert "act" not in after
        assert await give_jobs_back(run.target, source, run.settings) == []
        assert await list_held(run.settings) == []


async def test_a_run_that_is_under_way_is_waited_for(source_uri: str, target_database: str) -> None:
    job = await start_action(source_uri)
    async with begun(source_uri, target_database) as (run, observer), run.source_session("test") as source:
        pausing = asyncio.ensure_future(pause_source_jobs(run, source))

        async def waits() -> bool:
            return any(f"[{job}] (pid" in note for note in observer.notes)

        await wait_for(waits)
        assert not pausing.done()
        await set_gate(source_uri, is_open=True)
        assert len(await pausing) == 3


async def test_a_run_that_does_not_end_gives_all_jobs_back(source_uri: str, target_database: str) -> None:
    before = await jobs_of(source_uri)
    job = await start_action(source_uri)
    async with begun(source_uri, target_database, slot_timeout=1.0) as (run, _), run.source_session("test") as source:
        with pytest.raises(SourceError, match=rf"still running after 1 s.*\[{job}\]") as caught:
            await pause_source_jobs(run, source)
        assert "scheduled again" in caught.value.hint
        assert await list_held(run.settings) == []
    assert await jobs_of(source_uri) == before
    await set_gate(source_uri, is_open=True)


async def test_without_the_owners_rights_nothing_is_changed(source_uri: str, target_database: str) -> None:
    role = f"r_{secrets.token_hex(4)}"
    await execute(source_uri, f"create role {role} login", f"grant all on schema public to {role}")
    foreign = source_uri.replace("postgres@", f"{role}@")
    try:
        await execute(foreign, "select add_job('act', interval '1 day', initial_start => now() + interval '1 hour')")
        before = await jobs_of(source_uri)
        async with begun(source_uri, target_database) as (run, _), session(foreign, "source") as source:
            with pytest.raises(
                SourceError, match=rf"role {role} .* lacks the rights .*Retention Policy.*\(postgres\)"
            ) as caught:
                await pause_source_jobs(run, source)
            assert "grant postgres to" in caught.value.hint
            assert await list_held(run.settings) == []
        assert await jobs_of(source_uri) == before
    finally:
        await execute(
            source_uri, each_job("act", "delete_job(job_id)"), f"drop owned by {role} cascade", f"drop role {role}"
        )


async def test_only_one_version_on_both_ends_needs_its_jobs_paused(
    timescale_source_database: str, timescale_target_database: str, other_timescale: Server, target_database: str
) -> None:
    await execute(timescale_source_database, SCHEMA)

    async def found(target: str) -> list[str]:
        settings = load_settings({"source": timescale_source_database, "target": target})
        return [str(job) for job in await find_jobs_to_pause(settings)]

    assert await found(timescale_target_database) == [], "no job is scheduled"
    await execute(timescale_source_database, *JOBS.split(";")[:-1])
    assert len(await found(timescale_target_database)) == 3
    assert await found(target_database) == [], "no TimescaleDB there"
    async with timescale_database(other_timescale) as other:
        assert await found(other) == []
    await begin_state(load_settings({"source": timescale_source_database, "target": timescale_target_database}))
    assert await found(timescale_target_database) == [], "begun already"


async def test_target_jobs_are_off_until_each_gets_its_flag_of_the_source(source_uri: str, either: Server) -> None:
    await execute(source_uri, each_job("policy_retention", "alter_job(job_id, scheduled => false)"))
    before = await jobs_of(source_uri)
    async with timescale_database(either) as target_uri:
        # As a restore of the source's catalog leaves them: the same ids, paused ones off.
        async with begun(source_uri, target_uri) as (run, observer):
            async with run.source_session("test") as source:
                await pause_source_jobs(run, source)
            await execute(target_uri, SCHEMA, *JOBS.split(";")[:-1])
            for policy in ("policy_compression", "policy_retention"):
                await execute(target_uri, each_job(policy, "alter_job(job_id, scheduled => false)"))
            async with run.target_transaction("test"):
                assert len(await hold_target_jobs(run.target)) == 3
            async with run.target_transaction("test"):
                await hold_target_jobs(run.target)
            assert [job.is_scheduled for job in await read_jobs(run.target)] == [False] * 3
            await execute(target_uri, each_job("act", "delete_job(job_id)"))
            released = await release_target_jobs(run)
            assert [name.split(" [")[0] for name in released] == ["Columnstore Policy"]
            assert "dropped by somebody else: User-Defined Action" in observer.warnings[0]
            after = {job.name.split(" [")[0]: job.is_scheduled for job in await read_jobs(run.target)}
            assert sorted(after.values()) == [False, True]
            assert await release_target_jobs(run) == []
    assert before["policy_retention"][0] is False


async def test_flags_can_be_given_where_ids_differ(source_uri: str) -> None:
    """As after policies were made anew on a target with another version."""
    async with begun(source_uri, source_uri) as (run, _):
        ids = [job.id for job in await read_jobs(run.target)]
        async with run.target_transaction("test"):
            await hold_target_jobs(run.target, {ids[0]: False, ids[1]: True, ids[2]: False})
        assert len(await release_target_jobs(run)) == 1
        assert [job.is_scheduled for job in await read_jobs(run.target)] == [False, True, False]


async def test_a_database_without_timescaledb_has_no_jobs(source_database: str, target_database: str) -> None:
    async with begun(source_database, target_database) as (run, _), run.source_session("test") as source:
        assert await pause_source_jobs(run, source) == []
        assert await hold_target_jobs(run.target) == []
        assert await release_target_jobs(run) == []
