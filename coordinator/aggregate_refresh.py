"""Aggregates of a target whose catalog our role may not write (no superuser): refreshed after the hand-over, up to the source's watermarks.

A refresh takes away the buckets of its window whose rows are gone. So each run of chunks that the aggregate reads, one beside the other, is refreshed
by itself: buckets before and between them, whose chunks were dropped, are kept as they were copied, and so are those at a run's edges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import asyncpg

from live_migration.common.errors import TargetError
from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName, quote_literal
from live_migration.common.timescale import read_layout, read_slices
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
    runs = await _read_runs(run)
    refused, refreshed, emptied = [], [], []
    for aggregate in definitions.aggregates:
        if (watermark := watermarks.get(aggregate.name)) is None:
            continue
        run.reporter.note(f"refreshing {aggregate.name}")
        try:
            with asking("target", f"refreshing {aggregate.name}"):
                windows = list(windows_below(watermark, runs.get(aggregate.parent, [])))
                if not windows and not aggregate.materialized_only:
                    emptied.append(str(aggregate.name))
                await _refresh(run, aggregate, server.function("refresh_continuous_aggregate"), windows)
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


Range = tuple[int, int]
"""From where to where, in TimescaleDB's own unit."""


async def _read_runs(run: Run) -> dict[QualifiedName, list[Range]]:
    """Give the ranges in which each hypertable and aggregate of the target has chunks."""
    with asking("target", "reading the chunks"):
        layout = await read_layout(run.target)
        slices = await read_slices(run.target, layout) if layout else {}
    ranges: dict[QualifiedName, list[Range]] = {}
    for chunk in layout.chunks.values() if layout else ():
        hypertable = layout.hypertables[chunk.hypertable] if layout else None
        if hypertable is not None and chunk.oid in slices:
            first, end = json.loads(slices[chunk.oid])[hypertable.time_column]
            ranges.setdefault(hypertable.view or hypertable.name, []).append((first, end))
    return {name: join_ranges(found) for name, found in ranges.items()}


def join_ranges(ranges: Iterable[Range]) -> list[Range]:
    """Join ranges that touch; pure."""
    joined: list[Range] = []
    for first, end in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return joined


def windows_below(watermark: int, runs: Sequence[Range]) -> Iterator[Range]:
    """Give what is to be refreshed of the runs: up to the watermark, the last one to that itself, so that it becomes the target's; pure."""
    below = [each for each in runs if each[0] < watermark]
    yield from ((first, end) for first, end in below[:-1])
    if below:
        yield below[-1][0], watermark


async def _refresh(run: Run, aggregate: ContinuousAggregate, function: str, windows: Sequence[Range]) -> None:
    kind = await run.target.fetchval(_TYPE, aggregate.name.sql, aggregate.time_column)
    place = _TIMES.get(kind, f"{{}}::{kind}")
    name = f"{quote_literal(aggregate.name.sql)}::regclass"
    for number, window in enumerate(windows, 1):
        first, end = (place.format(f"({value})::bigint") for value in window)
        try:
            await run.target.execute(f"call {function}({name}, {first}, {end})")
        except asyncpg.InvalidParameterValueError:
            if number == len(windows):
                raise
            # It holds no whole bucket: what is there of one is kept.
