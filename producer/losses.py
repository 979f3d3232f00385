"""Which tables must be copied again when slot or log are lost: what we know of them are our publications."""

from __future__ import annotations

from contextlib import suppress

import asyncpg

from live_migration.common.control import ProducerConfig
from live_migration.common.errors import LiveMigrationError, LogGap, SlotLost
from live_migration.common.postgres import asking, session
from live_migration.common.progress import name_list

_TABLES = """
    select distinct schemaname || '.' || tablename as name from pg_publication_tables where pubname = any($1::text[]) order by 1
"""

_REMAINS = """
    select exists (select from pg_replication_slots where slot_name = $1) or exists (select from pg_publication where pubname = any($2::text[]))
"""


async def something_remains(uri: str, config: ProducerConfig) -> bool:
    """Tell whether the source still has the slot, or a publication; True also where it cannot be asked."""
    with suppress(LiveMigrationError):
        async with session(uri, "source", application="live-migration producer") as connection:
            with asking("source", "looking for slot and publications"):
                return bool(await connection.fetchval(_REMAINS, config.slot, list(config.publications)))
    return True


async def name_tables(error: LiveMigrationError, uri: str, config: ProducerConfig | None) -> LiveMigrationError:
    """Give the error with the tables named that must be copied again because of it, where the source can be asked."""
    if config is None or not isinstance(error, SlotLost | LogGap):
        return error
    rows: list[asyncpg.Record] = []
    with suppress(LiveMigrationError):
        async with session(uri, "source", application="live-migration producer") as connection:
            with asking("source", "reading the publications"):
                rows = await connection.fetch(_TABLES, list(config.publications))
    if not rows:
        return error
    names = name_list(row["name"] for row in rows)
    named = type(error)(f"{error.message}; to be copied again: {len(rows)} tables, {names}", hint=error.hint)
    named.__cause__ = error
    return named
