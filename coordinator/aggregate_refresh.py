"""Aggregates of a target whose catalog our role may not write (no superuser): one bucket of each is refreshed after the hand-over.

A refresh takes away the buckets of its window whose rows are gone, and brings up to date what is not so on the source. So no more is refreshed than makes
TimescaleDB see up to where the aggregate is materialized: the newest bucket of which rows are left. All others stay as they were copied, and are out
of date by the target's own record, so that a policy's next run refreshes what lies in its window.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import asyncpg

from live_migration.common.errors import TargetError
from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName, quote_identifier, quote_literal
from live_migration.coordinator import archives
from live_migration.coordinator.aggregate_state import AggregateState
from live_migration.coordinator.hypertable_definitions import ContinuousAggregate
from live_migration.coordinator.hypertable_gaps import read_target
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.materialized_views import refresh_readers
from live_migration.coordinator.run import Run

_ARCHIVE = "watermarks"
_TYPE = """
    select format_type(atttypid, null) from pg_attribute
    where attrelid = to_regclass($1) and attname = $2 and not attisdropped
"""
_TIMES = {
    "timestamp with time zone": "_timescaledb_functions.to_timestamp({})",
    "timestamp without time zone": "_timescaledb_functions.to_timestamp_without_timezone({})",
    "date": "_timescaledb_functions.to_date({})",
}


async def keep_watermarks(run: Run, state: AggregateState) -> None:
    """Remember that the aggregates must be refreshed, and up to where."""
    found = [[name.schema, name.name, value] for name, value in state.watermarks.items()]
    async with run.target_transaction("keeping the aggregates' watermarks") as target:
        await archives.keep(
            target,
            _ARCHIVE,
            json.dumps(found).encode(),
        )
    run.reporter.warning(
        "the target's role may not write TimescaleDB's catalog: continuous aggregates are refreshed there after the hand-over. Until then "
        "those that are real-time read all rows anew"
    )


async def kept_watermarks(target: asyncpg.Connection) -> dict[QualifiedName, int]:
    """Give up to where aggregates are materialized on the source, of a target whose catalog cannot say so."""
    with asking("target", "reading the plan"):
        content = await archives.read(target, _ARCHIVE)
    return {QualifiedName(schema, name): value for schema, name, value in json.loads(content)} if content else {}


async def refresh_aggregates(run: Run) -> None:
    """Refresh what is to be refreshed, parents first; one that cannot be is named in a warning."""
    if not (watermarks := await kept_watermarks(run.target)):
        return
    with asking("target", "reading the aggregates"):
        definitions, server = await read_definitions(run.target), await read_target(run.target)
    if definitions is None or server is None:
        return
    columns = {each.name: each.dimensions[0].column for each in definitions.hypertables}
    columns |= {each.name: each.time_column for each in definitions.aggregates}
    refused, refreshed, emptied = [], [], []
    for aggregate in definitions.aggregates:
        if (watermark := watermarks.get(aggregate.name)) is None:
            continue
        run.reporter.note(f"refreshing {aggregate.name}")
        try:
            with asking("target", f"refreshing {aggregate.name}"):
                kind = await time_type(run.target, aggregate)
                newest = await _find_newest(run, aggregate, watermark, columns[aggregate.parent], kind)
                if newest.window is not None:
                    await _refresh(run, aggregate, server.function("refresh_continuous_aggregate"), kind, newest.window)
                elif not newest.is_empty and not aggregate.materialized_only:
                    emptied.append(str(aggregate.name))
            refreshed.append(aggregate.name)
        except TargetError as error:
            refused.append(error.message)
    if refused:
        run.reporter.warning(f"aggregates could not be refreshed, do it by hand: {name_list(refused)}")
    if emptied:
        run.reporter.warning(
            f"no rows are left of what real-time aggregates read, so that no refresh can tell up to where they are materialized: {name_list(emptied)}. "
            "What they hold shows once they are set to timescaledb.materialized_only = true"
        )
    await refresh_readers(run, refreshed)


Window = tuple[str, str]
"""From where to where, as the server writes it."""


@dataclass(frozen=True, slots=True)
class _Newest:
    """The newest bucket of which rows are left, None where there is none. `is_empty`: nothing is materialized at all."""

    window: Window | None
    is_empty: bool


async def _find_newest(
    run: Run, aggregate: ContinuousAggregate, watermark: int, parent_column: str, kind: str
) -> _Newest:
    stored, column = aggregate.materialization.sql, quote_identifier(aggregate.time_column)
    if not await run.target.fetchval(f"select exists (select from {stored})"):
        return _Newest(None, is_empty=True)
    if aggregate.bucket is None:
        return _Newest(None, is_empty=False)
    first, end = bucket_within(aggregate.bucket.width, kind)
    below = time_literal(kind, watermark)
    row = await run.target.fetchrow(
        f"""select b::text as first, ({end})::text as "end" from (select distinct {column} as b from {stored} where {column} < {below}) m
            where exists (select from {aggregate.parent.sql} p where p.{quote_identifier(parent_column)} >= b and p.{quote_identifier(parent_column)} < {first})
            order by b desc limit 1"""
    )
    return _Newest((row["first"], row["end"]) if row else None, is_empty=False)


def bucket_within(width: str, kind: str) -> tuple[str, str]:
    """Give two expressions of a bucket's first moment `b`: where its rows surely still lie before, and an end that no other whole bucket comes before; pure.

    Days and months are not all of one length: nine tenths of one are in each, and one and a half hold no second.
    """
    quoted = quote_literal(width)
    if kind in _TIMES:
        return f"(b + {quoted}::interval * 0.9)", f"(b + {quoted}::interval * 1.5)::{kind}"
    return f"b + {quoted}::bigint", f"b + {quoted}::bigint"


async def _refresh(run: Run, aggregate: ContinuousAggregate, function: str, kind: str, window: Window) -> None:
    first, end = (f"{quote_literal(value)}::{kind}" for value in window)
    await run.target.execute(f"call {function}({quote_literal(aggregate.name.sql)}::regclass, {first}, {end})")


async def time_type(connection: asyncpg.Connection, aggregate: ContinuousAggregate) -> str:
    """Give the type of the times of an aggregate's buckets."""
    kind: str = await connection.fetchval(_TYPE, aggregate.name.sql, aggregate.time_column)
    return kind


def time_literal(kind: str, value: int) -> str:
    """Write a time that is given in TimescaleDB's own unit; pure."""
    return _TIMES.get(kind, f"{{}}::{kind}").format(f"({value})::bigint")
