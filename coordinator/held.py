"""What a migration still holds on the source, said at every exit."""

from __future__ import annotations

import asyncio

import asyncpg

from live_migration.common.errors import LiveMigrationError
from live_migration.common.postgres import session
from live_migration.common.progress import name_list
from live_migration.common.settings import Settings
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.run import APPLICATION
from live_migration.producer.publication import publications_present
from live_migration.producer.slot import describe_slot, read_slot

_TIMEOUT_SECONDS = 10.0
_CHANGES = {
    "replica_identity": "REPLICA IDENTITY FULL of",
    "job": "paused jobs:",
    "database_setting": "settings of the database:",
}


async def say_what_is_held(settings: Settings, reporter: Reporter) -> None:
    """Tell the user what stays on the source until `clean`; a server that cannot be reached keeps us from nothing."""
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            held = await list_held(settings)
    except (LiveMigrationError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        reporter.warning(
            f"the source or target cannot be asked just now; slot {settings.slot} and publications {settings.publication} "
            f"and {settings.insert_publication} may be on the source and retain WAL until `live-migration clean`"
        )
        return
    if held:
        reporter.note(f"still held on the source until `live-migration clean`: {'; '.join(held)}")


async def list_held(settings: Settings) -> list[str]:
    """Give slot with its retained WAL, publications, changed replica identities and paused jobs, for people."""
    async with session(settings.source_uri(), "source", application=f"{APPLICATION} exit") as source:
        slot = await read_slot(source, settings.slot)
        publications = await publications_present(source, [settings.publication, settings.insert_publication])
    async with session(settings.target_uri(), "target", application=f"{APPLICATION} exit") as target:
        changes = await list_changes(target)
    held = [describe_slot(settings.slot, slot)] if slot else []
    if publications:
        held.append(f"publications {', '.join(publications)}")
    return held + changes


async def list_changes(target: asyncpg.Connection) -> list[str]:
    """Give what the state says was changed on the source and is not given back, for people."""
    if not await target.fetchval("select to_regclass('_live_migration.source_changes') is not null"):
        return []
    changes = await target.fetch(
        "select kind, object from _live_migration.source_changes where not restored order by object"
    )
    found = {kind: [row["object"] for row in changes if row["kind"] == kind] for kind in _CHANGES}
    return [f"{_CHANGES[kind]} {name_list(objects)}" for kind, objects in found.items() if objects]
