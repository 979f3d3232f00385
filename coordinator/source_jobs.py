"""TimescaleDB's jobs: paused on the source while its data moves, held on the target until the hand-over.

A job is changed by `alter_job` alone. That forgets a job's time zone unless it is given again, and then plans its next
start anew unless that is given, too (seen with 2.24 and 2.29).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common import state
from live_migration.common.errors import SourceError
from live_migration.common.postgres import asking, session
from live_migration.common.progress import name_list
from live_migration.common.relation import quote_identifier, quote_literal
from live_migration.common.settings import Settings
from live_migration.common.timescale import read_version, read_version_to_be
from live_migration.coordinator import archives
from live_migration.coordinator.job_owners import find_helpless, give_policies_to_owners
from live_migration.coordinator.run import APPLICATION, Run
from live_migration.producer.publication import execute_politely

_LOOK_AGAIN_SECONDS = 0.5
_QUIET_LOOKS = 3

_PLACES = """
    select n.nspname::text as schema,
           coalesce(to_regclass('_timescaledb_catalog.bgw_job'), to_regclass('_timescaledb_config.bgw_job'))::text as jobs
    from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'timescaledb'
"""

# Jobs below 1000 are TimescaleDB's own: telemetry, its history of jobs.
_JOBS = """
    select j.job_id as id, j.application_name::text as name, j.owner::text as owner, j.scheduled as is_scheduled,
           case when j.hypertable_name is null then format('%I.%I', j.proc_schema, j.proc_name)
                else format('%I.%I', j.hypertable_schema, j.hypertable_name) end as subject,
           j.proc_schema in ('_timescaledb_functions', '_timescaledb_internal') as is_policy,
           pg_has_role(j.owner, 'usage') or pg_has_role('pg_database_owner', 'usage') as is_alterable
    from timescaledb_information.jobs j where j.job_id >= 1000 order by j.job_id
"""

# A worker that was started this moment has no session yet, only the mark that its scheduler made.
_RUNNING = """
    select j.application_name::text as name,
           (select a.pid from pg_stat_activity a
            where a.datname = current_database() and a.application_name = j.application_name limit 1) as pid
    from {jobs} j left join _timescaledb_internal.bgw_job_stat s on s.job_id = j.id
    where j.id = any($1::int[])
      and (exists (select from pg_stat_activity a
                   where a.datname = current_database() and a.application_name = j.application_name)
           or (s.last_finish = '-infinity' and s.last_start > clock_timestamp() - interval '3 seconds'))
    order by j.id
"""

_ALTER = """
    select {schema}.alter_job(j.id, scheduled => {flag}, timezone => j.timezone,
                              next_start => coalesce({start}, case when j.timezone is not null then nullif(s.next_start, '-infinity') end))
    from {jobs} j left join _timescaledb_internal.bgw_job_stat s on s.job_id = j.id
    where j.id = {id} and j.scheduled <> {flag}
"""

_NOTED_STARTS = "next starts of jobs at the cutover"

# A job without such a row, as after a restore of the catalog, would run at once.
_STARTS = """
    select job_id as id, next_start::text as start from _timescaledb_internal.bgw_job_stat
    where next_start > clock_timestamp() and isfinite(next_start)
"""


@dataclass(frozen=True, slots=True)
class Job:
    """A job of a user's: a policy, which moves data, or an action of the user's own, which may.

    `name`: TimescaleDB's, with the job's id. `subject`: the hypertable or aggregate, else the procedure.
    `is_alterable`: whether our role has the owner's rights, which `alter_job` asks for.
    """

    id: int
    name: str
    owner: str
    is_scheduled: bool
    subject: str
    is_policy: bool
    is_alterable: bool

    def __str__(self) -> str:
        return f"{self.name} of {self.subject}"


@dataclass(frozen=True, slots=True)
class _Places:
    """Where TimescaleDB's functions and its table of jobs stand: both change with version and installation."""

    schema: str
    jobs: str

    def alter(self, job_id: int, *, scheduled: bool, start: str | None = None) -> str:
        """Give the statement that sets a job's flag, and nothing where the job is gone or has it; `start`: when it is to run first."""
        return _ALTER.format(
            schema=quote_identifier(self.schema),
            jobs=self.jobs,
            id=int(job_id),
            flag="true" if scheduled else "false",
            start=f"{quote_literal(start)}::timestamptz" if start else "null",
        )


