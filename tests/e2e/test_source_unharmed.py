"""The source's own statements succeed during the migration (where they do not: docs/delivery.md), and each table is followed or named."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from live_migration.common.errors import LiveMigrationError
from live_migration.common.local_postgres import LocalPostgres
from live_migration.coordinator import statistics
from live_migration.coordinator.clean import clean
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import SETTINGS, execute
from tests.support.copying import fetch_value
from tests.support.crashing import crash, kept_server
from tests.support.workload import differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SCHEMA = """
create schema app;
create table app.with_key (id int primary key, v int);
create table app.deferrable_key (id int, v int, primary key (id) deferrable initially deferred);
create table app.unique_identity (id int not null unique, v int);
alter table app.unique_identity replica identity using index unique_identity_id_key;
create table app.full_identity (id int, v int);
alter table app.full_identity replica identity full;
create table app.full_generated (id int, v int, w int generated always as (id * 2) stored);
alter table app.full_generated replica identity full;
create table app.no_identity (id int, v int);
create table app.nothing_identity (id int primary key, v int);
alter table app.nothing_identity replica identity nothing;
create table app.parts_key (id int, v int, primary key (id)) partition by range (id);
create table app.parts_key_1 partition of app.parts_key for values from (0) to (1000);
create table app.parts_none (id int, v int) partition by range (id);
create table app.parts_none_1 partition of app.parts_none for values from (0) to (1000);
"""
LEAVES = [
    "with_key",
    "deferrable_key",
    "unique_identity",
    "full_identity",
    "full_generated",
    "no_identity",
    "nothing_identity",
    "parts_key_1",
    "parts_none_1",
]
FOLLOWED = tuple(f"app.{t}" for t in ("with_key", "unique_identity", "full_identity", "parts_key_1"))
INSERT_ONLY = ("deferrable_key", "no_identity", "nothing_identity", "parts_none_1")
CHANGED_ROWS = """
    select count(*) filter (where n_tup_upd >= 2 and n_tup_del >= 2) = $1
    from pg_stat_user_tables join pg_class c on c.oid = relid where schemaname = 'app' and c.relkind = 'r'
