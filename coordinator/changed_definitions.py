"""What was set otherwise on the source's hypertables, aggregates and jobs since the plan, where they came over with the catalog.

Of another version, and what was made since, is made from the source's definitions anyway. Nothing here may end the hand-over, behind
which users wait: what the target refuses is named in a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import asyncpg

from live_migration.common.postgres import asking, refusal_of
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.coordinator import steps
from live_migration.coordinator.hypertable_definitions import ContinuousAggregate, Definitions, Hypertable, Job
from live_migration.coordinator.hypertable_gaps import read_target
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.hypertable_sql import (
    Target,
    aggregate_setting_statements,
    alter_job_statement,
    compression_statements,
    interval_statements,
)
from live_migration.coordinator.run import Run
from live_migration.coordinator.source_jobs import paused_ids
from live_migration.coordinator.timescale_catalog import POST_RESTORE

_HELD = "select id, coalesce(source_id, id) as source_id from _live_migration.target_jobs order by id"


async def follow_definitions(run: Run, source: asyncpg.Connection) -> None:
    """Set on the target what was set on the source since: intervals, compression, aggregates' settings, jobs; drop jobs that are gone."""
    with asking("target", "reading the plan"):
        if not await steps.is_done(run.target, POST_RESTORE):
            return
    theirs, ours, target = await _read(run, source)
    if theirs is None or ours is None or target is None:
        return
    refused = []
    for statement in changed_settings(theirs, ours, target):
        if problem := await _try(run, statement):
            refused.append(problem)
    refused += await _follow_jobs(run, theirs, ours, target)
    if refused:
        run.reporter.warning(
            f"what was set on the source during the migration is not so on the target, which refuses it: {name_list(refused)}. "
            "Set it there by hand."
        )
    if left := name_list(_set_otherwise(theirs, ours)):
        run.reporter.warning(
            f"hypertables or aggregates were altered on the source during the migration in a way that is not carried over: {left}. "
            "Compare tablespaces, chunk skipping, dimensions and storage settings by hand."
        )


async def _read(run: Run, source: asyncpg.Connection) -> tuple[Definitions | None, Definitions | None, Target | None]:
    async def look() -> Definitions | None:
        async with source.transaction(isolation="repeatable_read", readonly=True):
            return await read_definitions(source)

    theirs = await run.patiently("reading hypertables and jobs", look)
    with asking("target", "reading hypertables and jobs"):
        return theirs, await read_definitions(run.target), await read_target(run.target)


def changed_settings(theirs: Definitions, ours: Definitions, target: Target) -> Iterator[str]:
    """Give the statements that set hypertables and aggregates as the source has them now. Pure."""
    hypertables = {each.name: each for each in ours.hypertables}
    for each in theirs.hypertables:
        mine = hypertables.get(each.name)
        if mine is None:
            continue
        yield from interval_statements(each, mine, target)
        if each.compression is not None and each.compression != mine.compression:
            yield from compression_statements(replace(each, skipping=()), target)
    aggregates = {each.name: each for each in ours.aggregates}
    for aggregate in theirs.aggregates:
        if (made := aggregates.get(aggregate.name)) is not None:
            yield from aggregate_setting_statements(aggregate, made, target)


def _set_otherwise(theirs: Definitions, ours: Definitions) -> list[QualifiedName]:
    """Name what differs in more than `changed_settings` sets."""
    mine: dict[QualifiedName, Hypertable | ContinuousAggregate] = {
        **{each.name: each for each in ours.hypertables},
        **{each.name: each for each in ours.aggregates},
    }
    made: tuple[Hypertable | ContinuousAggregate, ...] = (*theirs.hypertables, *theirs.aggregates)
    return [each.name for each in made if each.name in mine and not _is_alike(each, mine[each.name])]


def _is_alike(theirs: Hypertable | ContinuousAggregate, ours: Hypertable | ContinuousAggregate) -> bool:
    if theirs.compression is None and ours.compression is not None:
        return False
    return _rest(theirs) == _rest(ours)


def _rest(made: Hypertable | ContinuousAggregate) -> Hypertable | ContinuousAggregate:
    if isinstance(made, Hypertable):
        dimensions = tuple(replace(each, interval=None) for each in made.dimensions)
        return replace(made, dimensions=dimensions, compression=None)
    return replace(made, materialized_only=False, chunk_interval=0, compression=None, indexes=frozenset())


async def _try(run: Run, statement: str) -> str | None:
    """Run a statement in a transaction of its own; give what the target says against it."""
    try:
        async with run.target.transaction():
            await run.target.execute(statement)
            await steps.require_role(run.target, run.epoch)
    except asyncpg.PostgresError as error:
        return f"{statement}: {refusal_of(error)}"
    run.reporter.note(f"set as on the source now: {statement}")
    return None


async def _follow_jobs(run: Run, theirs: Definitions, ours: Definitions, target: Target) -> list[str]:
    refused: list[str] = []
    with asking("target", "reading the jobs that are held"):
        paused = set(await paused_ids(run.target))
        held = await run.target.fetch(_HELD)
    source_jobs, target_jobs = ({job.id: job for job in each.jobs} for each in (theirs, ours))
    names = [each.name for each in ours.aggregates]
    for row in held:
        mine, wanted = target_jobs.get(row["id"]), source_jobs.get(row["source_id"])
        if mine is None:
            continue  # named when the others are released
        if wanted is None:
            statement = f"select {target.function('delete_job')}({row['id']})"
            if problem := await _try(run, statement):
                refused.append(problem)
            else:
                await _forget(run, row["id"])
            continue
        if _as_held(wanted) != _as_held(mine) and (
            problem := await _try(run, alter_job_statement(row["id"], wanted, names, target))
        ):
            refused.append(problem)
        await _flag(run, row["id"], wanted.is_scheduled or wanted.id in paused)
    return refused


def _as_held(job: Job) -> Job:
    return replace(job, is_scheduled=False)


async def _forget(run: Run, job_id: int) -> None:
    async with run.target_transaction("forgetting a job that is gone from the source") as target:
        await target.execute("delete from _live_migration.target_jobs where id = $1", job_id)


async def _flag(run: Run, job_id: int, is_scheduled: bool) -> None:
    async with run.target_transaction("noting whether a job runs") as target:
        await target.execute(
            "update _live_migration.target_jobs set is_scheduled = $2 where id = $1 and is_scheduled <> $2",
            job_id,
            is_scheduled,
        )
