"""Definitions read from one server, made again on another, and read there: they must be equal as data."""

from __future__ import annotations

import asyncpg

from live_migration.coordinator.hypertable_definitions import Definitions, SparseIndex, decode, encode
from live_migration.coordinator.hypertable_gaps import assess_definitions, read_absent, read_target
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.hypertable_sql import (
    Target,
    aggregate_index_statements,
    aggregate_statements,
    compression_statements,
    hypertable_statements,
    job_statement,
    refresh_statement,
    schedule_statement,
)
from tests.fixtures.fix_postgres import Server, execute
from tests.fixtures.fix_timescale import timescale_database

FUNCTIONS = """
    create schema "Odd Schema";
    create schema store;
    create function "Odd Schema"."no w"() returns bigint language sql stable as 'select 1000::bigint';
    create function "Odd Schema"."no w"(int) returns bigint language sql stable as 'select 1::bigint';
    create function small_now() returns smallint language sql stable as 'select 100::smallint';
    create function public.text_hash(anyelement) returns int language sql immutable as 'select 7';
    create function public.as_time(text) returns timestamptz language sql immutable as 'select ''2026-01-01''::timestamptz';
    create procedure "Odd Schema"."act ion"(job_id int, config jsonb) language plpgsql as 'begin end';
    create procedure "Odd Schema"."act ion"(job_id int) language plpgsql as 'begin end';
    create function "Odd Schema".check_it(config jsonb) returns void language plpgsql as 'begin end';
"""
TABLES = """
    create table metrics (time timestamptz not null, device int not null, v float8, note text, primary key (device, time));
    create index on metrics (time desc);
    create index "by Device" on metrics (device, time desc);
    create table "Odd Schema"."we""ird Ta'ble" ("Ti me" timestamp not null, "dev'ice,1" text not null, "O\\B" int);
    create table ticks (n bigint not null, kind smallint not null, v int);
    create table names (device int primary key, name text);
    create table small (n smallint not null, v int);
    create table days (day date not null, v int);
    create table by_text (at text not null, v int);
    create table four (time timestamptz not null, other timestamptz not null, k int, j text);
"""
HYPERTABLES = """
    select create_hypertable('metrics', by_range('time', interval '1 month'), create_default_indexes => false);
    select add_dimension('metrics', by_hash('device', 4));
    select create_hypertable('"Odd Schema"."we""ird Ta''ble"', 'Ti me', chunk_time_interval => interval '6 hours',
                             associated_schema_name => 'Odd Schema', associated_table_prefix => 'p "x');
    select create_hypertable('ticks', 'n', chunk_time_interval => 1000, create_default_indexes => false,
                             associated_schema_name => 'store', associated_table_prefix => 'tick');
    select set_integer_now_func('ticks', '"Odd Schema"."no w"()'::regprocedure);
    select create_hypertable('small', 'n', chunk_time_interval => 50, create_default_indexes => false);
    select set_integer_now_func('small', 'small_now');
    select create_hypertable('days', 'day', chunk_time_interval => interval '30 days', create_default_indexes => false);
    select create_hypertable('by_text', 'at', chunk_time_interval => interval '3 days', create_default_indexes => false,
                             time_partitioning_func => 'as_time');
    select create_hypertable('four', 'time', chunk_time_interval => interval '1 day', create_default_indexes => false);
    select add_dimension('four', 'other', chunk_time_interval => interval '2 days');
    select add_dimension('four', 'k', number_partitions => 2, partitioning_func => 'text_hash');
    alter table metrics set (timescaledb.compress, timescaledb.compress_segmentby = 'device',
        timescaledb.compress_orderby = 'time desc, v nulls first', timescaledb.compress_chunk_time_interval = '60 days');
    alter table "Odd Schema"."we""ird Ta'ble" set (timescaledb.compress,
        timescaledb.compress_segmentby = '"dev''ice,1"', timescaledb.compress_orderby = '"O\\B" asc, "Ti me"');
    alter table ticks set (timescaledb.compress);
    alter table days set (timescaledb.compress, timescaledb.compress_segmentby = '');
    set timescaledb.enable_chunk_skipping = on;
    select enable_chunk_skipping('metrics', 'device');
"""
AGGREGATES = (
    """create materialized view hourly with (timescaledb.continuous, timescaledb.materialized_only = false) as
       select time_bucket('1 hour', time, 'Europe/Berlin') as hour, device, sum(v) as "S um", count(*) n
       from metrics group by 1, 2 with no data""",
    """create materialized view "Odd Schema"."a daily" with (timescaledb.continuous, timescaledb.materialized_only = true) as
       select time_bucket('1 day', hour, 'Europe/Berlin') as "Da y", device, sum("S um") as s from hourly
       group by 1, 2 with no data""",
    """create materialized view monthly with (timescaledb.continuous) as
       select time_bucket('1 month', m.time, origin => '2001-02-01'::timestamptz) as month, n.name,
              first(v, time), count(*) filter (where v > 1) as big
       from metrics m join names n on n.device = m.device where v is not null group by 1, 2 having count(*) > 0 with no data""",
    """create materialized view tick_counts with (timescaledb.continuous, timescaledb.create_group_indexes = false) as
       select time_bucket(100, n) as bucket, kind, max(v) from ticks group by 1, 2 with no data""",
)
AFTER = """
    create index "my index" on hourly ("S um", hour) where n > 1;
    alter materialized view hourly set (timescaledb.compress, timescaledb.compress_segmentby = 'device');
    alter materialized view "Odd Schema"."a daily" rename column s to "total x";
    comment on view hourly is 'an hour''s sum';
    select add_compression_policy('metrics', interval '3 months');
    select add_retention_policy('metrics', interval '1 year', initial_start => '2026-01-01 03:00+01', timezone => 'Europe/Berlin');
    select add_reorder_policy('metrics', 'by Device');
    select add_retention_policy('ticks', 5000::bigint);
    select add_compression_policy('ticks', 2000::bigint);
    select add_retention_policy('small', 50::smallint, schedule_interval => interval '2 hours');
    select add_retention_policy('"Odd Schema"."a daily"', interval '10 years');
    select add_continuous_aggregate_policy('hourly', interval '1 month', interval '1 hour', interval '30 minutes');
    select add_continuous_aggregate_policy('"Odd Schema"."a daily"', null, interval '1 day', interval '1 day');
    select add_compression_policy('hourly', interval '40 days');
    select add_continuous_aggregate_policy('tick_counts', 500::bigint, 100::bigint, interval '1 hour');
    select add_job('"Odd Schema"."act ion"(int, jsonb)'::regprocedure, '1 mon', config => '{"b": {"c": [1, null]}, "hypertable_id": 77}',
                   check_config => '"Odd Schema".check_it', initial_start => '2026-03-01', timezone => 'Asia/Tokyo');
    select add_job('"Odd Schema"."act ion"(int, jsonb)'::regprocedure, '90 seconds', fixed_schedule => false, scheduled => false);
    select alter_job(id, scheduled => false, max_retries => 3, retry_period => interval '7 minutes', max_runtime => '1 hour',
                     timezone => 'Europe/Berlin')
    from (select job_id as id from timescaledb_information.jobs where proc_name = 'policy_retention') j;
"""


