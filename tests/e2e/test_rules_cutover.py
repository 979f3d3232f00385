"""Rules of the end: no writer between the two barriers, and nothing that constrains lanes before the last."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.common.local_postgres import LocalPostgres
from live_migration.coordinator import cutover
from live_migration.coordinator.barrier import Barrier, emit_barrier
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import DatabaseFactory
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
    last_query = "select query_start from pg_stat_activity where datname = current_database() and application_name like 'live-migration cutover%'"
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


class _WithNeighbour:
    """A session beside which another one commits a row between a barrier's COMMIT and the look at where the WAL ends then."""

    def __init__(self, connection: Any, neighbour: asyncpg.Connection) -> None:
        self._connection, self._neighbour, self._asked = connection, neighbour, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def fetchval(self, query: str) -> Any:
        self._asked += 1
        if self._asked == 2:
            await self._neighbour.execute("insert into t values (1)")
        return await self._connection.fetchval(query)


@pytest.mark.parametrize("is_noticed", [True, False])
async def test_a_write_that_commits_right_behind_the_last_barrier_is_not_taken_for_one_before_it(
    is_noticed: bool,
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it comes too late to be noticed before the hand-over (as if it had), its end does not keep silent."""
    source = await asyncpg.connect(source_database)
    await source.execute("create table t (id int primary key)")
    emitted, looked, is_passed = 0, 0, cutover._is_passed

    async def emit_beside_a_writer(connection: Any, migration_id: str) -> Barrier:
        nonlocal emitted
        emitted += 1
        return await emit_barrier(_WithNeighbour(connection, source) if emitted == 2 else connection, migration_id)

    async def look_late(*arguments: Any) -> bool | None:
        nonlocal looked
        looked += 1
        return await is_passed(*arguments) if is_noticed or looked > 1 else False

    monkeypatch.setattr(cutover, "emit_barrier", emit_beside_a_writer)
    monkeypatch.setattr(cutover, "_is_passed", look_late)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        migration.ask_cutover.set()
        if is_noticed:
            assert "written after the last barrier" in await until_said(migration, "warnings", "no cutover")
        await migration.finish()
    warned = [line for line in migration.observer.warnings if "was written to after the last barrier: it has" in line]
    assert bool(warned) is not is_noticed
    if is_noticed:
        assert not differences(await read_rows(source_database, ["t"]), await read_rows(target_database, ["t"]))
    await source.close()


async def test_a_subscription_of_the_source_is_named_among_those_who_write(
    source_server: LocalPostgres, source_database: str, fresh_database: DatabaseFactory, unique_name: str
) -> None:
    """It writes by a worker of the server's, which is nobody's client."""
    publisher = await asyncpg.connect(await fresh_database(source_server))
    source = await asyncpg.connect(source_database)
    name = unique_name
    await publisher.execute(f"create publication {name}")
    await publisher.execute(f"select pg_create_logical_replication_slot('{name}', 'pgoutput')")
    where = await publisher.fetchval("select current_database()")
    await source.execute(
        f"create subscription {name} connection 'host=127.0.0.1 port={source_server.port} user=postgres dbname={where}' "
        f"publication {name} with (create_slot = false, slot_name = '{name}', copy_data = false)"
    )
    try:
        async with asyncio.timeout(30):
            while "a logical replication" not in (await cutover._busy(source, "")).message:
                await asyncio.sleep(0.05)
    finally:
        await source.execute(f"drop subscription {name}")
        await source.close()
        await publisher.close()
