"""Whether a session leads to the migration's source. Another database has other oids, and what it lacks is not gone from the source."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from live_migration.common.errors import SourceError
from live_migration.common.postgres import asking, session
from live_migration.common.settings import Settings
from live_migration.common.state import Migration

_IDENTITY = "select system_identifier::text as system, current_database()::text as database from pg_control_system()"


async def require_source(connection: asyncpg.Connection, migration: Migration) -> None:
    """Raise SourceError unless the session is on the migration's source, or on what took its place by a failover."""
    with asking("source", "asking whose database it is"):
        row = await connection.fetchrow(_IDENTITY)
    if (row["system"], row["database"]) != (migration.source_system, migration.source_database):
        raise SourceError(
            f"SOURCE leads to database {row['database']} of server {row['system']}, and the migration's source is database "
            f"{migration.source_database} of server {migration.source_system} ({migration.source_address})",
            hint="Give every consumer the SOURCE that `migrate` was given; nothing was read or changed.",
        )


@asynccontextmanager
async def source_session(
    settings: Settings, migration: Migration, application: str
) -> AsyncIterator[asyncpg.Connection]:
    """Open a session on the migration's source.

    Raises:
        ConnectionLost | SourceError: it cannot be reached, or SOURCE leads elsewhere.
    """
    async with session(settings.source_uri(), "source", application=application) as connection:
        await require_source(connection, migration)
        yield connection
