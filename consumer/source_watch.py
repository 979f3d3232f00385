"""What a consumer does on the source beside copying: the flush barrier, and looking whether somebody waits behind its locks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from uuid import UUID, uuid4

import asyncpg

from live_migration.common.control import MESSAGE_PREFIX, WalMessage
from live_migration.common.errors import LiveMigrationError, Retry
from live_migration.common.postgres import asking, session
from live_migration.common.tasks import kept_cancellation
from live_migration.common.telemetry import get_logger
from live_migration.consumer.claims import Claim
from live_migration.consumer.copy_errors import AttemptOver
from live_migration.consumer.lease_keeper import Lease
from live_migration.consumer.sessions import Backoff, SharedSession

log = get_logger(__name__)

LOOK_SECONDS = 1.0

_WAITERS = """
    select l.pid, blocker, coalesce(a.application_name, '') as application, a.query_start,
           extract(epoch from clock_timestamp() - l.waitstart)::float8 as seconds
    from pg_locks l left join pg_stat_activity a on a.pid = l.pid, unnest(pg_blocking_pids(l.pid)) as blocker
    where not l.granted and l.locktype = 'relation' and l.waitstart < clock_timestamp() - make_interval(secs => $2)
      and blocker = any($1::int[])
"""


async def write_flush_barrier(connection: asyncpg.Connection, migration_id: UUID) -> None:
    """Commit something that waits until the source's WAL is flushed up to it."""
    message = WalMessage(kind="heartbeat", migration_id=str(migration_id), id=str(uuid4()))
    await connection.execute("begin read write; set local synchronous_commit = local")
    await connection.fetchval(
        "select pg_logical_emit_message(true, $1, $2::text)", MESSAGE_PREFIX, message.model_dump_json()
    )
    await connection.execute("commit")


@asynccontextmanager
async def giving_way(source_uri: str, pid: int, patience_seconds: float, what: str) -> AsyncIterator[None]:
    """While inside, end the backend `pid` of ours as soon as somebody has waited for a lock of its for `patience_seconds`: all that come
    after queue behind whoever waits. What it was at work on ends with a lost connection then, and is tried again."""
    async with session(source_uri, "source", application="live-migration watch") as watcher:
        watching = asyncio.create_task(_end_when_waited_for(watcher, pid, patience_seconds, what))
        try:
            yield
        finally:
            watching.cancel()
            with kept_cancellation(), suppress(LiveMigrationError):  # where the source is away, so is the backend
                await watching


async def _end_when_waited_for(watcher: asyncpg.Connection, pid: int, patience_seconds: float, what: str) -> None:
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        with asking("source", "looking for those who wait behind us"):
            if row := await watcher.fetchrow(_WAITERS, [pid], patience_seconds):
                log.info("copy gives way", of=what, to=_waiter(row), seconds=round(row["seconds"], 1))
                await watcher.fetchval("select pg_terminate_backend($1::int)", pid)
                return


def _waiter(row: asyncpg.Record) -> str:
    return (
        f"{row['application'] or 'a session'} (pid {row['pid']}, its statement began at {row['query_start']:%H:%M:%S})"
    )


class SourceWatch:
    """One session on the source for a consumer, beside those that copy."""

    def __init__(self, session: SharedSession, migration_id: UUID, patience_seconds: float) -> None:
        self._session = session
        self._migration_id = migration_id
        self._patience_seconds = patience_seconds
        self._watched: dict[int, tuple[Lease[Claim], str]] = {}

    async def flush_barrier(self) -> None:
        """Return when the source has flushed its WAL up to what was the insert position at the call.

        A row that is visible may come from a commit that is not on disk yet, and would be undone by a crash; its
        transaction id would then come again with another row (DESIGN.md, section 4).
        """
        async with self._session.use("writing a flush barrier") as connection:
            await write_flush_barrier(connection, self._migration_id)

    @contextmanager
    def watching(self, pid: int, lease: Lease[Claim], what: str = "") -> Iterator[None]:
        """While inside, interrupt the work under `lease` when somebody waits for a lock that the backend `pid` holds.

        `what`: is copied, if it is more than what the lease is for.
        """
        self._watched[pid] = lease, what or str(lease.claim)
        try:
            yield
        finally:
            self._watched.pop(pid, None)

    async def run(self, ended: asyncio.Event) -> None:
        """Look once a second until cancelled; a source that is away is waited for."""
        backoff = Backoff()
        while True:
            try:
                if self._watched:
                    async with self._session.use("looking for those who wait behind us") as connection:
                        await self._look(connection)
                backoff.reset()
                await asyncio.sleep(LOOK_SECONDS)
            except LiveMigrationError as error:
                if error.retry is Retry.STOP:
                    raise
                await backoff.pause(error, ended)

    async def _look(self, connection: asyncpg.Connection) -> None:
        watched = dict(self._watched)
        for row in await connection.fetch(_WAITERS, list(watched), self._patience_seconds):
            lease, what = watched[row["blocker"]]
            reason = (
                f"copy of {what} gives way: on the source {_waiter(row)} waited {row['seconds']:.1f} s for its lock"
            )
            lease.interrupt.trigger(AttemptOver(reason, is_news=True))
            # Closing our socket may not be noticed by a backend for a while; this is.
            await connection.fetchval("select pg_terminate_backend($1::int)", row["blocker"])
