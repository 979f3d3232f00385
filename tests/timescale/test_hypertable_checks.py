"""What the checks refuse is what TimescaleDB refuses, and what they pass it takes."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.coordinator.hypertable_checks import assess_specs, skipped_oids
from live_migration.coordinator.hypertable_gaps import read_target
from live_migration.coordinator.hypertable_skips import Skips
from live_migration.coordinator.hypertable_spec import definition_of, parse_spec
from live_migration.coordinator.hypertable_sql import Target, hypertable_statements
from live_migration.coordinator.hypertable_tables import Table, read_tables
from tests.fixtures.fix_postgres import Server
from tests.fixtures.fix_timescale import timescale_database

TRIGGER = "create function f() returns trigger language plpgsql as 'begin return new; end'"
T = "create table t (id int not null, ts timestamptz not null, d int)"
SPEC = "public.t:ts,1 day"
CASES = {
    "plain": (SPEC, [T]),
    "space": (SPEC + ",d,4", [T]),
    "odd names": (
        '"O dd"."T.""a:,b":"Ti,me",6 hours,"d\'é",3',
        ['create schema "O dd"', """create table "O dd"."T.""a:,b" ("Ti,me" timestamp not null, "d'é" text)"""],
    ),
    "key with it": (SPEC, [T, "alter table t add primary key (id, ts)", "create unique index on t (ts, d) where id > 3"]),
    "primary key": (SPEC, [T, "alter table t add primary key (id)"]),
    "unique index of an expression": (SPEC, [T, "create unique index on t ((ts at time zone 'UTC'), id)"]),
    "unique index that includes it": (SPEC, [T, "create unique index on t (id) include (ts)"]),
    "partial unique index": (SPEC, [T, "create unique index on t (id) where d > 3"]),
    "key without the partition column": (SPEC + ",d,4", [T, "alter table t add unique (id, ts)"]),
    "exclusion": (SPEC, [T, "alter table t add column r int4range, add exclude using gist (r with &&)"]),
    "exclusion with it": (SPEC, [T, "alter table t add exclude using btree (ts with =, id with =)"]),
    "unlogged": (SPEC, [T, "alter table t set unlogged"]),
    "generated": (
        SPEC,
        ["create table t (id int, a timestamp not null, ts timestamp not null generated always as (a) stored)"],
    ),
    "other generated": (SPEC, [T, "alter table t add column g int generated always as (id + 1) stored"]),
    "generated partition column": (SPEC + ",g,2", [T, "alter table t add column g int generated always as (id + 1) stored"]),
    "identity": (SPEC, [T, "alter table t alter id add generated always as identity"]),
    "check": (SPEC, [T, "alter table t add check (id > 0)"]),
    "check that is not inherited": (SPEC, [T, "alter table t add check (id > 0) no inherit"]),
    "rule": (SPEC, [T, "create rule r as on delete to t do instead nothing"]),
    "trigger": (SPEC, [T, TRIGGER, "create trigger g before insert on t for each row execute function f()"]),
    "row trigger with transition table": (
        SPEC,
        [T, TRIGGER, "create trigger g after insert on t referencing new table as n for each row execute function f()"],
    ),
    "statement trigger with transition table": (
        SPEC,
        [T, TRIGGER, "create trigger g after insert on t referencing new table as n for each statement execute function f()"],
    ),
    "partitioned": (SPEC, ["create table t (id int, ts timestamptz not null) partition by range (ts)"]),
    "child": (SPEC, ["create table p (id int, ts timestamptz not null)", "create table t () inherits (p)"]),
    "parent": (SPEC, [T, "create table k () inherits (t)"]),
    "date": ("t:ts,2 days", ["create table t (ts date not null)"]),
    "date in hours": ("t:ts,6 hours", ["create table t (ts date not null)"]),
    "domain": (SPEC, ["create domain dt as timestamptz", "create table t (ts dt not null)"]),
    "text": (SPEC, ["create table t (ts text not null)"]),
    "numeric": ("t:ts,10", ["create table t (ts numeric not null)"]),
    "integer": ("t:ts,1000", ["create table t (ts int not null)"]),
    "smallint": ("t:ts,32767", ["create table t (ts smallint not null)"]),
    "too large for smallint": ("t:ts,32768", ["create table t (ts smallint not null)"]),
    "json to spread by": (SPEC + ",d,2", ["create table t (ts timestamptz not null, d json)"]),
    "jsonb to spread by": (SPEC + ",d,2", ["create table t (ts timestamptz not null, d jsonb)"]),
    "no such column": ("t:no,1 day", [T]),
    "no such table": ("u:ts,1 day", [T]),
}  # fmt: skip


KEYS = """
    select case when k.oid is null then format('drop index %s', i.indexrelid::regclass)
                else format('alter table %s drop constraint %I', i.indrelid::regclass, k.conname) end as drop,
           case when k.oid is null then pg_get_indexdef(i.indexrelid)
                else format('alter table %s add %s', i.indrelid::regclass, pg_get_constraintdef(k.oid)) end as make
    from pg_index i left join pg_constraint k on k.conindid = i.indexrelid and k.contype in ('p', 'u', 'x')
    where (i.indisunique or i.indisexclusion) and i.indrelid = to_regclass('public.t')
