"""`verify` against real servers: it is silent on equal content and finds each kind of difference."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common.errors import SourceError
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.settings import Settings, load_settings
from live_migration.coordinator.verify import Report, Verdict, verify
from tests.fixtures.fix_postgres import execute

pytestmark = pytest.mark.integration

SCHEMA = """
    create schema odd;
    create type odd.mood as enum ('sad', 'happy');
    create type odd.pair as (x int, y text);
    create table odd.values (
        id int, j json, p point, c odd.pair, m odd.mood[], b bytea, f float8, n numeric, t timestamptz, x xid,
        twice int generated always as (id * 2) stored);
    create table odd."zero columns" ();
    create table odd."Größe ""x"" 名" ("a b" text, "t" int, "T" int);
    create table odd.equal_rows (n numeric);
    create table odd.root (id int primary key, v text) partition by range (id);
    create table odd.leaf partition of odd.root for values from (0) to (1000);
    create unlogged table odd.unlogged (id int);
    create sequence odd.counter;
    insert into odd.values (id, j, p, c, m, b, f, n, t, x) values
        (1, '{"a":  1}', '(1,2)', '(1,"a,b")', '{sad,NULL}', '\\x00ff', '-0', '1.0', 'infinity', '7'),
        (2, null, null, null, '{}', '', 'nan', 'nan', '-infinity', null), (3, '[]', null, '(,)', null, null, 0, 1.00, now(), null);
    insert into odd."zero columns" default values;
    insert into odd."zero columns" default values;
    insert into odd."Größe ""x"" 名" values ('ü', 1, 2), (E'\\n', null, null);
    insert into odd.equal_rows values (1.0), (1.0), (2);
    insert into odd.root select i, 'v' || i from generate_series(0, 99) i;
    select nextval('odd.counter');
"""


@pytest.fixture
def settings(source_database: str, target_database: str) -> Settings:
    return load_settings({"source": source_database, "target": target_database})


async def fill(settings: Settings) -> None:
    """Make the same content on both sides, the target's rows in another physical order and its columns too."""
    await execute(settings.source_uri(), SCHEMA)
    await execute(settings.target_uri(), SCHEMA, "update odd.root set v = v where id < 50", "vacuum full odd.root")
    connection = await asyncpg.connect(settings.source_uri())
    at = await connection.fetchval("select t::text from odd.values where id = 3")
    await connection.close()
    await execute(settings.target_uri(), f"update odd.values set t = '{at}' where id = 3")


def only_difference(report: Report) -> tuple[str, str, Verdict]:
    (difference,) = report.differences
    return difference.kind, difference.name, difference.verdict


async def test_equal_databases_are_equal(settings: Settings) -> None:
    await fill(settings)
    report = await verify(settings)
    assert report.is_equal, report.differences
    assert {result.name for result in report.results} == {
        "odd.values",
        "odd.zero columns",
        'odd.Größe "x" 名',
        "odd.equal_rows",
        "odd.leaf",
        "odd.unlogged",
        "odd.counter",
    }
    assert {r.name: r.source_rows for r in report.results}["odd.leaf"] == 100


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("delete from odd.root where id = 7", "odd.leaf"),
        ("update odd.root set v = 'other' where id = 7", "odd.leaf"),
        ("insert into odd.equal_rows values (1.0)", "odd.equal_rows"),
        ("update odd.equal_rows set n = 1.00 where ctid = '(0,1)'", "odd.equal_rows"),
        ("update odd.values set f = '0' where id = 1", "odd.values"),
        ("update odd.values set j = '{\"a\": 1}' where id = 1", "odd.values"),
        ("update odd.values set b = '\\x00fe' where id = 1", "odd.values"),
        ("update odd.values set b = null where id = 2", "odd.values"),
        ("update odd.values set m = '{sad}' where id = 1", "odd.values"),
        ('insert into odd."zero columns" default values', "odd.zero columns"),
        ("insert into odd.unlogged values (1)", "odd.unlogged"),
    ],
)
async def test_one_other_row_is_found(settings: Settings, statement: str, table: str) -> None:
    await fill(settings)
    await execute(settings.target_uri(), statement)
    assert only_difference(await verify(settings)) == ("table", table, Verdict.DIFFERENT)


