"""Jobs of a source with another version of TimescaleDB, made on the target at the hand-over: none runs before its end."""

from __future__ import annotations

import asyncpg

from live_migration.common.postgres import refusal_of
from live_migration.common.progress import name_list
from live_migration.coordinator import steps
from live_migration.coordinator.hypertable_definitions import Definitions, Job
from live_migration.coordinator.hypertable_gaps import jobs_to_make, read_absent, read_target
from live_migration.coordinator.hypertable_source import read_definitions
from live_migration.coordinator.hypertable_sql import job_statement
from live_migration.coordinator.made_definitions import load_made
from live_migration.coordinator.run import Run
from live_migration.coordinator.source_jobs import hold_target_jobs

_STEP = "jobs made"
_SOURCE_ID = "update _live_migration.target_jobs set source_id = $2 where id = $1"
_PAUSED = "select oid::int from _live_migration.source_changes where kind = 'job' and before = 'true' and not restored"


async def make_jobs(run: Run, source: asyncpg.Connection) -> None:
    """Make the jobs that the source has now, all off, and remember what each gets at the end; once.

    One that the target refuses is named in a warning and left out: users wait.
    """
    made = await load_made(run.target)
    if made is None or made.is_from_plain or made.is_flat or await steps.is_done(run.target, _STEP):
        return

    async def look() -> Definitions | None:
        async with source.transaction(isolation="repeatable_read", readonly=True):
            return await read_definitions(source)

    definitions = await run.patiently("reading the jobs", look)
    if definitions is None:
        return
    refused: list[str] = []
    async with run.target_transaction("making the jobs") as target:
        server = await read_target(target)
        assert server is not None
        absent = await read_absent(target, definitions, own_only=False)
        paused = {row[0] for row in await target.fetch(_PAUSED)}
        names = [each.name for each in definitions.aggregates]
        flags, ids = {}, []
        for job in jobs_to_make(definitions, absent):
            made_id = await _make(target, job, job_statement(job, names, server), refused)
            if made_id is not None:
                flags[made_id] = job.is_scheduled or job.id in paused
                ids.append((made_id, job.id))
        await hold_target_jobs(target, flags)
        await target.executemany(_SOURCE_ID, ids)
        await steps.finish(target, run.epoch, _STEP)
    if refused:
        run.reporter.warning(f"jobs are left out, for the target refuses them: {name_list(refused)}")


async def _make(target: asyncpg.Connection, job: Job, statement: str, refused: list[str]) -> int | None:
    try:
        async with target.transaction():
            made_id: int = await target.fetchval(statement)
            return made_id
    except asyncpg.PostgresError as error:
        refused.append(f"{job}: {refusal_of(error)}")
        return None
