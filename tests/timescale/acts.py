"""What the server says that a statement did to compressed rows and to chunks, in place of what it was meant to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import asyncpg

UPDATED, DELETED = "compressed rows updated", "compressed batches deleted whole"
COMPRESSED, RECOMPRESSED, DECOMPRESSED = "chunk compressed", "chunk recompressed", "chunk decompressed"
HYPERTABLE_MADE, AGGREGATE_MADE = "hypertable made", "aggregate made"
EVERYTHING = {UPDATED, DELETED, COMPRESSED, RECOMPRESSED, DECOMPRESSED, HYPERTABLE_MADE, AGGREGATE_MADE}

_CHUNK_OF = """
    select c::text from show_chunks($1::text::regclass, newer_than => '2026-01-01'::timestamptz + $2 * interval '1 day',
                                    older_than => '2026-01-01'::timestamptz + ($2 + 1) * interval '1 day') c
"""
_STATUS = "select coalesce(_timescaledb_functions.chunk_status_text($1::text::regclass), '{}')"
_COMPRESS = "select compress_chunk($1::text::regclass, if_not_compressed => true)"
_DECOMPRESS = "select decompress_chunk($1::text::regclass, if_compressed => true)"


async def watched(connection: asyncpg.Connection, statement: str) -> list[str]:
    """Run an UPDATE or DELETE; give what the server's executor counted of compressed rows."""
    plan = json.loads(await connection.fetchval(f"explain (analyze, buffers off, timing off, format json) {statement}"))
    nodes = list(_nodes(plan[0]["Plan"]))
    changed = sum(node["Plans"][0]["Actual Rows"] for node in nodes if node["Node Type"] == "ModifyTable")
    acts = []
    if statement.startswith("update") and changed and any(node.get("Tuples decompressed") for node in nodes):
        acts.append(UPDATED)
    if any(node.get("Batches deleted") for node in nodes):
        acts.append(DELETED)
    return acts


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for each in plan.get("Plans", ()):
        yield from _nodes(each)


async def compress(connection: asyncpg.Connection, table: str, day: int) -> list[str]:
    """Compress the chunk of a day, or what came to it since it was; give which of both it was. In the caller's transaction."""
    if (chunk := await _turning(connection, table, day)) is None:
        return []
    before = await connection.fetchval(_STATUS, chunk)
    await connection.fetchval(_COMPRESS, chunk)
    if "COMPRESSED" not in before:
        return [COMPRESSED]
    return [RECOMPRESSED] if {"PARTIAL", "UNORDERED"} & set(before) else []


async def decompress(connection: asyncpg.Connection, table: str, day: int) -> list[str]:
    """Decompress the chunk of a day, in the caller's transaction; the server gives its name if it was compressed."""
    chunk = await _turning(connection, table, day)
    return [DECOMPRESSED] if chunk and await connection.fetchval(_DECOMPRESS, chunk) else []


async def _turning(connection: asyncpg.Connection, table: str, day: int) -> str | None:
    """Give the chunk of a day; no other session of the writer compresses or decompresses one before the transaction ends.

    So what the catalog says of it is what the function finds.
    """
    await connection.execute("select pg_advisory_xact_lock(6)")
    chunk: str | None = await connection.fetchval(_CHUNK_OF, table, day)
    return chunk