async def read_jobs(connection: asyncpg.Connection) -> list[Job]:
    """Give a database's jobs by id, without TimescaleDB's own; none where it has no TimescaleDB."""
    if await _places(connection) is None:
        return []
    return [Job(**dict(row)) for row in await connection.fetch(_JOBS)]


async def find_jobs_to_pause(settings: Settings) -> list[Job]:
    """Give the scheduled jobs that stand in the way of a migration that has not begun; none where they may go on.

    They stand in the way where source and target have one version of TimescaleDB, for chunks then come over as they are.

    Raises:
        LiveMigrationError: source or target cannot be asked.
    """
    async with (
        session(settings.source_uri(), "source", application=f"{APPLICATION} jobs") as source,
        session(settings.target_uri(), "target", application=f"{APPLICATION} jobs") as target,
    ):
        with asking("target", "reading the migration's state"):
            if await state.read_migration(target) is not None:
                return []
        with asking("source", "listing jobs"):
            jobs = [job for job in await read_jobs(source) if job.is_scheduled]
            version = await read_version(source) if jobs else None
        with asking("target", "asking for TimescaleDB's version"):
            is_same = version is not None and await read_version_to_be(target, version) == version
    return jobs if is_same and not settings.flatten else []


async def pause_source_jobs(run: Run, source: asyncpg.Connection) -> list[Job]:
    """Pause the source's jobs, each recorded before, and wait until none of them runs any more; give those that were paused.

    May be called again after a crash.

    Raises:
        SourceError: our role may not alter all of them, then none is changed; or a run did not end within
            `settings.slot_timeout` seconds, then all are given back.
    """
    with asking("source", "listing jobs"):
        places, jobs = await _places(source), await read_jobs(source)
    scheduled = [job for job in jobs if job.is_scheduled]
    if places is None or not jobs:
        return []
    await _require_rights(source, scheduled)
    for job in scheduled:
        await _pause(run, source, places, job)
    if scheduled:
        run.reporter.note(f"paused on the source until `clean`: {name_list(scheduled)}")
    await _await_runs(run, source, places, await paused_ids(run.target))
    return scheduled


async def _pause(run: Run, source: asyncpg.Connection, places: _Places, job: Job) -> None:
    async with run.target_transaction("recording a change on the source"):
        await run.target.execute(
            """insert into _live_migration.source_changes (kind, oid, object, before, after)
               select 'job', $1, $2, 'true', 'false'
               where not exists (select from _live_migration.source_changes
                                 where kind = 'job' and oid = $1 and not restored)""",
            job.id,
            str(job),
        )
    await _alter(source, places, job.id, str(job), scheduled=False, lock_timeout=run.settings.lock_timeout)


async def _alter(
    source: asyncpg.Connection, places: _Places, job_id: int, name: str, *, scheduled: bool, lock_timeout: float
) -> None:
    doing = f"{'scheduling' if scheduled else 'pausing'} job {name}"
    statement = places.alter(job_id, scheduled=scheduled)
    await execute_politely(source, [statement], lock_timeout=lock_timeout, doing=doing)


async def _require_rights(source: asyncpg.Connection, jobs: Sequence[Job]) -> None:
    if foreign := [job for job in jobs if not job.is_alterable]:
        with asking("source", "asking for our role"):
            role = await source.fetchval("select current_user::text")
        raise SourceError(
            f"role {role} on the source lacks the rights of the owners of jobs that must be paused: "
            f"{name_list(f'{job} ({job.owner})' for job in foreign)}",
            hint=rights_hint(role, foreign),
        )


