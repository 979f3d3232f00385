"""What every phase of one run of the conductor needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TypeVar

import asyncpg

from live_migration.common import state
from live_migration.common.catalog import TableInfo, list_tables
from live_migration.common.errors import LiveMigrationError, SourceError
from live_migration.common.postgres import LOCKED, asking, is_dropped_meanwhile, session, set_lock_timeout
from live_migration.common.settings import Settings
from live_migration.common.state import Migration, Phase
from live_migration.consumer.hypertables import leave_restoring
from live_migration.coordinator.control_topic import announce_publication_change
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.phases import is_transition_allowed
from live_migration.coordinator.steps import has_passed_barrier, require_role

_T = TypeVar("_T")
APPLICATION = "live-migration"
"""Our sessions' application_name begins with this."""

_DROPPED_ATTEMPTS = 50


@asynccontextmanager
async def target_session(settings: Settings, owner: str, what: str) -> AsyncIterator[asyncpg.Connection]:
    """Open a session of the coordinator `owner` on the target, which its successor ends by its name."""
    application = f"{APPLICATION} {what} {state.session_tag(owner)}"
    async with session(settings.target_uri(), "target", application=application) as target:
        with asking("target", "setting up a session"):
            await leave_restoring(target)
        yield target


@dataclass(slots=True)
class Run:
    """One coordinator's hold of a migration. `target` is the session of its main task, `epoch` that of its lease."""

    settings: Settings
    reporter: Reporter
    target: asyncpg.Connection
    epoch: int
    migration: Migration
    telling: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever tells the producer of a change: the newest word must be the last one."""
    following: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever brings newcomers: the watcher, or the cutover."""
    apart: set[tuple[int, int, int]] = field(default_factory=set)
    """Chunks that are gone and newer ones that are known to share no row: by oid, and what their ranges were then."""

    @property
    def phase(self) -> Phase:
        """The migration's phase, which only we move."""
        return self.migration.phase

    @asynccontextmanager
    async def source_session(self, what: str) -> AsyncIterator[asyncpg.Connection]:
        """Open a session on the source that waits for locks no longer than the settings allow; our successor ends it by its name."""
        application = f"{APPLICATION} {what} {state.session_tag(self.migration.owner or '')}"
        async with session(self.settings.source_uri(), "source", application=application) as source:
            with asking("source", "setting up a session"):
                await source.execute(set_lock_timeout(self.settings.lock_timeout, local=False))
            yield source

    async def patiently(self, doing: str, look: Callable[[], Awaitable[_T]]) -> _T:
        """Look at the source's catalogs, again as long as somebody locks a table so that it cannot be looked at."""
        for attempt in count():
            try:
                with asking("source", doing):
                    return await look()
            except SourceError as error:
                if is_dropped_meanwhile(error.__cause__) and attempt < _DROPPED_ATTEMPTS:
                    continue
                if not isinstance(error.__cause__, LOCKED):
                    raise
            if attempt % 5 == 0:
                self.reporter.note(f"{doing} waits for somebody who locks a table on the source")
            await asyncio.sleep(0.5)
        raise AssertionError

    async def list_tables(self, source: asyncpg.Connection) -> list[TableInfo]:
        """Give the source's tables."""
        return await self.patiently("listing tables", lambda: list_tables(source))

    def target_session(self, what: str) -> AbstractAsyncContextManager[asyncpg.Connection]:
        """Open another session on the target."""
        return target_session(self.settings, self.migration.owner or "", what)

    @asynccontextmanager
    async def target_transaction(self, doing: str) -> AsyncIterator[asyncpg.Connection]:
        """Run a transaction on the target that commits only while we are the coordinator."""
        with asking("target", doing):
            async with self.target.transaction():
                yield self.target
                await require_role(self.target, self.epoch)

    async def reload(self) -> None:
        """Read the migration's row anew."""
        self.migration = await state.require_migration(self.target)

    async def enter(self, phase: Phase) -> None:
        """Move the migration to a phase, in a transaction where one is open, and tell everybody."""
        if not is_transition_allowed(self.phase, phase):
            raise LiveMigrationError(f"a migration cannot go from phase {self.phase.value} to {phase.value}")
        with asking("target", f"entering phase {phase.value}"):
            await state.set_phase(self.target, self.epoch, phase)

    async def publications_changed(self, target: asyncpg.Connection) -> None:
        """Tell the producer that a publication was changed; `target` is the calling task's session.

        Nobody is told behind the last barrier, where the broker may be gone: what is read then is applied no more.
        """
        if await has_passed_barrier(target):
            return
        async with self.telling:
            change = await announce_publication_change(self.settings, target, self.epoch)
            # The row may have been read anew meanwhile, in another phase.
            self.migration = replace(self.migration, publication_change=change)
