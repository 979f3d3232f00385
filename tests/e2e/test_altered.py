"""DDL on the source that writes no file anew: a column that holds more than the target's, a name that comes to mean
another column, a type that takes the place of another; and columns that the target computes itself."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest

from live_migration.coordinator import drift
from live_migration.coordinator.cutover import CutoverRefused
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute
from tests.support.workload import differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

WIDER = {  # table -> type before, type afterwards, value that only the type afterwards holds
    "amount": ("numeric(10,2)", "numeric", "1.2345"),
    "scaled": ("numeric(10,2)", "numeric(12,4)", "1.2345"),
    "moment": ("timestamptz(0)", "timestamptz", "'2026-01-01 00:00:00.123456Z'"),
    "span": ("interval(0)", "interval(3)", "'1.234 s'"),
    "name": ("varchar(3)", "varchar(5)", "'ab   '"),
    "amounts": ("numeric(10,2)[]", "numeric[]", "'{1.2345}'"),
    "by_domain": ("cents", "numeric", "1.2345"),
}
STOPPED = "select string_agg(hint, ' ') from _live_migration.checkpoints where error is not null"


async def mend(migration: Migration, mended: set[str]) -> None:
    """Run on the target what the stopped lanes ask for."""
    connection = await asyncpg.connect(migration.target)
    for statement in re.findall(r'ALTER TABLE "public"\.[^;]*;', await connection.fetchval(STOPPED) or ""):
        if statement not in mended:
            await connection.execute(statement)
            mended.add(statement)
    await connection.close()


async def test_no_value_is_rounded_where_the_source_has_come_to_hold_more(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await execute(source_database, "create domain cents as numeric(10,2)")
    for table, (before, _, _) in WIDER.items():
        await execute(source_database, f"create table {table} (id int primary key, v {before})")
        await execute(source_database, f"insert into {table} select i from generate_series(1, 5) i")
    await execute(source_database, "create table early (id int primary key, v numeric(10,2))")
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await execute(target_database, "alter table early alter v type numeric")
        await execute(source_database, "insert into early values (1, 1.23)")
        for table, (_, after, value) in WIDER.items():
            await execute(
                source_database,
                f"alter table {table} alter v type {after}",
                f"insert into {table} values (100, {value})",
                f"update {table} set v = {value} where id = 1",
            )
        await migration.until("a lane stops", STOPPED)
        for consumer in migration.consumers:
            await consumer.crash()
        await execute(target_database, "update _live_migration.checkpoints set error = null, hint = null")
        for consumer in migration.consumers:
            consumer.start()
        mended: set[str] = set()
        async with asyncio.timeout(120):
            while len(mended) < len(WIDER):
                migration.raise_failures()
                await mend(migration, mended)
                await asyncio.sleep(0.1)
        assert any('"amount" ALTER COLUMN "v" TYPE numeric;' in statement for statement in mended)
        await migration.until("the other table's row", "select exists (select from public.early)")
        assert not any('"early"' in statement for statement in mended)
        await execute(source_database, "alter table early alter v type numeric", "insert into early values (2, 1.2345)")
        for table, (_, _, value) in WIDER.items():
            await execute(source_database, f"update {table} set v = {value} where id = 2")
        await migration.finish()
    tables = (*WIDER, "early")
    assert not differences(*[await read_rows(uri, tables) for uri in (migration.source, migration.target)])


EXCHANGED = """
    create table anew (id int primary key, v int, x int);
    create table swapped (id int primary key, a int, b int);
    create table replaced (id int primary key, v int, w int);
    create table quiet (id int primary key, v int);
    create table renamed (id int primary key, a int);
    create table twice (id int primary key, a int);
    create table parts (id int primary key, a int, b int) partition by range (id);
    create table parts_1 partition of parts for values from (0) to (1000);
"""
EXCHANGED_TABLES = {
    "anew": "i, i",
    "swapped": "i, -i",
    "replaced": "i, -i",
    "quiet": "i",
    "renamed": "i",
    "twice": "i",
    "parts": "i, -i",
}
NOTED = "select file_mark like $1 from _live_migration.tables where table_name = 'twice'"


async def test_a_table_in_which_a_name_comes_to_mean_another_column_is_copied_once_more(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drift, "_INTERVAL_SECONDS", 0.5)
    await execute(source_database, EXCHANGED)
    for table, values in EXCHANGED_TABLES.items():
        await execute(source_database, f"insert into {table} select i, {values} from generate_series(1, 5) i")
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await execute(
            source_database,
            "alter table anew drop v; alter table anew add v int default 0",
            "alter table swapped rename a to tmp; alter table swapped rename b to a; alter table swapped rename tmp to b",
            "alter table replaced drop v; alter table replaced rename w to v",
            "alter table quiet drop v; alter table quiet add v int default 7",
            "alter table renamed rename a to z",
            "alter table twice rename a to z",
            "alter table parts rename a to tmp; alter table parts rename b to a; alter table parts rename tmp to b",
            "insert into anew values (100, 1, 2)",
            "insert into swapped values (100, 1, 2)",
            "insert into replaced values (100, 1)",
            "insert into renamed values (100, 1)",
            "insert into parts values (100, 1, 2)",
        )
        await execute(target_database, "alter table renamed rename a to z", "alter table replaced drop w")
        await execute(target_database, "alter table twice rename a to z")
        await migration.until("the name is noted", NOTED, f"%:{b'z'.hex()}%")
        await execute(source_database, "alter table twice drop z", "alter table twice add z int default 7")
        expected = {f"public.{table}" for table in ("anew", "swapped", "replaced", "quiet", "twice", "parts_1")}
        async with asyncio.timeout(60):
            while exchanged(migration) != expected:
                migration.raise_failures()
                await asyncio.sleep(0.05)
        defaults = {"anew": "v set default 0", "quiet": "v set default 7", "twice": "z set default 7"}
        await execute(target_database, *(f"alter table {table} alter {what}" for table, what in defaults.items()))
        await migration.finish()
    assert exchanged(migration) == expected
    read = [await by_name(uri) for uri in (migration.source, migration.target)]
    assert read[0] == read[1]


def exchanged(migration: Migration) -> set[str]:
    """Give the tables that were said to be copied once more for their columns' names."""
    return {
        warning.split(" ")[0] for warning in migration.observer.warnings if "that others had the names of" in warning
    }


