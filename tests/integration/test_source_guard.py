"""What could harm the source or lose its rows while the change log is prepared: identities, slots, open transactions."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.postgres import connect
from live_migration.common.settings import Settings, load_settings
from live_migration.coordinator import planning
from live_migration.coordinator.conductor import conduct
from live_migration.producer.publication import tables_without_identity
from live_migration.producer.slot import await_older_transactions
from tests.e2e.migration import RecordingObserver
from tests.fixtures.fix_postgres import DatabaseFactory, PostgresFactory

pytestmark = pytest.mark.integration

CREATE_SLOT = """
import asyncio, sys
from live_migration.producer.slot import create_slot
asyncio.run(create_slot(sys.argv[1], sys.argv[2], timeout=60, on_wait=lambda note: print(note, flush=True)))
"""
GENERATED_KEYS = """
    create table by_key (a int, g int generated always as (a * 2) stored, v int, primary key (g));
    create table by_index (a int, g int generated always as (a * 2) stored not null, v int);
    create unique index by_index_g on by_index (a, g);
    alter table by_index alter a set not null, replica identity using index by_index_g;
"""


async def fetch(uri: str, query: str, *arguments: object) -> Any:
    connection = await asyncpg.connect(uri)
    try:
        return await connection.fetchval(query, *arguments)
    finally:
        await connection.close()


def settings_for(source: str, target: str, kafka: str, name: str, folder: Path, **options: object) -> Settings:
    given = {"source": source, "target": target, "kafka": kafka, "name": name, "dir": folder, "workers": False}
    return load_settings({**given, "lock_timeout": 0.5, "partitions": 2, **options})


async def test_waiting_for_older_transactions_sees_the_newest_one(source_database: str) -> None:
    writer, watcher = await asyncpg.connect(source_database), await connect(source_database, "source")
    await writer.execute("create table t (id int)")
    await writer.execute("begin; insert into t values (1)")  # no later xid ends while it runs
    waiting = asyncio.ensure_future(
        await_older_transactions(watcher, timeout=30, on_wait=lambda note: None, what="the test")
    )
    done, _ = await asyncio.wait([waiting], timeout=0.5)
    assert not done, "a transaction that runs is not waited for"
    await writer.execute("commit")
    await waiting
    await writer.close()
    await watcher.close()


async def test_a_killed_program_leaves_no_slot_behind(
    source_database: str, unique_name: str, source_server: LocalPostgres
) -> None:
    writer = await asyncpg.connect(source_database)
    await writer.execute("create table t (id int)")
    await writer.execute("begin; insert into t values (1)")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CREATE_SLOT, source_database, unique_name, stdout=asyncio.subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    assert b"waits for open transactions" in await process.stdout.readline()
    process.kill()
    await process.wait()
    left = "select count(*) from pg_stat_activity where application_name = 'live-migration slot' and datname = current_database()"
    async with asyncio.timeout(30):
        while await fetch(source_database, left):
            await asyncio.sleep(0.1)
    await writer.execute("commit")
    assert not await fetch(
        source_database, "select count(*) from pg_replication_slots where slot_name = $1", unique_name
    )
    await writer.close()


@pytest.mark.parametrize("version", [15, 18])
async def test_a_key_with_a_generated_column_is_no_identity(
    version: int,
    postgres_server: PostgresFactory,
    fresh_database: DatabaseFactory,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    source = await fresh_database(postgres_server(version))
    connection = await asyncpg.connect(source)
    await connection.execute(GENERATED_KEYS)
    settings = settings_for(source, target_database, kafka_bootstrap, unique_name, tmp_path)
    observer, stop = RecordingObserver(), asyncio.Event()
    conducting = asyncio.ensure_future(conduct(settings, stop=stop, ask_cutover=asyncio.Event(), observer=observer))
    await _until(conducting, source, "select true from pg_replication_slots where slot_name = $1", unique_name)
    for table in ("by_key", "by_index"):
        await connection.execute(f"insert into {table} (a, v) values (1, 1), (2, 2)")
        assert await connection.execute(f"update {table} set v = 3 where a = 1") == "UPDATE 1"
        assert await connection.execute(f"delete from {table} where a = 2") == "DELETE 1"
    members = "select array_agg(tablename::text order by tablename desc) from pg_publication_tables where pubname = $1"
    assert await fetch(source, members, settings.insert_publication) == ["by_key", "by_index"]
    # Should they be in the first publication for a moment, they are moved.
    await connection.execute(f"alter publication {settings.insert_publication} drop table by_key")
    await connection.execute(f"alter publication {settings.publication} add table by_key")
    refuses = version * 10_000 >= planning.GENERATED_IN_FULL
    lost = await tables_without_identity(connection, settings.publication, refuses_generated=refuses)
    assert [str(table.name) for table in lost] == ["public.by_key"]
    stop.set()
    await conducting
    await connection.close()


async def test_a_table_that_loses_its_identity_while_the_slot_is_made_is_written_to(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    settings = settings_for(source_database, target_database, kafka_bootstrap, unique_name, tmp_path)
    writer, other = await asyncpg.connect(source_database), await asyncpg.connect(source_database)
    await writer.execute(
        "create table t (id int primary key, v int); insert into t values (1, 1); create table u (id int)"
    )
    await other.execute("begin; insert into u values (1)")
    observer, stop = RecordingObserver(), asyncio.Event()
    conducting = asyncio.ensure_future(conduct(settings, stop=stop, ask_cutover=asyncio.Event(), observer=observer))
    waiting = "select true from pg_stat_activity where application_name = 'live-migration slot'"
    await _until(conducting, source_database, waiting)
    await writer.execute("alter table t drop constraint t_pkey")
    async with asyncio.timeout(10):
        while True:
            try:
                await writer.execute("update t set v = v + 1")
                break
            except asyncpg.ObjectNotInPrerequisiteStateError:
                await asyncio.sleep(0.1)
    await other.execute("commit")
    stop.set()
    await conducting
    await writer.close()
    await other.close()


async def test_time_outs_of_role_and_database_do_not_hold_for_our_sessions(source_database: str) -> None:
    name = source_database.rsplit("/", 1)[1]
    timeouts = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout"]
    timeouts += ["transaction_timeout"]
    for timeout in timeouts:
        await fetch(source_database, f"alter database {name} set {timeout} = '90s'")
    connection = await connect(source_database, "source")
    for timeout in timeouts:
        assert await connection.fetchval(f"show {timeout}") == "0", timeout
    # A host that dies must not leave its sessions on the server for hours, with their locks and snapshots.
    assert await connection.fetchval("show tcp_keepalives_idle") != "7200"
    await connection.close()


async def _until(conducting: asyncio.Future[None], uri: str, query: str, *arguments: object) -> None:
    async with asyncio.timeout(60):
        while not await fetch(uri, query, *arguments):
            if conducting.done():
                await conducting
            await asyncio.sleep(0.05)