def rights_hint(role: str, jobs: Sequence[Job]) -> str:
    """Say how a role gets to pause jobs that others own."""
    owners = ", ".join(sorted({job.owner for job in jobs}))
    return (
        f"`grant {owners} to {role}`, or let the owners pause them and schedule them again afterwards: "
        f"`select alter_job({jobs[0].id}, scheduled => false)`."
    )


async def _await_runs(run: Run, source: asyncpg.Connection, places: _Places, ids: Sequence[int]) -> None:
    """Wait until no paused job runs; seen several times in a row, for the scheduler learns of our change a moment late."""
    began, said, quiet = time.monotonic(), "", 0
    query = _RUNNING.format(jobs=places.jobs)
    while quiet < _QUIET_LOOKS:
        with asking("source", "looking for jobs that run"):
            rows = await source.fetch(query, ids)
        running = name_list(f"{row['name']}" + (f" (pid {row['pid']})" if row["pid"] else "") for row in rows)
        if rows and time.monotonic() - began > run.settings.slot_timeout:
            await give_jobs_back(run.target, source, run.settings)
            raise SourceError(
                f"jobs on the source were still running after {run.settings.slot_timeout:g} s: {running}",
                hint="All jobs are scheduled again. Try at a time when they are done, or with a longer --slot-timeout.",
            )
        if rows and running != said:
            run.reporter.note(f"waiting for runs of jobs on the source that are under way: {running}")
            said = running
        quiet = 0 if rows else quiet + 1
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)


async def paused_ids(target: asyncpg.Connection) -> list[int]:
    """Give the source's jobs that we paused and have not given back."""
    with asking("target", "reading what was changed on the source"):
        rows = await target.fetch(
            "select oid::int as id from _live_migration.source_changes where kind = 'job' and not restored order by 1"
        )
    return [row["id"] for row in rows]


async def give_jobs_back(target: asyncpg.Connection, source: asyncpg.Connection, settings: Settings) -> list[str]:
    """Schedule the jobs again that we paused; give a line for each: one that somebody changed or dropped since is left."""
    with asking("target", "reading what was changed on the source"):
        rows = await target.fetch(
            """select id, oid::int as job_id, object from _live_migration.source_changes
               where kind = 'job' and not restored order by id"""
        )
    lines = []
    for row in rows:
        lines.append(await _give_back(source, row["job_id"], row["object"], settings.lock_timeout))
        with asking("target", "recording what was given back"):
            await target.execute("update _live_migration.source_changes set restored = true where id = $1", row["id"])
    return lines


async def _give_back(source: asyncpg.Connection, job_id: int, name: str, lock_timeout: float) -> str:
    with asking("source", "listing jobs"):
        places = await _places(source)
        job = next((job for job in await read_jobs(source) if job.id == job_id), None)
    if places is None or job is None:
        return f"job {name} is gone from the source, dropped by somebody else"
    if job.is_scheduled:
        return f"job {name} on the source is scheduled already, by somebody else; it was left so"
    if not job.is_alterable:
        await _require_rights(source, [job])
    await _alter(source, places, job_id, name, scheduled=True, lock_timeout=lock_timeout)
    return f"job {name} on the source is scheduled again"


async def hold_target_jobs(target: asyncpg.Connection, flags: Mapping[int, bool] | None = None) -> list[Job]:
    """Set all jobs of the target off, in the caller's transaction, and remember what each gets at the end; give them.

    Call it in the transaction of `timescaledb_post_restore()`, before any can start. May be called again: what was
    remembered first holds.

    Args:
        flags: the source's flag of each job, by its id on the target. None: the ids are the source's, as after a
            restore of its catalog, and a job that we paused there was scheduled.
    """
    places = await _places(target)
    if places is None:
        return []
    if flags is None:
        rows = await target.fetch(
            "select oid::int as id, before from _live_migration.source_changes where kind = 'job' and not restored"
        )
        flags = {row["id"]: row["before"] == "true" for row in rows}
    jobs = await read_jobs(target)
    for job in jobs:
        await target.execute(
            """insert into _live_migration.target_jobs (id, name, is_scheduled) values ($1, $2, $3)
               on conflict (id) do nothing""",
            job.id,
            str(job),
            flags.get(job.id, job.is_scheduled),
        )
        await target.execute(places.alter(job.id, scheduled=False))
    return jobs


