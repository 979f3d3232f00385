"""What no stream tells, of tables that are copied once more for it: DDL that gives rows new values, and rows that come back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from live_migration.coordinator import drift
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute
from tests.support.workload import differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

REWRITTEN = """
    create table early (id int primary key, v int);
    create table altered (id int primary key, v int);
    create table added (id int primary key, v int);
    create table parts (id int primary key, v int) partition by range (id);
    create table parts_1 partition of parts for values from (0) to (50);
    create table parts_2 partition of parts for values from (50) to (1000);
    create table moved (id int primary key, v int);
    create table emptied (id int primary key, v int);
    create table compared (id int primary key, v int);
"""
TABLES = ("early", "altered", "added", "parts", "moved", "emptied", "compared")
ANEW = "was written anew on the source"


def named(migration: Migration) -> set[str]:
    """Give the tables that were said to be written anew."""
    return {warning.split(" ")[0] for warning in migration.observer.warnings if ANEW in warning}


async def assert_equal(migration: Migration, tables: tuple[str, ...]) -> None:
    assert not differences(*[await read_rows(uri, tables) for uri in (migration.source, migration.target)])


async def test_tables_that_ddl_gives_new_values_are_copied_once_more(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drift, "_INTERVAL_SECONDS", 0.5)
    await execute(source_database, REWRITTEN)
    for table in TABLES:
        await execute(source_database, f"insert into {table} select i, i from generate_series(1, 99) i")
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path)
    migration.start_coordinator()
    migration.producer.start()
    try:
        await migration.until_phase("copy")
        await execute(source_database, "alter table early alter v type int using v + 1")  # the copy sees it
        for consumer in migration.consumers:
            consumer.start()
        await migration.until_phase("replay")
        await execute(
            source_database,
            "alter table altered alter v type int using v + 1",
            "alter table added add w float default random()",
            "alter table parts alter v type int using v * 2",
            "vacuum full moved",
            "cluster moved using moved_pkey",
            "truncate emptied",
            "alter table compared alter v set default 7",
            "insert into altered values (100, 100)",
            "insert into parts values (100, 100)",
        )
        await execute(
            target_database,
            "alter table added add w float default random()",
            "alter table compared alter v set default 7",
        )
        async with asyncio.timeout(30):
            while len(named(migration)) < 4:
                migration.raise_failures()
                await asyncio.sleep(0.05)
        await migration.finish()
    finally:
        await migration.__aexit__()
    assert named(migration) == {"public.altered", "public.added", "public.parts_1", "public.parts_2"}
    await assert_equal(migration, TABLES)


async def test_a_table_that_is_written_anew_at_the_last_moment_is_copied_once_more(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The watch looks once a minute: what it has not come to is found behind the last barrier."""
    await execute(
        source_database, "create table altered (id int primary key, v int)", "insert into altered values (1, 1)"
    )
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await execute(source_database, "alter table altered alter v type int using v + 1")
        await migration.finish()
    assert named(migration) == {"public.altered"}
    await assert_equal(migration, ("altered",))


@pytest.mark.parametrize(
    "make",
    [
        "create table coded (id int, code text unique)",
        "create table coded (id int, code text primary key); alter table coded replica identity nothing",
    ],
)
async def test_a_value_that_comes_back_in_a_table_without_identity_stops_no_lane(
    make: str, source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await execute(source_database, make, "create table other (id int primary key)")
    await execute(source_database, "insert into coded values (1, 'a'), (2, 'b'), (3, 'c')")
    source = await asyncpg.connect(source_database)
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path, partitions=1)
    async with migration:
        await migration.until_phase("replay")
        await source.execute("delete from coded where id = 1; insert into coded values (4, 'a'), (5, 'e')")
        await source.execute("update coded set code = 'f' where id = 2; insert into coded values (6, 'b')")
        await source.execute("insert into other values (1)")
        await migration.until("the lane goes on", "select exists (select from other)", timeout=60)
        told = await migration.until(
            "the table is named", "select message from _live_migration.events where message like '%stands in the way%'"
        )
        assert "public.coded" in told
        assert "code=a" in told
        assert "copied once more" in told
        async with asyncio.timeout(30):
            while not any("public.coded has no replica identity" in each for each in migration.observer.warnings):
                migration.raise_failures()
                await asyncio.sleep(0.05)
        await migration.finish()
    await assert_equal(migration, ("coded", "other"))
    await source.close()
