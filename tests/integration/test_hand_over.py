"""What the schema's second part holds that the target cannot make, or makes at another time: nothing of it may stop the hand-over."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import asyncpg
import pytest

from live_migration.common.errors import TargetError
from live_migration.common.local_postgres import LocalPostgres
from live_migration.coordinator import handover
from live_migration.coordinator.entries import run_entries
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.schema import read_post_data, restore_schema
from tests.fixtures.fix_postgres import DatabaseFactory, PostgresFactory, execute
from tests.integration.test_conductor import Bench, MakeSettings, bench, fetch, make_settings, stand_in_for_consumers

__all__ = ["make_settings"]

pytestmark = pytest.mark.integration


async def hand_over(b: Bench) -> None:
    """Go through all phases as the coordinator does, but for the stream."""
    await prepare(b.run)
    await restore_schema(b.run)
    await stand_in_for_consumers(b.settings)
    post_data = await read_post_data(b.run)
    await run_entries(b.run, "partitioned indexes", post_data.partitioned)
    async with b.run.source_session("test") as source:
        await handover.hand_over(b.run, source)
    await handover.validate_foreign_keys(b.run)


async def test_unlogged_partitions_have_their_indexes_before_those_of_the_root_are_put_together(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings()
    await fetch(
        settings.source_uri(),
        """create table m (id int, v int, primary key (id)) partition by list (id);
           create table m1 partition of m for values in (1);
           create unlogged table m2 partition of m for values in (2);
           create table m3 partition of m for values in (3, 4) partition by list (id);
           create unlogged table m3a partition of m3 for values in (3);
           create index m_v on m (v); create index own on m2 (v desc);
           alter table m2 replica identity using index m2_pkey;
           insert into m values (2, 2), (3, 3)""",
    )
    async with bench(settings) as b:
        await hand_over(b)
        indexes = """select i.indexrelid::regclass::text, h.inhparent::regclass::text, i.indisvalid, i.indisreplident
                     from pg_index i left join pg_inherits h on h.inhrelid = i.indexrelid
                     where i.indrelid::regclass::text ~ '^m' order by 1"""
        assert await b.target(indexes) == await b.source(indexes)
        assert await b.target("select id, v from m order by 1") == [(2, 2), (3, 3)]


@pytest.mark.parametrize("version", [17, 18])
async def test_a_foreign_key_that_does_not_hold_is_named_and_ends_nothing(
    version: int, make_settings: MakeSettings, postgres_server: PostgresFactory, fresh_database: DatabaseFactory
) -> None:
    """One of a partitioned table cannot be added unvalidated before 18."""
    server = postgres_server(version)
    settings = make_settings(source=await fresh_database(server), target=await fresh_database(server))
    await fetch(
        settings.source_uri(),
        """create table p (id int primary key);
           create table c (id int, p int constraint orphans references p) partition by hash (id);
           create table c1 partition of c for values with (modulus 1, remainder 0);
           create table d (id int, p int constraint sound references p) partition by hash (id);
           create table d1 partition of d for values with (modulus 1, remainder 0);
           comment on constraint orphans on c is 'orphans'; comment on constraint sound on d is 'sound'""",
    )
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await stand_in_for_consumers(b.settings)
        await b.target("insert into c values (1, 7)")
        await handover.add_foreign_keys(b.run)
        await run_entries(b.run, "post-data last", (await read_post_data(b.run)).last)
        await handover.validate_foreign_keys(b.run)
        assert await b.target("select name, state from _live_migration.foreign_keys order by 1") == [
            ("orphans", "failed"),
            ("sound", "valid"),
        ]
        (warning,) = [line for line in b.observer.warnings if "violate a foreign key" in line]
        assert "orphans" in warning
        assert "violate" in warning


async def test_foreign_keys_are_made_as_the_source_has_them_by_then(make_settings: MakeSettings) -> None:
    """Columns and keys that got other names: the plan's statements name what is not there any more."""
    settings = make_settings()
    await fetch(
        settings.source_uri(),
        """create table p (id int primary key, code int constraint codes unique);
           create table t (id int primary key, w int constraint to_p references p, c int constraint to_code references p (code),
                           old int, gone int constraint dropped references p);
           alter table t add constraint late foreign key (old) references p not valid;
           insert into p values (1, 1); insert into t values (1, 1, 1, 1, 1)""",
    )
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await stand_in_for_consumers(b.settings)
        changes = "alter table t rename w to parent; alter table p rename code to key"
        await b.source(changes)
        await b.target(changes)
        await b.source(
            "alter table t rename constraint to_code to to_key; alter table t validate constraint late; alter table t drop constraint dropped"
        )
        async with b.run.source_session("test") as source:
            await handover.hand_over(b.run, source)
        await handover.validate_foreign_keys(b.run)
        keys = "select conname, convalidated, pg_get_constraintdef(oid) from pg_constraint where contype = 'f' and connamespace = 'public'::regnamespace order by 1"
        assert await b.target(keys) == await b.source(keys)
        assert [row[:2] for row in await b.target(keys)] == [("late", True), ("to_key", True), ("to_p", True)]


