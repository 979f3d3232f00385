"""DDL on the source since the plan: brought at the hand-over, or named with its statements, and never passed over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.coordinator import handover
from live_migration.coordinator.cutover import CutoverRefused, _require_accounted_for
from live_migration.coordinator.definitions import read_definitions_of_all
from live_migration.coordinator.entries import run_entries
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.schema import read_post_data, restore_schema
from live_migration.coordinator.source_changes import find_changes, find_lacking, name_changes, warn_of_lacking
from tests.fixtures.change_log import wait_for
from tests.fixtures.fix_postgres import DatabaseFactory, PostgresFactory
from tests.integration.test_conductor import Bench, MakeSettings, bench, fetch, make_settings, stand_in_for_consumers
from tests.support.rich_schema import RICH_SCHEMA

__all__ = ["make_settings"]

pytestmark = pytest.mark.integration

SCHEMA = """
    create table p (id int primary key);
    create table t (id int primary key, v int, w int default 3, x int constraint x_is_small check (x < 10), "Odd" text);
    create index of_x on t (x); create sequence s; create sequence small as smallint maxvalue 100;
    create function f() returns trigger language plpgsql as 'begin return new; end';
    create function g(a int, b text default 'x') returns int language sql as 'select 1';
    create view vw as select 1 as x; create view security with (security_barrier) as select 1 as id;
    create materialized view mv as select id from t; create index of_mv on mv (id);
    create type color as enum ('red', 'blue'); create domain positive as int check (value > 0);
    create trigger going before insert on t for each row execute function f();
    create trigger changing before insert on t for each row execute function f();
    create rule no_delete as on delete to p do instead nothing;
    create policy everybody on t using (v > 0);
    create table parts (id int, v int) partition by range (id);
    create table parts_1 partition of parts for values from (0) to (10);
    create table gone (id int primary key check (id > 0));
"""
NAMED = {
    "create unique index u on t (v)": "index u of public.t is new",
    "drop index of_x": "index of_x of public.t is gone",
    "create index on parts (v)": "index parts_v_idx of public.parts is new",
    "alter table t add constraint c check (w < 100)": "constraint c of public.t is new",
    "alter table t drop constraint x_is_small, add constraint x_is_small check (x < 20)": "constraint x_is_small of public.t was altered",
    "alter table t add constraint once unique (w)": "constraint once of public.t is new",
    "alter table t alter v set default 7": "column v of public.t was altered",
    "alter table t alter v set not null": "column v of public.t was altered",
    "alter table t alter w drop default": "column w of public.t was altered",
    "create or replace view vw as select 2 as x": "view public.vw was altered",
    "alter view security set (security_barrier = false)": "view public.security was altered",
    "create view another as select 1 as id": "view public.another is new",
    "drop view vw": "view public.vw is gone",
    "create or replace function g(a int, b text default 'x') returns int language sql as 'select 2'": "function public.g(a integer, b text) was altered",
    "create function h() returns int language sql as 'select 2'": "function public.h() is new",
    "alter type color add value 'green'": "type public.color was altered",
    "alter domain positive add constraint big check (value > 1)": "type public.positive was altered",
    "create type pair as (a int, b text)": "type public.pair is new",
}
LATE = """
    alter table t add constraint to_p foreign key (w) references p;
    create trigger coming before insert on t for each row execute function f();
    drop trigger going on t; alter table t disable trigger changing;
    drop policy everybody on t; create policy everybody on t for select using (v > 1);
    create policy few on t as restrictive for update to public using (v < 5) with check (v < 4);
    create policy writers on t for insert with check (v < 3);
    alter table t enable row level security; alter table t force row level security;
    drop rule no_delete on p; create rule no_update as on update to p do instead nothing;
    create trigger of_parts before insert on parts for each row execute function f()
