"""Keys whose index is built first and becomes the constraint afterwards: beside other builds, and whatever happens between the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from live_migration.common.postgres import session
from live_migration.consumer import table_group
from live_migration.consumer.claim_endings import (
    CopiedTable,
    finish_first_step,
    finish_group,
    finish_index,
    give_index_back,
)
from live_migration.consumer.claims import Claimant, claim_index
from live_migration.consumer.sessions import Backend
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.recopy import FREE, drop_built_indexes
from live_migration.coordinator.schema import restore_schema
from live_migration.coordinator.waiting import await_copy
from tests.integration.test_conductor import MakeSettings, bench, fetch, make_settings
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

__all__ = ["make_settings"]

pytestmark = pytest.mark.integration

TABLE = "create table public.t (id int not null, v int not null, w text)"
FILL = """
    insert into public.t select g, g, g from generate_series(1, 500) g;
    alter table public.t add constraint t_pkey primary key (id);
    create index t_v on public.t (v);
    alter table public.t add constraint t_key unique (v, id)
"""
CONSTRAINTS = """
    select conrelid::regclass::text, conname, contype, condeferrable, condeferred, conindid::regclass::text, pg_get_constraintdef(k.oid),
           reloptions, indisreplident, indisclustered, indimmediate
    from pg_constraint k join pg_class c on c.oid = conindid join pg_index on indexrelid = conindid
    where contype in ('p', 'u', 'x') and connamespace::regnamespace::text !~ '^_live' order by 1, 2
"""
IS_BUILT = "select bool_or(is_built) from _live_migration.indexes where name = 't_pkey' and state = 'pending'"


async def constraints(uri: str) -> list[asyncpg.Record]:
    async with session(uri, "source") as connection:
        return await connection.fetch(CONSTRAINTS)


async def assert_same(source: str, target: str) -> None:
    assert await contents(target) == await contents(source)
    assert await index_definitions(target) == await index_definitions(source)
    assert await constraints(target) == await constraints(source)


KEYS = """
    create schema "s; 1";
    create table "s; 1"."t "" (x)" (id int not null, "k "" (2)" int not null, v text, w int, n int);
    alter table "s; 1"."t "" (x)" add constraint "key "" (x" primary key ("k "" (2)", id) include (v) with (fillfactor = 70);
    alter table "s; 1"."t "" (x)" add constraint u1 unique (w) deferrable initially deferred;
    alter table "s; 1"."t "" (x)" add constraint u2 unique (v, w) deferrable;
    alter table "s; 1"."t "" (x)" add constraint u3 unique nulls not distinct (n);
    alter table "s; 1"."t "" (x)" add constraint x exclude using btree (w with =);
    alter table "s; 1"."t "" (x)" cluster on "key "" (x";
    create table public.r (id int not null, v int);
    alter table public.r add constraint r_key unique (id); alter table public.r replica identity using index r_key;
    create index on public.r (v);
    create table public.single (id int primary key);
    create table public.p (id int, k int, v int, primary key (id, k)) partition by list (k);
    create table public.p1 partition of public.p for values in (1); create index on public.p1 (v);
    create table public.parent (id int primary key, v int); create table public.child (primary key (id)) inherits (public.parent);
    create index on public.parent (v); create index on public.child (v);
    insert into "s; 1"."t "" (x)" select g, g, g, g, g from generate_series(1, 100) g;
    insert into public.r select g, g from generate_series(1, 100) g; insert into public.p values (1, 1, 1); insert into public.child values (1, 1);
"""


async def test_servers_make_the_same_of_what_pg_dump_writes_in_two_steps(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), KEYS)
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        async with consumers(settings):
            await await_copy(b.run)
        planned = await b.target("select name, two_steps is not null, is_built from _live_migration.indexes order by 1")
    assert {name for name, is_split, _ in planned if is_split} == {
        'key " (x', "u1", "u2", "u3", "r_key", "p1_pkey", "parent_pkey", "child_pkey",
    }  # fmt: skip
    await assert_same(settings.source_uri(), settings.target_uri())


async def claimant(connection: asyncpg.Connection) -> Claimant:
    started = await connection.fetchval("select backend_start from pg_stat_activity where pid = pg_backend_pid()")
    return Claimant("tester", Backend(connection.get_server_pid(), started), None, 60.0)


async def test_an_index_is_built_beside_others_and_a_constraint_made_beside_none(
    source_database: str, target_database: str
) -> None:
    for uri in (source_database, target_database):
        await run_sql(uri, TABLE)
    await run_sql(source_database, FILL)
    await plan(source_database, target_database)
    await run_sql(target_database, "update _live_migration.tables set state = 'copied'")
    async with session(target_database, "target") as target:
        who = await claimant(target)
        first = [await claim_index(target, who) for _ in range(4)]
        assert [claim and claim.name for claim in first] == ["t_pkey", "t_key", "t_v", None]
        key, unique, plain = first[:3]
        assert key
        assert unique
        assert plain
        assert [claim.is_first_step for claim in (key, unique, plain)] == [True, True, False]
        await finish_first_step(target, key, "tester")
        await finish_first_step(target, unique, "tester")
        assert await claim_index(target, who) is None, "a constraint beside a build"
        await give_index_back(target, plain, "tester", 0, None)
        key_again = await claim_index(target, who)
        assert key_again
        assert (key_again.name, key_again.is_built, key_again.is_first_step) == ("t_pkey", True, False)
        assert await claim_index(target, who) is None, "a constraint or a build beside a constraint"
        await give_index_back(target, key_again, "tester", 0, None)
        key_again = await claim_index(target, who)
        assert key_again
        assert key_again.name == "t_pkey"
        assert key_again.is_built
        await finish_index(target, key_again, "tester")
        unique_again = await claim_index(target, who)
        assert unique_again
        assert unique_again.name == "t_key"
        await finish_index(target, unique_again, "tester")
        plain_again = await claim_index(target, who)
        assert plain_again
        assert plain_again.name == "t_v"
        assert await fetch_value(target_database, "select state from _live_migration.tables") == "copied"
        await finish_index(target, plain_again, "tester")
    assert await fetch_value(target_database, "select state from _live_migration.tables") == "ready"


async def die_between_the_steps(source: str, target: str, *, more_tables: str = "select") -> None:
    """Leave t_pkey's index, built by a consumer that is killed while it waits for a reader to make it the constraint."""
    for uri in (source, target):
        await run_sql(uri, TABLE)
        await run_sql(uri, more_tables)
    await run_sql(source, FILL)
    await plan(source, target)
    reader = await asyncpg.connect(target)
    try:
        await reader.execute("begin; lock table public.t in access share mode")
        await run_sql(target, "update _live_migration.tables set retry_at = 'infinity' where table_name <> 't'")
        # The copy empties the table, for which it would wait, too: the rows are there already.
        await run_sql(
            target,
            """insert into public.t select g, g, g from generate_series(1, 500) g;
               update _live_migration.tables set state = 'copied' where table_name = 't'""",
        )
        async with consumer_process(settings_for(source, target), "dies") as process:
            await until(target, IS_BUILT.replace("'pending'", "'building'"))
            await until(
                target, "select exists (select from pg_locks where mode = 'AccessExclusiveLock' and not granted)"
            )
            process.kill()
            await process.wait()
    finally:
        await reader.close()
    await run_sql(target, "update _live_migration.tables set retry_at = null")


