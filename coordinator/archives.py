"""What one phase keeps on the target for a later one, by name."""

from __future__ import annotations

import asyncpg


async def keep(target: asyncpg.Connection, name: str, content: bytes) -> None:
    """Keep bytes under a name, in place of what was there; in the caller's transaction."""
    await target.execute(
        "insert into _live_migration.archives values ($1, $2) on conflict (name) do update set content = excluded.content",
        name,
        content,
    )


async def read(target: asyncpg.Connection, name: str) -> bytes | None:
    """Give what was kept under a name, None where nothing was."""
    content: bytes | None = await target.fetchval("select content from _live_migration.archives where name = $1", name)
    return content