async def test_row_that_stands_twice_instead_of_another_is_found(settings: Settings) -> None:
    await fill(settings)
    await execute(settings.target_uri(), "update odd.equal_rows set n = 2 where ctid = '(0,1)'")
    (difference,) = (await verify(settings)).differences
    assert (difference.source_rows, difference.target_rows) == (3, 3)
    assert difference.detail == "same number of rows, other content"


@pytest.mark.parametrize(
    ("side", "statement", "expected"),
    [
        ("source", "drop table odd.unlogged", ("table", "odd.unlogged", Verdict.MISSING_ON_SOURCE)),
        ("target", "drop table odd.unlogged", ("table", "odd.unlogged", Verdict.MISSING_ON_TARGET)),
        ("target", "alter sequence odd.counter increment by 5", ("sequence", "odd.counter", Verdict.DIFFERENT)),
        ("target", "drop sequence odd.counter", ("sequence", "odd.counter", Verdict.MISSING_ON_TARGET)),
        ("target", "select nextval('odd.counter')", ("sequence", "odd.counter", Verdict.DIFFERENT)),
        ("target", "select setval('odd.counter', 1, false)", ("sequence", "odd.counter", Verdict.DIFFERENT)),
        ("target", "alter table odd.unlogged rename id to other", ("table", "odd.unlogged", Verdict.DIFFERENT)),
        ("target", "alter table odd.unlogged add more int", ("table", "odd.unlogged", Verdict.DIFFERENT)),
        ("target", "select lo_from_bytea(0, 'x')", ("large objects", "all", Verdict.DIFFERENT)),
    ],
)
async def test_what_stands_on_one_side_only_is_found(
    settings: Settings, side: str, statement: str, expected: tuple[str, str, Verdict]
) -> None:
    await fill(settings)
    await execute(settings.source_uri() if side == "source" else settings.target_uri(), statement)
    assert only_difference(await verify(settings)) == expected


async def test_columns_in_another_order_are_equal(settings: Settings) -> None:
    await execute(settings.source_uri(), "create table t (a int, b int); insert into t values (1, 2)")
    await execute(settings.target_uri(), "create table t (b int, a int); insert into t values (2, 1)")
    assert (await verify(settings)).is_equal


async def test_table_that_cannot_be_read_is_not_called_equal(settings: Settings) -> None:
    for uri in (settings.source_uri(), settings.target_uri()):
        await execute(
            uri, "create table t (a int, b int generated always as (1 / a) virtual)", "insert into t values (0)"
        )
        await execute(uri, "create table other (a int)")
    report = await verify(settings)
    (difference,) = report.differences
    assert difference.verdict is Verdict.FAILED
    assert "division by zero" in difference.detail
    assert not report.is_equal


async def test_locked_table_ends_the_comparison_instead_of_waiting_for_ever(settings: Settings) -> None:
    await execute(settings.source_uri(), "create table t (a int)")
    blocker = await asyncpg.connect(settings.source_uri())
    try:
        await blocker.execute("begin; lock table t in access exclusive mode")
        with pytest.raises(SourceError, match="lock timeout"):
            await verify(settings.model_copy(update={"lock_timeout": 0.1}))
    finally:
        await blocker.close()


async def test_databases_of_two_encodings_are_compared_by_their_characters(
    source_server: LocalPostgres, target_database: str, unique_name: str
) -> None:
    await execute(source_server.uri(), f"create database {unique_name} template template0 encoding latin1 locale 'C'")
    try:
        for uri in (source_server.uri(unique_name), target_database):
            await execute(uri, "create table t (a text)", "insert into t values ('ü')")
        settings = load_settings({"source": source_server.uri(unique_name), "target": target_database})
        report = await verify(settings)
        assert [result.verdict for result in report.results] == [Verdict.EQUAL]
    finally:
        await execute(source_server.uri(), f"drop database {unique_name} with (force)")