async def test_what_names_something_that_the_target_lacks_is_named_and_left_out(make_settings: MakeSettings) -> None:
    """Altered on the target alone: behind the last barrier users wait, and nothing of it may end the hand-over."""
    settings = make_settings()
    await fetch(
        settings.source_uri(),
        """create table p (id int primary key); create table t (id int primary key, w int references p);
           create publication of_column for table t (id, w); create publication of_table for table p;
           create policy only_few on t using (w < 100); insert into p values (1)""",
    )
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await stand_in_for_consumers(b.settings)
        await b.target("alter table t rename w to parent")
        async with b.run.source_session("test") as source:
            await handover.hand_over(b.run, source)
        await handover.validate_foreign_keys(b.run)
        assert await b.target("select tablename from pg_publication_tables order by 1") == [("p",)]
        assert await b.target("select name, state from _live_migration.foreign_keys") == [("t_w_fkey", "failed")]
        said = [line for line in b.observer.warnings if "not restored" in line or "left out" in line]
        assert [word for word in ("t_w_fkey", "of_column", "only_few") if not any(word in line for line in said)] == []
        assert len(said) == 3
        assert [line for line in said if "ADD CONSTRAINT t_w_fkey" in line or "CREATE POLICY only_few" in line]


async def test_what_was_made_on_the_source_after_the_last_look_is_named_and_ends_nothing(
    make_settings: MakeSettings,
) -> None:
    """Sequences and unlogged tables, which no stream carries; the rest of them comes over."""
    settings = make_settings()
    await fetch(
        settings.source_uri(),
        """create table t (id int primary key); create sequence early; create unlogged table known (id int, v int);
           insert into known values (1, 2)""",
    )
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await stand_in_for_consumers(b.settings)
        await b.source(
            """create sequence late; create unlogged table staging (id int); create unlogged table wide (); alter table known add more text;
               alter table known alter v type real; insert into known values (3, 4, 'x'); select setval('early', 7)"""
        )
        async with b.run.source_session("test") as source:
            await handover.hand_over(b.run, source)
        await handover.validate_foreign_keys(b.run)
        assert await b.target("select last_value, is_called from early") == [(7, True)]
        assert await b.target("select id, v from known order by id") == [(1, 2), (3, 4)]
        for said in (
            "sequences that the target has not are left out: public.late",
            "table public.staging",
            "table public.wide",
        ):
            assert len([line for line in b.observer.warnings if said in line]) == 1
        assert any("columns more of public.known" in line for line in b.observer.warnings)


async def test_a_table_with_rows_is_never_emptied_for_a_part_of_its_columns(make_settings: MakeSettings) -> None:
    """One without identity, altered on the source right behind the last look: types are the target's own, names must be there."""
    settings = make_settings()
    await fetch(
        settings.source_uri(), "create table t (id int, v int not null, w varchar(3)); insert into t values (1, 2, 'x')"
    )
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await stand_in_for_consumers(b.settings)
        await b.target("insert into t values (7, 7, 'old'); update _live_migration.tables set copy_again = true")
        await b.source("alter table t alter v type bigint, alter w type text; alter table t rename id to ident")
        async with b.run.source_session("test") as source:
            with pytest.raises(TargetError, match="lacks its columns ident"):
                await handover.hand_over(b.run, source)
            assert await b.target("select * from t") == [(7, 7, "old")]
            await b.target("alter table t rename id to ident")
            await handover.hand_over(b.run, source)
        assert await b.target("select * from t") == [(1, 2, "x")]


@pytest.fixture
async def target_role(target_server: LocalPostgres, target_database: str) -> AsyncIterator[str]:
    """A role on the target that owns the database and is no superuser."""
    name = f"r_{secrets.token_hex(6)}"
    await execute(
        target_database,
        f"create role {name} login",
        f"alter database {target_database.rsplit('/', 1)[1]} owner to {name}",
        f"alter schema public owner to {name}",
    )
    yield name
    await execute(target_database, f"reassign owned by {name} to postgres; drop owned by {name}; drop role {name}")


async def test_what_only_a_superuser_can_make_is_named_and_left_out(
    make_settings: MakeSettings, target_database: str, target_role: str
) -> None:
    settings = make_settings(target=target_database.replace("postgres@", f"{target_role}@"))
    source = await asyncpg.connect(settings.source_uri())
    for statement in (
        "create schema app",
        "create table app.t (id int primary key)",
        "create publication of_all for all tables",
        "create publication of_schema for tables in schema app",
        "create publication of_table for table app.t",
        "comment on publication of_all is 'all'",
        "create function et() returns event_trigger language plpgsql as 'begin end'",
        "create event trigger et on ddl_command_end execute function et()",
        "comment on event trigger et is 'et'",
    ):
        await source.execute(statement)
    await source.close()
    async with bench(settings) as b:
        await hand_over(b)
        assert await b.target("select pubname from pg_publication order by 1") == [("of_schema",), ("of_table",)]
        assert await b.target("select pubname from pg_publication_tables") == [("of_table",)]
        assert await b.target("select evtname from pg_event_trigger") == []
        left_out = sorted(line.split(" is not restored: ")[0] for line in b.observer.warnings if "not restored" in line)
    assert left_out == [
        "comment EVENT TRIGGER et",
        "comment PUBLICATION of_all",
        "event trigger et",
        "publication of_all",
        "publication tables in schema app.of_schema app",
    ]
