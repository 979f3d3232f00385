"""The copy's sessions: each knows its backend, so that a successor can end it; opened when needed, and again when lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from live_migration.common.errors import LiveMigrationError
from live_migration.common.postgres import Side, connect, replica_role
from live_migration.common.state import Migration
from live_migration.common.tasks import is_set_within
from live_migration.common.telemetry import get_logger
from live_migration.consumer.copy_errors import server_errors
from live_migration.consumer.hypertables import session_settings
from live_migration.consumer.right_source import require_source

_BACKEND = "select backend_start from pg_stat_activity where pid = pg_backend_pid()"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """A server process; the start tells it from a later one with the same pid."""

    pid: int
    started: datetime


@dataclass(frozen=True, slots=True)
class CopySession:
    """A session and its backend. `copy_settings`: statements that a transaction which copies begins with."""

    connection: asyncpg.Connection
    backend: Backend
    copy_settings: tuple[str, ...] = ()

    def terminate(self) -> None:
        """Close the socket at once; the server rolls back."""
        self.connection.terminate()


async def open_session(uri: str, side: Side) -> CopySession:
    """Open a session; errors are those of `postgres.connect`."""
    connection = await connect(uri, side, application="live-migration copy", sends_bulk=side == "target")
    try:
        with server_errors(side, "opening a session"):
            started = await connection.fetchval(_BACKEND)
            settings = await _copy_settings(connection) if side == "target" else ()
    except BaseException:
        connection.terminate()
        raise
    return CopySession(connection, Backend(connection.get_server_pid(), started), settings)


async def _copy_settings(connection: asyncpg.Connection) -> tuple[str, ...]:
    """Give the statement that keeps triggers from firing, where the role may use it, and what hypertables need."""
    return tuple(filter(None, (await replica_role(connection), await session_settings(connection))))


class SessionPair:
    """A worker's session on either side, opened at first use."""

    def __init__(self, source_uri: str, target_uri: str, migration: Migration) -> None:
        self._uris: dict[Side, str] = {"source": source_uri, "target": target_uri}
        self._migration = migration
        self._sessions: dict[Side, CopySession] = {}

    async def open(self, side: Side) -> CopySession:
        session = self._sessions.get(side)
        if session is None or session.connection.is_closed():
            session = self._sessions[side] = await open_session(self._uris[side], side)
            if side == "source":
                await require_source(session.connection, self._migration)
        return session

    def give_away(self, side: Side) -> CopySession:
        """Hand the session over to the caller, who closes it; the next `open` makes another."""
        return self._sessions.pop(side)

    def discard(self) -> None:
        """Close both at once, whatever they are at."""
        while self._sessions:
            self._sessions.popitem()[1].terminate()


_SHARED_LOCK_TIMEOUT = "2s"


class SharedSession:
    """One session for several tasks, one at a time, for short statements only, which never wait long for a lock.

    A consumer that was stopped in a transaction keeps its locks; whoever is to end it must not hang on one of them.
    """

    def __init__(self, uri: str, side: Side) -> None:
        self._uri = uri
        self._side = side
        self._lock = asyncio.Lock()
        self._session: CopySession | None = None

    @asynccontextmanager
    async def use(self, doing: str) -> AsyncIterator[asyncpg.Connection]:
        """Have the session for a moment; `doing` goes into errors. After an error it is opened anew."""
        async with self._lock:
            if self._session is None or self._session.connection.is_closed():
                self._session = await open_session(self._uri, self._side)
                with server_errors(self._side, doing):
                    await self._session.connection.execute(f"set lock_timeout = '{_SHARED_LOCK_TIMEOUT}'")
            try:
                with server_errors(self._side, doing):
                    yield self._session.connection
            except BaseException:
                self.discard()
                raise

    def discard(self) -> None:
        if self._session:
            self._session.terminate()
            self._session = None


class Backoff:
    """Growing pauses after broken connections, with jitter, so that consumers do not come back all at once."""

    def __init__(self, first_seconds: float = 0.2, longest_seconds: float = 10.0) -> None:
        self._first = first_seconds
        self._longest = longest_seconds
        self._next = first_seconds

    def reset(self) -> None:
        self._next = self._first

    async def pause(self, error: LiveMigrationError, ended: asyncio.Event) -> None:
        """Log the error and wait, or return at once when `ended` is set."""
        seconds = self._next * random.uniform(0.7, 1.3)
        self._next = min(self._next * 2, self._longest)
        log.warning("trying again", reason=error.message, seconds=round(seconds, 1))
        await is_set_within(ended, seconds)
