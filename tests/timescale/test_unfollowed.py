"""What no stream tells of chunks: rows changed without an identity where statistics were discarded, new values given by DDL."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from live_migration.common.catalog import list_tables
from live_migration.common.rewriting import find_rewrite
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

TABLES = """
    create table bare (at timestamptz not null, v int);
    create table keyed (at timestamptz not null, id int, v int, primary key (at, id));
    select create_hypertable('bare', 'at', chunk_time_interval => interval '1 day');
    select create_hypertable('keyed', 'at', chunk_time_interval => interval '1 day');
"""
ROWS = """
    insert into bare select '{0}'::timestamptz + i * interval '1 minute', i from generate_series(1, 100) i;
    insert into keyed select '{0}'::timestamptz + i * interval '1 minute', i, i from generate_series(1, 100) i;
"""
COUNTED = "select coalesce(sum(n_tup_upd), 0) = $1 from pg_stat_all_tables where relname like '\\_hyper%'"


async def read(uri: str, table: str) -> list[tuple[object, ...]]:
    connection = await asyncpg.connect(uri)
    try:
        return [tuple(row) for row in await connection.fetch(f"select * from {table} order by 1, 2")]
    finally:
        await connection.close()


async def marks(uri: str) -> dict[int, str | None]:
    connection = await asyncpg.connect(uri)
    try:
        return {table.oid: table.file_mark for table in await list_tables(connection)}
    finally:
        await connection.close()


async def test_chunks_that_no_stream_tells_all_of_are_copied_once_more(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = timescale_source_database, target_of_timescale
    await execute(source, TABLES, ROWS.format("2026-01-01"))
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        await execute(source, ROWS.format("2026-01-05"))  # chunks that no plan knows
        await migration.until("the new chunks' rows", "select count(*) = 200 from public.keyed")
        await execute(source, "update bare set v = v + 1000")
        await migration.until("statistics", COUNTED, 200, where="source")
        await execute(source, "select pg_stat_reset()")
        await migration.until("statistics as at the plan", COUNTED, 0, where="source")
        await execute(source, "alter table keyed alter v type int using v + 1")
        await migration.finish()
    for table in ("bare", "keyed"):
        assert await read(target, table) == await read(source, table), table


async def test_a_chunk_whose_rows_are_moved_is_not_written_anew(timescale_source_database: str) -> None:
    source = timescale_source_database
    await execute(source, TABLES, ROWS.format("2026-01-01"))
    await execute(source, "alter table keyed set (timescaledb.compress, timescaledb.compress_segmentby = 'id')")
    before = await marks(source)
    for statement in (
        "select compress_chunk(c) from show_chunks('keyed') c",
        ROWS.format("2026-01-01 00:00:30"),
        "select compress_chunk(c, recompress => true) from show_chunks('keyed') c",
        "select decompress_chunk(c) from show_chunks('keyed') c",
        "vacuum full keyed",
    ):
        await execute(source, statement)
        now = await marks(source)
        assert not [oid for oid in before.keys() & now if find_rewrite(before[oid], now[oid])], statement
