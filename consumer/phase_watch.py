"""The migration's phase as a consumer sees it: by notification, and by a look each second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import asyncpg

from live_migration.common import state
from live_migration.common.errors import LiveMigrationError, Retry
from live_migration.common.postgres import asking, session
from live_migration.common.settings import Settings
from live_migration.common.state import Migration
from live_migration.common.tasks import TaskGroup
from live_migration.consumer.sessions import Backoff

POLL_SECONDS = 1.0


async def wait_for_migration(
    settings: Settings, stop: asyncio.Event, is_wanted: Callable[[Migration | None], bool]
) -> Migration | None:
    """Wait until the migration on the target, None where there is none, `is_wanted`, and give it; None too once `stop` is set.

    A target that is away is waited for, without end.

    Raises:
        LiveMigrationError: what no retry mends.
    """
    backoff = Backoff()
    while not stop.is_set():
        try:
            return await _follow(settings, stop, is_wanted)
        except LiveMigrationError as error:
            if error.retry is Retry.STOP:
                raise
            await backoff.pause(error, stop)
    return None


async def _follow(
    settings: Settings, stop: asyncio.Event, is_wanted: Callable[[Migration | None], bool]
) -> Migration | None:
    async with session(settings.target_uri(), "target", application="live-migration phase") as connection:
        news = asyncio.Event()

        def wake(*_: object) -> None:
            news.set()

        connection.add_termination_listener(wake)
        with asking("target", "following the migration's phase"):
            await connection.add_listener(state.CHANNEL, wake)
        while not stop.is_set():
            news.clear()
            migration = await _read(connection)
            if is_wanted(migration):
                return migration
            await _first_of(stop, news)
    return None


async def _read(connection: asyncpg.Connection) -> Migration | None:
    with asking("target", "following the migration's phase"):
        return await state.read_migration(connection)


async def _first_of(first: asyncio.Event, second: asyncio.Event) -> None:
    """Return when either event is set, or when it is time to look again."""
    async with TaskGroup() as group:
        waiting = [group.create_task(event.wait()) for event in (first, second)]
        await asyncio.wait(waiting, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
