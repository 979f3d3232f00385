"""Policies and other jobs that were made on the source after the plan: made on the target, held until the hand-over like all of its jobs."""

from __future__ import annotations

import asyncpg

from live_migration.common.errors import TargetError
from live_migration.common.postgres import asking
from live_migration.coordinator import steps
from live_migration.coordinator.hypertable_definitions import Job
from live_migration.coordinator.hypertable_gaps import read_target
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.hypertable_sql import Target, job_statement
from live_migration.coordinator.run import Run
from live_migration.coordinator.timescale_catalog import POST_RESTORE

_KNOWN = "select coalesce(source_id, id) from _live_migration.target_jobs"
_HELD = "insert into _live_migration.target_jobs (id, name, is_scheduled, source_id) values ($1, $2, $3, $4)"
_AGGREGATE_VIEW = """
    select exists (select from timescaledb_information.continuous_aggregates where view_schema = $1 and view_name = $2)
"""


async def bring_jobs(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> dict[str, str]:
    """Make the source's jobs that the target lacks; give those that could not be made, and why.

    Does nothing where the target's jobs did not come over with the source's catalog, under the source's ids.
    """
    with asking("target", "reading the plan"):
        if not await steps.is_done(target, POST_RESTORE):
            return {}
        known = {row[0] for row in await target.fetch(_KNOWN)}
    definitions = await run.patiently("reading the jobs", lambda: read_definitions(source))
    timescale = await read_target(target)
    problems: dict[str, str] = {}
    if definitions is None or timescale is None:
        return problems
    for job in definitions.jobs:
        if job.id in known:
            continue
        try:
            with asking("target", f"making {job}"):
                await _make(run, target, job, timescale)
        except TargetError as error:
            if not isinstance(error.__cause__, asyncpg.PostgresError):
                raise
            problems[str(job)] = f"{error.message}. Make what it needs on the target, or delete the job on the source"
    return problems


async def _make(run: Run, target: asyncpg.Connection, job: Job, timescale: Target) -> None:
    async with target.transaction():
        relation = job.relation
        is_view = relation and await target.fetchval(_AGGREGATE_VIEW, relation.schema, relation.name)
        id = await target.fetchval(job_statement(job, [relation] if relation and is_view else [], timescale))
        await target.execute(_HELD, id, str(job), job.is_scheduled, job.id)
        await steps.require_role(target, run.epoch)
    run.reporter.note(f"{job}, made on the source, is on the target now, held until the hand-over")
