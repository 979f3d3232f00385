"""A database with hypertables of every kind, and what must be equal of it on both ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute

SCHEMA = """
    create schema app;
    create schema store;
    create table devices (id int primary key, name text not null);
    create table metrics (time timestamptz not null, device int not null, temp float8, note text, primary key (device, time));
    select create_hypertable('metrics', 'time', chunk_time_interval => interval '1 day');
    alter table metrics set (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time');
    create index metrics_note on metrics (note, time);
    create table events (ts timestamptz not null, kind text, payload jsonb);
    select create_hypertable('events', 'ts', chunk_time_interval => interval '1 day');
    create table app.readings (time timestamptz not null, sensor int not null, val numeric, primary key (sensor, time));
    select create_hypertable('app.readings', 'time', partitioning_column => 'sensor', number_partitions => 3,
                             chunk_time_interval => interval '1 day', associated_schema_name => 'store',
                             associated_table_prefix => 'rd');
    create table samples (at timestamptz not null, place text, v int);
    select create_hypertable('samples', 'at', partitioning_column => 'place', number_partitions => 2,
                             chunk_time_interval => interval '2 days', create_default_indexes => false);
    alter table samples replica identity full;
    alter table samples set (timescaledb.compress, timescaledb.compress_segmentby = 'place', timescaledb.compress_orderby = 'at');
    create table plain (id int primary key, v text);
    insert into devices select d, 'device ' || d from generate_series(1, 8) d;
    alter table metrics add foreign key (device) references devices;
    create function stamp() returns trigger language plpgsql as
        $$begin if new.note is null then new.note := 'none'; end if; return new; end$$;
    create trigger stamp before insert on metrics for each row execute function stamp();
    insert into metrics select t, d, extract(epoch from t)::int % 97 + d, 'n' || d
        from generate_series('2026-01-01'::timestamptz, '2026-01-05', '10 min') t, generate_series(1, 5) d;
    insert into events select t, 'k' || extract(minute from t), jsonb_build_object('a', extract(epoch from t)::int % 13)
        from generate_series('2026-01-01'::timestamptz, '2026-01-05', '17 min') t;
    insert into events select * from events where ts < '2026-01-01 06:00';
    insert into app.readings select t, d, round(extract(epoch from t)::int % 101 / 7.0, 3)
        from generate_series('2026-01-01'::timestamptz, '2026-01-05', '20 min') t, generate_series(1, 5) d;
    insert into samples select t, nullif('p' || d, 'p0'), extract(epoch from t)::int % 11
        from generate_series('2026-01-01'::timestamptz, '2026-01-05', '30 min') t, generate_series(0, 4) d;
    insert into plain select g, 'v' || g from generate_series(1, 100) g;
"""
AGGREGATES = (
    """create materialized view hourly with (timescaledb.continuous) as
       select time_bucket('1 hour', time) as hour, device, avg(temp) as avg, count(*) as n from metrics group by 1, 2 with no data""",
    """create materialized view daily with (timescaledb.continuous, timescaledb.materialized_only = false) as
       select time_bucket('1 day', hour) as day, device, sum(n) as n from hourly group by 1, 2 with no data""",
    "call refresh_continuous_aggregate('hourly', null, '2026-01-04')",
    "call refresh_continuous_aggregate('daily', null, '2026-01-03')",
)
POLICIES = """
    select add_continuous_aggregate_policy('hourly', start_offset => interval '3 days', end_offset => interval '1 hour',
                                           schedule_interval => interval '1 hour');
    select add_compression_policy('metrics', interval '1000 days');
    select add_retention_policy('events', interval '1000 days');
    select compress_chunk(c) from show_chunks('metrics', older_than => '2026-01-03'::timestamptz) c;
"""
TABLES = ("devices", "metrics", "events", "app.readings", "samples", "plain")
AGGREGATE_NAMES = ("hourly", "daily")

_JOBS = """
    select j.proc_name, j.scheduled, j.schedule_interval::text, coalesce(a.view_schema, j.hypertable_schema),
           coalesce(a.view_name, j.hypertable_name), (j.config - 'hypertable_id' - 'mat_hypertable_id')::text as config,
           j.proc_schema, j.max_runtime::text, j.max_retries, j.retry_period::text, j.fixed_schedule, j.initial_start, j.check_name
    from timescaledb_information.jobs j left join timescaledb_information.continuous_aggregates a
         on (a.materialization_hypertable_schema, a.materialization_hypertable_name) = (j.hypertable_schema, j.hypertable_name)
    where job_id >= 1000
"""
LATER = "select alter_job(job_id, next_start => '2100-01-01') from timescaledb_information.jobs where proc_name = 'policy_retention'"
"""Lets a policy wait, as one does that has run a moment ago."""
CONSTRAINT_TRIGGER = "create constraint trigger stamped after insert on metrics for each row execute function stamp()"
"""TimescaleDB replaces any other trigger of a chunk that is there already by its hypertable's, this kind it cannot."""
NEXT_START = """
    select s.next_start from _timescaledb_internal.bgw_job_stat s join timescaledb_information.jobs j using (job_id)
    where j.proc_name = 'policy_retention' and s.next_start > now() + interval '1 hour'
"""
_COMPRESSION = """
    select hypertable_schema, hypertable_name, range_start::text, is_compressed from timescaledb_information.chunks
    where hypertable_name !~ '^_materialized' order by 1, 2, 3, 4
"""
_CHUNKS = """
    select coalesce(a.view_name, c.hypertable_name)::text as hypertable, format('%I.%I', c.chunk_schema, c.chunk_name) as chunk,
           (select string_agg(pg_get_expr(k.conbin, k.conrelid), ' and ' order by pg_get_expr(k.conbin, k.conrelid)) from pg_constraint k
            where k.conrelid = format('%I.%I', c.chunk_schema, c.chunk_name)::regclass and k.contype = 'c' and k.coninhcount = 0) as range,
           coalesce(_timescaledb_functions.chunk_status_text(format('%I.%I', c.chunk_schema, c.chunk_name)::regclass), '{}') as status
    from timescaledb_information.chunks c left join timescaledb_information.continuous_aggregates a
         on (a.materialization_hypertable_schema, a.materialization_hypertable_name) = (c.hypertable_schema, c.hypertable_name)
"""
_AGGREGATES = """
    select view_name::text as name, format('%I.%I', materialization_hypertable_schema, materialization_hypertable_name) as table,
           materialized_only as is_materialized_only from timescaledb_information.continuous_aggregates order by 1
"""
_COMPRESSED_AT = """
    select pg_xact_commit_timestamp(xmin) from _timescaledb_catalog.chunk where status & 1 = 1 order by 1
"""
_SCHEDULED_AT = """
    select pg_xact_commit_timestamp(xmin) from {} where id >= 1000 and scheduled order by 1
"""


async def make(uri: str) -> None:
    connection = await asyncpg.connect(uri)
    await connection.execute(SCHEMA)
    for statement in AGGREGATES:
        await connection.execute(statement)
    await connection.execute(POLICIES)
    await connection.close()


@asynccontextmanager
async def migrating(source: str, target: str, kafka: str, name: str, folder: Path) -> AsyncIterator[Migration]:
    """Make the database on the source, and migrate it as far as replay."""
    await make(source)
    async with Migration(source, target, kafka, name, folder, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        yield migration


async def as_owner(source: str, target: str, role: str) -> str:
    """Give the source's database to a role that is no superuser; give its URI for that role."""
    await execute(target, f"create role {role} login")
    await execute(
        source,
        f"create role {role} login replication",
        f"alter database {source.rsplit('/', 1)[1]} owner to {role}",
        f"grant all on schema public to {role}",
    )
    return source.replace("postgres@", f"{role}@")


async def rows_of(connection: asyncpg.Connection, relation: str) -> list[str]:
    return sorted(row[0] for row in await connection.fetch(f"select x::text from {relation} x"))


async def value(uri: str, query: str, *arguments: object) -> object:
    """Give what a query gives, on a session of its own."""
    connection = await asyncpg.connect(uri)
    try:
        return await connection.fetchval(query, *arguments)
    finally:
        await connection.close()


async def all_rows(uri: str, relation: str) -> list[str]:
    """Give `rows_of` on a session of its own."""
    connection = await asyncpg.connect(uri)
    try:
        return await rows_of(connection, relation)
    finally:
        await connection.close()


async def differences(
    source_uri: str, target_uri: str, *, tables: tuple[str, ...] = TABLES, aggregates: tuple[str, ...] = AGGREGATE_NAMES
) -> list[str]:
    """Compare every row of each table and aggregate, what aggregates have materialized, and the shape of hypertables."""
    source, target = await asyncpg.connect(source_uri), await asyncpg.connect(target_uri)
    found = []
    try:
        for relation in (*tables, *aggregates):
            ours, theirs = await rows_of(source, relation), await rows_of(target, relation)
            if ours != theirs:
                missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
                found.append(
                    f"{relation}: {len(ours)} rows here, {len(theirs)} there; missing {missing[:3]}, extra {extra[:3]}"
                )
        for query in (_HYPERTABLES, _FOREIGN_KEYS, _KEYS_OF_CHUNKS, _LACKING_KEYS, _TRIGGERS, _LACKING):
            ours, theirs = [[tuple(r) for r in await each.fetch(query)] for each in (source, target)]
            if ours != theirs:
                found.append(
                    f"{query.split()[1:6]}: {[r for r in ours if r not in theirs]} {[r for r in theirs if r not in ours]}"
                )
        return found
    finally:
        await source.close()
        await target.close()


_HYPERTABLES = """
    select h.hypertable_schema, h.hypertable_name, h.num_dimensions, h.compression_enabled, d.column_name, d.time_interval::text,
           d.integer_interval, d.num_partitions
    from timescaledb_information.hypertables h
    join timescaledb_information.dimensions d using (hypertable_schema, hypertable_name)
    where h.hypertable_name !~ '^_materialized' order by 1, 2, d.dimension_number
"""
_FOREIGN_KEYS = """
    select conrelid::regclass::text, conname, pg_get_constraintdef(oid), convalidated from pg_constraint
    where contype = 'f' and connamespace::regnamespace::text !~ '^_timescaledb_(catalog|config)'
      and connamespace not in ('_timescaledb_internal'::regnamespace, coalesce(to_regnamespace('_live_migration'), 0)) and coninhcount = 0
      and conrelid not in (select inhrelid from pg_inherits) order by 1, 2
"""
_KEYS_OF_CHUNKS = """
    select distinct coalesce(o.inhparent, k.conrelid)::regclass::text, coalesce(t.inhparent, k.confrelid)::regclass::text, k.convalidated
    from pg_constraint k left join pg_inherits o on o.inhrelid = k.conrelid left join pg_inherits t on t.inhrelid = k.confrelid
    where k.contype = 'f' and (o.inhparent is not null or t.inhparent is not null) order by 1, 2, 3
"""
_TRIGGERS = """
    select tgrelid::regclass::text, tgname from pg_trigger
    where not tgisinternal and tgrelid::regclass::text in ('metrics', 'events', 'plain') order by 1, 2
"""
_LACKING = """
    select distinct r.tgrelid::regclass::text, r.tgname from pg_trigger r join pg_inherits i on i.inhparent = r.tgrelid
    where not r.tgisinternal and r.tgtype & 1 = 1 and r.tgrelid::regclass::text in ('metrics', 'events')
      and not exists (select from pg_trigger t where t.tgrelid = i.inhrelid and t.tgname = r.tgname) order by 1, 2
"""
"""Row triggers that chunks lack."""
_LACKING_KEYS = """
    select distinct r.conrelid::regclass::text, r.conname from pg_constraint r join pg_inherits i on i.inhparent = r.conrelid
    where r.contype = 'f' and r.conrelid in (select format('%I.%I', hypertable_schema, hypertable_name)::regclass from timescaledb_information.hypertables)
      and not exists (select from pg_constraint k where k.conrelid = i.inhrelid and k.confrelid = r.confrelid and k.conkey = r.conkey)
    order by 1, 2
"""
"""Foreign keys that chunks lack."""


async def jobs(uri: str) -> list[tuple[Any, ...]]:
    """Give the jobs but for what differs from server to server, sorted by `str`."""
    connection = await asyncpg.connect(uri)
    try:
        return sorted((tuple(row) for row in await connection.fetch(_JOBS)), key=str)
    finally:
        await connection.close()


async def compression(uri: str) -> list[tuple[Any, ...]]:
    """Give which chunk of which hypertable is compressed."""
    connection = await asyncpg.connect(uri)
    try:
        return [tuple(row) for row in await connection.fetch(_COMPRESSION)]
    finally:
        await connection.close()


async def chunks(uri: str) -> dict[tuple[str, str], list[str]]:
    """Give TimescaleDB's words for the state of every chunk that holds a row, by hypertable or aggregate and range in all dimensions.

    A chunk without rows is left out: the stream tells of rows, so one that was made and emptied need not be made on the target.
    """
    connection = await asyncpg.connect(uri)
    try:
        return {
            (row["hypertable"], row["range"]): row["status"]
            for row in await connection.fetch(_CHUNKS)
            if await connection.fetchval(f"select exists (select from {row['chunk']})")
        }
    finally:
        await connection.close()


async def compressed(uri: str) -> set[tuple[str, str]]:
    """Give the chunks of `chunks` that are compressed, partially or wholly."""
    return {key for key, status in (await chunks(uri)).items() if "COMPRESSED" in status}


async def aggregates(uri: str) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """Give of each aggregate what it has materialized, what it gives, and what it gives in the other mode (real-time or not)."""
    connection = await asyncpg.connect(uri)
    try:
        found = await connection.fetch(_AGGREGATES)
        before = {row["name"]: await rows_of(connection, row["name"]) for row in found}
        stored = {row["name"]: await rows_of(connection, row["table"]) for row in found}
        await _turn_over(connection, found, is_back=False)
        other = {row["name"]: await rows_of(connection, row["name"]) for row in found}
        await _turn_over(connection, found, is_back=True)
        return {name: (stored[name], before[name], other[name]) for name in before}
    finally:
        await connection.close()


async def require_equal(source: str, target: str) -> None:
    """Fail unless all is equal after a load with its newcomers: every row of every table; what aggregates have materialized, and what they give in either mode; which chunk is compressed."""
    assert await differences(source, target, tables=(*TABLES, "late")) == []
    ours, theirs = await aggregates(source), await aggregates(target)
    assert ours.keys() == theirs.keys() == {"hourly", "daily", "late_hourly"}
    for name, parts in ours.items():
        assert parts == theirs[name], name
        assert all(parts), name
    found = await chunks(target)
    assert found.keys() == (await chunks(source)).keys()
    assert {key for key, status in found.items() if status} == await compressed(source)
    assert {tuple(status) for status in found.values()} == {(), ("COMPRESSED",)}


async def _turn_over(connection: asyncpg.Connection, found: list[asyncpg.Record], *, is_back: bool) -> None:
    for row in found:
        flag = "true" if row["is_materialized_only"] == is_back else "false"
        await connection.execute(f"alter materialized view {row['name']} set (timescaledb.materialized_only = {flag})")


async def require_compressed_before_jobs(uri: str) -> None:
    """Fail unless chunks were compressed at the hand-over, each before any job was scheduled: by the server's times of commit."""
    connection = await asyncpg.connect(uri)
    try:
        barrier = await connection.fetchval("select at from _live_migration.steps where name = 'watermarks'")
        compressed = [row[0] for row in await connection.fetch(_COMPRESSED_AT)]
        place = (
            "coalesce(to_regclass('_timescaledb_catalog.bgw_job'), to_regclass('_timescaledb_config.bgw_job'))::text"
        )
        jobs = await connection.fetchval(f"select {place}")
        scheduled = [row[0] for row in await connection.fetch(_SCHEDULED_AT.format(jobs))]
        assert scheduled, "no job was scheduled"
        assert barrier < compressed[-1] < scheduled[0], (barrier, compressed, scheduled)
    finally:
        await connection.close()
