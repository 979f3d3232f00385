"""Statements that make hypertables, continuous aggregates and jobs on a TimescaleDB of 2.16 to 2.29. Pure.

The forms are those that all these releases take. A statement with a value of its own to give says so; the others are run for
their effect. Where a hypertable's id matters, the statement looks it up on the server that runs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from live_migration.common.relation import QualifiedName, quote_identifier, quote_literal
from live_migration.coordinator.hypertable_definitions import (
    Compression,
    ContinuousAggregate,
    Dimension,
    Hypertable,
    Index,
    Job,
    SparseIndex,
)

Version = tuple[int, ...]

SPARSE_INDEXES_SINCE: Version = (2, 22)
_COMPOSITE_SINCE: Version = (2, 26)
_FIRSTLAST_SINCE: Version = (2, 28)
_JOB_NAMES_SINCE: Version = (2, 20)


@dataclass(frozen=True, slots=True)
class Target:
    """The TimescaleDB that statements are made for; `schema`: where its functions stand. See `read_target`."""

    version: Version
    schema: str

    def function(self, name: str) -> str:
        """Give a function of the extension's API, qualified."""
        return QualifiedName(self.schema, name).sql


def can_make(index: SparseIndex, version: Version) -> bool:
    """Tell whether a release knows such a sparse index."""
    if index.type == "firstlast":
        return version >= _FIRSTLAST_SINCE
    return version >= (_COMPOSITE_SINCE if len(index.columns) > 1 else SPARSE_INDEXES_SINCE)


def hypertable_statements(hypertable: Hypertable, target: Target) -> list[str]:
    """Make an empty table a hypertable, without default indexes: those of the source come with its schema.

    To be run before the table holds rows. Compression is not in it.
    """
    first, *others = hypertable.dimensions
    table = _relation(hypertable.name)
    arguments = [table, f"{quote_literal(first.column)}::name", f"chunk_time_interval => {first.interval}::bigint"]
    if hypertable.chunk_schema is not None:
        arguments.append(f"associated_schema_name => {quote_literal(hypertable.chunk_schema)}")
    if hypertable.chunk_prefix is not None:
        arguments.append(f"associated_table_prefix => {quote_literal(hypertable.chunk_prefix)}")
    if first.function:
        arguments.append(f"time_partitioning_func => {_procedure(first.function)}")
    arguments.append("create_default_indexes => false")
    statements = [f"select {target.function('create_hypertable')}({', '.join(arguments)})"]
    statements += [_add_dimension(table, each, target) for each in others]
    if first.now_function:
        now = f"{_procedure(first.now_function, '')}::regproc"
        statements.append(f"select {target.function('set_integer_now_func')}({table}, {now})")
    return statements


def _add_dimension(table: str, dimension: Dimension, target: Target) -> str:
    arguments = [table, f"{quote_literal(dimension.column)}::name"]
    if dimension.partitions is not None:
        arguments.append(f"number_partitions => {dimension.partitions}")
    if dimension.interval is not None:
        arguments.append(f"chunk_time_interval => {dimension.interval}::bigint")
    if dimension.function:
        arguments.append(f"partitioning_func => {_procedure(dimension.function)}")
    return f"select {target.function('add_dimension')}({', '.join(arguments)})"


def compression_statements(hypertable: Hypertable, target: Target) -> list[str]:
    """Give a hypertable its compression settings, and the columns that chunks are skipped by; both may come late.

    No chunk is compressed by them.
    """
    statements = []
    if hypertable.compression:
        options = _compression_options(hypertable.compression, target)
        statements.append(f"alter table {hypertable.name.sql} set ({options})")
    for column in hypertable.skipping:
        function, table = target.function("enable_chunk_skipping"), _relation(hypertable.name)
        enabled = "set_config('timescaledb.enable_chunk_skipping', 'on', true)"  # the function refuses without it
        statements.append(
            f"select {function}({table}, {quote_literal(column)}::name) from (select {enabled} offset 0) setting"
        )
    return statements


def interval_statements(wanted: Hypertable, present: Hypertable, target: Target) -> list[str]:
    """Give a hypertable the intervals that chunks to come have; dimensions are told apart by their column."""
    intervals = {each.column: each.interval for each in present.dimensions}
    return [
        f"select {target.function('set_chunk_time_interval')}({_relation(wanted.name)}, {each.interval}::bigint, "
        f"dimension_name => {quote_literal(each.column)}::name)"
        for each in wanted.dimensions
        if each.interval is not None and intervals.get(each.column, each.interval) != each.interval
    ]


