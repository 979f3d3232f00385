"""Copying one whole table from source to target by COPY, while nobody writes to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg

from live_migration.common.catalog import TableInfo
from live_migration.common.postgres import asking
from live_migration.common.relation import quote_identifier

_CHUNKS_IN_FLIGHT = 16


async def copy_table(source: asyncpg.Connection, target: asyncpg.Connection, table: TableInfo) -> int:
    """Empty the target's table and fill it with the source's rows; call it inside a transaction. Gives the row count.

    Memory is bounded by a few of the server's COPY chunks.
    """
    columns = [column.name for column in table.copied_columns]
    form = "binary" if table.is_binary_safe else "text"
    with asking("target", f"emptying {table.name}"):
        await target.execute(f"truncate only {table.name.sql}")
    chunks: asyncio.Queue[bytes | None] = asyncio.Queue(_CHUNKS_IN_FLIGHT)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_read(source, table, columns, form, chunks))
            status: str = await group.create_task(_write(target, table, columns, form, chunks))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return int(status.split()[-1])


async def _read(
    source: asyncpg.Connection, table: TableInfo, columns: list[str], form: str, chunks: asyncio.Queue[bytes | None]
) -> None:
    with asking("source", f"reading {table.name}"):
        names = ", ".join(quote_identifier(name) for name in columns)
        await source.copy_from_query(f"select {names} from only {table.name.sql}", output=chunks.put, format=form)
    await chunks.put(None)


async def _write(
    target: asyncpg.Connection, table: TableInfo, columns: list[str], form: str, chunks: asyncio.Queue[bytes | None]
) -> str:
    async def arriving() -> AsyncIterator[bytes]:
        while (chunk := await chunks.get()) is not None:
            yield chunk

    with asking("target", f"writing {table.name}"):
        status: str = await target.copy_to_table(
            table.name.name, schema_name=table.name.schema, columns=columns or None, source=arriving(), format=form
        )
    return status
