"""A session on the source beside the stream: how far its WAL is, and heartbeats while the stream is quiet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from uuid import uuid4

import asyncpg

from live_migration.common.control import MESSAGE_PREFIX, WalMessage
from live_migration.common.errors import LiveMigrationError
from live_migration.common.postgres import CONNECTION_ERRORS, asking, session
from live_migration.common.telemetry import get_logger

log = get_logger(__name__)

_PROBE_SECONDS = 2.0
_COMMAND_SECONDS = 30.0
_WAL_END = """
    select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_flush_lsn() end - '0/0'::pg_lsn
"""


class SourceProbe:
    """Asks for the end of the source's WAL, and writes a heartbeat when nothing was confirmed for an interval.

    Nothing depends on it: what fails is logged once and tried again.
    """

    def __init__(self, uri: str, migration_id: str, heartbeat_seconds: float, confirmed_lsn: Callable[[], int]) -> None:
        self._uri = uri
        self._migration_id = migration_id
        self._heartbeat_seconds = heartbeat_seconds
        self._confirmed_lsn = confirmed_lsn
        self._moved_at = time.monotonic()
        self._last_confirmed = 0
        self._complaint = ""
        self.source_lsn = 0
        """End of the source's WAL, as far as was asked."""

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            try:
                async with session(self._uri, "source", application="live-migration producer") as connection:
                    with asking("source", "looking at its WAL"):
                        await connection.execute(
                            "set synchronous_commit = local"
                        )  # a standby that is away must not stop us
                        await self._probe(connection)
            except (*CONNECTION_ERRORS, asyncpg.PostgresError, asyncpg.InterfaceError, LiveMigrationError) as error:
                self._complain(f"{type(error).__name__}: {error}")
            await asyncio.sleep(_PROBE_SECONDS)

    async def _probe(self, connection: asyncpg.Connection) -> None:
        while True:
            async with asyncio.timeout(_COMMAND_SECONDS):
                self.source_lsn = int(await connection.fetchval(_WAL_END))
                if self._is_quiet():
                    await self._beat(connection)
            self._complaint = ""
            await asyncio.sleep(min(_PROBE_SECONDS, self._heartbeat_seconds))

    def _is_quiet(self) -> bool:
        confirmed = self._confirmed_lsn()
        if confirmed > self._last_confirmed:
            self._last_confirmed = confirmed
            self._moved_at = time.monotonic()
        return time.monotonic() - self._moved_at >= self._heartbeat_seconds

    async def _beat(self, connection: asyncpg.Connection) -> None:
        message = WalMessage(kind="heartbeat", migration_id=self._migration_id, id=uuid4().hex)
        await connection.execute(
            "select pg_logical_emit_message(true, $1::text, $2::text)", MESSAGE_PREFIX, message.model_dump_json()
        )
        self._moved_at = time.monotonic()

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            log.warning("no heartbeat can be written to the source", error=complaint)
        self._complaint = complaint