async def test_who_comes_after_a_dead_consumer_makes_the_rest(source_database: str, target_database: str) -> None:
    await die_between_the_steps(source_database, target_database)
    before = await fetch_value(target_database, "select 'public.t_pkey'::regclass::oid::bigint")
    async with consumers(settings_for(source_database, target_database)):
        await until_ready(target_database)
    await assert_same(source_database, target_database)
    assert await fetch_value(target_database, "select 'public.t_pkey'::regclass::oid::bigint") == before, "built twice"


@pytest.mark.parametrize(
    ("on_source", "on_target"),
    [
        (
            "alter table public.t drop constraint t_pkey; alter table public.t alter id drop not null; insert into public.t values (null, 1)",
            "alter table public.t alter id drop not null; insert into public.t values (null, 1)",
        ),
        ("select", "drop index public.t_pkey"),
        ("select", "drop index public.t_pkey; create index t_pkey on public.t (w)"),
        ("alter table public.t rename id to uid", "alter table public.t rename id to uid"),
        (
            "alter table public.t drop constraint t_pkey",
            "alter index public.t_pkey set (fillfactor = 50); drop index public.t_pkey",
        ),
        ("alter table public.t drop column id", "alter table public.t drop column id"),
        (
            "alter table public.t drop constraint t_pkey; alter table public.t add constraint t_pkey primary key (v)",
            "drop index public.t_pkey; create index t_pkey on public.t (w)",
        ),
    ],
)
async def test_a_second_step_that_is_refused_begins_anew_as_the_source_has_it(
    source_database: str, target_database: str, on_source: str, on_target: str
) -> None:
    await die_between_the_steps(source_database, target_database)
    await until(
        target_database,
        "select bool_and(backend_pid is null or pid is null) from _live_migration.indexes left join pg_stat_activity on pid = backend_pid",
    )
    await run_sql(source_database, on_source)
    await run_sql(target_database, on_target)
    async with consumers(settings_for(source_database, target_database)):
        await until_ready(target_database)
    await assert_same(source_database, target_database)
    events = await fetch_value(
        target_database, "select string_agg(message, ' ') from _live_migration.events where message like '%source has%'"
    )
    assert ("t_pkey" in (events or "")) == ("drop" in on_source), "what is as it was planned is no news"


async def test_a_table_that_is_copied_again_in_a_group_keeps_the_index(
    source_database: str, target_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = """do $$ begin
        for i in 1 .. 40 loop execute format('create table public.g%s (id int not null)', i); end loop;
    end $$"""
    await die_between_the_steps(source_database, target_database, more_tables=small)
    await run_sql(
        target_database,
        f"""update _live_migration.tables set state = 'planned';
            update _live_migration.indexes set state = 'pending', {FREE} where state = 'building'""",
    )
    in_groups: list[str] = []

    async def watched(connection: asyncpg.Connection, copied: Sequence[CopiedTable], *others: Any) -> None:
        in_groups.extend(str(each.claim) for each in copied)
        await finish_group(connection, copied, *others)

    monkeypatch.setattr(table_group, "finish_group", watched)
    async with consumers(settings_for(source_database, target_database)):
        await until_ready(target_database)
    await assert_same(source_database, target_database)
    assert "public.t" in in_groups


async def test_a_recopy_drops_an_index_that_is_no_constraint_yet(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), f"{TABLE};{FILL}")
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await b.target(
            """do $$ begin execute (select two_steps[1] from _live_migration.indexes where name = 't_pkey'); end $$;
               update _live_migration.indexes set is_built = true where name = 't_pkey';
               insert into _live_migration.steps (name) values ('recopy')"""
        )
        await drop_built_indexes(b.run)
        assert await fetch_value(settings.target_uri(), "select to_regclass('public.t_pkey')") is None
        assert not await fetch_value(settings.target_uri(), "select bool_or(is_built) from _live_migration.indexes")
        async with consumers(settings):
            await await_copy(b.run)
    await assert_same(settings.source_uri(), settings.target_uri())