async def by_name(uri: str) -> dict[str, list[str]]:
    """Give the tables' rows, whatever the order of their columns."""
    connection = await asyncpg.connect(uri)
    try:
        return {
            table: [row[0] for row in await connection.fetch(f"select to_jsonb(t)::text from {table} t order by id")]
            for table in EXCHANGED_TABLES
        }
    finally:
        await connection.close()


ZONED = """
    create domain cents as numeric(10,2);
    create domain precise as numeric;
    create table zone (id int primary key, v timestamp);
    create table back (id int primary key, v timestamptz);
    create table told (id int primary key, v timestamp);
    create table domains (id int primary key, v cents);
    insert into zone select i, '2026-01-01 00:00:00' from generate_series(1, 5) i;
    insert into back select i, '2026-07-01 00:00:00Z' from generate_series(1, 5) i;
    insert into told select i, '2026-01-01 00:00:00' from generate_series(1, 5) i;
    insert into domains select i, i from generate_series(1, 5) i;
"""
IN_BERLIN = """
    do $$begin execute format('alter database %I set timezone = ''Europe/Berlin''', current_database()); end$$
"""
TOLD = """ALTER TABLE "public"."told" ALTER COLUMN "v" TYPE timestamp with time zone USING "v" AT TIME ZONE 'UTC';"""


async def test_a_type_that_goes_by_the_sessions_zone_or_is_a_domain_is_copied_once_more(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drift, "_INTERVAL_SECONDS", 0.5)
    await execute(source_database, ZONED)
    await execute(target_database, IN_BERLIN)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await execute(
            source_database,
            "set timezone = 'UTC'; alter table zone alter v type timestamptz",
            "set timezone = 'UTC'; alter table back alter v type timestamp",
            "set timezone = 'UTC'; alter table told alter v type timestamptz",
            "alter table domains alter v type precise",
            "insert into domains values (100, 1.2345)",
            "insert into told values (100, '2026-07-01 00:00:00Z')",
        )
        await execute(
            target_database, "alter table zone alter v type timestamptz", "alter table back alter v type timestamp"
        )
        await migration.until("the lane stops", STOPPED)
        mended: set[str] = set()
        await mend(migration, mended)
        assert mended == {TOLD}
        await migration.until("the lane goes on", "select exists (select from public.told where id = 100)")
        assert await in_utc(migration.target, "told") == await in_utc(migration.source, "told")
        async with asyncio.timeout(60):
            while len(retyped(migration)) < 4:
                migration.raise_failures()
                await asyncio.sleep(0.05)
        await migration.until("the row is rounded", "select exists (select from public.domains where v = 1.23)")
        await execute(target_database, "alter table domains alter v type precise")
        await migration.finish()
    assert retyped(migration) == {"public.zone", "public.back", "public.told", "public.domains"}
    for table in ("zone", "back", "told", "domains"):
        assert await in_utc(migration.target, table) == await in_utc(migration.source, table), table


def retyped(migration: Migration) -> set[str]:
    """Give the tables that were said to be copied once more for a column's type."""
    return {warning.split(" ")[0] for warning in migration.observer.warnings if "whose type was altered" in warning}


async def in_utc(uri: str, table: str) -> list[str]:
    """Give a table's rows as a session in UTC sees them."""
    connection = await asyncpg.connect(uri, server_settings={"timezone": "UTC"})
    try:
        return [row[0] for row in await connection.fetch(f"select to_jsonb(t)::text from {table} t order by id")]
    finally:
        await connection.close()


async def test_a_generated_column_that_is_computed_otherwise_is_to_be_mended_before_the_cutover(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await execute(
        source_database,
        "create table sums (id int primary key, v int, g int generated always as (v + 1) stored)",
        "create table mended (id int primary key, v text, g bool generated always as (v in ('a', 'b')) stored)",
        "insert into sums select i, i from generate_series(1, 5) i",
        "insert into mended select i, 'a' from generate_series(1, 5) i",
    )
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        anew = "alter table mended drop g, add g bool generated always as (v in ('b', 'c')) stored"
        await execute(
            source_database,
            "alter table sums drop g, add g int generated always as (v + 100) stored",
            anew,
            "insert into sums values (100, 1)",
            "insert into mended values (100, 'c')",
        )
        await execute(target_database, anew)
        with pytest.raises(CutoverRefused) as refused:
            await migration.finish()
        assert re.findall("ALTER TABLE .*;", refused.value.message) == [
            'ALTER TABLE "public"."sums" ALTER COLUMN "g" SET EXPRESSION AS ((v + 100));'
        ]
        await execute(target_database, *re.findall("ALTER TABLE .*;", refused.value.message))
        migration.start_coordinator()
        await migration.finish()
    tables = ("sums", "mended")
    assert not differences(*[await read_rows(uri, tables) for uri in (migration.source, migration.target)])