async def held_target_jobs(target: asyncpg.Connection) -> list[str]:
    """Give the names of the target's jobs that are still off because we hold them."""
    rows = await target.fetch(
        "select id, name from _live_migration.target_jobs where is_scheduled and not is_released order by id"
    )
    off = {job.id for job in await read_jobs(target) if not job.is_scheduled} if rows else set()
    return [row["name"] for row in rows if row["id"] in off]


async def held_target_ids(target: asyncpg.Connection) -> list[int]:
    """Give the jobs of the target that get their schedule with `release_target_jobs`."""
    with asking("target", "reading the jobs that are held"):
        rows = await target.fetch(
            "select id from _live_migration.target_jobs where is_scheduled and not is_released order by id"
        )
    return [row["id"] for row in rows]


async def release_target_jobs(run: Run) -> list[str]:
    """Give each job of the target that was held the flag of the source; give the names of those that are scheduled now.

    Each runs first when it would have run next on the source; one that is due there runs at once. Policies are given to whom their tables
    belong. One that is gone meanwhile is named in a warning, and so is one whose owner cannot run it.
    """
    scheduled, gone, helpless = {}, [], {}
    async with run.target_transaction("giving the target's jobs their schedule") as target:
        starts = await _noted_starts(target)
        places = await _places(target)
        present = {job.id for job in await read_jobs(target)}
        rows = await target.fetch(
            """select id, name, is_scheduled, coalesce(source_id, id) as source_id from _live_migration.target_jobs
               where not is_released order by id"""
        )
        for row in rows:
            if places is None or row["id"] not in present:
                gone.append(row["name"])
            elif row["is_scheduled"]:
                await target.execute(places.alter(row["id"], scheduled=True, start=starts.get(row["source_id"])))
                scheduled[row["id"]] = row["name"]
        if places is not None:  # last: their owners alone may alter them from there on
            await give_policies_to_owners(target, places.jobs, [row["id"] for row in rows])
            helpless = await find_helpless(target, places.jobs, list(scheduled))
        await target.execute("update _live_migration.target_jobs set is_released = true")
    if gone:
        run.reporter.warning(f"jobs are gone from the target, dropped by somebody else: {name_list(gone)}")
    if helpless:
        run.reporter.warning(
            "jobs of the target whose owners may not log in, or lack the rights of whom their tables belong to, will fail: "
            f"{name_list(f'{scheduled[id]} ({owner})' for id, owner in helpless.items())}"
        )
    return list(scheduled.values())


async def note_starts(run: Run, source: asyncpg.Connection) -> None:
    """Note when the source's jobs are to run next, of those that are not due: nobody may be able to ask after the hand-over."""
    with asking("source", "reading when jobs are to run"):
        starts = await read_starts(source)
    async with run.target_transaction("noting when jobs are to run") as target:
        await archives.keep(
            target,
            _NOTED_STARTS,
            json.dumps(list(starts.items())).encode(),
        )


async def read_starts(source: asyncpg.Connection) -> dict[int, str]:
    """Give when jobs are to run next, by id, of those that are not due."""
    if await _places(source) is None:
        return {}
    return {row["id"]: row["start"] for row in await source.fetch(_STARTS)}


async def _noted_starts(target: asyncpg.Connection) -> dict[int, str]:
    content = await archives.read(target, _NOTED_STARTS)
    return dict(json.loads(content)) if content else {}


async def _places(connection: asyncpg.Connection) -> _Places | None:
    row = await connection.fetchrow(_PLACES)
    return _Places(row["schema"], row["jobs"]) if row and row["jobs"] else None
