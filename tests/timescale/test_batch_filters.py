"""Bloom filters of compressed batches that come over as they are: what is hashed with an oid in it is another value on the target."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import Server, database, execute
from tests.fixtures.fix_timescale import timescale_database

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_MAKE = """
    create type mood as enum ('sad', 'ok', 'happy');
    create domain moods as mood[];
    create table orders (time timestamptz not null, device int not null, status mood not null, was moods, code uuid, v int,
                         primary key (time, device, status));
    select create_hypertable('orders', 'time', chunk_time_interval => interval '1 day');
    create index on orders (status);
    create index on orders (was);
    create index on orders (code);
    create index on orders (device, status);
    alter table orders set (timescaledb.compress, timescaledb.compress_segmentby = '', timescaledb.compress_orderby = 'time');
    insert into orders select t, d, mood, array[mood]::moods, md5(mood::text)::uuid, d
        from generate_series('2026-01-02'::timestamptz, '2026-01-03 23:00', '1 hour') t, generate_series(1, 6) d,
             lateral (select (array['sad', 'ok'])[1 + d % 2]::mood) m (mood);
    insert into orders select t, 2, 'happy', '{happy}', md5('happy')::uuid, 7
        from generate_series('2026-01-02'::timestamptz, '2026-01-03 23:00', '1 hour') t;
"""
_OIDS = "select oid from pg_enum order by 1"
_LABELS = ("sad", "ok", "happy")
_FILTERS = """
    select a.attname::text from pg_attribute a join pg_class c on c.oid = a.attrelid
    where format_type(a.atttypid, null) = '_timescaledb_internal.bloom1' and c.relnamespace = '_timescaledb_internal'::regnamespace
      and c.reltuples <> 0 group by 1 order by 1
"""
_KEY = "'2026-01-02 05:00+00', 2, 'happy', '{happy}', md5('happy')::uuid"
_UPSERT = f"insert into orders values ({_KEY}, 100) on conflict (time, device, status) do update set v = excluded.v"


async def test_what_is_asked_by_an_enum_is_found_in_compressed_batches(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await _migrate(timescale_source_database, target_of_timescale, kafka_bootstrap, unique_name, tmp_path)


async def test_what_is_asked_by_an_enum_is_found_on_another_version(
    other_timescale: Server, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    async with timescale_database(other_timescale) as source, database(other_timescale) as target:
        await _migrate(source, target, kafka_bootstrap, unique_name, tmp_path)


async def _migrate(source: str, target: str, kafka: str, name: str, folder: Path) -> None:
    await execute(source, _MAKE, "select compress_chunk(c) from show_chunks('orders') c")
    async with Migration(source, target, kafka, name, folder, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await migration.finish()
    ours, theirs = await asyncpg.connect(source), await asyncpg.connect(target)
    try:
        assert await theirs.fetch(_OIDS) != await ours.fetch(_OIDS)
        assert await ours.fetch(_FILTERS) == await theirs.fetch(_FILTERS) != []
        assert await _filled(ours) >= await _filled(theirs) >= {"_ts_meta_v2_bloomh_code"}
        for query in _queries():
            assert await theirs.fetchval(query) == await ours.fetchval(query), query
        for statement in ("delete from orders where status = 'happy'", _UPSERT):
            assert await _tried(theirs, statement) == await _tried(ours, statement), statement
    finally:
        await ours.close()
        await theirs.close()


def _queries() -> list[str]:
    conditions = [
        f"{each} = {value}"
        for label in _LABELS
        for each, value in (("status", f"'{label}'"), ("was", f"'{{{label}}}'"), ("code", f"md5('{label}')::uuid"))
    ]
    return [
        f"select count(*) from orders where {condition}" for condition in [*conditions, "device = 2 and status = 'ok'"]
    ]


async def _filled(connection: asyncpg.Connection) -> set[str]:
    """Give the filters that any batch has."""
    tables = await connection.fetch(
        "select distinct format('%I.%I', n.nspname, c.relname) from pg_attribute a join pg_class c on c.oid = a.attrelid"
        " join pg_namespace n on n.oid = c.relnamespace where c.relkind = 'r' and format_type(a.atttypid, null) = '_timescaledb_internal.bloom1'"
    )
    filters = {row[0] for row in await connection.fetch(_FILTERS)}
    return {
        name for row in tables for name in filters if await connection.fetchval(f'select count("{name}") from {row[0]}')
    }


async def _tried(connection: asyncpg.Connection, statement: str) -> tuple[str, int, int]:
    """Give what a statement does, and what the table holds then; undo it."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        status = await connection.execute(statement)
        found = "select count(*), count(*) filter (where v = 100) from orders"
        rows, upserted = await connection.fetchrow(found)
        return status, rows, upserted
    finally:
        await transaction.rollback()
