"""Consumers that die, hang and come back in the middle of a copy: whatever happens, each row arrives once."""

from __future__ import annotations

import asyncio
import signal
import time

import asyncpg
import pytest

from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.postgres import session
from tests.fixtures.fix_postgres import SETTINGS
from tests.support.copying import (
    consumer_process,
    consumers,
    contents,
    fetch_value,
    index_definitions,
    plan,
    run_sql,
    settings_for,
    until,
    until_ready,
)

pytestmark = pytest.mark.integration

TABLES = """
    create table public.big (id int not null, v text);
    create table public.small (id int not null, v text);
"""
STALL = """
    create function public.stall() returns trigger language plpgsql as 'begin perform pg_advisory_xact_lock_shared(1); return null; end';
    create trigger stall before insert on public.{table} execute function public.stall();
    alter table public.{table} enable always trigger stall;
"""
PART = 64 * 1024


async def make(source: str, target: str, *, stall: str = "big") -> None:
    """Big and small table; on the target, copies into `stall` wait while somebody holds advisory lock 1."""
    for uri in (source, target):
        await run_sql(uri, TABLES)
    await run_sql(
        source,
        """insert into public.big select i, repeat('x', i % 100) from generate_series(1, 20000) i;
           insert into public.small select i, 's' from generate_series(1, 100) i;
           alter table public.big add primary key (id); create index on public.big (v); alter table public.small add primary key (id)""",
    )
    await run_sql(target, STALL.format(table=stall))
    await plan(source, target)


async def until_stalled(target: str, count: int = 1) -> None:
    await until(
        target,
        "select count(*) >= $1 from pg_locks where locktype = 'advisory' and not granted and objid = 1 and classid = 0",
        count,
    )


async def assert_equal(source: str, target: str) -> None:
    assert await contents(target) == await contents(source)
    assert await index_definitions(target) == await index_definitions(source)


