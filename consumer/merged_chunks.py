"""Chunks that were merged into others on the source, by compression with an interval of its own or by hand: one is gone, another's range is larger.

A copy of what is left holds the rows of both, so both have that copy's snapshot. Where what is left was copied before, it is copied anew, and
so is one that came after the plan and took up a chunk of the plan that was not copied yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import asyncpg

from live_migration.common.home import Home
from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import chunk_ranges
from live_migration.consumer.chunk_marks import mark_chunk
from live_migration.consumer.claim_endings import CopyOrigin
from live_migration.consumer.copy_errors import server_errors

_PLANNED = """
    select c.oid, c.range from _live_migration.tables o join _live_migration.tables c using (hypertable_oid)
    where o.oid = $1 and c.oid <> o.oid and c.kind = 'chunk' and c.range is not null
"""
_OWN = """
    select c.range, h.schema_name, h.table_name from _live_migration.tables c join _live_migration.tables h on h.oid = c.hypertable_oid
    where c.oid = $1
"""
_MARK = """
    update _live_migration.tables set rebuild = coalesce(rebuild, 'chunks were merged on the source') where oid = any($1::oid[])
"""
_SIBLINGS = """
    select s.inhrelid from pg_inherits o join pg_inherits s on s.inhparent = o.inhparent where o.inhrelid = $1
"""
_OTHERS = """
    select c.oid, n.nspname::text as schema, c.relname::text as name
    from pg_inherits i join pg_class c on c.oid = i.inhrelid join pg_namespace n on n.oid = c.relnamespace
    where i.inhparent = to_regclass($1) and c.relkind = 'r' and c.oid <> all($2::oid[])
"""
_ABSORB = """
    update _live_migration.tables c set snapshot = $3, horizon = $4, timeline = $5
    from _live_migration.tables o
    where o.oid = $1 and c.hypertable_oid = o.hypertable_oid and c.kind = 'chunk' and c.state in ('copied', 'ready')
      and not c.oid = any($2::oid[])
"""
_SET_RANGE = "update _live_migration.tables set range = $2 where oid = $1"


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a chunk that is gone left on the source. `grown`: chunks of its hypertable whose range is another than when they were planned.

    `has_rows`: others hold rows in its range. `takers`: chunks that came after the plan and took it up, by oid. `lsn`: the WAL's end when
    they were looked for.
    """

    grown: list[int] = field(default_factory=list)
    has_rows: bool = False
    takers: dict[int, Home] = field(default_factory=dict)
    lsn: int = 0


async def look_for_merged(
    source: asyncpg.Connection, target: asyncpg.Connection, gone: int, lock_timeout: float
) -> Leftover:
    """Look what became of a chunk that is gone: it was dropped, or merged into others.

    Raises:
        CopyDeferred: somebody locks one of the others, so that it cannot be looked at just now.
    """
    with server_errors("target", "reading the plan"):
        own = await target.fetchrow(_OWN, gone)
        planned = {row["oid"]: row["range"] for row in await target.fetch(_PLANNED, gone)}
    if own is None:
        return Leftover()
    root = QualifiedName(own["schema_name"], own["table_name"])
    with server_errors("source", "looking for merged chunks"):
        async with source.transaction(readonly=True):
            await source.execute(f"set local lock_timeout = '{max(1, round(lock_timeout * 1000))}ms'")
            now = await chunk_ranges(source, list(planned))
            has_rows = await source.fetchval(f"select exists (select from {root.sql} where {own['range'] or 'false'})")
            grown = [oid for oid, condition in now.items() if condition != planned[oid]]
            takers = await _find_takers(source, root, own["range"], list(planned)) if has_rows and not grown else {}
            lsn = int(await source.fetchval("select pg_current_wal_insert_lsn()"))
    return Leftover(grown, has_rows, takers, lsn)


async def _find_takers(
    source: asyncpg.Connection, root: QualifiedName, condition: str, planned: list[int]
) -> dict[int, Home]:
    """Give the chunks beside the planned ones that hold rows of a range which is not theirs alone: they took another chunk up."""
    others = {
        row["oid"]: QualifiedName(row["schema"], row["name"]) for row in await source.fetch(_OTHERS, root.sql, planned)
    }
    ranges = await chunk_ranges(source, list(others))
    return {
        oid: Home(root, name)
        for oid, name in others.items()
        if ranges.get(oid, condition) != condition  # else it was made anew where a chunk was dropped
        and await source.fetchval(f"select exists (select from {name.sql} where {condition})")
    }


async def mark_leftover(target: asyncpg.Connection, leftover: Leftover) -> None:
    """Have the chunks copied anew by their lane that hold what another left; in the caller's transaction."""
    if leftover.grown:
        await target.execute(_MARK, leftover.grown)
    for oid, home in leftover.takers.items():
        await mark_chunk(target, oid, home, reason="another was merged into it", lsn=leftover.lsn, is_new=True)


async def siblings(source: asyncpg.Connection, chunk: int) -> list[int]:
    """Give the chunks of a chunk's hypertable that the session's snapshot shows, itself included."""
    with server_errors("source", "looking for merged chunks"):
        return [row[0] for row in await source.fetch(_SIBLINGS, chunk)]


async def absorb(
    target: asyncpg.Connection, chunk: int, condition: str, present: Sequence[int], origin: CopyOrigin
) -> None:
    """Give what is gone of a hypertable the snapshot of a grown chunk's copy; in the transaction that empties the chunk's range.

    `present`: what that snapshot shows of the hypertable. Chunks that were dropped get it, too: their rows are gone from the source.
    """
    with server_errors("target", "recording merged chunks"):
        await target.execute(_ABSORB, chunk, list(present), origin.snapshot, origin.horizon, origin.timeline)
        await target.execute(_SET_RANGE, chunk, condition)