async def _prepare(uri: str) -> None:
    connection = await asyncpg.connect(uri)
    try:
        for script in (FUNCTIONS, TABLES, HYPERTABLES, *AGGREGATES, AFTER):
            await connection.execute(script)
    finally:
        await connection.close()


async def _read(uri: str) -> Definitions:
    connection = await asyncpg.connect(uri)
    try:
        definitions = await read_definitions(connection)
        assert definitions is not None
        assert await connection.fetchval("show search_path") == '"$user", public'
        return definitions
    finally:
        await connection.close()


async def _make(uri: str, definitions: Definitions) -> None:
    """Make what was read, as a migration would: tables, hypertables, aggregates, then jobs, which start later."""
    connection = await asyncpg.connect(uri)
    try:
        target = await read_target(connection)
        assert target is not None
        absent = await read_absent(connection, definitions, own_only=True)
        (finding,) = assess_definitions(definitions, target, absent)
        assert finding.what.endswith(
            "name a hypertable by its id, which is another on the target: job 1011 (Odd Schema.act ion)"
        )
        await connection.execute(FUNCTIONS)
        await connection.execute(TABLES)
        assert await read_absent(connection, definitions, own_only=False) == frozenset()
        for hypertable in definitions.hypertables:
            for statement in hypertable_statements(hypertable, target) + compression_statements(hypertable, target):
                await connection.execute(statement)
        for aggregate in definitions.aggregates:
            for statement in aggregate_statements(aggregate, target) + aggregate_index_statements(aggregate):
                await connection.execute(statement)
            await connection.execute(refresh_statement(aggregate.name, target))
        names = [each.name for each in definitions.aggregates]
        made = {}
        for job in definitions.jobs:
            made[job.id] = await connection.fetchval(job_statement(job, names, target))
        assert (
            await connection.fetchval(
                "select count(*) from timescaledb_information.jobs where job_id >= 1000 and scheduled"
            )
            == 0
        )
        for job in definitions.jobs:
            await connection.execute(
                schedule_statement(made[job.id], target, is_scheduled=job.is_scheduled, timezone=job.timezone)
            )
    finally:
        await connection.close()