"""
WRITTEN = [t.removesuffix("_1") for t in LEAVES]


async def _write(connection: asyncpg.Connection, number: int, tables: list[str]) -> None:
    for table in tables:
        await connection.execute(f"insert into app.{table} (id, v) values ({number}, 1), ({number + 1}, 1)")
        await connection.execute(f"update app.{table} set v = v + 1 where id = {number}")
        await connection.execute(f"delete from app.{table} where id = {number + 1}")


async def test_updates_and_deletes_succeed_on_every_kind_of_table(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    await _write(source, 0, WRITTEN)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until(
            "publication", "select 1 from pg_publication where pubname = $1", unique_name, where="source"
        )
        await _write(source, 10, WRITTEN)
        await migration.until_phase("replay")
        await _write(source, 20, WRITTEN)
        await source.execute("create table app.newcomer (id int primary key, v int)")
        await source.execute("create table app.newcomer_no_key (id int, v int)")
        await source.execute("create table app.parts_key_2 partition of app.parts_key for values from (1000) to (2000)")
        await source.execute(
            "create table app.parts_none_2 partition of app.parts_none for values from (1000) to (2000)"
        )
        await _write(source, 1500, ["parts_key", "parts_none", "newcomer", "newcomer_no_key"])
        await source.execute("alter table app.with_key drop constraint with_key_pkey")
        await migration.until(
            "the table that lost its identity leaves the publication",
            "select not exists (select from pg_publication_tables where pubname = $1 and tablename = 'with_key')",
            unique_name,
            where="source",
            timeout=15,
        )
        await _write(source, 30, WRITTEN)
        with pytest.raises(LiveMigrationError) as refused:
            await migration.finish()
        warnings = "\n".join(migration.observer.warnings) + str(refused.value)
        for table in (*INSERT_ONLY, "newcomer_no_key", "parts_key_2", "parts_none_2", "with_key"):
            assert table in warnings, f"{table} is neither followed nor named: {warnings}"
    await source.close()


async def test_every_table_arrives_whole_those_without_identity_by_a_second_copy(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    await _write(source, 0, WRITTEN)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await _write(source, 10, WRITTEN)
        # what was updated or deleted in tables without identity is known from the statistics, which sessions hand in when they end
        await source.close()
        await migration.until("statistics", CHANGED_ROWS, len(WRITTEN), where="source")
        await migration.finish()
    everything = tuple(f"app.{table}" for table in WRITTEN)
    found = differences(await read_rows(source_database, everything), await read_rows(target_database, everything))
    assert not found
    warnings = [each for each in migration.observer.warnings if "were updated or deleted on the source" in each]
    assert any("app.no_identity" in warning for warning in warnings)


async def test_tables_get_full_identity_on_request_and_clean_gives_it_back(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    await _write(source, 0, WRITTEN)
    identities = "select relname, relreplident::text from pg_class where relnamespace = 'app'::regnamespace order by 1"
    before = await source.fetch(identities)
    async with Migration(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, replica_identity_full=True
    ) as migration:
        await migration.until_phase("replay")
        await _write(source, 10, WRITTEN)
        await migration.finish()
    followed = (*FOLLOWED, *(f"app.{table}" for table in INSERT_ONLY))
    found = differences(await read_rows(source_database, followed), await read_rows(target_database, followed))
    assert not found
    await clean(migration.settings, prune=False, note=print)
    assert await source.fetch(identities) == before
    await source.close()


UNFOLLOWED = """
create schema app;
create table app.touched (id int, v int);
insert into app.touched select i, 0 from generate_series(1, 100) i;
"""
CHANGE = "update app.touched set v = 1 where id = 1; delete from app.touched where id = 2; insert into app.touched values (101, 0)"
COUNTED = "select n_tup_upd + n_tup_del = $1 from pg_stat_user_tables where relname = 'touched'"


async def assert_copied_once_more(migration: Migration) -> None:
    """Finish, and compare the table that has no identity."""
    await migration.finish()
    found = differences(*[await read_rows(uri, ("app.touched",)) for uri in (migration.source, migration.target)])
    assert not found
    assert [w for w in migration.observer.warnings if "rows of app.touched" in w and "copied once more" in w]


async def test_a_table_without_identity_is_copied_once_more_after_a_crash_of_the_source(
    target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The crash takes the only sign that rows were changed."""
    async with LocalPostgres(settings=SETTINGS) as server:
        await execute(server.uri(), UNFOLLOWED)
        async with Migration(server.uri(), target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
            await migration.until_phase("replay")
            await execute(server.uri(), CHANGE)
            await migration.until("statistics", COUNTED, 2, where="source")
            await crash(server.uri())
            await migration.until("statistics without what was changed", COUNTED, 0, where="source")
            await assert_copied_once_more(migration)


@pytest.mark.parametrize(
    ("reset", "before"), [("pg_stat_reset()", 0), ("pg_stat_reset_single_table_counters('app.touched'::regclass)", 2)]
)
async def test_a_table_without_identity_is_copied_once_more_after_its_statistics_were_reset(
    reset: str,
    before: int,
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """What is counted at the end is what was counted at the plan."""
    await execute(source_database, UNFOLLOWED)
    if before:
        await execute(source_database, CHANGE)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until("statistics", COUNTED, before, where="source")
        await migration.until_phase("replay")
        if not before:
            await execute(source_database, CHANGE)
            await migration.until("statistics", COUNTED, 2, where="source")
        await execute(source_database, f"select {reset}")
        if before:
            await execute(source_database, "update app.touched set v = 2 where id in (3, 4)")
        await migration.until("statistics as at the plan", COUNTED, before, where="source")
        await assert_copied_once_more(migration)


async def test_a_change_that_its_session_reports_late_is_waited_for(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await execute(source_database, UNFOLLOWED)
    source = await asyncpg.connect(source_database)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await source.execute("select pg_stat_force_next_flush()")  # the next but one is 10 s later
        await source.execute(CHANGE)
        assert not await fetch_value(source_database, COUNTED, 2)
        await assert_copied_once_more(migration)
    await source.close()


async def test_a_change_that_its_session_does_not_report_is_taken_for_granted(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A session hands in nothing while a transaction of its own is open."""
    monkeypatch.setattr(statistics, "_MOST_SECONDS", 2.0)
    await execute(source_database, UNFOLLOWED)
    source = await asyncpg.connect(source_database)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await source.execute("select pg_stat_force_next_flush()")
        await source.execute(CHANGE)
        await source.execute("begin; select 1")
        await assert_copied_once_more(migration)
        assert not await fetch_value(source_database, COUNTED, 2)
    assert any("idle in transaction" in warning for warning in migration.observer.warnings)
    await source.close()


async def test_a_table_that_was_not_touched_is_not_copied_once_more_although_the_source_was_restarted(
    target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    async with kept_server(18) as server:
        await execute(server.uri(), UNFOLLOWED)
        async with Migration(server.uri(), target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
            await migration.until_phase("replay")
            await server.stop()
            await server.start()
            await migration.finish()
        assert not [each for each in migration.observer.warnings if "rows of app.touched" in each]