@pytest.mark.parametrize("stall", ["big", "small"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_consumer_that_dies_or_hangs_is_succeeded(
    source_database: str, target_database: str, stall: str, how: signal.Signals
) -> None:
    """Killed, or stopped for good: what it held is given to another within the lease, and its backends are ended."""
    await make(source_database, target_database, stall=stall)
    settings = settings_for(source_database, target_database, part_size=PART)
    blocker = await asyncpg.connect(target_database)
    try:
        await blocker.execute("select pg_advisory_lock(1)")
        async with consumer_process(settings, "first") as first:
            await until_stalled(target_database)
            if stall == "big":
                await until_stalled(target_database, 2)
            first.send_signal(how)
            began = time.monotonic()
            async with consumers(settings, 1):
                taken_over = f"select attempt > 1 and owner = 'consumer-0' from _live_migration.tables where table_name = '{stall}'"
                await until(target_database, taken_over)
                assert time.monotonic() - began < settings.lease + 5
                await blocker.execute("select pg_advisory_unlock(1)")
                await until_ready(target_database)
                if how is signal.SIGSTOP:  # it comes back as a zombie, and finds out
                    first.send_signal(signal.SIGCONT)
                    await asyncio.sleep(2)
                    assert first.returncode is None
    finally:
        await blocker.close()
    await assert_equal(source_database, target_database)
    if how is signal.SIGSTOP or stall == "small":  # else the lost snapshot is seen before the lease has run out
        gone = "select count(*) from _live_migration.events where message like 'first is gone%'"
        assert await fetch_value(target_database, gone) > 0


async def test_whoever_holds_the_lock_of_index_claims_holds_up_no_succession(
    source_database: str, target_database: str
) -> None:
    """Claims of all kinds are made one at a time in a consumer, and the dead are succeeded between them: none may wait for ever."""
    await make(source_database, target_database, stall="small")
    settings = settings_for(source_database, target_database, part_size=PART)
    blocker, other = await asyncpg.connect(target_database), await asyncpg.connect(target_database)
    try:
        await blocker.execute("select pg_advisory_lock(1)")
        async with consumer_process(settings, "first") as first:
            await until_stalled(target_database)
            first.kill()
            await other.execute("select pg_advisory_lock(5069837231101002)")
            async with consumers(settings, 1):
                taken_over = (
                    "select attempt > 1 and owner = 'consumer-0' from _live_migration.tables where table_name = 'small'"
                )
                await until(target_database, taken_over)
                await other.execute("select pg_advisory_unlock_all()")
                await blocker.execute("select pg_advisory_unlock(1)")
                await until_ready(target_database)
    finally:
        await blocker.close()
        await other.close()
    await assert_equal(source_database, target_database)


async def test_a_dead_consumer_s_part_is_done_by_another_while_the_holder_goes_on(
    source_database: str, target_database: str
) -> None:
    await make(source_database, target_database)
    settings = settings_for(source_database, target_database, part_size=PART, table_jobs=1)
    blocker = await asyncpg.connect(target_database)
    try:
        await blocker.execute("select pg_advisory_lock(1)")
        async with consumers(settings, 1):
            await until_stalled(target_database)
            async with consumer_process(settings, "second") as second:
                await until(target_database, "select count(*) > 0 from _live_migration.parts where owner = 'second'")
                await until_stalled(target_database, 2)
                second.kill()
                await second.wait()
            await until(target_database, "select count(*) = 0 from _live_migration.parts where owner = 'second'")
            await blocker.execute("select pg_advisory_unlock(1)")
            await until_ready(target_database)
    finally:
        await blocker.close()
    await assert_equal(source_database, target_database)
    assert (
        await fetch_value(target_database, "select attempt from _live_migration.tables where table_name = 'big'") == 1
    )


@pytest.mark.parametrize("side", ["source", "target"])
async def test_sessions_ended_again_and_again(source_database: str, target_database: str, side: str) -> None:
    """All of our sessions on one side are ended time and again, the holder's too: the attempt rises, the copy is exact."""
    await make(source_database, target_database)
    settings = settings_for(source_database, target_database, part_size=PART)
    uri = source_database if side == "source" else target_database
    blocker = await asyncpg.connect(target_database)
    end_all = """select count(pg_terminate_backend(pid)) from pg_stat_activity
                 where datname = current_database() and application_name ~ 'live-migration (copy|phase)'"""
    try:
        async with consumers(settings, 2):
            for _ in range(3):
                await blocker.execute("select pg_advisory_lock(1)")
                await until_stalled(target_database)
                assert await fetch_value(uri, end_all) > 0
                await blocker.execute("select pg_advisory_unlock(1)")
            await until_ready(target_database)
    finally:
        await blocker.close()
    await assert_equal(source_database, target_database)
    attempt = await fetch_value(target_database, "select attempt from _live_migration.tables where table_name = 'big'")
    assert attempt > 1 or side == "target"


async def test_a_stopped_consumer_gives_back_at_once(source_database: str, target_database: str) -> None:
    await make(source_database, target_database)
    settings = settings_for(source_database, target_database, part_size=PART, lease=600)
    blocker = await asyncpg.connect(target_database)
    try:
        await blocker.execute("select pg_advisory_lock(1)")
        async with consumers(settings, 1):
            await until_stalled(target_database, 2)
        held = "select count(*) from _live_migration.tables where owner is not null"
        assert await fetch_value(target_database, held) == 0
        assert await fetch_value(target_database, held.replace("tables", "parts")) == 0
        await blocker.execute("select pg_advisory_unlock(1)")
    finally:
        await blocker.close()
    async with consumers(settings, 1):
        await until_ready(target_database, timeout=15)
    await assert_equal(source_database, target_database)


async def test_a_zombie_s_commit_is_refused(source_database: str, target_database: str) -> None:
    """The attempt rises behind a part's back; its rows and its done mark are rolled back."""
    await make(source_database, target_database)
    settings = settings_for(source_database, target_database, part_size=PART)
    blocker = await asyncpg.connect(target_database)
    try:
        await blocker.execute("select pg_advisory_lock(1)")
        async with consumers(settings, 2):
            await until_stalled(target_database, 2)
            async with session(target_database, "target") as target:
                await target.execute("update _live_migration.tables set attempt = attempt + 5 where table_name = 'big'")
                await blocker.execute("select pg_advisory_unlock(1)")
            await until(
                target_database,
                "select state = 'ready' and attempt > 6 from _live_migration.tables where table_name = 'big'",
            )
    finally:
        await blocker.close()
    await assert_equal(source_database, target_database)


async def test_a_target_that_crashes_and_comes_back(source_database: str) -> None:
    async with LocalPostgres(settings={**SETTINGS, "fsync": "on"}) as server:
        target_database = server.uri()
        await make(source_database, target_database)
        async with consumers(settings_for(source_database, target_database, part_size=PART), 2):
            await until(target_database, "select count(*) > 2 from _live_migration.parts where state = 'done'")
            await server.restart(immediate=True)
            await until_ready(target_database)
        await assert_equal(source_database, target_database)


async def test_locks_of_a_stopped_consumer_do_not_hold_up_its_successor(
    source_database: str, target_database: str
) -> None:
    """Stopped between a part's done mark and its COMMIT, a consumer keeps the lock on the table's row."""
    await make(source_database, target_database)
    holder, copier = await asyncpg.connect(target_database), await asyncpg.connect(target_database)
    began = "(select backend_start from pg_stat_activity where pid = $1)"
    await holder.execute(
        f"""update _live_migration.tables set state = 'copying', attempt = 1, snapshot_id = 'gone', owner = 'first',
                backend_pid = $1, backend_start = {began}, lease_until = clock_timestamp() - interval '1 second'
            where table_name = 'big'""",
        holder.get_server_pid(),
    )
    await holder.execute(
        f"""insert into _live_migration.parts (oid, part, attempt, first_block, size_bytes, state, owner, backend_pid, backend_start,
                lease_until)
            select oid, 0, 1, 0, 0, 'copying', 'first', $1, {began}, clock_timestamp() + interval '3 seconds'
            from _live_migration.tables where table_name = 'big'""",
        copier.get_server_pid(),
    )
    await copier.execute("begin; select from _live_migration.tables where table_name = 'big' for share")
    try:
        async with consumers(settings_for(source_database, target_database), 1):
            await until_ready(target_database)
        await assert_equal(source_database, target_database)
    finally:
        holder.terminate()
        copier.terminate()
