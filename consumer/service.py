"""The consumer service: follows the migration from phase to phase, and tells that it lives."""

from __future__ import annotations

import asyncio

from live_migration.common import state
from live_migration.common.errors import LiveMigrationError, Retry
from live_migration.common.postgres import asking, session
from live_migration.common.settings import Settings
from live_migration.common.state import Migration, Phase
from live_migration.common.tasks import TaskGroup
from live_migration.common.telemetry import get_logger
from live_migration.consumer.apply_phase import run_apply_phase
from live_migration.consumer.copy_errors import leading_error
from live_migration.consumer.copy_phase import run_copy_phase
from live_migration.consumer.phase_watch import wait_for_migration
from live_migration.consumer.sessions import Backoff

HEARTBEAT_SECONDS = 3.0
_AT_WORK = frozenset({Phase.COPY, Phase.REPLAY, Phase.CUTOVER, Phase.DONE})

log = get_logger(__name__)


async def run_consumer(settings: Settings, stop: asyncio.Event) -> None:
    """Work for the migration on the target until it is done, or `stop` is set; wait for one where there is none.

    Raises:
        LiveMigrationError: what no retry mends. Lost connections are made again, without end.
    """
    worker = state.worker_id("consumer")
    settings.kafka_servers()  # missing ones are told now, and not after the copy
    settings.source_uri()
    try:
        async with TaskGroup() as group:
            heartbeat = group.create_task(_tell_alive(settings, worker))
            await _follow_phases(settings, worker, stop)
            heartbeat.cancel()
    except BaseExceptionGroup as errors:
        raise leading_error(errors) from errors


async def _follow_phases(settings: Settings, worker: str, stop: asyncio.Event) -> None:
    backoff = Backoff()
    log.info("consumer waits for a migration", worker=worker)
    while not stop.is_set():
        try:
            migration = await wait_for_migration(settings, stop, _has_work)
            if migration is None or migration.phase is Phase.DONE:
                log.info("consumer ends", worker=worker, is_done=migration is not None)
                return
            await _work(settings, worker, stop, migration)
            backoff.reset()
        except LiveMigrationError as error:
            if error.retry is Retry.STOP:
                raise
            await backoff.pause(error, stop)


def _has_work(migration: Migration | None) -> bool:
    return migration is not None and migration.phase in _AT_WORK


async def _work(settings: Settings, worker: str, stop: asyncio.Event, migration: Migration) -> None:
    log.info("consumer works", worker=worker, phase=migration.phase.value)
    if migration.phase is Phase.COPY:
        await run_copy_phase(settings, worker, stop)
    else:
        await run_apply_phase(settings, worker, stop)


async def _tell_alive(settings: Settings, worker: str) -> None:
    """Renew our row in `workers` every few seconds, whatever becomes of the connection."""
    while True:
        try:
            async with session(settings.target_uri(), "target", application="live-migration heartbeat") as connection:
                while True:
                    with asking("target", "sending a heartbeat"):
                        if await state.exists(connection):
                            await state.heartbeat(connection, worker, "consumer")
                    await asyncio.sleep(HEARTBEAT_SECONDS)
        except LiveMigrationError as error:
            log.debug("heartbeat not sent", reason=error.message)
            await asyncio.sleep(HEARTBEAT_SECONDS)
