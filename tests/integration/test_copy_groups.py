"""Small tables that are copied together: in few transactions, each row once, whatever becomes of one of them or of who copies."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from live_migration.consumer import claims
from live_migration.consumer.sessions import Backend
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

COUNT = 60
TABLES = f"""
    do $$ begin
        for i in 1 .. {COUNT} loop
            execute format('create table public.t%s (id int not null, v text)', i);
        end loop;
    end $$
"""
FILL = f"""
    do $$ begin
        for i in 1 .. {COUNT} loop
            execute format('insert into public.t%s select g, repeat(''x'', g %% 50) from generate_series(1, %s) g', i, (i % 3) * 20);
            if i % 2 = 0 then
                execute format('alter table public.t%s add primary key (id); create unique index on public.t%s (id, v)', i, i);
            end if;
        end loop;
    end $$
"""
"""Those with odd numbers have no key: a row that was copied twice would stand there twice."""
STALL = """
    create function public.stall() returns trigger language plpgsql as $$
    begin
        while not pg_try_advisory_xact_lock_shared(1) loop perform pg_sleep(0.02); end loop;
        return null;
    end $$;
    create trigger stall before insert on public.{table} execute function public.stall();
    alter table public.{table} enable always trigger stall;
"""
"""On the target, a copy into the table waits while somebody holds advisory lock 1; no lock_timeout ends that."""
FIRST_GROUP = COUNT // 4
IS_STALLED = """
    select count(*) > 0 from pg_stat_activity where datname = current_database() and query like 'COPY%' and wait_event = 'PgSleep'
"""
GROUP_IS_HELD = f"""
    select count(*) >= {FIRST_GROUP} from _live_migration.tables where state = 'copying' and attempt = 1
"""


async def make(source: str, target: str, *, stall: str = "") -> None:
    for uri in (source, target):
        await run_sql(uri, TABLES)
    await run_sql(source, FILL)
    if stall:
        await run_sql(target, STALL.format(table=stall))
    await plan(source, target)
    # The first group begins with the table that it is about; its size does not go beyond that of a small one.
    if stall:
        await run_sql(
            target, f"update _live_migration.tables set size_bytes = 100000 where table_name in ('{stall}', 't2')"
        )


@asynccontextmanager
async def stalled(target: str) -> AsyncIterator[asyncpg.Connection]:
    """Hold what copies into the stalled table wait for."""
    connection = await asyncpg.connect(target)
    try:
        await connection.execute("select pg_advisory_lock(1)")
        yield connection
    finally:
        await connection.close()


async def assert_equal(source: str, target: str) -> None:
    assert await contents(target) == await contents(source)
    assert await index_definitions(target) == await index_definitions(source)


async def test_many_small_tables_take_few_snapshots(source_database: str, target_database: str) -> None:
    await make(source_database, target_database)
    async with consumers(settings_for(source_database, target_database), 2):
        await until_ready(target_database)
    await assert_equal(source_database, target_database)
    copied = "select count(distinct horizon) from _live_migration.tables where attempt = 1 and snapshot is not null"
    assert await fetch_value(target_database, copied) < COUNT / 2
    counted = "select sum(row_count) from _live_migration.tables"
    assert await fetch_value(target_database, counted) == COUNT / 3 * (0 + 20 + 40)
    assert await fetch_value(target_database, "select bool_and(state = 'done') from _live_migration.indexes")


async def test_rows_that_stand_there_already_go(source_database: str, target_database: str) -> None:
    """As after an attempt whose rows were committed and whose copy counts no more: `migrate --recopy`, a failover."""
    await make(source_database, target_database)
    await run_sql(target_database, "insert into public.t1 values (1, 'old'); insert into public.t3 values (1, 'old')")
    async with consumers(settings_for(source_database, target_database)):
        await until_ready(target_database)
    await assert_equal(source_database, target_database)


async def test_whoever_is_particular_is_left_out_and_named(
    source_database: str, target_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("live_migration.consumer.copy_errors.REFUSED_RETRY_SECONDS", 0.5)
    monkeypatch.setattr("live_migration.consumer.index_builder.ERROR_RETRY_SECONDS", 0.5)
    await make(source_database, target_database)
    checked = "create or replace function public.checked(int) returns int immutable language sql as 'select {}'"
    await run_sql(source_database, f"{checked.format('$1')}; create index refused on public.t7 (public.checked(id))")
    await run_sql(target_database, f"drop schema _live_migration cascade; {checked.format('1 / 0')}")
    await plan(source_database, target_database)
    await run_sql(target_database, "alter table public.t1 drop column v; drop table public.t5")
    await run_sql(source_database, "alter table public.t2 rename to elsewhere")
    stopped = "select error from _live_migration.tables where table_name = $1 and state = 'stopped'"
    async with consumers(settings_for(source_database, target_database), 2):
        assert "column v (text) is missing" in await until(target_database, stopped, "t1")
        assert "now named public.elsewhere" in await until(target_database, stopped, "t2")
        assert "no such table" in await until(target_database, stopped, "t5")
        assert "22012" in await until(
            target_database, "select error from _live_migration.indexes where name = 'refused'"
        )
        others = f"select count(*) = {COUNT} - 4 from _live_migration.tables where state = 'ready'"
        await until(target_database, others)
        await run_sql(
            target_database,
            f"alter table public.t1 add v text; create table public.t5 (id int not null, v text); {checked.format('$1')}",
        )
        await run_sql(source_database, "alter table public.elsewhere rename to t2")
        await until_ready(target_database)
    await assert_equal(source_database, target_database)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_group_whose_consumer_dies_or_hangs_is_taken_over(
    source_database: str, target_database: str, how: signal.Signals
) -> None:
    await make(source_database, target_database, stall="t1")
    settings = settings_for(source_database, target_database, table_jobs=1)
    async with stalled(target_database) as blocker, consumer_process(settings, "first") as first:
        await until(target_database, IS_STALLED)
        assert await fetch_value(target_database, GROUP_IS_HELD)
        first.send_signal(how)
        began = time.monotonic()
        async with consumers(settings, 1):
            freed = "select count(*) = 0 from _live_migration.tables where owner = 'first'"
            await until(target_database, freed)
            assert time.monotonic() - began < settings.lease + 5
            await blocker.execute("select pg_advisory_unlock(1)")
            await until_ready(target_database)
            if how is signal.SIGSTOP:  # it comes back as a zombie, and finds out
                first.send_signal(signal.SIGCONT)
                await asyncio.sleep(1)
                assert first.returncode is None
    await assert_equal(source_database, target_database)


async def test_the_whole_group_is_undone_where_one_claim_is_lost(source_database: str, target_database: str) -> None:
    """The attempt of one rises behind the consumer's back, as a successor or a failover would raise it."""
    await make(source_database, target_database, stall="t1")
    async with (
        stalled(target_database) as blocker,
        consumers(settings_for(source_database, target_database, table_jobs=1), 1),
    ):
        await until(target_database, IS_STALLED)
        await run_sql(target_database, "update _live_migration.tables set attempt = 7 where table_name = 't2'")
        await blocker.execute("select pg_advisory_unlock(1)")
        await until_ready(target_database)
    await assert_equal(source_database, target_database)
    attempts = f"select count(*) >= {FIRST_GROUP} - 1 from _live_migration.tables where attempt = 2"
    assert await fetch_value(target_database, attempts), "what was copied beside it was kept"


