"""Reads the definitions of hypertables, continuous aggregates and jobs from a TimescaleDB of 2.16 to 2.29.

`timescaledb_information` leaves out what we need (chunk prefixes, schemas of functions, timezones of jobs, columns whose
names hold commas), so those come from the catalog tables whose columns all these releases share.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from live_migration.common.relation import QualifiedName
from live_migration.coordinator.hypertable_definitions import (
    Bucket,
    Compression,
    ContinuousAggregate,
    Definitions,
    Dimension,
    Hypertable,
    Index,
    Job,
    OrderBy,
    SparseIndex,
    is_own_schema,
    parents_first,
)

_SETTINGS = {"search_path": "pg_catalog", "intervalstyle": "iso_8601", "datestyle": "ISO", "timezone": "UTC"}
"""So that names come qualified, and intervals and times in a form that any session reads the same way."""

_EXTENSION = """
    select e.extversion::text as version, n.nspname::text as schema,
           to_regclass('_timescaledb_catalog.bgw_job') is not null as has_jobs_in_catalog,
           to_regclass('_timescaledb_catalog.hypertable_cagg_settings') is not null as has_aggregate_settings
    from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'timescaledb'
"""

_HYPERTABLES = """
    select h.id, h.schema_name::text as schema, h.table_name::text as name, h.status & 8 = 8 as is_compressed_on_insert, h.chunk_target_size > 0 as is_adaptive,
           h.associated_schema_name::text as chunk_schema, h.associated_table_prefix::text as chunk_prefix,
           coalesce(t.compression_enabled, a.compression_enabled, false) as is_compressed,
           s.segmentby, s.orderby, s.orderby_desc, s.orderby_nullsfirst, to_jsonb(s) ->> 'index' as index,
           coalesce((select array_agg(p.tablespace_name::text order by p.id) from _timescaledb_catalog.tablespace p
                     where p.hypertable_id = h.id), '{}') as tablespaces,
           coalesce((select array_agg(distinct k.column_name::text) from _timescaledb_catalog.chunk_column_stats k
                     where k.hypertable_id = h.id), '{}') as skipping,
           exists (select from pg_inherits i join pg_class f on f.oid = i.inhrelid
                   where i.inhparent = c.oid and f.relkind = 'f') as has_tiered_chunks
    from _timescaledb_catalog.hypertable h
    join pg_namespace n on n.nspname = h.schema_name join pg_class c on c.relnamespace = n.oid and c.relname = h.table_name
    left join timescaledb_information.hypertables t on (t.hypertable_schema, t.hypertable_name) = (h.schema_name, h.table_name)
    left join timescaledb_information.continuous_aggregates a
           on (a.materialization_hypertable_schema, a.materialization_hypertable_name) = (h.schema_name, h.table_name)
    left join _timescaledb_catalog.compression_settings s on s.relid = c.oid
    where h.compression_state <> 2
    order by schema, name
"""

_DIMENSIONS = """
    select d.hypertable_id, d.column_name::text as column, format_type(d.column_type, null) as type,
           d.interval_length as interval, d.num_slices as partitions, d.compress_interval_length,
           d.partitioning_func_schema::text as function_schema, d.partitioning_func::text as function,
           d.integer_now_func_schema::text as now_schema, d.integer_now_func::text as now_function
    from _timescaledb_catalog.dimension d order by d.id
"""

_AGGREGATES = """
    select a.mat_hypertable_id as id, a.user_view_schema::text as schema, a.user_view_name::text as name,
           v.view_definition as query, v.view_owner::text as owner, a.materialized_only,
           coalesce((to_jsonb(a) ->> 'finalized')::bool, true) as is_finalized,
           coalesce(p.user_view_schema, r.schema_name)::text as parent_schema,
           coalesce(p.user_view_name, r.table_name)::text as parent_name,
           b.bucket_func, case when b.bucket_width ~ '^[0-9]+$' then b.bucket_width
                               else b.bucket_width::interval::text end as bucket_width,
           b.bucket_origin, b.bucket_offset, b.bucket_timezone, b.bucket_fixed_width,
           obj_description(c.oid, 'pg_class') as comment
    from _timescaledb_catalog.continuous_agg a
    join timescaledb_information.continuous_aggregates v on (v.view_schema, v.view_name) = (a.user_view_schema, a.user_view_name)
    join pg_namespace n on n.nspname = a.user_view_schema
    join pg_class c on c.relnamespace = n.oid and c.relname = a.user_view_name
    join _timescaledb_catalog.hypertable r on r.id = a.raw_hypertable_id
    left join _timescaledb_catalog.continuous_agg p on p.mat_hypertable_id = a.raw_hypertable_id
    left join _timescaledb_catalog.continuous_aggs_bucket_function b on b.mat_hypertable_id = a.mat_hypertable_id
