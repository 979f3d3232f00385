"""What the tasks of one consumer's copy share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import asyncpg

from live_migration.common.errors import Fenced, LiveMigrationError, Retry
from live_migration.common.postgres import terminate_backend
from live_migration.common.settings import Settings
from live_migration.common.state import Migration, record_event
from live_migration.common.tasks import TaskGroup
from live_migration.common.telemetry import get_logger
from live_migration.consumer.claim_endings import give_part_back, give_table_back, show_error
from live_migration.consumer.claims import Claimant, PartClaim, TableClaim
from live_migration.consumer.copy_errors import AttemptOver, CopyDeferred, CopyEnded, TableStopped
from live_migration.consumer.interrupts import Bell
from live_migration.consumer.lease_keeper import Lease, LeaseKeeper
from live_migration.consumer.sessions import Backoff, CopySession, SessionPair, SharedSession
from live_migration.consumer.source_watch import SourceWatch

IDLE_SECONDS = 0.5
"""How often a worker without work looks for some."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CopyContext:
    """`control`: the target session for state; `workers`: the group in which all work runs; `ended`: leave off."""

    settings: Settings
    migration: Migration
    owner: str
    control: SharedSession
    keeper: LeaseKeeper
    watch: SourceWatch
    workers: TaskGroup
    ended: asyncio.Event
    bell: Bell

    def claimant(self, target: CopySession, source: CopySession | None) -> Claimant:
        return Claimant(self.owner, target.backend, source.backend if source else None, self.settings.lease)

    async def work(self, pair: SessionPair, work_once: Callable[[], Awaitable[bool]]) -> None:
        """Call `work_once`, which tells whether there was anything to do, until the phase is over; servers that are away are
        waited for.

        Raises:
            LiveMigrationError: what no retry mends.
        """
        backoff = Backoff()
        try:
            while not self.ended.is_set():
                try:
                    is_busy = await work_once()
                except LiveMigrationError as error:
                    if error.retry is Retry.STOP:
                        raise
                    pair.discard()
                    await backoff.pause(error, self.ended)
                else:
                    backoff.reset()
                    if not is_busy:
                        await self.bell.wait(IDLE_SECONDS)
        finally:
            pair.discard()

    async def set_back(
        self, lease: Lease[TableClaim] | Lease[PartClaim], error: LiveMigrationError, target: CopySession | None = None
    ) -> None:
        """Write down that a copy failed, so that it is done again: at once, later, or when somebody mended something.

        `target`, given up already, is ended: it may wait for a lock there, which a backend does deaf to its client.

        Raises:
            LiveMigrationError: `error` itself where it is to end the consumer; ConnectionLost when the target is away: the
                claim is freed by a keeper then.
        """
        claim = lease.claim
        if error.retry is Retry.STOP and not isinstance(error, Fenced):
            raise error
        async with self.control.use(f"giving {claim} back") as connection:
            if target is not None:
                await terminate_backend(connection, target.backend.pid, target.backend.started)
            if isinstance(claim, TableClaim):
                await self._give_table_back(connection, claim, error)
            else:
                await self._give_part_back(connection, claim, error)
        self.bell.ring()

    async def _give_part_back(
        self, connection: asyncpg.Connection, claim: PartClaim, error: LiveMigrationError
    ) -> None:
        await give_part_back(connection, claim, self.owner)
        log.info("part set back", table=str(claim.name), part=claim.part, reason=error.message)
        if isinstance(error, AttemptOver):
            await self._give_table_back(connection, claim, error)
        elif isinstance(error, TableStopped):
            await show_error(connection, claim, error)

    async def _give_table_back(
        self, connection: asyncpg.Connection, claim: TableClaim | PartClaim, error: LiveMigrationError
    ) -> None:
        if isinstance(error, TableStopped):
            delay, shown = error.retry_seconds, error
        else:
            delay, shown = self.settings.lock_timeout * random.uniform(0.5, 1.5), None
        is_news = await give_table_back(
            connection,
            claim,
            0.0 if isinstance(error, CopyEnded) else delay,
            error=shown.message if shown else None,
            hint=shown.hint if shown else None,
        )
        if is_news:
            log.info("table set back", table=str(claim.name), attempt=claim.attempt, reason=error.message)
        # Whom a part gave way to is said even where another part, which missed the first's snapshot, was quicker to set the table back.
        if (shown and is_news) or (isinstance(error, CopyDeferred) and error.is_news):
            await record_event(connection, "warning", error.message)
