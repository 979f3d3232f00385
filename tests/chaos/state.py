"""What a failed round leaves to be looked at: its databases go, its state stays as files."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg

from tests.chaos.world import GONE

_STATE_TABLES = """
    select c.relname, format('select * from %s', c.oid::regclass) from pg_class c
    where c.relnamespace = to_regnamespace('_live_migration') and c.relkind in ('r', 'p') and not c.relispartition
    union all values ('_sessions', 'select * from pg_stat_activity where datname = current_database()')
"""
_SOURCE = {
    "slots": "select * from pg_replication_slots",
    "publications": "select * from pg_publication",
    "published_tables": "select * from pg_publication_tables",
    "identities": "select oid::regclass, relreplident from pg_class where relkind in ('r', 'p') and oid > 16383",
    "statistics": "select * from pg_stat_user_tables",
    "sessions": "select * from pg_stat_activity where datname = current_database()",
}
_START_SECONDS = 30.0


async def keep_state(source: str, target: str, folder: Path) -> None:
    """Write the target's schema `_live_migration`, and what the source knows of us, as CSV files; what cannot be read is said in one."""
    folder.mkdir(parents=True, exist_ok=True)
    for side, uri in (("source", source), ("target", target)):
        try:
            await _keep(side, uri, folder)
        except (*GONE, TimeoutError) as error:
            (folder / f"{side}-unreadable.txt").write_text(f"{type(error).__name__}: {error}\n")


async def _keep(side: str, uri: str, folder: Path) -> None:
    connection = await _connect(uri)
    try:
        queries = _SOURCE if side == "source" else dict(await connection.fetch(_STATE_TABLES))
        for name, query in queries.items():
            await connection.copy_from_query(
                query, output=folder / f"{side}-{name.lstrip('_')}.csv", format="csv", header=True, timeout=60
            )
    finally:
        connection.terminate()


async def _connect(uri: str) -> asyncpg.Connection:
    """Connect, also to a server that just starts again."""
    async with asyncio.timeout(_START_SECONDS):
        while True:
            try:
                return await asyncpg.connect(uri, timeout=5)
            except (asyncpg.CannotConnectNowError, OSError):
                await asyncio.sleep(0.1)
