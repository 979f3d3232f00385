"""`clean`: give back everything that a migration made or changed, on either side and on the broker."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
from aiokafka import errors as kafka_errors

from live_migration.common import kafka, state
from live_migration.common.errors import ConnectionLost, LiveMigrationError, SlotError, SourceError, TargetError
from live_migration.common.postgres import asking, session
from live_migration.common.progress import name_list
from live_migration.common.settings import Settings
from live_migration.common.state import Migration, Phase
from live_migration.common.supervisor import LocalServerError, lock_file
from live_migration.coordinator.control_topic import announce_end
from live_migration.coordinator.cutover import is_coordinator_alive
from live_migration.coordinator.dead_letters import count_letters
from live_migration.coordinator.giving_back import give_back
from live_migration.coordinator.handover import list_unfinished
from live_migration.coordinator.held import list_changes
from live_migration.coordinator.ownership import (
    Claim,
    find_on_source,
    read_claim,
    read_topics,
    read_topics_owner,
    require_ours_on_source,
)
from live_migration.coordinator.prepare import remove_from_source
from live_migration.coordinator.run import APPLICATION
from live_migration.coordinator.source_jobs import read_jobs
from live_migration.producer.slot import identify_system, read_slot

Note = Callable[[str], None]
_FULL = """
    select format('%s.%s', n.nspname, c.relname) as name from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relreplident = 'f' and c.relkind in ('r', 'p') order by 1
"""
_LOCK_SECONDS = 5.0
_TELL_SECONDS = 10.0
"""For the word to the producer: a broker that hangs must not keep the slot, and with it the source's WAL."""


async def clean(settings: Settings, *, prune: bool, note: Note, force: bool = False) -> bool:
    """Remove slot, publications, topics and state, and restore what was changed on the source; parts that are missing are passed over.

    The state goes last, so that an attempt that failed half way can be repeated. `prune` removes `settings.dir`, too. `force`: also what no state
    on the target names, without a source that is off for good, and while something is left to do on the target, both of which is named. False:
    something may be left on the source.

    Raises:
        TargetError: a coordinator is alive, or the target holds another migration, or what follows the hand-over is not finished; or it holds
            none, and what bears our name may be another's.
        SourceError: SOURCE is not the migration's source, or slot and publications there are another migration's.
    """
    async with session(settings.target_uri(), "target", application=f"{APPLICATION} clean") as target:
        with asking("target", "reading the migration's state"):
            migration = await state.read_migration(target)
        if migration is not None:
            await _require_ours(settings, target, migration)
            await _require_finished(target, migration, note, force=force)
            claim = await read_claim(target)
            is_known = await _clean_known_source(settings, target, migration, claim, note, force=force)
            if claim.is_begun:
                await _clean_kafka(settings, migration, claim, prune, note)
        else:
            is_known = await _clean_unknown(settings, prune, note, force=force)
        await _clean_target(target, migration, note)
    if prune:
        await _remove_folder(settings.dir, note)
    return is_known


async def _remove_folder(folder: Path, note: Note) -> None:
    """Remove the folder of our own broker and of logs, unless a broker runs there: another migration's, with its change log."""
    lock = folder / "kafka" / "lock"
    if lock.parent.is_dir():
        try:
            file = await lock_file(lock, patience=_LOCK_SECONDS)
        except LocalServerError:
            note(f"left {folder}: a broker runs there, of another migration with this --dir")
            return
        with file:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    else:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    note(f"removed {folder}")


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


async def _require_finished(target: asyncpg.Connection, migration: Migration, note: Note, *, force: bool) -> None:
    """Refuse to drop the state while it alone knows what is left to do on the target, unless somebody says so."""
    with asking("target", "looking at what follows the hand-over"):
        left = await list_unfinished(target) if migration.phase is Phase.DONE else []
    if not left:
        return
    said = f"the target is in charge, but what follows the hand-over is not finished: {name_list(left)}"
    if not force:
        raise TargetError(
            said,
            hint="Run `live-migration migrate` again, which finishes it without the source; then clean. "
            "Or leave it as it is: `live-migration clean --force`.",
        )
    note(f"{said}. It stays so: see to it yourself")


async def _require_its_source(settings: Settings, migration: Migration) -> None:
    identity = await identify_system(settings.source_uri())
    if (identity.system_identifier, identity.database) != (migration.source_system, migration.source_database):
        raise SourceError(
            f"SOURCE is not the source of this migration, which is {migration.source_address}",
            hint="Give the migration's own source, so that slot and publications can be removed there.",
        )


async def _tell_producer(settings: Settings, migration: Migration, note: Note) -> None:
    """Let the producer know before the slot goes, which it would take for a loss."""
    reachable = _reachable(settings, migration)
    try:
        async with asyncio.timeout(_TELL_SECONDS):
            if reachable.kafka and await read_topics_owner(reachable) in (None, str(migration.id)):
                await announce_end(reachable, migration)
    except (LiveMigrationError, kafka_errors.KafkaError, TimeoutError) as error:
        why = error.message if isinstance(error, LiveMigrationError) else error or type(error).__name__
        note(f"a producer that still runs cannot be told that its migration ends: {why}")


