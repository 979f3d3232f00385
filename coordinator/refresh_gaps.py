"""Buckets that no refresh policy would reach any more after its job was paused: materialized before the job runs again.

A policy refreshes from `now - start_offset` and never goes back to where its aggregate ends. After a longer pause it would leave out what lies
between for good: of a real-time aggregate, too, which reads rows anew above its watermark alone, and that jumps with the next run.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from live_migration.common.errors import ConnectionLost, LiveMigrationError
from live_migration.common.postgres import Side, asking
from live_migration.common.relation import QualifiedName, quote_literal
from live_migration.coordinator.aggregate_refresh import time_literal, time_type
from live_migration.coordinator.hypertable_definitions import ContinuousAggregate, Definitions, Job
from live_migration.coordinator.hypertable_gaps import read_target
from live_migration.coordinator.hypertable_source import read_definitions

_POLICY = "policy_refresh_continuous_aggregate"
_WATERMARK = """
    select w.watermark from _timescaledb_catalog.continuous_aggs_watermark w
    join _timescaledb_catalog.continuous_agg a on a.mat_hypertable_id = w.mat_hypertable_id
    where a.user_view_schema = $1 and a.user_view_name = $2
"""
_AGO = "select _timescaledb_functions.time_to_internal(($2::timestamptz - $1::text::interval)::{kind})"
_EAST, _WEST = timedelta(hours=14), timedelta(hours=12)
"""A policy takes times without a zone for those of its owner's zone: here for the one that leaves most out."""
_WITH_ZONE = "timestamp with time zone"
_MOST = {"smallint": 2**15 - 1, "integer": 2**31 - 1, "bigint": 2**63 - 1}


@dataclass(frozen=True, slots=True)
class Gap:
    """What a policy would leave out, and what it would refresh itself by then: `statement` refreshes both."""

    aggregate: QualifiedName
    statement: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The aggregates that were refreshed; lines for people about those that were not, each with its statement."""

    refreshed: list[str]
    failed: list[str]


async def close_gaps(
    connection: asyncpg.Connection,
    side: Side,
    jobs: Collection[int],
    *,
    since: datetime,
    floors: Mapping[QualifiedName, int] | None = None,
) -> Outcome:
    """Refresh what the policies among the jobs would leave out, parents first; call it outside of a transaction, and again after a crash.

    Nothing below an aggregate's watermark is looked at, so that buckets whose rows are gone are kept, and nothing that its policy did not reach
    when it was paused, but for integers, whose present time of then nobody knows.

    Args:
        since: none of the jobs was paused before.
        floors: watermarks of aggregates that the catalog tells too low.

    Raises:
        ConnectionLost: the server is gone.
    """
    outcome = Outcome([], [])
    if not jobs:
        return outcome
    try:
        with asking(side, "reading the refresh policies"):
            definitions = await read_definitions(connection)
    except ConnectionLost:
        raise
    except LiveMigrationError as error:
        outcome.failed.append(f"whether refresh policies leave buckets out could not be asked: {error.message}")
        return outcome
    for aggregate in definitions.aggregates if definitions else ():
        assert definitions is not None
        policies = [j for j in definitions.jobs if j.id in jobs and _is_policy_of(j, aggregate)]
        floor = (floors or {}).get(aggregate.name)
        await _close(connection, side, definitions, aggregate, policies, since, floor, outcome)
    return outcome


def _is_policy_of(job: Job, aggregate: ContinuousAggregate) -> bool:
    return job.is_policy and job.procedure.name == _POLICY and job.relation == aggregate.name


async def _close(
    connection: asyncpg.Connection,
    side: Side,
    definitions: Definitions,
    aggregate: ContinuousAggregate,
    policies: list[Job],
    since: datetime,
    floor: int | None,
    outcome: Outcome,
) -> None:
    statement = ""
    try:
        with asking(side, f"refreshing {aggregate.name}"):
            async for gap in _gaps(connection, definitions, aggregate, policies, since, floor):
                statement = gap.statement
                await connection.execute(statement)
                outcome.refreshed.append(str(aggregate.name))
    except ConnectionLost:
        raise
    except LiveMigrationError as error:
        by_hand = f". Do it by hand: {statement}" if statement else ""
        outcome.failed.append(
            f"buckets of {aggregate.name} that its refresh policy does not reach any more may be missing: {error.message}{by_hand}"
        )


async def _gaps(
    connection: asyncpg.Connection,
    definitions: Definitions,
    aggregate: ContinuousAggregate,
    policies: list[Job],
    since: datetime,
    floor: int | None,
) -> AsyncIterator[Gap]:
    """Give what each policy would leave out; its own window, too, for a bucket that begins before that is not whole in it."""
    for policy in policies:
        config = json.loads(policy.config or "{}")
        if (start_offset := config.get("start_offset")) is None:
            continue
        kind = await time_type(connection, aggregate)
        now_function = _now_function(definitions, aggregate)
        watermark = await _watermark(connection, aggregate, floor)
        if watermark is not None and await _ago(connection, kind, now_function, start_offset) <= watermark:
            continue
        if watermark is None and kind in _MOST:
            continue  # nothing was materialized when its jobs were paused: the policy begins where it would have begun
        first = watermark
        if kind not in _MOST:  # what the policy had left out before the pause is no matter of ours
            moment = since if kind == _WITH_ZONE else since - _WEST
            reached = await connection.fetchval(_AGO.format(kind=kind), start_offset, moment)
            first = reached if watermark is None else max(watermark, reached)
        end = None
        if (end_offset := config.get("end_offset")) is not None:
            end = await _ago(connection, kind, now_function, end_offset)
        server = await read_target(connection)
        assert server is not None
        function, name = server.function("refresh_continuous_aggregate"), quote_literal(aggregate.name.sql)
        window = ", ".join("null" if each is None else time_literal(kind, each) for each in (first, end))
        yield Gap(aggregate.name, f"call {function}({name}, {window})")


async def _watermark(connection: asyncpg.Connection, aggregate: ContinuousAggregate, floor: int | None) -> int | None:
    """Give where an aggregate's buckets end, at `floor` at least; None where it has none."""
    if not await connection.fetchval(f"select exists (select from {aggregate.materialization.sql})"):
        return None
    watermark: int | None = await connection.fetchval(_WATERMARK, aggregate.name.schema, aggregate.name.name)
    return max((each for each in (watermark, floor) if each is not None), default=None)


async def _ago(connection: asyncpg.Connection, kind: str, now_function: QualifiedName | None, offset: str | int) -> int:
    """Give a time before the present one, in TimescaleDB's own unit."""
    if kind in _MOST:
        assert now_function is not None, "a policy on integers asks for it"
        now: int = await connection.fetchval(f"select {now_function.sql}()::bigint")
        return max(-_MOST[kind] - 1, min(_MOST[kind], now - int(offset)))
    moment = await connection.fetchval("select now()")
    ago: int = await connection.fetchval(
        _AGO.format(kind=kind), offset, moment if kind == _WITH_ZONE else moment + _EAST
    )
    return ago


def _now_function(definitions: Definitions, aggregate: ContinuousAggregate) -> QualifiedName | None:
    """Give the function that tells the present time of the hypertable that an aggregate reads, through others maybe."""
    parents = {each.name: each.parent for each in definitions.aggregates}
    name = aggregate.name
    while name in parents:
        name = parents[name]
    return next((each.dimensions[0].now_function for each in definitions.hypertables if each.name == name), None)