"""
LATE_KINDS = ("foreign key", "trigger", "rule", "policy", "row security")


@asynccontextmanager
async def planned(
    make_settings: MakeSettings, schema: str, **options: Any
) -> AsyncIterator[tuple[Bench, asyncpg.Connection]]:
    """Give a migration whose schema is restored, and a session on its source."""
    settings = make_settings(**options)
    await fetch(settings.source_uri(), schema)
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await stand_in_for_consumers(b.settings)
        await run_entries(b.run, "partitioned indexes", (await read_post_data(b.run)).partitioned)
        async with b.run.source_session("test") as source:
            yield b, source


async def labels(b: Bench, source: asyncpg.Connection) -> list[str]:
    return [each.label for each in await find_lacking(b.run, source, b.run.target)]


@pytest.mark.parametrize("version", [14, 18])
async def test_every_change_is_named_until_it_is_on_the_target(
    version: int,
    make_settings: MakeSettings,
    postgres_server: PostgresFactory,
    fresh_database: DatabaseFactory,
) -> None:
    source_uri, target_uri = [await fresh_database(postgres_server(each)) for each in (version, 18)]
    async with planned(make_settings, SCHEMA, source=source_uri, target=target_uri) as (b, source):
        assert await labels(b, source) == []
        for statement, label in NAMED.items():
            await b.source(statement)
            assert await labels(b, source) == [label], statement
            with pytest.raises(CutoverRefused) as refused:
                await _require_accounted_for(b.run, source)
            assert label in refused.value.message
            assert "--accept-ddl" in refused.value.message
            script = Path(b.settings.dir, "changed-on-source.sql")
            assert script.stat().st_mode & 0o777 == 0o600
            if "type" in label and "altered" in label:
                await b.target(statement)
            else:
                await b.target(script.read_text())
            assert await labels(b, source) == [], script.read_text()
            await _require_accounted_for(b.run, source)


async def test_what_is_accepted_is_named_and_the_cutover_goes_on(make_settings: MakeSettings) -> None:
    async with planned(make_settings, SCHEMA, accept_ddl=True) as (b, source):
        await b.source("create unique index u on t (v)")
        await _require_accounted_for(b.run, source)
        await handover.hand_over(b.run, source)
        await warn_of_lacking(b.run)
        said = [line for line in b.observer.warnings if "index u of public.t is new" in line]
        assert len(said) == 2


async def test_triggers_policies_rules_and_foreign_keys_are_made_as_the_source_has_them_by_then(
    make_settings: MakeSettings,
) -> None:
    async with planned(make_settings, SCHEMA) as (b, source):
        await b.source(LATE)
        await _require_accounted_for(b.run, source)
        await handover.hand_over(b.run, source)
        await handover.validate_foreign_keys(b.run)
        theirs, ours = [
            {each.key: each.definition for each in await read_definitions_of_all(side, kinds=LATE_KINDS)}
            for side in (source, b.run.target)
        ]
        assert ours == theirs
        assert ("trigger", "public", "t", "coming") in ours
        assert ("trigger", "public", "t", "going") not in ours
        await warn_of_lacking(b.run)
        assert not [line for line in b.observer.warnings if "since the plan" in line or "restored" in line]


async def test_the_hand_over_finds_the_same_changes_after_a_crash(make_settings: MakeSettings) -> None:
    """What is run is counted, so that it must stay what it was, whatever the source has become."""
    async with planned(make_settings, SCHEMA) as (b, source):
        await b.source(
            "drop trigger going on t; create trigger coming before insert on t for each row execute function f()"
        )
        with pytest.MonkeyPatch.context() as patch:

            async def crash(*_: object, **__: object) -> None:
                raise ConnectionError

            patch.setattr(handover, "run_entries", crash)
            with pytest.raises(ConnectionError):
                await handover.hand_over(b.run, source)
        await b.source("drop trigger coming on t; drop trigger changing on t")
        await handover.hand_over(b.run, source)
        names = [row[0] for row in await b.target("select tgname from pg_trigger where not tgisinternal order by 1")]
        assert names == ["changing", "coming"]
        await warn_of_lacking(b.run)
        (said,) = [line for line in b.observer.warnings if "since the plan" in line]
        assert "trigger changing of public.t is gone" in said


async def test_what_somebody_made_on_the_target_already_ends_no_hand_over(make_settings: MakeSettings) -> None:
    async with planned(make_settings, SCHEMA) as (b, source):
        await b.source(LATE)
        await b.target(
            """create trigger coming before insert on t for each row execute function f();
               create trigger changing before insert on t for each row execute function f();
               alter table t add constraint to_p foreign key (w) references p"""
        )
        await handover.hand_over(b.run, source)
        left_out = [line for line in b.observer.warnings if "left out" in line or "not restored" in line]
        assert [line for line in left_out if "to_p" in line]


async def test_nothing_is_named_of_what_is_followed_otherwise(make_settings: MakeSettings) -> None:
    """Newcomers, dropped tables, what we change ourselves, keys made anew by ALTER TYPE, indexes made anew."""
    async with planned(make_settings, SCHEMA, replica_identity_full=True) as (b, source):
        await b.source(
            """create table newcomer (id int primary key, v int default 3 check (v > 0)); create index on newcomer (v);
               drop table gone; reindex table t; alter table t replica identity full; analyze t;
               comment on table t is 'x'; alter table t alter x type bigint; cluster t using t_pkey;
               create temp table temporary (id int primary key); alter table t owner to postgres;
               create table parts_2 partition of parts for values from (10) to (20)"""
        )
        await b.target("alter table t alter x type bigint")
        assert [each.label for each in await find_changes(b.run, source, b.run.target) or []] == []


async def test_nothing_is_named_of_a_rich_schema_that_nobody_changed(make_settings: MakeSettings) -> None:
    async with planned(make_settings, RICH_SCHEMA) as (b, source):
        assert [each.label for each in await find_changes(b.run, source, b.run.target) or []] == []
        await handover.hand_over(b.run, source)
        await handover.validate_foreign_keys(b.run)
        there = {each.key: each.definition for each in await read_definitions_of_all(b.run.target)}
        here = await read_definitions_of_all(source)
        assert {each.kind for each in here} >= {
            "index",
            "constraint",
            "column",
            "view",
            "function",
            "type",
            *LATE_KINDS,
        }
        # Another version writes a view's text otherwise.
        assert [each.label for each in here if each.kind != "view" and there.get(each.key) != each.definition] == []


async def test_altered_sequences_are_altered_and_set(make_settings: MakeSettings) -> None:
    async with planned(make_settings, SCHEMA) as (b, source):
        await b.source(
            """alter sequence s increment by 50 cache 7 minvalue -5 start 3 cycle; select nextval('s');
               alter sequence small as bigint maxvalue 10000000000; select setval('small', 9000000000)"""
        )
        await handover.set_sequences(b.run, source)
        query = """select relname, seqtypid::regtype::text, seqstart, seqincrement, seqmin, seqmax, seqcache, seqcycle,
                          pg_sequence_last_value(seqrelid) from pg_sequence join pg_class c on c.oid = seqrelid
                   where relnamespace = 'public'::regnamespace order by 1"""
        assert await b.target(query) == await b.source(query)
        assert await b.target("select last_value, is_called from small") == [(9000000000, True)]


async def test_the_look_at_the_target_gives_way_to_a_lane_that_empties_tables_under_views(
    make_settings: MakeSettings,
) -> None:
    """Printing views locks the tables under them, one after the other: beside TRUNCATE of both that is a deadlock (seen)."""
    schema = """create table a (id int primary key); create table b (id int primary key);
                create view v1 as select * from a; create view v2 as select * from b"""
    async with planned(make_settings, schema) as (b, source), b.run.target_session("drift") as target:
        await b.source(
            "create or replace view v1 as select *, 1 as one from a; create or replace view v2 as select *, 1 as one from b"
        )
        lane = await asyncpg.connect(b.settings.target_uri())
        watcher = await asyncpg.connect(b.settings.target_uri())
        await lane.execute("begin; truncate b")
        looking = asyncio.ensure_future(name_changes(b.run, source, target))

        async def is_waiting() -> bool:
            assert not looking.done(), looking
            query = "select exists (select from pg_locks where pid = $1 and not granted)"
            return bool(await watcher.fetchval(query, target.get_server_pid()))

        await wait_for(is_waiting)
        await lane.execute("truncate a")
        await looking
        assert not [each for each in b.observer.warnings if "changed on the source" in each]

        asking = asyncio.ensure_future(find_lacking(b.run, source, target))
        await b.observer.until_note("waits for somebody who locks a table on the target")
        assert not asking.done()
        await lane.execute("rollback")
        assert {each.label for each in await asking} == {"view public.v1 was altered", "view public.v2 was altered"}
        await name_changes(b.run, source, target)
        assert [each for each in b.observer.warnings if "view public.v1 was altered" in each]
        await lane.close()
        await watcher.close()