"""

_INDEXES = """
    select a.mat_hypertable_id as id, x.relname::text as name, i.indisunique as is_unique,
           starts_with(x.relname::text, h.table_name || '_') as is_named_by_default,
           substr(pg_get_indexdef(i.indexrelid), strpos(pg_get_indexdef(i.indexrelid), t.phrase) + length(t.phrase)) as definition
    from _timescaledb_catalog.continuous_agg a join _timescaledb_catalog.hypertable h on h.id = a.mat_hypertable_id
    join pg_namespace n on n.nspname = h.schema_name join pg_class c on c.relnamespace = n.oid and c.relname = h.table_name
    join pg_index i on i.indrelid = c.oid and i.indisvalid join pg_class x on x.oid = i.indexrelid
    cross join lateral (select format('INDEX %I ON %I.%I ', x.relname, h.schema_name, h.table_name) as phrase) t
"""

_AGGREGATE_SETTINGS = "select distinct hypertable_id from _timescaledb_catalog.hypertable_cagg_settings"

_JOBS = """
    select j.id, j.application_name::text as name, r.rolname::text as owner,
           j.schedule_interval::text, j.max_runtime::text, j.max_retries, j.retry_period::text,
           j.proc_schema::text as schema, j.proc_name::text as procedure,
           j.check_schema::text, j.check_name::text, j.scheduled, j.fixed_schedule, j.initial_start::text, j.timezone,
           j.hypertable_id, j.config::text
    from {schema}.bgw_job j left join pg_roles r on r.oid = j.owner::oid
    where j.id >= 1000 order by j.id
"""
"""Jobs below 1000 are TimescaleDB's own housekeeping, which each database has."""

_OWN_SCHEMA = "_timescaledb_internal"
_HASH = QualifiedName("_timescaledb_functions", "get_partition_hash")
_ID_KEYS = ("hypertable_id", "mat_hypertable_id")


async def read_definitions(connection: asyncpg.Connection) -> Definitions | None:
    """Give a database's definitions; None where it has no TimescaleDB.

    Several queries: call it in a transaction with one snapshot where that matters.
    """
    async with _settings(connection):
        extension = await connection.fetchrow(_EXTENSION)
        if extension is None:
            return None
        dimensions: dict[int, list[asyncpg.Record]] = defaultdict(list)
        for row in await connection.fetch(_DIMENSIONS):
            dimensions[row["hypertable_id"]].append(row)
        hypertables = {row["id"]: row for row in await connection.fetch(_HYPERTABLES)}
        aggregates = {row["id"]: row for row in await connection.fetch(_AGGREGATES)}
        indexes: dict[int, list[asyncpg.Record]] = defaultdict(list)
        for row in await connection.fetch(_INDEXES):
            indexes[row["id"]].append(row)
        granular = await connection.fetch(_AGGREGATE_SETTINGS) if extension["has_aggregate_settings"] else []
        jobs_schema = "_timescaledb_catalog" if extension["has_jobs_in_catalog"] else "_timescaledb_config"
        jobs = await connection.fetch(_JOBS.format(schema=jobs_schema))
    extras: dict[int, tuple[str, ...]] = {row["hypertable_id"]: ("granular_refresh_column",) for row in granular}
    for id, row in hypertables.items():
        if row["is_compressed_on_insert"]:
            extras[id] = (*extras.get(id, ()), "direct_compress")
        if row["is_adaptive"]:
            extras[id] = (*extras.get(id, ()), "adaptive chunking (chunk_target_size)")
    names = {id: QualifiedName(row["schema"], row["name"]) for id, row in {**hypertables, **aggregates}.items()}
    return Definitions(
        extension["version"],
        extension["schema"],
        tuple(
            _hypertable(row, dimensions[id], extras.get(id, ()))
            for id, row in hypertables.items()
            if id not in aggregates
        ),
        parents_first(
            _aggregate(row, hypertables[id], dimensions[id], indexes[id], extras.get(id, ()))
            for id, row in aggregates.items()
        ),
        tuple(_job(row, names) for row in jobs),
    )


