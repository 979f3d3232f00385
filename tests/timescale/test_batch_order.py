"""Compressed batches whose bounds are of text, on a target that orders text otherwise; and batches that hold oids."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.settings import load_settings
from live_migration.coordinator.findings import Finding
from live_migration.coordinator.preflight import validate
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import Server, execute
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_MAKE = """
    create table notes (time timestamptz not null, word text not null, b text collate "C", v int, primary key (time, word));
    select create_hypertable('notes', 'time', chunk_time_interval => interval '1 day');
    alter table notes set (timescaledb.compress, timescaledb.compress_segmentby = '', timescaledb.compress_orderby = 'word, time');
    create table plain (time timestamptz not null, word text not null, v int, primary key (time, word));
    select create_hypertable('plain', 'time', chunk_time_interval => interval '1 day');
    alter table plain set (timescaledb.compress, timescaledb.compress_segmentby = 'word', timescaledb.compress_orderby = 'time');
"""
_FILL = """
    insert into notes select t, word, word, 1 from generate_series('2026-01-02'::timestamptz, '2026-01-03 23:00', '1 hour') t, unnest($1::text[]) word;
"""
_WORDS = ("ю", "б", "ц", "а")
"""In KOI8-R the first has the least byte of them all, in UTF-8 the greatest code point."""
_UPSERT = "insert into notes values ('2026-01-02 05:00+00', 'ю', 'x') on conflict (time, word) do update set v = 100"
_COMPRESSED = "select hypertable_name, range_start, is_compressed from timescaledb_information.chunks order by 1, 2"


@asynccontextmanager
async def _database_in(server: Server, encoding: str, name: str) -> AsyncIterator[str]:
    """Make a database of an encoding, ordered by bytes, with TimescaleDB."""
    create = f"create database {name} template template0 encoding '{encoding}' lc_collate 'C' lc_ctype 'C' locale_provider libc"
    await execute(server.uri(), create)
    try:
        await execute(server.uri(name), "create extension timescaledb")
        yield server.uri(name)
    finally:
        await execute(server.uri(), f"drop database {name} with (force)")


async def test_what_is_asked_by_text_is_found_under_another_order(
    timescale_source: Server, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    target = target_of_timescale
    async with _database_in(timescale_source, "KOI8R", unique_name) as source:
        await _fill(source)
        named = await _found(source, target)
        assert (
            [each for each in named if "public.notes" in each.what and "public.plain" not in each.what] == named != []
        )
        async with Migration(
            source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
        ) as migration:
            await migration.until_phase("replay", timeout=240)
            await execute(source, "insert into notes values ('2026-01-03 00:30', 'я', 'я', 2)")
            await migration.finish()
        ours, theirs = await asyncpg.connect(source), await asyncpg.connect(target)
        try:
            for word in (*_WORDS, "я", "нет"):
                count = f"select count(*) from notes where word = '{word}'"
                assert await theirs.fetchval(count) == await ours.fetchval(count), word
            for statement in ("delete from notes where word = 'ю'", _UPSERT):
                assert await _tried(theirs, statement) == await _tried(ours, statement), statement
            assert await theirs.fetch(_COMPRESSED) == await ours.fetch(_COMPRESSED)
        finally:
            await ours.close()
            await theirs.close()
        assert await world.differences(source, target, tables=("notes", "plain"), aggregates=()) == []


async def _found(source: str, target: str) -> list[Finding]:
    settings = load_settings(
        {"source": source, "target": target, "name": f"lm_{secrets.token_hex(4)}", "pause_source_jobs": True}
    )
    return [each for each in await validate(settings) if "copied as rows" in each.what]


async def _fill(source: str) -> None:
    connection = await asyncpg.connect(source)
    try:
        await connection.execute(_MAKE)
        await connection.execute(_FILL.replace("$1", f"array{list(_WORDS)}"))
        await connection.execute("insert into plain select time, word, v from notes")
        await connection.execute(
            "select compress_chunk(c) from show_chunks('notes') c; select compress_chunk(c) from show_chunks('plain') c"
        )
    finally:
        await connection.close()


async def _tried(connection: asyncpg.Connection, statement: str) -> tuple[str, int, int]:
    """Give what a statement does, and what the table holds then; undo it."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        status = await connection.execute(statement)
        rows, upserted = await connection.fetchrow("select count(*), count(*) filter (where v = 100) from notes")
        return status, rows, upserted
    finally:
        await transaction.rollback()


_TYPED = """
    create table filler (id int);
    create type mood as enum ('sad');
    create table typed (time timestamptz not null, kind regclass, types regtype[], v int);
    select create_hypertable('typed', 'time', chunk_time_interval => interval '1 day');
    alter table typed set (timescaledb.compress, timescaledb.compress_segmentby = '', timescaledb.compress_orderby = 'time');
    insert into typed select t, 'filler', '{mood,int}', 1 from generate_series('2026-01-02'::timestamptz, '2026-01-03 23:00', '1 hour') t;
"""


async def test_compressed_oids_are_those_of_the_target(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = timescale_source_database, target_of_timescale
    await execute(source, _TYPED, "select compress_chunk(c) from show_chunks('typed') c")
    assert ["hold oids" in each.what for each in await _found(source, target)] == [True]
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await migration.finish()
    assert await world.value(source, "select 'filler'::regclass::oid") != await world.value(
        target, "select 'filler'::regclass::oid"
    )
    assert await world.differences(source, target, tables=("typed",), aggregates=()) == []
    assert await world.value(target, "select bool_and(is_compressed) from timescaledb_information.chunks")
