"""Rules of the end: no writer between the two barriers, and nothing that constrains lanes before the last."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from tests.e2e.migration import Migration
from tests.support.workload import differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SCHEMA = """
    create table parent (id bigint generated always as identity primary key, name text);
    create table child (id serial primary key, parent bigint not null references parent);
    insert into parent (name) select 'p' || i from generate_series(1, 100) i;
    insert into child (parent) select id from parent;
"""
FOREIGN_KEYS = "select count(*) from pg_constraint where contype = 'f' and connamespace = 'public'::regnamespace"


async def until_said(migration: Migration, kind: str, text: str) -> str:
    async with asyncio.timeout(60):
        while True:
            migration.raise_failures()
            if found := [line for line in getattr(migration.observer, kind) if text in line]:
                return str(found[0])
            assert migration.coordinator
            assert not migration.coordinator.done(), f"the migration ended without {text!r}"
            await asyncio.sleep(0.02)


async def test_a_write_between_the_barriers_is_found_although_every_lane_stood_at_the_first(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """One transaction, open while the lanes reach the first barrier and ended before the second is written."""
    source, watcher = await asyncpg.connect(source_database), await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    last_query = "select query_start from pg_stat_activity where datname = current_database() and application_name = 'live-migration cutover'"
    async with Migration(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, consumers=1
    ) as migration:
        await migration.until_phase("replay")
        await migration.consumers[0].crash()
        migration.ask_cutover.set()
        await until_said(migration, "notes", "the first barrier is in the WAL")
        waiting_since = await watcher.fetchval(last_query)
        await source.execute("begin; insert into parent (name) values ('between')")
        migration.consumers[0].start()
        # the coordinator asks the source nothing before it has seen every lane at the first barrier
        looks_again = f"select ({last_query}) > $1"
        await migration.until("the lanes are at the first barrier", looks_again, waiting_since, where="source")
        await source.execute("commit")
        warning = await until_said(migration, "warnings", "no cutover")
        assert "public.parent between the two barriers" in warning
        await migration.until_phase("replay")
        await migration.finish()
    tables = ("parent", "child")
    assert not differences(await read_rows(source_database, tables), await read_rows(target_database, tables))
    await source.close()
    await watcher.close()


async def test_foreign_keys_come_after_the_last_barrier(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Lanes are apart from one another: a parent's TRUNCATE may come before its child's."""
    source, target = await asyncpg.connect(source_database), await asyncpg.connect(target_database)
    await source.execute(SCHEMA)
    async with Migration(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, partitions=8
    ) as migration:
        await migration.until_phase("replay")
        assert await target.fetchval(FOREIGN_KEYS) == 0
        await source.execute("""
            truncate parent cascade;
            insert into parent (name) select 'q' || i from generate_series(1, 50) i;
            insert into child (parent) select id from parent;
        """)
        await migration.until("the lanes go on", "select count(*) = 50 from public.child")
        assert await target.fetchval(FOREIGN_KEYS) == 0
        await migration.finish()
    assert await target.fetchval(f"{FOREIGN_KEYS} and convalidated") == 1
    tables = ("parent", "child")
    assert not differences(await read_rows(source_database, tables), await read_rows(target_database, tables))
    for query in ("select last_value, is_called from parent_id_seq", "select last_value, is_called from child_id_seq"):
        assert await target.fetch(query) == await source.fetch(query)
    await source.close()
    await target.close()
