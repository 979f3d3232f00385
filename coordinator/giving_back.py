"""What a migration changed on the source beside slot and publications, given back: by `clean`, and where nothing was begun after all."""

from __future__ import annotations

import asyncpg

from live_migration.common.postgres import asking
from live_migration.common.relation import ReplicaIdentity
from live_migration.common.settings import Settings
from live_migration.common.state import require_migration
from live_migration.coordinator.refresh_gaps import close_gaps
from live_migration.coordinator.source_jobs import give_jobs_back, paused_ids
from live_migration.coordinator.timescale_source import give_settings_back
from live_migration.producer.publication import restore_identity


async def give_back(target: asyncpg.Connection, source: asyncpg.Connection, settings: Settings) -> list[str]:
    """Restore what the state says we changed on the source, each recorded once done; give a line for people for each.

    Raises:
        SourceError: something cannot be given back; what was given back before stays so.
    """
    identities = await give_identities_back(target, source, settings)
    lines = [f"{table} has its replica identity back" for table in identities]
    lines += [f"{name} of the source's database is as it was" for name in await give_settings_back(target, source)]
    since = (await require_migration(target)).created_at
    outcome = await close_gaps(source, "source", await paused_ids(target), since=since)
    lines += [
        f"{name} was refreshed on the source from where it ended when jobs were paused" for name in outcome.refreshed
    ]
    lines += outcome.failed
    return lines + await give_jobs_back(target, source, settings)


async def give_identities_back(target: asyncpg.Connection, source: asyncpg.Connection, settings: Settings) -> list[str]:
    """Restore the replica identities that we changed; give the tables' names."""
    with asking("target", "reading what was changed on the source"):
        rows = await target.fetch(
            """select id, oid, object, before from _live_migration.source_changes
               where kind = 'replica_identity' and not restored order by id"""
        )
    restored = []
    for row in rows:
        name = await restore_identity(
            source, row["oid"], ReplicaIdentity(row["before"]), lock_timeout=settings.lock_timeout
        )
        with asking("target", "recording what was given back"):
            await target.execute("update _live_migration.source_changes set restored = true where id = $1", row["id"])
        if name is not None:
            restored.append(str(name))
    return restored
