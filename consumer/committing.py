"""Transactions of the source that stand in its WAL and are in no snapshot yet: a commit is streamed before it is visible, for long where it waits for a
synchronous standby. A lane that has applied one must not copy a chunk anew under a snapshot without it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import asyncpg

from live_migration.common.state import record_event
from live_migration.common.telemetry import get_logger

log = get_logger(__name__)

_LOOK_AGAIN_SECONDS = 0.05
TELL_SECONDS = 5.0
"""How long is waited before anybody is told."""

# The newest transactions are in no list of a snapshot, which ends below the last one that has ended.
# Who commits a prepared transaction has no xid of its own, and nothing says which one it is. A session that we may not look into is taken for
# one unless it holds a lock on a relation, which COMMIT PREPARED does not; a transaction that merely stays prepared is waited for by nobody.
# Idle are clients alone: workers of a subscription call themselves so while they commit what was streamed or prepared.
_COMMITTING = """
    with ours as (select current_database() as name), activity as (
        select *, state like 'idle%' and backend_type = 'client backend' and wait_event is distinct from 'SyncRep' as is_idle
        from pg_stat_activity
    ), running as (
        select x::xid as x from pg_snapshot_xip(pg_current_snapshot()) x
        union
        select backend_xid from activity
        where backend_xid is not null and pid <> pg_backend_pid() and coalesce(backend_type, '') <> 'autovacuum worker'
    ), found as (
        select 'xid ' || x as key, a.pid, a.application_name, a.usename
        from running cross join ours left join activity a on a.backend_xid = x
        where not exists (select from pg_prepared_xacts p where p.transaction = x)
          and a.is_idle is not true and coalesce(a.datname, ours.name) = ours.name
        union all
        select 'virtual ' || l.virtualtransaction, a.pid, a.application_name, a.usename
        from pg_locks l join activity a on a.pid = l.pid join ours on ours.name = a.datname
        where l.locktype = 'virtualxid' and l.granted and l.mode = 'ExclusiveLock' and l.pid <> pg_backend_pid()
          and a.backend_xid is null and exists (select from pg_prepared_xacts p where p.database = ours.name)
          and case when a.state is null or a.state = 'disabled'
                   then not exists (select from pg_locks r where r.pid = l.pid and r.locktype = 'relation')
                   else a.is_idle is not true and (a.wait_event = 'SyncRep' or coalesce(a.query, '') = '' or a.query ~* 'commit.*prepared') end
    )
    select key, case when pid is null then 'a transaction of nobody who is connected'
                     else format('pid %s (%s, user %s)', pid, coalesce(nullif(application_name, ''), 'no application name'), usename) end as who
    from found
"""
"""Transactions of this database that are under way, without those that wait for their client."""


_HAS_APPLIED = "select exists (select from _live_migration.checkpoints where commit_lsn > '0/0')"


async def await_committing(connection: asyncpg.Connection, on_wait: Callable[[str], Awaitable[None]]) -> None:
    """Return when every transaction that may be about to become visible has; outside of a transaction.

    `on_wait` is told once whom it waits for, after some seconds.
    """
    began, is_told = time.monotonic(), False
    waiting = await _look(connection)
    while waiting:
        if not is_told and time.monotonic() - began >= TELL_SECONDS:
            is_told = True
            await on_wait(f"waits for transactions on the source that are about to end: {', '.join(waiting.values())}")
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        now = await _look(connection)
        waiting = {key: who for key, who in waiting.items() if key in now}


async def await_applied(source: asyncpg.Connection, target: asyncpg.Connection, what: str) -> None:
    """Wait likewise before tables are copied where lanes have applied changes before: they do not apply them to the copy again."""

    async def tell(message: str) -> None:
        log.info("copy waits", table=what, reason=message)
        await record_event(target, "warning", f"the copy of {what} {message}")

    if await target.fetchval(_HAS_APPLIED):
        await await_committing(source, tell)


async def _look(connection: asyncpg.Connection) -> dict[str, str]:
    return {row["key"]: row["who"] for row in await connection.fetch(_COMMITTING)}