async def test_the_copy_of_a_group_gives_way_to_who_waits_behind_one_of_its_locks(
    source_database: str, target_database: str
) -> None:
    await make(source_database, target_database, stall="t1")
    altering = await asyncpg.connect(source_database)
    try:
        async with (
            stalled(target_database) as blocker,
            consumers(settings_for(source_database, target_database, table_jobs=1), 1),
        ):
            await until(target_database, IS_STALLED)
            await altering.execute("set application_name = 'the one who alters'")
            began = time.monotonic()
            await altering.execute("alter table public.t2 add w text default 'n'")
            waited = time.monotonic() - began
            events = "select array_agg(message) from _live_migration.events where message like '%the one who alters%'"
            assert len(await until(target_database, events)) == 1
            await run_sql(target_database, "alter table public.t2 add w text")
            await blocker.execute("select pg_advisory_unlock(1)")
            await until_ready(target_database)
    finally:
        await altering.close()
    assert waited < 4
    await assert_equal(source_database, target_database)


async def test_sessions_ended_again_and_again(source_database: str, target_database: str) -> None:
    await make(source_database, target_database)
    end_all = """select count(pg_terminate_backend(pid)) from pg_stat_activity
                 where datname = current_database() and application_name ~ 'live-migration (copy|phase)'"""
    async with consumers(settings_for(source_database, target_database), 2):
        for count in (1, 10, 20, 30):
            await until(
                target_database, "select count(*) >= $1 from _live_migration.tables where state = 'ready'", count
            )
            await run_sql(source_database if count % 20 else target_database, end_all)
        await until_ready(target_database)
    await assert_equal(source_database, target_database)


async def test_few_tables_and_those_set_back_are_no_group(source_database: str, target_database: str) -> None:
    """What is left for the last is left for others to take; what failed is copied alone."""
    await make(source_database, target_database)
    connection = await asyncpg.connect(target_database)
    try:
        backend = Backend(connection.get_server_pid(), await connection.fetchval("select now()"))
        who = claims.Claimant("one", backend, backend, 60.0)
        assert len(await claims.claim_group(connection, who, 1 << 30)) == FIRST_GROUP
        await connection.execute(
            "update _live_migration.tables set retry_at = now() where state = 'planned' and oid::bigint % 2 = 0"
        )
        rest = await connection.fetch(
            "select oid from _live_migration.tables where state = 'planned' and retry_at is null"
        )
        taken = await claims.claim_group(connection, who, 1 << 30)
        assert len(taken) == len(rest) // 4
        assert {claim.oid for claim in taken} <= {row["oid"] for row in rest}
        await connection.execute(
            "update _live_migration.tables set size_bytes = 1 << 20 where oid = (select max(oid) from _live_migration.tables where state = 'planned')"
        )
        assert await claims.claim_group(connection, who, 1 << 30) == [], "before what is bigger"
    finally:
        await connection.close()