def aggregate_setting_statements(
    wanted: ContinuousAggregate, present: ContinuousAggregate, target: Target
) -> list[str]:
    """Give a continuous aggregate what may be set of it later: whether it is real-time, its chunks' interval, its compression."""
    name, statements = wanted.name.sql, []
    if wanted.materialized_only != present.materialized_only:
        flag = str(wanted.materialized_only).lower()
        statements.append(f"alter materialized view {name} set (timescaledb.materialized_only = {flag})")
    if wanted.chunk_interval != present.chunk_interval:
        interval = f"{_materialization(wanted.name)}, {wanted.chunk_interval}::bigint"
        statements.append(f"select {target.function('set_chunk_time_interval')}({interval})")
    if wanted.compression is not None and wanted.compression != present.compression:
        statements.append(f"alter materialized view {name} set ({_compression_options(wanted.compression, target)})")
    return statements


def _compression_options(compression: Compression, target: Target) -> str:
    options = ["timescaledb.compress = true"]
    if compression.segment_by is not None:
        options.append(f"timescaledb.compress_segmentby = {_columns_literal(compression.segment_by)}")
    if compression.order_by:
        order = ", ".join(
            f"{quote_identifier(each.column)} {'desc' if each.descending else 'asc'} "
            f"nulls {'first' if each.nulls_first else 'last'}"
            for each in compression.order_by
        )
        options.append(f"timescaledb.compress_orderby = {quote_literal(order)}")
    if compression.chunk_interval is not None:
        options.append(f"timescaledb.compress_chunk_time_interval = '{compression.chunk_interval} microseconds'")
    indexes = compression.sparse_indexes
    if indexes is not None and target.version >= SPARSE_INDEXES_SINCE:
        known = [f"{each.type}({_columns(each.columns)})" for each in indexes if can_make(each, target.version)]
        if known or not indexes:
            options.append(f"timescaledb.compress_index = {quote_literal(', '.join(known))}")
    return ", ".join(options)


def aggregate_statements(aggregate: ContinuousAggregate, target: Target) -> list[str]:
    """Make a continuous aggregate with no row in it, as it is on the source but for its indexes and jobs.

    What it reads must be there. See `aggregate_index_statements`, `refresh_statement`.
    """
    name = aggregate.name.sql
    options = [
        "timescaledb.continuous",
        f"timescaledb.materialized_only = {str(aggregate.materialized_only).lower()}",
        "timescaledb.create_group_indexes = false",
    ]
    interval = f"{_materialization(aggregate.name)}, {aggregate.chunk_interval}::bigint"
    statements = [
        f"create materialized view {name} with ({', '.join(options)}) as\n{aggregate.query}\nwith no data",
        f"select {target.function('set_chunk_time_interval')}({interval})",
    ]
    if aggregate.compression:
        statements.append(f"alter materialized view {name} set ({_compression_options(aggregate.compression, target)})")
    if aggregate.comment is not None:
        statements.append(f"comment on view {name} is {quote_literal(aggregate.comment)}")
    return statements


def aggregate_index_statements(aggregate: ContinuousAggregate) -> list[str]:
    """Make the indexes of a continuous aggregate's materialization, except that on time, which it always has."""
    own = {f"USING btree ({each} DESC)" for each in (aggregate.time_column, quote_identifier(aggregate.time_column))}
    wanted = sorted((each for each in aggregate.indexes if each.name or each.definition not in own), key=_order)
    return [
        f"create {'unique ' if each.is_unique else ''}index {quote_identifier(each.name) + ' ' if each.name else ''}"
        f"on {aggregate.name.sql} {each.definition}"
        for each in wanted
    ]


def _order(index: Index) -> tuple[str, str]:
    return index.name or "", index.definition


def refresh_statement(name: QualifiedName, target: Target) -> str:
    """Fill a continuous aggregate, parents first; not within a transaction."""
    return f"call {target.function('refresh_continuous_aggregate')}({_relation(name)}, null, null)"


