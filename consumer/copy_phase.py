"""The copy phase of one consumer: workers that copy, builders that index, and what keeps their claims alive."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from live_migration.common import state
from live_migration.common.errors import LiveMigrationError, Retry
from live_migration.common.settings import Settings
from live_migration.common.state import Migration, Phase
from live_migration.common.tasks import TaskGroup
from live_migration.consumer.copy_context import CopyContext
from live_migration.consumer.copy_errors import CopyEnded, leading_error
from live_migration.consumer.index_builder import IndexBuilder
from live_migration.consumer.interrupts import Bell
from live_migration.consumer.lease_keeper import LeaseKeeper
from live_migration.consumer.part_copier import CopyWorker
from live_migration.consumer.phase_watch import wait_for_migration
from live_migration.consumer.sessions import Backoff, SharedSession
from live_migration.consumer.source_watch import SourceWatch


async def run_copy_phase(settings: Settings, worker: str, stop: asyncio.Event) -> None:
    """Copy tables and build indexes until the migration leaves the phase `copy`, or `stop` is set.

    Any number of consumers may run this at once. What was begun when it ends is given back to the others. Lost connections are
    made again, without end.

    Raises:
        LiveMigrationError: what no retry mends; Fenced is none of that.
    """
    control = SharedSession(settings.target_uri(), "target")
    beside = SharedSession(settings.source_uri(), "source")
    try:
        with _single_error():
            migration = await _read_migration(control, stop)
            if migration is not None and migration.phase is Phase.COPY:
                await _run(settings, worker, stop, migration, control, beside)
    finally:
        control.discard()
        beside.discard()


async def _run(
    settings: Settings,
    worker: str,
    stop: asyncio.Event,
    migration: Migration,
    control: SharedSession,
    beside: SharedSession,
) -> None:
    keeper = LeaseKeeper(worker, settings.lease, control, beside)
    watch = SourceWatch(beside, migration.id, settings.lock_timeout)
    ended, bell = asyncio.Event(), Bell()
    async with TaskGroup() as background:
        tasks = [
            background.create_task(keeper.run(ended)),
            background.create_task(watch.run(ended)),
            background.create_task(_end_with_phase(settings, stop, ended, keeper, bell)),
        ]
        async with TaskGroup() as workers:
            context = CopyContext(settings, migration, worker, control, keeper, watch, workers, ended, bell)
            for _ in range(settings.table_jobs):
                workers.create_task(CopyWorker(context).run())
            for _ in range(settings.index_jobs):
                workers.create_task(IndexBuilder(context).run())
        for task in tasks:
            task.cancel()


async def _read_migration(control: SharedSession, stop: asyncio.Event) -> Migration | None:
    backoff = Backoff()
    while not stop.is_set():
        try:
            async with control.use("reading the migration's state") as connection:
                return await state.read_migration(connection)
        except LiveMigrationError as error:
            if error.retry is Retry.STOP:
                raise
            await backoff.pause(error, stop)
    return None


async def _end_with_phase(
    settings: Settings, stop: asyncio.Event, ended: asyncio.Event, keeper: LeaseKeeper, bell: Bell
) -> None:
    """Wait for `stop` or for another phase, then end all work."""
    await wait_for_migration(settings, stop, _is_other_phase)
    ended.set()
    bell.ring()
    keeper.interrupt_all(CopyEnded("the consumer stops" if stop.is_set() else "the migration left the phase copy"))


def _is_other_phase(migration: Migration | None) -> bool:
    return migration is None or migration.phase is not Phase.COPY


@contextmanager
def _single_error() -> Iterator[None]:
    """Raise the one error that tells most in place of a group."""
    try:
        yield
    except BaseExceptionGroup as errors:
        raise leading_error(errors) from errors
