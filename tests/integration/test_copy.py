"""The copy phase on real servers: every value, every shape, under load and beside other people's locks."""

from __future__ import annotations

import asyncio
import json
import time

import asyncpg
import pytest

from live_migration.common.errors import TargetError
from live_migration.common.postgres import session
from live_migration.common.visibility import CopySnapshot
from tests.fixtures.fix_postgres import DatabaseFactory, PostgresFactory
from tests.support.copying import (
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
    create schema s;
    create type s.mood as enum ('sad', 'happy');
    create table s.big (id bigint not null, account int not null, amount int not null, note text);
    create table s.wide (id int not null, n numeric, f float8, a int[], m s.mood, ms s.mood[], j jsonb, b bytea, t timestamptz, i interval);
    create table s.generated (id int generated always as identity, a int, twice int generated always as (a * 2) stored);
    create table s."a 'q'; ""n"" \\ %s ü 名前" ("select" int not null, "c ""x"" '' \\ 名" text);
    create table s.nothing ();
    create table s.only_generated (g int generated always as (1 + 1) stored);
    create table s.empty (id int not null);
    create table s.parent (id int not null);
    create table s.child (extra text) inherits (s.parent);
    create table s.leaves (id int not null, k int not null) partition by list (k);
    create table s.leaf_1 partition of s.leaves for values in (1);
    create table s.leaf_2 partition of s.leaves for values in (2);
"""
COLUMNS_200 = ", ".join(f"c{i} int default {i}" for i in range(200))
TABLES += f"    create table s.many (id int not null, {COLUMNS_200});"

FILL = """
    insert into s.big select i, i % 100, 10, repeat('x', i % 50) from generate_series(1, 40000) i;
    insert into s.wide values (1, 'nan', 'nan', '{1,null}', 'sad', '{happy,null}', '{"a": 1.10}', '\\x00ff', 'infinity', '1 mon -1 day'),
        (2, repeat('9', 100)::numeric, '-infinity', '{}', 'happy', '{}', null, '', '-infinity', '1 us'),
        (3, null, '-0', null, null, null, 'null', null, '0044-03-15 12:00:00+00 BC', null);
    insert into s.generated (a) values (1), (2), (null);
    insert into s."a 'q'; ""n"" \\ %s ü 名前" values (1, E'\\N\\t\\\\.\\n'), (2, ''), (3, null);
    insert into s.nothing select from generate_series(1, 7);
    insert into s.only_generated select from generate_series(1, 4);
    insert into s.parent values (1), (2);
    insert into s.child values (3, 'child');
    insert into s.leaves select i, i % 2 + 1 from generate_series(1, 100) i;
    insert into s.many (id) select generate_series(1, 10);
"""
INDEXES = """
    alter table s.big add primary key (id);
    create index on s.big (account);
    create index on s.big (lower(note)) where amount > 0;
    alter table s.big add unique (account, id);
    alter table s.wide add primary key (id);
    alter table s.generated add primary key (id);
    alter table s."a 'q'; ""n"" \\ %s ü 名前" add constraint "k ""x"" 名" primary key ("select");
    create unique index on s.child (extra);
"""


async def make(source: str, target: str) -> None:
    for uri in (source, target):
        await run_sql(uri, TABLES)
    await run_sql(source, FILL + INDEXES)
    await plan(source, target)


async def test_every_kind_of_table_arrives_whole_with_its_indexes(source_database: str, target_database: str) -> None:
    await make(source_database, target_database)
    # rows that an earlier try left behind are not there afterwards
    await run_sql(target_database, "insert into s.empty values (1); insert into s.leaf_1 values (5, 1)")
    settings = settings_for(source_database, target_database, part_size=256 * 1024)
    async with consumers(settings, 2):
        await until_ready(target_database)
    assert await contents(target_database) == await contents(source_database)
    assert await index_definitions(target_database) == await index_definitions(source_database)
    async with session(target_database, "target") as target:
        rows = {row["table_name"]: row for row in await target.fetch("select * from _live_migration.tables")}
        parts = await target.fetchrow(
            "select count(*) as parts, sum(row_count)::bigint as rows, bool_and(state = 'done') as done from _live_migration.parts"
        )
    assert parts["parts"] > 4
    assert (parts["rows"], parts["done"]) == (40000, True)
    assert rows["big"]["row_count"] == 40000
    assert rows["nothing"]["row_count"] == 7
    assert rows["big"]["binary_copy"]
    assert not rows["wide"]["binary_copy"]
    for row in rows.values():
        assert row["attempt"] == 1
        assert row["owner"] is row["lease_until"] is row["error"] is None
        CopySnapshot.parse(row["snapshot"], row["horizon"])
        assert row["horizon"] > 0


async def test_the_oldest_version_on_both_sides(
    postgres_server: PostgresFactory, fresh_database: DatabaseFactory
) -> None:
    source, target = await fresh_database(postgres_server(14)), await fresh_database(postgres_server(14))
    await make(source, target)
    async with consumers(settings_for(source, target, part_size=256 * 1024), 2):
        await until_ready(target)
    assert await contents(target) == await contents(source)
    assert await index_definitions(target) == await index_definitions(source)


async def test_small_tables_are_frozen(source_database: str, target_database: str) -> None:
    await make(source_database, target_database)
    async with consumers(settings_for(source_database, target_database)):
        await until_ready(target_database)
    await run_sql(target_database, "create extension pg_visibility schema public")
    frozen = await fetch_value(
        target_database, "select avg(all_frozen::int) > 0.8 from public.pg_visibility_map('s.big'::regclass)"
    )
    assert frozen


async def test_parts_of_a_table_share_one_snapshot(source_database: str, target_database: str) -> None:
    """Transactions move amounts between rows far apart: every snapshot of the source has the same sum."""
    await make(source_database, target_database)
    stop = asyncio.Event()

    async def move(seed: int) -> int:
        connection = await asyncpg.connect(source_database)
        count = 0
        try:
            await connection.execute(f"select setseed({seed / 10})")
            while not stop.is_set():
                await connection.execute(
                    """with pair as (select ceil(random() * 20000)::int as a, 20000 + ceil(random() * 20000)::int as b)
                       update s.big set amount = amount + case when id = a then 1 else -1 end from pair where id in (a, b)"""
                )
                count += 1
        except asyncpg.DeadlockDetectedError:
            pass
        finally:
            await connection.close()
        return count

    movers = [asyncio.ensure_future(move(seed)) for seed in range(3)]
    try:
        async with consumers(settings_for(source_database, target_database, part_size=64 * 1024), 2):
            await until_ready(target_database)
    finally:
        stop.set()
        moved = sum(await asyncio.gather(*movers))
    assert moved > 100
    assert await fetch_value(target_database, "select sum(amount) from s.big") == 400_000
    assert await fetch_value(target_database, "select count(*) from s.big") == 40_000
    assert await fetch_value(target_database, "select count(*) from _live_migration.parts") > 20


async def test_a_table_altered_after_planning_stops_with_the_alter_that_mends_it(
    source_database: str, target_database: str
) -> None:
    await make(source_database, target_database)
    await run_sql(
        source_database,
        """alter table s.wide alter a type bigint[] using a::bigint[], add extra text collate "C" not null default 'e''x', drop j;
           alter table s.parent rename id to "renamed ""x"" y";
           alter table s.generated drop twice, add twice int generated always as (a * 3) stored, alter a type bigint;
           alter table s.generated drop twice, add triple int generated always as (a * 3) stored;
           alter table s.leaves add more int default 7;
           alter table s.empty alter id drop not null; insert into s.empty values (null)""",
    )
    await run_sql(target_database, "alter table s.wide alter a set default '{5}'")
    async with consumers(settings_for(source_database, target_database), 2):
        stopped = (
            "select count(*) = 7 from _live_migration.tables where state = 'stopped' and hint like '%ALTER TABLE%'"
        )
        await until(target_database, stopped)
        await until(target_database, "select count(*) = 5 from _live_migration.tables where state = 'ready'")
        async with session(target_database, "target") as target:
            rows = await target.fetch("select * from _live_migration.tables where hint is not null order by table_name")
            run = set()
            for row in rows:
                for line in row["hint"].splitlines():
                    if line.startswith("ALTER TABLE") and line not in run:
                        run.add(line)
                        await target.execute(line)
        await until_ready(target_database)
    assert await contents(target_database) == await contents(source_database) or await same_by_name(
        source_database, target_database
    )
    async with session(target_database, "target") as target:
        columns = await target.fetchval("select columns from _live_migration.tables where table_name = 'wide'")
        assert await target.fetchval("select count(*) from _live_migration.tables where error is not null") == 0
    assert {"name": "extra", "type": "text", "generated": ""} in json.loads(columns)


async def test_a_column_of_the_target_that_holds_less_stops_the_copy(
    source_database: str, target_database: str
) -> None:
    await make(source_database, target_database)
    await run_sql(target_database, "alter table s.wide alter n type numeric(200, 1), alter t type timestamptz(0)")
    async with consumers(settings_for(source_database, target_database), 1):
        stopped = "select hint from _live_migration.tables where state = 'stopped' and table_name = 'wide'"
        await until(target_database, f"select exists ({stopped})")
        hint = await fetch_value(target_database, stopped)
        assert 'ALTER COLUMN "n" TYPE numeric USING' in hint
        await run_sql(target_database, "\n".join(line for line in hint.splitlines() if line.startswith("ALTER")))
        await until_ready(target_database)
    assert await contents(target_database) == await contents(source_database)


async def same_by_name(source: str, target: str) -> bool:
    """Compare tables whose columns stand in another order."""
    for table in ("s.wide", "s.generated", "s.leaves", "s.parent", "s.empty"):
        query = (
            f"select md5(string_agg(r, e'\\n' order by r)) from (select to_jsonb(t)::text as r from only {table} t) x"
        )
        if table == "s.leaves":
            query = query.replace("only ", "")
        assert await fetch_value(source, query) == await fetch_value(target, query), table
    return True


async def test_a_renamed_table_stops_by_name_and_a_dropped_one_ends_empty(
    source_database: str, target_database: str
) -> None:
    await make(source_database, target_database)
    await run_sql(
        source_database,
        "drop table s.many; alter table s.wide rename to elsewhere; create table s.wide (id int); insert into s.wide values (9)",
    )
    async with consumers(settings_for(source_database, target_database)):
        error = await until(
            target_database, "select error from _live_migration.tables where table_name = 'wide' and state = 'stopped'"
        )
        assert "now named s.elsewhere" in error
        await until(target_database, "select state = 'ready' from _live_migration.tables where table_name = 'many'")
        await until(target_database, "select true from _live_migration.events where message like 's.many was dropped%'")
        await run_sql(source_database, "drop table s.wide; alter table s.elsewhere rename to wide")
        await until(target_database, "select state = 'ready' from _live_migration.tables where table_name = 'wide'")
    assert await fetch_value(target_database, "select count(*) from s.wide") == 3
    assert await fetch_value(target_database, "select count(*) from s.many") == 0


async def test_a_rewrite_while_we_wait_for_the_lock_is_seen(source_database: str, target_database: str) -> None:
    """Whoever takes the snapshot before the lock reads no row of a table that was rewritten meanwhile."""
    await make(source_database, target_database)
    rewriter = await asyncpg.connect(source_database)
    try:
        await rewriter.execute("begin; lock table s.wide, s.big in access exclusive mode")
        async with consumers(settings_for(source_database, target_database, lock_timeout=30)):
            async with asyncio.timeout(20):
                waiting = "select count(*) from pg_locks where not granted and mode = 'AccessShareLock'"
                while await rewriter.fetchval(waiting) < 2:
                    await asyncio.sleep(0.02)
            await rewriter.execute(
                "alter table s.wide alter id type bigint; alter table s.wide alter id type int; truncate s.big; commit"
            )
            await until_ready(target_database)
    finally:
        await rewriter.close()
    assert await contents(target_database) == await contents(source_database)
    assert await fetch_value(target_database, "select count(*) from s.big") == 0
    assert await fetch_value(target_database, "select count(*) from s.wide") == 3


async def test_a_table_locked_by_somebody_is_copied_when_the_lock_is_gone_and_others_before(
    source_database: str, target_database: str
) -> None:
    await make(source_database, target_database)
    holder = await asyncpg.connect(source_database)
    try:
        await holder.execute("begin; lock table s.wide in access exclusive mode")
        async with consumers(settings_for(source_database, target_database)):
            others = "select count(*) >= 11 from _live_migration.tables where state = 'ready'"
            await until(target_database, others)
            await until(target_database, "select attempt > 1 from _live_migration.tables where table_name = 'wide'")
            await holder.execute("rollback")
            await until_ready(target_database)
    finally:
        await holder.close()
    assert await contents(target_database) == await contents(source_database)


@pytest.mark.parametrize("part_size", [64 * 1024, 1 << 30])
async def test_the_copy_gives_way_to_who_waits_behind_its_lock(
    source_database: str, target_database: str, part_size: int
) -> None:
    await make(source_database, target_database)
    await run_sql(
        target_database,
        """create function s.stall() returns trigger language plpgsql as 'begin perform pg_advisory_xact_lock_shared(1); return null; end';
           create trigger stall before insert on s.big execute function s.stall();
           alter table s.big enable always trigger stall""",
    )
    blocker, altering = await asyncpg.connect(target_database), await asyncpg.connect(source_database)
    try:
        await blocker.execute("select pg_advisory_lock(1)")
        async with consumers(settings_for(source_database, target_database, part_size=part_size), 2):
            await until(
                target_database,
                "select count(*) >= $1 from pg_locks where locktype = 'advisory' and not granted and objid = 1 and classid = 0",
                1 if part_size > 1 << 20 else 2,
            )
            await altering.execute("set application_name = 'the one who alters'")
            began = time.monotonic()
            await altering.execute("alter table s.big add note_2 text default 'n'")
            waited = time.monotonic() - began
            message = await until(
                target_database, "select message from _live_migration.events where message like '%the one who alters%'"
            )
            assert "s.big" in message
            await blocker.execute(
                "select pg_advisory_unlock(1); drop trigger stall on s.big; alter table s.big add note_2 text"
            )
            await until_ready(target_database)
    finally:
        await blocker.close()
        await altering.close()
    assert waited < 4
    assert await contents(target_database) == await contents(source_database)
    assert await fetch_value(target_database, "select attempt from _live_migration.tables where table_name = 'big'") > 1


async def test_an_index_that_fails_says_why_and_is_built_once_mended(
    source_database: str, target_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("live_migration.consumer.copy_errors.REFUSED_RETRY_SECONDS", 0.5)
    monkeypatch.setattr("live_migration.consumer.index_builder.ERROR_RETRY_SECONDS", 0.5)
    await make(source_database, target_database)
    checked = "create or replace function s.checked(int) returns int immutable language sql as 'select {}'"
    await run_sql(source_database, f"{checked.format('$1')}; create index checked on s.big (s.checked(account))")
    await run_sql(target_database, f"drop schema _live_migration cascade; {checked.format('1 / 0')}")
    await plan(source_database, target_database)
    async with consumers(settings_for(source_database, target_database)):
        error = await until(
            target_database, "select error from _live_migration.indexes where name = 'checked' and state = 'pending'"
        )
        assert "22012" in error
        await until(
            target_database, "select bool_and(state = 'ready' or table_name = 'big') from _live_migration.tables"
        )
        assert (
            await fetch_value(target_database, "select state from _live_migration.tables where table_name = 'big'")
            == "copied"
        )
        await run_sql(target_database, checked.format("$1"))
        await until_ready(target_database)
    assert await index_definitions(target_database) == await index_definitions(source_database)


async def test_the_phase_ends_by_itself_when_the_migration_moves_on(source_database: str, target_database: str) -> None:
    await make(source_database, target_database)
    async with consumers(settings_for(source_database, target_database), 2) as tasks:
        await until_ready(target_database)
        await run_sql(target_database, "update _live_migration.migration set phase = 'replay'; notify _live_migration")
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks)
    gone = "select count(*) = 0 from pg_stat_activity where datname = current_database() and application_name = 'live-migration copy'"
    for uri in (source_database, target_database):
        async with asyncio.timeout(5):
            while not await fetch_value(uri, gone):
                await asyncio.sleep(0.02)


async def test_a_wrong_database_ends_the_phase(source_database: str, target_database: str) -> None:
    await plan(source_database, target_database)
    with pytest.raises(TargetError, match="does not exist"):
        async with consumers(settings_for(source_database, target_database + "_not"), 1) as tasks:
            await asyncio.gather(*tasks)


async def test_a_value_of_200_mb_passes(source_database: str, target_database: str) -> None:
    for uri in (source_database, target_database):
        await run_sql(
            uri, "create table public.huge (id int, v bytea); alter table public.huge alter v set storage external"
        )
    await run_sql(
        source_database,
        "insert into public.huge select 1, convert_to(repeat('0123456789abcdef', 13107200), 'SQL_ASCII')",
    )
    await run_sql(source_database, "insert into public.huge select i, '\\x00' from generate_series(2, 100) i")
    await plan(source_database, target_database)
    async with consumers(settings_for(source_database, target_database)):
        await until_ready(target_database)
    query = "select string_agg(md5(v), ',' order by id) || max(length(v)) from public.huge"
    assert await fetch_value(target_database, query) == await fetch_value(source_database, query)
