"""`clean`: give back everything that a migration made or changed, on either side and on the broker."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable

import asyncpg
from aiokafka import errors as kafka_errors

from live_migration.common import kafka, state
from live_migration.common.errors import ConnectionLost, LiveMigrationError, SlotError, SourceError, TargetError
from live_migration.common.postgres import asking, session
from live_migration.common.progress import name_list
from live_migration.common.settings import Settings
from live_migration.common.state import Migration, Phase
from live_migration.coordinator.control_topic import announce_end
from live_migration.coordinator.cutover import is_coordinator_alive
from live_migration.coordinator.dead_letters import count_letters
from live_migration.coordinator.giving_back import give_back
from live_migration.coordinator.prepare import remove_from_source
from live_migration.coordinator.run import APPLICATION
from live_migration.coordinator.source_jobs import held_target_jobs
from live_migration.producer.slot import identify_system, read_slot

Note = Callable[[str], None]
_TELL_SECONDS = 10.0
"""For the word to the producer: a broker that hangs must not keep the slot, and with it the source's WAL."""


async def clean(settings: Settings, *, prune: bool, note: Note) -> None:
    """Remove slot, publications, topics and state, and restore what was changed on the source; parts that are missing are passed over.

    The state goes last, so that an attempt that failed half way can be repeated. `prune` removes `settings.dir`, too.

    Raises:
        TargetError: a coordinator is alive, or the target holds another migration, or its jobs are held.
        SourceError: SOURCE is not the migration's source.
    """
    async with session(settings.target_uri(), "target", application=f"{APPLICATION} clean") as target:
        with asking("target", "reading the migration's state"):
            migration = await state.read_migration(target)
        if migration is not None:
            await _require_ours(settings, target, migration)
            await _tell_producer(settings, migration, note)
        await _clean_source(settings, target, migration, note)
        await _clean_kafka(settings, migration, prune, note)
        await _clean_target(target, migration, note)
    if prune:
        await asyncio.to_thread(shutil.rmtree, settings.dir, ignore_errors=True)
        note(f"removed {settings.dir}")


async def _require_ours(settings: Settings, target: asyncpg.Connection, migration: Migration) -> None:
    if migration.name != settings.name:
        raise TargetError(
            f"the target holds another migration, named {migration.name}", hint=f"Give --name {migration.name}."
        )
    with asking("target", "looking for a coordinator"):
        is_alive = await is_coordinator_alive(target)
    if is_alive:
        raise TargetError(
            f"the migration is being run by {migration.owner}", hint="Stop that `live-migration migrate` first."
        )
    with asking("target", "looking for jobs that are held"):
        jobs = await held_target_jobs(target) if migration.phase is Phase.DONE else []
    if jobs:
        raise TargetError(
            f"the target is in charge, but what follows the hand-over is not finished: its jobs are still off: {name_list(jobs)}",
            hint="Run `live-migration migrate` again, which finishes it without the source; then clean.",
        )
    identity = await identify_system(settings.source_uri())
    if (identity.system_identifier, identity.database) != (migration.source_system, migration.source_database):
        raise SourceError(
            f"SOURCE is not the source of this migration, which is {migration.source_address}",
            hint="Give the migration's own source, so that slot and publications can be removed there.",
        )


async def _tell_producer(settings: Settings, migration: Migration, note: Note) -> None:
    """Let the producer know before the slot goes, which it would take for a loss."""
    try:
        async with asyncio.timeout(_TELL_SECONDS):
            await announce_end(_reachable(settings, migration), migration)
    except (LiveMigrationError, kafka_errors.KafkaError, TimeoutError) as error:
        why = error.message if isinstance(error, LiveMigrationError) else error or type(error).__name__
        note(f"a producer that still runs cannot be told that its migration ends: {why}")


def _reachable(settings: Settings, migration: Migration | None) -> Settings:
    """Give settings with the broker that the migration has, unless one is given."""
    known = migration.kafka if migration is not None else None
    return settings.model_copy(update={"kafka": settings.kafka or known})


async def _clean_source(
    settings: Settings, target: asyncpg.Connection, migration: Migration | None, note: Note
) -> None:
    async with session(settings.source_uri(), "source", application=f"{APPLICATION} clean") as source:
        if migration is None:
            await _require_idle(source, settings)
        for dropped in await remove_from_source(source, settings):
            note(f"dropped {dropped} on the source")
        if migration is not None:
            for line in await give_back(target, source, settings):
                note(line)


async def _require_idle(source: asyncpg.Connection, settings: Settings) -> None:
    """Refuse to take a slot from somebody whose state we do not see."""
    with asking("source", "looking at the slot"):
        slot = await read_slot(source, settings.slot)
    if slot is not None and slot.active_pid is not None:
        raise SlotError(
            f"the target holds no migration, but slot {settings.slot} is in use by pid {slot.active_pid} on the source",
            hint="It belongs to a migration into another target. Check TARGET and --name.",
        )


async def _clean_kafka(settings: Settings, migration: Migration | None, prune: bool, note: Note) -> None:
    reachable = _reachable(settings, migration)
    if not reachable.kafka:
        return
    try:
        letters = await count_letters(reachable)
        for topic in await kafka.delete_topics(reachable, with_letters=prune or not letters):
            note(f"deleted topic {topic}")
        if letters and not prune:
            note(
                f"left topic {settings.dead_letter_topic}, which holds the rows that were skipped: "
                "`live-migration tail --dead-letters` prints them, `live-migration clean --prune` deletes it"
            )
        if await kafka.delete_group(reachable, settings.name):
            note(f"deleted consumer group {settings.name}")
    except ConnectionLost as error:
        if settings.kafka:
            raise
        note(
            f"the broker at {reachable.kafka} is not running, its topics were left: {error.message}. "
            "With --prune a broker of our own is removed with its folder."
        )


async def _clean_target(target: asyncpg.Connection, migration: Migration | None, note: Note) -> None:
    with asking("target", "dropping the migration's state"):
        present = await target.fetchval("select to_regnamespace('_live_migration') is not null")
        if not present:
            return
        if migration is not None:
            await _end_workers(target)
        await target.execute("drop schema _live_migration cascade")
    note("dropped schema _live_migration on the target")
    if migration is not None and migration.phase is not Phase.DONE and migration.phase is not Phase.PREPARE:
        note(
            f"the migration was in phase {migration.phase.value}: the tables that it restored on the target are left there; "
            "drop them, or the database, before you migrate into it again"
        )


async def _end_workers(target: asyncpg.Connection) -> None:
    """End sessions of producers and consumers that still run, for they would keep the state locked."""
    await target.execute(
        """select pg_terminate_backend(pid, 2000) from pg_stat_activity
           where datname = current_database() and application_name like $1 and pid <> pg_backend_pid()""",
        f"{APPLICATION}%",
    )
