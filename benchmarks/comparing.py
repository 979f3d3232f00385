"""Whether both sides hold the same rows: no case is won by not doing its work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg

from benchmarks.servers import Servers


class RowsDiffer(Exception):
    """Source and target do not hold the same rows after a case."""


async def compare_rows(servers: Servers, tables: Sequence[str], *, who: str) -> None:
    """Compare count and checksum of each table.

    Raises:
        RowsDiffer: they are not equal; the message names contestant, table and both sides.
    """
    for table in tables:
        source, target = await asyncio.gather(_digest(servers.source_uri, table), _digest(servers.target_uri, table))
        if source != target:
            raise RowsDiffer(f"{who}: {table} holds {source} on the source and {target} on the target")


async def _digest(uri: str, table: str) -> tuple[int, str]:
    connection = await asyncpg.connect(uri)
    try:
        row = await connection.fetchrow(
            f"select count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text from {table} t"
        )
        return row[0], row[1]
    finally:
        await connection.close()
