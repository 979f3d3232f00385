"""What is particular in copying a hypertable's chunk as it is: its compressed rows lie in a table of their own.

A chunk and that table are one unit: one lock, one snapshot, one transaction on either side. A chunk that was compressed or
decompressed since it was planned has no twin on the target: it is left empty, and its lane copies it anew through the hypertable.
Where all chunks are copied through their hypertables (the target's TimescaleDB has another version), their rows are decompressed on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import asyncpg

from live_migration.common.catalog import CURRENT_TIMELINE
from live_migration.common.chunk_range import is_same_range
from live_migration.common.hashing import read_encoding, read_hashed
from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import (
    chunk_range,
    compressed_table,
    read_chunk_status,
    read_column_bounds,
    write_chunk_status,
    write_column_bounds,
)
from live_migration.consumer.batch_filters import filters_that_hold
from live_migration.consumer.claim_endings import CopyOrigin
from live_migration.consumer.claims import TableClaim
from live_migration.consumer.copy_errors import CopyDeferred, TableStopped, server_errors
from live_migration.consumer.copy_stream import CopyCount, CopyPlan, stream_copy
from live_migration.consumer.plain_chunks import is_plain, is_told_without
from live_migration.consumer.table_shape import ColumnDefinition
from live_migration.consumer.table_snapshot import read_definitions

_COMPRESSED = "_timescaledb_internal.compressed_data"
"""Its binary form is the extension's own, the same under the same version. (`bloom1`, of sparse indexes, has none: text then.)"""

_FILTER = "_timescaledb_internal.bloom1"

_GONE = f"""
    select pg_current_snapshot()::text as snapshot, pg_current_wal_insert_lsn() as horizon, {CURRENT_TIMELINE} as timeline,
           exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace
                   where c.oid = $1 or (n.nspname, c.relname) = ($2, $3)) as is_there
"""

CHANGED = "it was compressed or decompressed between planning and copy"


async def is_as_planned(source: asyncpg.Connection, claim: TableClaim) -> bool:
    """Tell whether a chunk has its compressed rows where it had them when it was planned, and the same range where it must not have another."""
    with server_errors("source", f"looking at {claim.name}"):
        found = await compressed_table(source, claim.oid)
        # One that has grown is copied over what it has taken up, if that can be told from the rest of its hypertable.
        may_grow = claim.root is not None and not (claim.is_into_plain and not is_told_without(claim.range or ""))
        is_same = may_grow or claim.range is None or is_same_range(await chunk_range(source, claim.oid), claim.range)
    return found == claim.compressed and is_same


async def as_it_is_now(source: asyncpg.Connection, target: asyncpg.Connection, claim: TableClaim) -> TableClaim:
    """Give the claim on a chunk that is copied through its hypertable with the table of its compressed rows, and the root, as they are now."""
    assert claim.root is not None
    with server_errors("source", f"looking at {claim.name}"):
        compressed = await compressed_table(source, claim.oid)
    return replace(claim, compressed=compressed, is_into_plain=await is_plain(target, claim.root))


async def in_range_now(source: asyncpg.Connection, claim: TableClaim) -> TableClaim:
    """Give the claim on a locked chunk with the range that it has now: chunks may have been merged into it since it was planned."""
    with server_errors("source", f"looking at {claim.name}"):
        return replace(claim, range=await chunk_range(source, claim.oid) or claim.range)


async def look_without(source: asyncpg.Connection, claim: TableClaim, home: QualifiedName | None = None) -> CopyOrigin:
    """Give a snapshot in which a chunk, or a table, is gone, and `home` with it, the chunk whose compressed rows it holds: all its changes are to be passed over.

    Raises:
        CopyDeferred: it is there, after all.
    """
    with server_errors("source", f"looking at {claim.name}"):
        await source.execute("begin isolation level repeatable read read only")
        row = await source.fetchrow(_GONE, claim.oid, home and home.schema, home and home.name)
        await source.execute("rollback")
    if row["is_there"]:
        raise CopyDeferred(f"{claim.name} is there, after all")
    return CopyOrigin(row["snapshot"], row["horizon"], row["timeline"], json.dumps([]), False)


async def copy_compressed(
    source: asyncpg.Connection, target: asyncpg.Connection, claim: TableClaim, on_bytes: Callable[[int], None]
) -> CopyCount:
    """Copy a chunk's compressed rows, and what says that it has some, inside the transactions that copy the chunk."""
    assert claim.compressed is not None
    name, oid = claim.compressed
    with server_errors("source", f"looking at {name}"):
        columns = await read_definitions(source, oid)
        schema, table = await source.fetchrow(
            "select n.nspname::text, c.relname::text from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = $1",
            oid,
        )
    with server_errors("target", f"looking at {name}"):
        twin = await target.fetchval("select to_regclass($1)::oid", name)
        there = await read_definitions(target, twin) if twin is not None else ()
    if _shape(columns) != _shape(there):
        raise TableStopped(
            f"target: {name}, which holds the compressed rows of {claim.name}, has another shape than on the source",
            hint="Both ends must have the same version of TimescaleDB.",
        )
    with server_errors("source", f"looking at {claim.name}"):
        status = await read_chunk_status(source, claim.name)
        bounds = await read_column_bounds(source, claim.name)
    if status is not None:  # rows may have come beside the compressed ones since the catalog was read with the plan
        with server_errors("target", f"describing {claim.name}"):
            await write_chunk_status(target, claim.name, status)
            await write_column_bounds(target, claim.name, bounds)
    is_binary = all(column.info.is_binary_safe or column.info.type == _COMPRESSED for column in columns)
    left_out = await _filters_to_leave_out(source, target, claim, columns)
    plan = CopyPlan(
        QualifiedName(schema, table), tuple(each.name for each in columns if each.name not in left_out), is_binary
    )
    return await stream_copy(source, target, plan, blocks=None, freeze=True, on_bytes=on_bytes)


async def _filters_to_leave_out(
    source: asyncpg.Connection, target: asyncpg.Connection, claim: TableClaim, columns: Sequence[ColumnDefinition]
) -> frozenset[str]:
    """Give the bloom filters that do not hold for the target's values of what they are over: they are NULL there."""
    filters = frozenset(column.name for column in columns if column.info.type == _FILTER)
    if not filters:
        return filters
    with server_errors("target", f"looking at {claim.name}"):
        encoding = await read_encoding(target)
    with server_errors("source", f"looking at {claim.name}"):
        is_same = await read_encoding(source) == encoding
        hashed = await read_hashed(source, [claim.oid])
    others = [column for (_, column), each in hashed.items() if not each.is_by_value(same_encoding=is_same)]
    return filters - filters_that_hold(filters, others)


def _shape(columns: Sequence[ColumnDefinition]) -> list[tuple[str, str]]:
    return [(column.name, column.info.type) for column in columns]
