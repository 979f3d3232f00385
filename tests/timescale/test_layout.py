"""Which relations are parts of hypertables, as a real TimescaleDB has them."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import Layout, read_layout, read_version
from tests.fixtures.fix_postgres import Server
from tests.fixtures.fix_timescale import timescale_database
from tests.support.recorded_catalog import COLUMNS, record

SCHEMA = """
    create schema store;
    create table metrics (time timestamptz not null, device int not null, v float8 check (v > -1), primary key (device, time));
    select create_hypertable('metrics', 'time', chunk_time_interval => interval '1 day',
                             associated_schema_name => 'store', associated_table_prefix => 'm');
    alter table metrics set (timescaledb.compress, timescaledb.compress_segmentby = 'device');
    insert into metrics select t, d, 1 from generate_series('2026-01-01'::timestamptz, '2026-01-03 23:00', '1 hour') t, generate_series(1, 3) d;
    select compress_chunk(c) from show_chunks('metrics', older_than => '2026-01-02'::timestamptz) c;
    create table hashed (at int not null, k int not null);
    select create_hypertable('hashed', 'at', partitioning_column => 'k', number_partitions => 2, chunk_time_interval => 10);
    insert into hashed select g, g from generate_series(1, 40) g;
    create table nullable (at int not null, k text, j int);
    select create_hypertable('nullable', 'at', partitioning_column => 'k', number_partitions => 3, chunk_time_interval => 20);
    select add_dimension('nullable', 'j', number_partitions => 2);
    insert into nullable select g, nullif('k' || g % 7, 'k0'), nullif(g % 5, 0) from generate_series(1, 400) g;
    create function own_hash(value anyelement) returns int language sql immutable as 'select coalesce(value::int, 5)';
    create table own (at int not null, k int);
    select create_hypertable('own', 'at', partitioning_column => 'k', number_partitions => 2, chunk_time_interval => 20,
                             partitioning_func => 'own_hash');
    insert into own select g, case g % 3 when 0 then 2000000000 when 1 then 7 end from generate_series(1, 40) g;
    create table plain (id int primary key);
"""
"""In `nullable` values of either hashed column are missing; so they are in `own`, whose function gives a hash for none."""
AGGREGATE = """
    create materialized view hourly with (timescaledb.continuous) as
    select time_bucket('1 hour', time) as hour, device, sum(v) as v from metrics group by 1, 2 with no data
"""


async def _prepare(uri: str) -> tuple[Layout, asyncpg.Connection]:
    connection = await asyncpg.connect(uri)
    await connection.execute(SCHEMA)
    await connection.execute(AGGREGATE)
    await connection.execute("call refresh_continuous_aggregate('hourly', null, null)")
    layout = await read_layout(connection)
    assert layout is not None
    return layout, connection


async def _check(uri: str) -> None:
    layout, connection = await _prepare(uri)
    try:
        roots = {str(each.name): each for each in layout.hypertables.values()}
        assert {"public.metrics", "public.hashed"} < roots.keys()
        (materialization,) = (each for each in layout.hypertables.values() if each.view)
        assert materialization.view == QualifiedName("public", "hourly")
        assert roots["public.metrics"].time_column == "time"
        chunks = [c for c in layout.chunks.values() if c.hypertable == roots["public.metrics"].oid]
        assert {c.name.schema for c in chunks} == {"store"}
        assert len(chunks) == 3
        assert sum(c.compressed is not None for c in chunks) == 1
        for chunk in layout.chunks.values():
            root = layout.hypertables[chunk.hypertable].name.sql
            here, there = (
                await connection.fetchval(f"select count(*) from {chunk.name.sql}"),
                await connection.fetchval(f"select count(*) from {root} where {chunk.range}"),
            )
            assert here == there > 0
            own = await connection.fetchval(f"select count(*) from {chunk.name.sql} where {chunk.range}")
            assert own == here
        for compressed, chunk_oid in layout.compressed.items():
            assert layout.is_internal(compressed)
            assert layout.hypertable_of(compressed) == layout.hypertable_of(chunk_oid) == roots["public.metrics"]
        plain = await connection.fetchval("select 'plain'::regclass::oid")
        assert layout.hypertable_of(plain) is None
        # whatever is no hypertable, chunk or compressed table is a table of the user's
        unknown = await connection.fetch(
            """select c.oid, c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
               where c.relkind = 'r' and n.nspname in ('_timescaledb_internal', 'store', 'public')
                 and not exists (select from pg_depend d where d.objid = c.oid and d.deptype = 'e')"""
        )
        assert [
            r["relname"] for r in unknown if not layout.hypertable_of(r["oid"]) and not layout.is_internal(r["oid"])
        ] == ["plain"]
    finally:
        await connection.close()


async def test_parts_of_hypertables(timescale_source_database: str) -> None:
    await _check(timescale_source_database)


async def test_parts_of_hypertables_of_another_version(other_timescale: Server) -> None:
    async with timescale_database(other_timescale) as uri:
        await _check(uri)


async def _check_columns(uri: str) -> None:
    connection = await asyncpg.connect(uri)
    try:
        version = await read_version(connection)
        if version not in COLUMNS:
            pytest.skip(f"the columns of TimescaleDB {version} are not recorded")
        assert await record(connection) == COLUMNS[version]
    finally:
        await connection.close()


async def test_its_catalog_has_the_recorded_columns(timescale_source_database: str) -> None:
    """What `test_catalog_queries` has our queries run against."""
    await _check_columns(timescale_source_database)


async def test_the_catalog_of_another_version_has_the_recorded_columns(other_timescale: Server) -> None:
    async with timescale_database(other_timescale) as uri:
        await _check_columns(uri)


async def test_a_database_without_it(source_database: str) -> None:
    connection = await asyncpg.connect(source_database)
    try:
        assert await read_layout(connection) is None
    finally:
        await connection.close()
