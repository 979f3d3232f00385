"""The cutover: what it waits for, what it refuses, and what it brings that is not in the stream."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.coordinator import cutover, schema
from live_migration.coordinator.clean import clean
from live_migration.coordinator.conductor import conduct
from live_migration.coordinator.cutover import CutoverRefused, request_cutover
from live_migration.coordinator.schema import FolderError
from tests.e2e.migration import Migration, RecordingObserver

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SCHEMA = """
    create table parent (id bigint generated always as identity primary key, name text);
    create table child (id serial primary key, parent bigint not null references parent);
    create unlogged table cache (key text primary key, value text);
    create table no_identity (v int);
    create function bump() returns trigger language plpgsql as 'begin new.name := new.name || ''!''; return new; end';
    create trigger bump before update on parent for each row execute function bump();
    create materialized view names as select name from parent;
    insert into parent (name) select 'p' || i from generate_series(1, 1000) i;
    insert into child (parent) select id from parent;
    insert into cache select 'k' || i, 'v' from generate_series(1, 500) i;
    select lo_from_bytea(0, 'large');
    refresh materialized view names;
"""


async def rows(uri: str, query: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(uri)
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


async def wait_for(migration: Migration, kind: str, text: str) -> str:
    async with asyncio.timeout(60):
        while True:
            migration.raise_failures()
            if found := [line for line in getattr(migration.observer, kind) if text in line]:
                return str(found[0])
            await asyncio.sleep(0.05)


async def test_the_cutover_brings_everything_that_the_stream_does_not_carry(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    async with Migration(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, cutover="auto"
    ) as migration:
        await migration.until_phase("copy", "replay")
        await source.execute("update parent set name = 'changed' where id = 7; insert into cache values ('late', 'v')")
        async with asyncio.timeout(120):
            while not (migration.coordinator and migration.coordinator.done()):
                migration.raise_failures()
                await asyncio.sleep(0.1)
        await migration.coordinator
    await source.execute("refresh materialized view names")  # as the cutover did on the target
    assert not [w for w in migration.observer.warnings if "after the last barrier" in w]
    for query in (
        "select * from parent order by id",
        "select * from child order by id",
        "select * from cache order by key",
        "select * from names order by 1",
        "select last_value, is_called from parent_id_seq",
        "select last_value, is_called from child_id_seq",
        "select oid::int, lo_get(oid) from pg_largeobject_metadata order by 1",
        "select conname::text, convalidated from pg_constraint where contype = 'f' and conname like 'child%'",
        "select tgname::text from pg_trigger where not tgisinternal",
    ):
        there = await rows(target_database, query)
        assert there
        assert there == await rows(source_database, query)
    second = RecordingObserver()
    await conduct(migration.settings, stop=asyncio.Event(), ask_cutover=asyncio.Event(), observer=second)
    assert "done already" in second.notes[-1]
    await clean(migration.settings, prune=True, note=print)
    assert not await rows(target_database, "select 1 from pg_namespace where nspname = '_live_migration'")
    await source.close()


async def test_a_source_that_is_written_to_goes_back_to_replay_and_says_who_writes(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database, server_settings={"application_name": "web shop"})
    await source.execute(SCHEMA)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        is_writing = True

        async def write() -> None:
            while is_writing:
                await source.execute("insert into parent (name) values ('busy')")

        async with asyncio.TaskGroup() as group:
            group.create_task(write())
            await request_cutover(migration.settings)
            warning = await wait_for(migration, "warnings", "no cutover")
            is_writing = False
        assert "web shop" in warning
        await migration.until_phase("replay")
        await migration.finish()
    query = "select count(*) from parent"
    assert await rows(target_database, query) == await rows(source_database, query)
    await source.close()


async def test_an_open_or_prepared_transaction_and_a_table_that_cannot_be_brought_are_named(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await source.execute("begin")
        await source.execute("insert into parent (name) values ('prepared')")
        await source.execute(f"prepare transaction '{unique_name}'")
        migration.ask_cutover.set()
        warning = await wait_for(migration, "warnings", "no cutover")
        assert unique_name in warning
        await source.execute(f"commit prepared '{unique_name}'")
        await source.execute("create type mood as enum ('good'); create table newcomer (id int primary key, m mood)")
        await source.execute("alter table child rename to kid")
        with pytest.raises(CutoverRefused, match=r"public\.newcomer cannot be brought.*mood") as refused:
            await migration.finish()
        assert "renamed on the source: public.child to public.kid" in refused.value.message
        assert await rows(target_database, "select phase from _live_migration.migration") == [("replay",)]
        await source.execute("drop table newcomer; drop type mood; alter table kid rename to child")
        migration.start_coordinator()
        await migration.finish()
    query = "select * from parent order by id"
    assert await rows(target_database, query) == await rows(source_database, query)
    await source.close()


async def test_a_full_disk_refuses_the_cutover_before_the_barrier_and_is_not_written_to_behind_it(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    await rows(source_database, "create table t (id int primary key)")
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path)
    async with migration:
        await migration.until_phase("replay")
        with monkeypatch.context() as full:
            full.setattr(schema, "private_folder", is_full)
            with pytest.raises(FolderError, match="No space left") as refused:
                await migration.finish()
            assert "--dir" in refused.value.hint
        assert await rows(target_database, "select phase from _live_migration.migration") == [("replay",)]
        prove = cutover._prove_everything_arrived

        async def prove_and_fill(*arguments: Any) -> None:
            await prove(*arguments)
            monkeypatch.setattr(schema, "private_folder", is_full)

        monkeypatch.setattr(cutover, "_prove_everything_arrived", prove_and_fill)
        migration.start_coordinator()
        await migration.finish()
        assert await rows(target_database, "select phase from _live_migration.migration") == [("done",)]