"""


async def _refused(connection: asyncpg.Connection, spec: str, tables: tuple[Table, ...], target: Target) -> str | None:
    """Make the hypertable and then its keys, as a migration does; give what TimescaleDB says against it."""
    asked = parse_spec(spec)
    types = {column.name: column.type for table in tables if table.name == asked.name for column in table.columns}
    missing = dict.fromkeys((asked.column, asked.partition_column or ""), "int")
    keys = await connection.fetch(KEYS)
    try:
        for key in keys:
            await connection.execute(key["drop"])
        for statement in hypertable_statements(definition_of(asked, {**missing, **types}), target):
            await connection.execute(statement)
        for key in keys:
            await connection.execute(key["make"])
    except asyncpg.PostgresError as error:
        return str(error)
    return None


async def _check_all(server: Server) -> None:
    async with timescale_database(server) as uri:
        connection = await asyncpg.connect(uri)
        target = await read_target(connection)
        assert target is not None
        try:
            for name, (spec, script) in CASES.items():
                transaction = connection.transaction()
                await transaction.start()
                for statement in script:
                    await connection.execute(statement)
                tables = await read_tables(connection)
                found = assess_specs([parse_spec(spec)], tables, target.version)
                errors = [each.what for each in found if each.level == "error"]
                refused = await _refused(connection, spec, tables, target)
                assert bool(errors) == bool(refused), f"{name}: {errors} {refused}"
                assert all(each.hint for each in found), name
                await transaction.rollback()
        finally:
            await connection.close()


async def test_checks_and_server_agree(timescale_target: Server) -> None:
    await _check_all(timescale_target)


async def test_checks_and_another_version_agree(other_timescale: Server) -> None:
    await _check_all(other_timescale)


REFERENCES = {
    "from a plain table": ("alter table r add constraint f foreign key (id, ts) references t (id, ts)", False),
    "from itself": ("alter table t add constraint f foreign key (id, ts) references t (id, ts)", True),
    "from another hypertable": ("alter table h add constraint f foreign key (id, ts) references t (id, ts)", True),
    "to a plain table": ("alter table t add constraint f foreign key (pid) references p (id)", False),
    "by a key that it cannot have": ("alter table r add constraint f foreign key (id) references t (id)", True),
}


@pytest.mark.parametrize("name", REFERENCES)
async def test_foreign_keys(timescale_target_database: str, name: str) -> None:
    """They are made when the table is a hypertable already."""
    statement, is_refused = REFERENCES[name]
    connection = await asyncpg.connect(timescale_target_database)
    try:
        for script in (
            "create table p (id int primary key)",
            "create table t (id int not null, ts timestamptz not null, pid int, unique (id, ts), constraint only_id unique (id))",
            "create table r (id int not null, ts timestamptz not null)",
            "create table h (id int not null, ts timestamptz not null)",
            statement,
        ):
            await connection.execute(script)
        specs = [parse_spec("t:ts,1 day"), parse_spec("h:ts,1 day")]
        tables = await read_tables(connection)
        target = await read_target(connection)
        assert target is not None
        found = assess_specs(specs, tables, target.version)
        assert [each.level for each in found] == ["error"] * (1 + is_refused)
        assert "only_id" in found[0].what
        left_out = assess_specs(specs, tables, target.version, skips=Skips(everything=True))
        assert [each.level for each in left_out] == ["warning"] * len(found)
        objects = skipped_oids(specs, tables, target.version, Skips(everything=True))
        key = await connection.fetchrow("select oid, conindid from pg_constraint where conname = 'only_id'")
        reference = await connection.fetchrow(
            "select oid, conrelid::regclass::text as table from pg_constraint where conname = 'f'"
        )
        assert objects == {*key, *([reference["oid"]] if is_refused else [])}

        await connection.execute(f"alter table {reference['table']} drop constraint f")
        await connection.execute("alter table t drop constraint only_id")
        for spec in specs:
            assert await _refused(connection, str(spec), tables, target) is None
        if is_refused:
            with pytest.raises(asyncpg.PostgresError):
                await connection.execute(statement)
        else:
            await connection.execute(statement)
    finally:
        await connection.close()
