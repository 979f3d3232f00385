"""Chunks of a hypertable that is a plain table on the target (`--flatten`): nothing there keeps their rows apart but their range.

The range of a chunk of a hash partition is told by a function of TimescaleDB's, which such a target lacks: what concerns one of them
concerns its whole hypertable.
"""

from __future__ import annotations

import asyncpg

from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import chunk_range, is_hypertable
from live_migration.consumer.copy_errors import server_errors

_OWN = "_timescaledb_"
_HYPERTABLE = """
    select oid, schema_name, table_name from _live_migration.tables
    where kind = 'hypertable' and not is_left_out and (root_schema, root_name) = ($1, $2)
"""


def is_told_without(condition: str) -> bool:
    """Tell whether a chunk's condition can be asked for where there is no TimescaleDB."""
    return _OWN not in condition


async def is_plain(target: asyncpg.Connection, root: QualifiedName) -> bool:
    """Tell whether a hypertable of the source is a plain table on the target."""
    with server_errors("target", f"looking at {root}"):
        return not await is_hypertable(target, root)


async def hypertable_to_copy(
    source: asyncpg.Connection, target: asyncpg.Connection, chunk: int, root: QualifiedName
) -> tuple[int, QualifiedName] | None:
    """Give oid and name of the hypertable that must be copied whole where one of its chunks is to be; None where that one will do."""
    with server_errors("source", f"looking at a chunk of {root}"):
        condition = await chunk_range(source, chunk)
    if condition is None or is_told_without(condition) or not await is_plain(target, root):
        return None
    with server_errors("target", "reading the plan"):
        row = await target.fetchrow(_HYPERTABLE, root.schema, root.name)
    return (row["oid"], QualifiedName(row["schema_name"], row["table_name"])) if row else None
