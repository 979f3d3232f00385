"""Tables that are made on the source after the plan come over by themselves: with and without key, dropped again, under faults."""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest

from live_migration.consumer import copy_errors
from live_migration.coordinator.cutover import CutoverRefused
from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SCHEMA = """
    create schema app;
    create table parent (id int primary key, v text);
    insert into parent select g, 'v' || g from generate_series(1, 20) g;
    create table parts (id int, primary key (id)) partition by range (id);
    create table parts_1 partition of parts for values from (0) to (100);
    create function app.stamp() returns trigger language plpgsql as $$begin new.note := 'stamped'; return new; end$$;
"""
_FOLLOWED = "select newcomer = 'followed' and rebuild is null from _live_migration.tables where table_name = $1"
_OBJECTS = """
    select conrelid::regclass::text as on, conname::text as name, pg_get_constraintdef(oid) as is, convalidated from pg_constraint
    where conrelid::regclass::text like 'app.%'
    union all select tgrelid::regclass::text, tgname, pg_get_triggerdef(oid), tgenabled = 'O' from pg_trigger
    where tgrelid::regclass::text like 'app.%' and not tgisinternal
    union all select tablename, indexname, indexdef, true from pg_indexes where schemaname = 'app'
    order by 1, 2
"""


async def _equal(migration: Migration, *tables: str) -> None:
    source, target = await asyncpg.connect(migration.source), await asyncpg.connect(migration.target)
    try:
        for table in tables:
            ours, theirs = [
                sorted(r[0] for r in await each.fetch(f"select x::text from {table} x")) for each in (source, target)
            ]
            assert ours == theirs, table
        objects = [[tuple(row) for row in await each.fetch(_OBJECTS)] for each in (source, target)]
        assert objects[0] == objects[1]
    finally:
        await source.close()
        await target.close()


async def test_tables_made_during_replay_come_over_with_all_that_is_theirs(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    older = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await older.execute("begin; insert into parts values (50)")
        await source.execute(
            """create table app.orders (id bigserial primary key, parent int references parent, note text, at timestamptz default now());
               create index orders_note on app.orders (note);
               create trigger stamp before insert on app.orders for each row when (new.note is null) execute function app.stamp();
               comment on trigger stamp on app.orders is 'stamps';
               create table app.no_key (a int, b text)"""
        )
        await source.execute(
            "insert into app.orders (parent, note) select 1 + g % 20, 'before ' || g from generate_series(1, 500) g"
        )
        await source.execute("insert into app.no_key select g % 7, 'before' from generate_series(1, 100) g")
        await migration.until("made", "select count(*) = 2 from _live_migration.tables where newcomer = 'made'")
        for i in range(40):  # while it is being published, and while the wait for `older` goes on
            await source.execute("insert into app.orders (parent) values ($1)", 1 + i % 20)
            await source.execute("update app.orders set note = note || '+' where id = $1", 1 + i * 3)
            await source.execute("delete from app.orders where id = $1", 400 + i)
            await source.execute("insert into app.no_key values ($1, 'during')", i)
            await asyncio.sleep(0.02)
        await older.execute("insert into app.orders (parent, note) values (3, 'older'); commit")
        for name in ("orders", "no_key"):
            await migration.until(name, _FOLLOWED, name)
        await source.execute("update app.orders set note = 'after' where id % 5 = 0")
        await source.execute("delete from app.orders where id % 11 = 0")
        await source.execute("insert into app.orders (note) values (null)")
        await source.execute("insert into app.no_key values (1, 'after')")
        await migration.finish()
        await _equal(migration, "app.orders", "app.no_key", "parent")
        report = await verify(migration.settings)
        assert report.is_equal, report.differences
    await source.close()
    await older.close()


async def test_a_table_made_right_before_the_cutover_comes_over(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await source.execute("create table app.last (id int primary key); insert into app.last values (1), (2)")
        await migration.finish()
        await _equal(migration, "app.last", "parent")
    await source.close()


async def test_what_is_dropped_again_is_let_go_and_what_cannot_be_made_is_named(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await source.execute("create table app.brief (id int primary key); insert into app.brief values (1)")
        await migration.until("brief", _FOLLOWED, "brief")
        await source.execute("insert into app.brief values (2); drop table app.brief")
        await source.execute(
            "create table app.brief (id int primary key, v text); insert into app.brief values (7, 'new')"
        )
        await source.execute(
            "create type app.mood as enum ('good'); create table app.moody (id int primary key, m app.mood)"
        )
        await source.execute("create table parts_2 partition of parts for values from (100) to (200)")
        with pytest.raises(CutoverRefused) as refused:
            await migration.finish()
        assert "app.moody cannot be brought" in str(refused.value)
        assert "public.parts_2 cannot be brought" in str(refused.value)
        assert "brief" not in str(refused.value)
        await source.execute("drop table app.moody, parts_2; drop type app.mood")
        migration.start_coordinator()
        await migration.finish()
        await _equal(migration, "app.brief", "parent")
    await source.close()


_SAYS = "select error from _live_migration.checkpoints where error like '%' || $1 || '%'"


async def test_a_copy_of_a_lanes_own_that_the_target_refuses_says_so_and_goes_on_once_that_is_mended(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A value of an enum that the target lacks, in a newcomer: the lane stands, and nobody would know why."""
    monkeypatch.setattr(copy_errors, "REFUSED_RETRY_SECONDS", 0.5)
    source, target = await asyncpg.connect(source_database), await asyncpg.connect(target_database)
    await source.execute(
        """create schema app; create type app.mood as enum ('good');
           create table of_the_plan (id int primary key, m app.mood)"""  # has the stream in text form
    )
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await source.execute("alter type app.mood add value 'bad'")
        await source.execute("create table app.moody (m app.mood); insert into app.moody values ('bad'), ('good')")
        said = await migration.until("what the target refuses", _SAYS, "invalid input value for enum")
        assert "app.moody" in said
        assert "lane" in said
        await target.execute("alter type app.mood add value 'bad'")
        await migration.until("moody", _FOLLOWED, "moody")
        assert not await target.fetchval("select bool_or(error is not null) from _live_migration.checkpoints")
        await migration.finish()
        await _equal(migration, "app.moody")
    await source.close()
    await target.close()


async def test_newcomers_come_over_exactly_once_whenever_the_coordinator_dies(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    seed = int(os.environ.get("LIVE_MIGRATION_TEST_SEED", random.randrange(1 << 30)))
    print(f"LIVE_MIGRATION_TEST_SEED={seed}")
    chance = random.Random(seed)
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    tables = [f"app.t{n}" for n in range(6)]
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        for n, table in enumerate(tables):
            key = "primary key" if n % 3 else ""
            await source.execute(f"create table {table} (id bigint {key}, v text default 'x')")
            await source.execute(f"insert into {table} select g from generate_series(1, 300) g")
            deadline = asyncio.get_running_loop().time() + chance.uniform(0.3, 4)
            while asyncio.get_running_loop().time() < deadline:
                for each in tables[: n + 1]:
                    await source.execute(f"insert into {each} select coalesce(max(id), 0) + 1 from {each}")
                    if tables.index(each) % 3:
                        await source.execute(f"update {each} set v = v || 'y' where id = $1", chance.randrange(1, 300))
            assert migration.coordinator is not None
            migration.coordinator.cancel()
            with suppress(asyncio.CancelledError):
                await migration.coordinator
            migration.start_coordinator()
        await migration.finish()
        await _equal(migration, *tables, "parent")
    await source.close()
