"""Who keeps us waiting on the target: locks there are waited for as long as it takes, so whoever holds one is named."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import asyncpg

from live_migration.common import state
from live_migration.common.errors import LiveMigrationError
from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.coordinator.beside import beside
from live_migration.coordinator.run import APPLICATION, Run

_INTERVAL_SECONDS = 2.0

_WHO = """
    case when b.pid is null then 'a prepared transaction, see pg_prepared_xacts'
         else format('pid %s (%s, user %s%s%s)', b.pid, coalesce(nullif(b.application_name, ''), nullif(b.backend_type, 'client backend'), 'no application name'),
                     coalesce(b.usename, 'of nobody'), ', ' || b.state,
                     ', its transaction began at ' || to_char(b.xact_start, 'YYYY-MM-DD HH24:MI:SS TZ')) end
"""
# A lane, or a copy, of ours that is waited for ends by itself.
_BLOCKERS = f"""
    select distinct coalesce(b.pid, 0) as pid, {_WHO} as who
    from pg_stat_activity a cross join lateral unnest(pg_blocking_pids(a.pid)) as blocking (pid)
    left join pg_stat_activity b on b.pid = blocking.pid
    where a.datname = current_database() and a.usename = current_user and starts_with(a.application_name, $1)
      and (a.pid = $2 or right(a.application_name, length($3::text)) = $3::text) and not coalesce(starts_with(b.application_name, $1), false)
    order by 1
"""
_OPEN = f"""
    select {_WHO} as who
    from pg_stat_activity b
    where b.datname = current_database() and b.pid <> pg_backend_pid() and not starts_with(b.application_name, $1) and exists (
        select from pg_locks l join pg_class c on c.oid = l.relation join pg_namespace n on n.oid = c.relnamespace
        where l.pid = b.pid and l.locktype = 'relation' and l.database = (select oid from pg_database where datname = current_database())
          and c.relkind in ('r', 'p') and n.nspname !~ '^pg_' and n.nspname not in ('information_schema', '_live_migration'))
    union all
    select format('prepared transaction %s (user %s, prepared at %s)', gid, owner, to_char(prepared, 'YYYY-MM-DD HH24:MI:SS TZ'))
    from pg_prepared_xacts where database = current_database()
"""


async def naming_blockers(run: Run, what: str, work: Coroutine[None, None, None]) -> None:
    """Do work on the target; whoever it waits for there meanwhile is named. `what` waits, as people read it."""
    await beside(work, [_watch(run, what)])


async def warn_of_open_transactions(run: Run) -> None:
    """Name who has transactions open on the target that have touched tables of its users: the hand-over may have to wait for them."""
    with asking("target", "looking at open transactions"):
        rows = await run.target.fetch(_OPEN, APPLICATION)
    who = name_list(row["who"] for row in rows)
    run.reporter.warn_on_change(
        "open on the target",
        f"transactions are open on the target, whose locks the hand-over may have to wait for: {who}. End them, or their sessions"
        if rows
        else "",
    )


async def _watch(run: Run, what: str) -> None:
    """Look at who blocks us, whatever becomes of the sessions that look; never returns."""
    blockers = _Blockers(run, what)
    while True:
        try:
            async with run.target_session("blockers") as target:
                while True:
                    with asking("target", "looking who blocks us"):
                        await blockers.look(target)
                    await asyncio.sleep(_INTERVAL_SECONDS)
        except LiveMigrationError:  # whoever waits learns of a target that is away; a look less ends no hand-over
            await asyncio.sleep(_INTERVAL_SECONDS)


class _Blockers:
    """Names who blocks us in two looks running, once until others do."""

    def __init__(self, run: Run, what: str) -> None:
        self._run = run
        self._what = what
        self._seen: dict[int, str] = {}
        self._is_said = False

    async def look(self, target: asyncpg.Connection) -> None:
        tag = state.session_tag(self._run.migration.owner or "")
        rows = await target.fetch(_BLOCKERS, APPLICATION, self._run.target.get_server_pid(), tag)
        found = {row["pid"]: row["who"] for row in rows}
        lasting = {pid: found[pid] for pid in found if pid in self._seen}
        self._seen = found
        if lasting:
            self._is_said = True
            ends = "; ".join(f"select pg_terminate_backend({pid})" for pid in lasting if pid)
            self._run.reporter.warn_on_change(
                "blocked on the target",
                f"{self._what} waits on the target for a lock of {name_list(lasting.values())}. End that transaction, or its session"
                + (f": {ends}" if ends else ""),
            )
        elif self._is_said and not found:
            self._is_said = False
            self._run.reporter.warn_on_change("blocked on the target", "")
            self._run.reporter.note(f"{self._what} goes on: nobody on the target is in the way any more")
