"""Aggregates of a target whose catalog our role may not write (no superuser): refreshed after the hand-over, up to the source's watermarks.

What is refreshed begins where the rows that an aggregate reads begin: older rows of it, whose data are gone, are kept as they were copied.
"""

from __future__ import annotations

import json

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


async def refresh_aggregates(run: Run) -> None:
    """Refresh what is to be refreshed, parents first; one that cannot be is named in a warning."""
    with asking("target", "reading the plan"):
        content = await archives.read(run.target, _ARCHIVE)
    if content is None:
        return
    watermarks = {QualifiedName(schema, name): value for schema, name, value in json.loads(content)}
    with asking("target", "reading the aggregates"):
        definitions, server = await read_definitions(run.target), await read_target(run.target)
    if definitions is None or server is None:
        return
    columns = {each.name: each.dimensions[0].column for each in definitions.hypertables}
    columns |= {each.name: each.time_column for each in definitions.aggregates}
    refused, refreshed = [], []
    for aggregate in definitions.aggregates:
        if (watermark := watermarks.get(aggregate.name)) is None:
            continue
        run.reporter.note(f"refreshing {aggregate.name}")
        try:
            with asking("target", f"refreshing {aggregate.name}"):
                window = await _window(run, aggregate, columns[aggregate.parent], watermark)
                name = f"{quote_literal(aggregate.name.sql)}::regclass"
                await run.target.execute(f"call {server.function('refresh_continuous_aggregate')}({name}, {window})")
            refreshed.append(aggregate.name)
        except TargetError as error:
            refused.append(error.message)
    if refused:
        run.reporter.warning(f"aggregates could not be refreshed, do it by hand: {name_list(refused)}")
    await refresh_readers(run, refreshed)


async def _window(run: Run, aggregate: ContinuousAggregate, parent_column: str, watermark: int) -> str:
    """Give the refresh's arguments: from the first row that the aggregate reads to its watermark."""
    kind = await run.target.fetchval(_TYPE, aggregate.name.sql, aggregate.time_column)
    end = _TIMES[kind].format(f"{watermark}::bigint") if kind in _TIMES else f"{watermark}::{kind}"
    first = await run.target.fetchval(
        f"select quote_literal(min({quote_identifier(parent_column)})::text) from {aggregate.parent.sql}"
    )
    start = f"{first}::{kind}" if first else "null"
    return f"{start}, {end}"