@asynccontextmanager
async def _settings(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """Change settings for some queries, within a transaction that may be open already."""
    setting = "select set_config($1, $2, true)"
    async with connection.transaction():
        before = {name: await connection.fetchval("select current_setting($1)", name) for name in _SETTINGS}
        for name, value in _SETTINGS.items():
            await connection.execute(setting, name, value)
        yield
        for name, value in before.items():
            await connection.execute(setting, name, value)


def _name(schema: str | None, name: str | None) -> QualifiedName | None:
    return QualifiedName(schema, name) if schema and name else None


def _hypertable(row: asyncpg.Record, dimensions: list[asyncpg.Record], extras: tuple[str, ...]) -> Hypertable:
    prefix = None if _is_default_prefix(row["chunk_prefix"]) else row["chunk_prefix"]
    return Hypertable(
        QualifiedName(row["schema"], row["name"]),
        tuple(_dimension(each) for each in dimensions),
        None if row["chunk_schema"] == _OWN_SCHEMA else row["chunk_schema"],
        prefix,
        _compression(row, dimensions),
        tuple(sorted(row["skipping"])),
        tuple(row["tablespaces"]),
        row["has_tiered_chunks"],
        extras,
    )


def _is_default_prefix(prefix: str) -> bool:
    """Tell whether TimescaleDB chose a prefix; it holds the hypertable's id, which differs from server to server."""
    return prefix.removeprefix("_hyper_").isdecimal() and prefix.startswith("_hyper_")


def _dimension(row: asyncpg.Record) -> Dimension:
    function = _name(row["function_schema"], row["function"])
    return Dimension(
        row["column"],
        row["type"],
        row["interval"],
        row["partitions"],
        None if function == _HASH else function,
        _name(row["now_schema"], row["now_function"]),
    )


def _compression(row: asyncpg.Record, dimensions: list[asyncpg.Record]) -> Compression | None:
    if not row["is_compressed"]:
        return None
    order_by = row["orderby"]
    if order_by is not None:
        fields = zip(order_by, row["orderby_desc"], row["orderby_nullsfirst"], strict=True)
        order_by = tuple(OrderBy(*each) for each in fields)
    return Compression(
        None if row["segmentby"] is None else tuple(row["segmentby"]),
        order_by,
        dimensions[0]["compress_interval_length"],
        _sparse_indexes(row["index"]),
    )


def _sparse_indexes(index: str | None) -> tuple[SparseIndex, ...] | None:
    """Give those that the user asked for; the others follow from the rest. A bare `config` entry says: none."""
    asked = [each for each in json.loads(index or "[]") if each.get("source") == "config"]
    if not asked:
        return None
    return tuple(
        SparseIndex(each["type"], tuple([each["column"]] if isinstance(each["column"], str) else each["column"]))
        for each in asked
        if "type" in each
    )


def _aggregate(
    row: asyncpg.Record,
    materialization: asyncpg.Record,
    dimensions: list[asyncpg.Record],
    indexes: list[asyncpg.Record],
    extras: tuple[str, ...],
) -> ContinuousAggregate:
    bucket = ("bucket_func", "bucket_width", "bucket_origin", "bucket_offset", "bucket_timezone", "bucket_fixed_width")
    return ContinuousAggregate(
        QualifiedName(row["schema"], row["name"]),
        row["query"].strip().removesuffix(";"),
        QualifiedName(row["parent_schema"], row["parent_name"]),
        row["materialized_only"],
        dimensions[0]["column"],
        dimensions[0]["interval"],
        Bucket(*(row[field] for field in bucket)) if row["bucket_func"] else None,
        row["is_finalized"],
        _compression(materialization, dimensions),
        frozenset(
            Index(None if each["is_named_by_default"] else each["name"], each["definition"], each["is_unique"])
            for each in indexes
        ),
        row["comment"],
        materialization["has_tiered_chunks"],
        extras,
        row["owner"],
        QualifiedName(materialization["schema"], materialization["name"]),
    )


def _job(row: asyncpg.Record, names: dict[int, QualifiedName]) -> Job:
    procedure = QualifiedName(row["schema"], row["procedure"])
    config, id_key = _without_id(row["config"]) if is_own_schema(procedure.schema) else (row["config"], None)
    return Job(
        procedure,
        row["schedule_interval"],
        config,
        names.get(row["hypertable_id"]),
        id_key,
        _name(row["check_schema"], row["check_name"]),
        row["scheduled"],
        row["fixed_schedule"],
        row["initial_start"],
        row["timezone"],
        row["max_runtime"],
        row["max_retries"],
        row["retry_period"],
        row["name"].removesuffix(f" [{row['id']}]"),
        row["owner"] or "",
        row["id"],
    )


def _without_id(config: str | None) -> tuple[str | None, str | None]:
    """Take the hypertable's id out of a policy's configuration; a user's action may mean anything by such a key."""
    if config is None:
        return None, None
    fields = json.loads(config)
    keys = [key for key in _ID_KEYS if fields.pop(key, None) is not None]
    return json.dumps(fields, sort_keys=True), keys[0] if keys else None