def _reachable(settings: Settings, migration: Migration | None) -> Settings:
    """Give settings with the broker that the migration has, unless one is given."""
    known = migration.kafka if migration is not None else None
    return settings.model_copy(update={"kafka": settings.kafka or known})


async def _clean_known_source(
    settings: Settings, target: asyncpg.Connection, migration: Migration, claim: Claim, note: Note, *, force: bool
) -> bool:
    try:
        await _require_its_source(settings, migration)
    except (ConnectionLost, SourceError) as error:
        if isinstance(error, SourceError) and not (_has_no_database(error) and _names_database(settings, migration)):
            raise
        if not force:
            hint = f"{error.hint} If it is off for good: `live-migration clean --force` leaves it as it is."
            raise type(error)(error.message, hint=hint) from error
        with asking("target", "reading what was changed on the source"):
            changes = await list_changes(target)
        given_back = f"; give back {'; '.join(changes)}" if changes else ""
        note(
            f"the source was left as it is, for it cannot be reached ({error.message}). Should it come back: drop slot {settings.slot}, which keeps "
            f"its WAL, and publications {settings.publication} and {settings.insert_publication}{given_back}"
        )
        return False
    async with session(settings.source_uri(), "source", application=f"{APPLICATION} clean") as source:
        if claim.is_begun:
            await require_ours_on_source(source, settings, claim)
            await _tell_producer(settings, migration, note)
            await _remove(source, settings, note)
        elif found := await find_on_source(source, settings):
            note(f"left {name_list(found)} on the source, which this migration has not made")
        for line in await give_back(target, source, settings):
            note(line)
    return True


def _has_no_database(error: BaseException | None) -> bool:
    """Tell whether it is the server's word that it has no such database, which takes slot and publications with it."""
    while error is not None and not isinstance(error, asyncpg.InvalidCatalogNameError):
        error = error.__cause__
    return error is not None


def _names_database(settings: Settings, migration: Migration) -> bool:
    """Tell whether SOURCE names the migration's database, and no other that never was there."""
    return urlsplit(settings.source_uri()).path.removeprefix("/") == migration.source_database


async def _clean_unknown(settings: Settings, prune: bool, note: Note, *, force: bool) -> bool:
    """Remove what bears our name though no state tells whose it is: only where somebody says so, and nothing is at work with it."""
    identity = await identify_system(settings.source_uri())
    topics = await read_topics(settings) if settings.kafka else None
    are_others = topics is not None and topics.system_identifier not in ("", identity.system_identifier)
    async with session(settings.source_uri(), "source", application=f"{APPLICATION} clean") as source:
        await _require_idle(source, settings)
        found = await find_on_source(source, settings)
        named = f"topics {settings.changes_topic} and {settings.control_topic}"
        if topics is not None and not are_others:
            found.append(f"{named} (of {topics})")
        if found and not force:
            raise TargetError(
                f"the target holds no migration, so whose these are is not known: {name_list(found)}. Nothing was touched",
                hint="A migration of this name into another target may need them: check TARGET and --name. If nobody does: `live-migration clean --force`.",
            )
        await _remove(source, settings, note)
        is_known = not await _name_unknown(source, note)
    if are_others:
        note(f"left {named}, which are another source's (of {topics})")
    else:
        await _clean_kafka(settings, None, None, prune, note)
    return is_known


async def _remove(source: asyncpg.Connection, settings: Settings, note: Note) -> None:
    for dropped in await remove_from_source(source, settings):
        note(f"dropped {dropped} on the source")


async def _name_unknown(source: asyncpg.Connection, note: Note) -> bool:
    """Name what a migration may have changed whose state is gone; tell whether there is such."""
    with asking("source", "looking for what a migration may have changed"):
        tables = [row["name"] for row in await source.fetch(_FULL)]
        jobs = [job for job in await read_jobs(source) if not job.is_scheduled]
    found = [f"REPLICA IDENTITY FULL of {name_list(tables)}"] * bool(tables)
    found += [f"jobs that are off: {name_list(jobs)}"] * bool(jobs)
    if found:
        note(
            "the target holds no migration, so what one has changed on the source is not known any more. Look whether this is meant to be so: "
            f"{'; '.join(found)}. `alter table … replica identity default` and `select alter_job(…, scheduled => true)` give it back"
        )
    return bool(found)


async def _require_idle(source: asyncpg.Connection, settings: Settings) -> None:
    """Refuse to take a slot from somebody whose state we do not see."""
    with asking("source", "looking at the slot"):
        slot = await read_slot(source, settings.slot)
    if slot is not None and slot.active_pid is not None:
        raise SlotError(
            f"the target holds no migration, but slot {settings.slot} is in use by pid {slot.active_pid} on the source",
            hint="It belongs to a migration into another target. Check TARGET and --name.",
        )


async def _clean_kafka(
    settings: Settings, migration: Migration | None, claim: Claim | None, prune: bool, note: Note
) -> None:
    reachable = _reachable(settings, migration)
    if not reachable.kafka:
        return
    try:
        if claim is not None and await read_topics_owner(reachable) not in (None, claim.migration_id):
            note(f"left topics {settings.changes_topic} and {settings.control_topic}, which are another migration's")
            return
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