def job_statement(job: Job, aggregates: Iterable[QualifiedName], target: Target) -> str:
    """Make a job that does not run yet; its value is the new job's id. It belongs to the role that runs the statement.

    `aggregates`: names of the continuous aggregates, which a job may belong to. An index that a policy names must be there.
    """
    arguments = [
        f"{_procedure(job.procedure, 'integer, jsonb')}::regproc",
        f"{quote_literal(job.schedule_interval)}::interval",
        "scheduled => false",
        f"fixed_schedule => {str(job.is_fixed_schedule).lower()}",
    ]
    is_aggregate = job.relation in set(aggregates)
    if job.config is not None:
        arguments.append(f"config => {_config(job, is_aggregate)}")
    if job.initial_start is not None:
        arguments.append(f"initial_start => {quote_literal(job.initial_start)}::timestamptz")
    if job.check:
        arguments.append(f"check_config => {_procedure(job.check, 'jsonb')}::regproc")
    zone = f"timezone => {quote_literal(job.timezone)}" if job.timezone is not None else ""
    if zone:
        arguments.append(zone)
    if job.name and target.version >= _JOB_NAMES_SINCE:
        arguments.append(f"job_name => {quote_literal(job.name)}")
    made = f"{target.function('add_job')}({', '.join(arguments)})"
    if job.relation:
        relation = _materialization(job.relation) if is_aggregate else _relation(job.relation)
        made = f"_timescaledb_functions.alter_job_set_hypertable_id({made}, {relation})"
    altered = [
        made,
        f"max_runtime => {quote_literal(job.max_runtime)}::interval",
        f"max_retries => {job.max_retries}",
        f"retry_period => {quote_literal(job.retry_period)}::interval",
        *([zone] if zone else []),  # alter_job takes it away where it is not given again
    ]
    return f"select job_id from {target.function('alter_job')}({', '.join(altered)})"


def alter_job_statement(job_id: int, job: Job, aggregates: Iterable[QualifiedName], target: Target) -> str:
    """Set all of a job but whether it runs; `job_id`: its id on the server that runs the statement."""
    arguments = [
        str(int(job_id)),
        f"schedule_interval => {quote_literal(job.schedule_interval)}::interval",
        f"max_runtime => {quote_literal(job.max_runtime)}::interval",
        f"max_retries => {job.max_retries}",
        f"retry_period => {quote_literal(job.retry_period)}::interval",
        f"fixed_schedule => {str(job.is_fixed_schedule).lower()}",
    ]
    if job.config is not None:
        arguments.append(f"config => {_config(job, job.relation in set(aggregates))}")
    if job.initial_start is not None:
        arguments.append(f"initial_start => {quote_literal(job.initial_start)}::timestamptz")
    if job.timezone is not None:
        arguments.append(f"timezone => {quote_literal(job.timezone)}")
    return f"select {target.function('alter_job')}({', '.join(arguments)})"


def schedule_statement(job_id: int, target: Target, *, is_scheduled: bool, timezone: str | None) -> str:
    """Set whether a job runs, and nothing else; `job_id` and `timezone` are its own on the server that runs the statement.

    `alter_job` takes a job's timezone away where it is not given again.
    """
    zone = f", timezone => {quote_literal(timezone)}" if timezone is not None else ""
    return f"select {target.function('alter_job')}({job_id}, scheduled => {str(is_scheduled).lower()}{zone})"


def _config(job: Job, is_aggregate: bool) -> str:
    config = f"{quote_literal(job.config or '{}')}::jsonb"
    if job.id_key is None or job.relation is None:
        return config
    schema, name = quote_literal(job.relation.schema), quote_literal(job.relation.name)
    if is_aggregate:
        found = (
            "select mat_hypertable_id from _timescaledb_catalog.continuous_agg "
            f"where user_view_schema = {schema} and user_view_name = {name}"
        )
    else:
        found = f"select id from _timescaledb_catalog.hypertable where schema_name = {schema} and table_name = {name}"
    return f"{config} || jsonb_build_object({quote_literal(job.id_key)}, ({found}))"


def _relation(name: QualifiedName) -> str:
    return f"{quote_literal(name.sql)}::regclass"


def _materialization(aggregate: QualifiedName) -> str:
    return (
        "(select format('%I.%I', materialization_hypertable_schema, materialization_hypertable_name)::regclass "
        "from timescaledb_information.continuous_aggregates "
        f"where view_schema = {quote_literal(aggregate.schema)} and view_name = {quote_literal(aggregate.name)})"
    )


def _procedure(name: QualifiedName, arguments: str | None = None) -> str:
    """Give a function as a constant; by name alone where its arguments may be of any type."""
    if arguments is None:
        return f"{quote_literal(name.sql)}::regproc"
    return f"{quote_literal(f'{name.sql}({arguments})')}::regprocedure"


def _columns(columns: Iterable[str]) -> str:
    return ", ".join(map(quote_identifier, columns))


def _columns_literal(columns: Iterable[str]) -> str:
    return quote_literal(_columns(columns))