async def _carry(source: Server, target: Server) -> None:
    async with timescale_database(source) as source_uri, timescale_database(target) as target_uri:
        await _prepare(source_uri)
        there = decode(encode(await _read(source_uri)))
        await _make(target_uri, there)
        here = await _read(target_uri)
        assert here.hypertables == there.hypertables
        assert here.aggregates == there.aggregates
        assert here.jobs == there.jobs
        assert [job.name for job in here.jobs] == [job.name for job in there.jobs]


async def test_sparse_indexes(timescale_source: Server, other_timescale: Server) -> None:
    """Those that the older release does not know are named and left out, the others come over."""
    table = 'create table t (time timestamptz not null, a int, "B" text, c int)'
    make = (
        table,
        "select create_hypertable('t', 'time', create_default_indexes => false)",
        """alter table t set (timescaledb.compress, timescaledb.compress_orderby = 'time',
           timescaledb.compress_index = 'bloom("B"),minmax(c),bloom(a,"B")')""",
        "create table none (like t)",
        "select create_hypertable('none', 'time', create_default_indexes => false)",
        "alter table none set (timescaledb.compress, timescaledb.compress_orderby = 'a', timescaledb.compress_index = '')",
    )
    async with timescale_database(timescale_source) as source_uri, timescale_database(other_timescale) as target_uri:
        await execute(source_uri, *make)
        none, there = (await _read(source_uri)).hypertables
        assert none.compression
        assert none.compression.sparse_indexes == ()
        assert there.compression
        indexes = there.compression.sparse_indexes
        assert indexes == (
            SparseIndex("bloom", ("B",)),
            SparseIndex("minmax", ("c",)),
            SparseIndex("bloom", ("a", "B")),
        )
        await execute(target_uri, table, "create table none (like t)")
        target = Target((2, 24, 0), "public")
        (finding,) = assess_definitions(await _read(source_uri), target)
        assert "public.t (bloom)" in finding.what
        for each in (none, there):
            await execute(target_uri, *hypertable_statements(each, target), *compression_statements(each, target))
        other_none, here = (await _read(target_uri)).hypertables
        assert here.compression
        assert here.compression.sparse_indexes == indexes[:2]
        assert other_none == none


async def test_to_the_same_version(timescale_source: Server) -> None:
    await _carry(timescale_source, timescale_source)


async def test_to_another_version(timescale_source: Server, other_timescale: Server) -> None:
    await _carry(timescale_source, other_timescale)


async def test_from_another_version(timescale_source: Server, other_timescale: Server) -> None:
    await _carry(other_timescale, timescale_source)


async def test_adaptive_chunking_is_named(other_timescale: Server) -> None:
    """2.29 has none any more."""
    async with timescale_database(other_timescale) as uri:
        await execute(
            uri,
            "create table t (time timestamptz not null)",
            "select create_hypertable('t', 'time')",
            "select set_adaptive_chunking('t', '100MB')",
        )
        (finding,) = assess_definitions(await _read(uri), Target((2, 29, 2), "public"))
        assert "public.t: adaptive chunking" in finding.what
