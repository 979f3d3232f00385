"""Chunks that were merged or split on the source, by compression with an interval of its own or by hand: the stream has nothing of it.

A copy of what is left of merged chunks holds the rows of all, so all have that copy's snapshot. What came after the plan is in no copy:
where a chunk is gone or has another range than was known, those of its hypertable that came since and may hold its rows are copied anew.
The range of one that came since is known from when it is marked on, or copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import asyncpg

from live_migration.common.chunk_range import is_same_range
from live_migration.common.home import Home
from live_migration.common.postgres import set_lock_timeout
from live_migration.common.relation import QualifiedName
from live_migration.common.rewriting import FILE_MARK
from live_migration.common.timescale import chunk_ranges
from live_migration.consumer.chunk_marks import mark_chunk
from live_migration.consumer.claim_endings import CopyOrigin
from live_migration.consumer.copy_errors import server_errors
from live_migration.consumer.plain_chunks import is_plain, is_told_without

_KNOWN = """
    select oid, range from _live_migration.tables where hypertable_oid = $1 and oid <> $2 and kind = 'chunk' and range is not null
"""
_OWN = """
    select c.range, h.oid as hypertable, h.schema_name, h.table_name, coalesce(h.root_schema, h.schema_name) as root_schema,
           coalesce(h.root_name, h.table_name) as root_name
    from _live_migration.tables c join _live_migration.tables h on h.oid = c.hypertable_oid
    where c.oid = $1
"""
_MARK = """
    update _live_migration.tables set rebuild = coalesce(rebuild, 'chunks were merged on the source') where oid = any($1::oid[])
"""
_CHUNKS = "select oid from _live_migration.tables where hypertable_oid = $1 and kind = 'chunk'"
_SIBLINGS = """
    select s.inhrelid from pg_inherits o join pg_inherits s on s.inhparent = o.inhparent where o.inhrelid = $1
"""
_OTHERS = """
    select c.oid, n.nspname::text as schema, c.relname::text as name
    from pg_inherits i join pg_class c on c.oid = i.inhrelid join pg_namespace n on n.oid = c.relnamespace
    where i.inhparent = $1 and c.relkind = 'r' and c.oid <> all($2::oid[])
"""
_ABSORB = """
    update _live_migration.tables c set snapshot = $3, horizon = $4, timeline = $5
    from _live_migration.tables o
    where o.oid = $1 and c.hypertable_oid = o.hypertable_oid and c.kind = 'chunk' and c.state in ('copied', 'ready')
      and not c.oid = any($2::oid[])
"""
_FILE_MARKS = f"select c.oid, {FILE_MARK} as file_mark from pg_class c where c.oid = any($1::oid[])"
_SET_FILE_MARK = "update _live_migration.tables set file_mark = $2 where oid = $1"
_SET_RANGE = "update _live_migration.tables set range = $2 where oid = $1"
# Of rows that come from elsewhere: of a hypertable's root itself some versions say right away that it is empty.
_EXPLAIN = "explain select from jsonb_populate_recordset(null::{root}, '[]') where {condition}"
UNASKABLE = (
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.DatatypeMismatchError,
    asyncpg.InvalidTextRepresentationError,
    asyncpg.InvalidDatetimeFormatError,
)
"""Errors of a condition that was read before a column was renamed, where its name means none, or another one, by now."""
_CONTRADICTION = "One-Time Filter: false"
"""What a plan says of conditions that no row can meet together."""


@dataclass(frozen=True, slots=True)
class Hypertable:
    """A hypertable of the plan: by oid and name on the source, and the table on the target."""

    oid: int
    name: QualifiedName
    root: QualifiedName


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A chunk that came after the plan, with its range when it was looked at."""

    home: Home
    range: str


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a chunk that is gone left on the source. `grown`: chunks of its hypertable whose range is another than was known.

    `has_rows`: others hold rows in its range. `newcomers`: chunks that came after the plan and may have taken it up, by oid. `lsn`: the
    WAL's end when they were looked for.
    """

    grown: list[int] = field(default_factory=list)
    has_rows: bool = False
    newcomers: Mapping[int, Newcomer] = field(default_factory=dict)
    lsn: int = 0


async def look_for_merged(
    source: asyncpg.Connection, target: asyncpg.Connection, gone: int, lock_timeout: float, *, is_early: bool = False
) -> Leftover:
    """Look what became of a chunk that is gone: it was dropped, or merged into others, or split.

    `is_early`: what is known of its range is from later than where its lane stands.

    Raises:
        CopyDeferred: somebody locks one of the others, so that it cannot be looked at just now.
    """
    with server_errors("target", "reading the plan"):
        own = await target.fetchrow(_OWN, gone)
        if own is None:
            return Leftover()
        known = {row["oid"]: row["range"] for row in await target.fetch(_KNOWN, own["hypertable"], gone)}
    hypertable = _hypertable(own)
    with server_errors("source", "looking for merged chunks"):
        async with source.transaction(readonly=True):
            await source.execute(set_lock_timeout(lock_timeout))
            now = await chunk_ranges(source, list(known))
            has_rows = await _has_rows(source, hypertable.name, own["range"] or "false")
            others = await _read_newcomers(source, hypertable, [gone, *known])
            lsn = int(await source.fetchval("select pg_current_wal_insert_lsn()"))
    grown = [oid for oid, condition in now.items() if not is_same_range(condition, known[oid])]
    newcomers = await keep_overlapping(target, hypertable.root, others, None if is_early else own["range"])
    return Leftover(grown, has_rows, newcomers, lsn)


async def _has_rows(source: asyncpg.Connection, hypertable: QualifiedName, condition: str) -> bool:
    """Tell whether a hypertable may hold rows that meet a condition, in the caller's transaction."""
    try:
        async with source.transaction():
            return bool(await source.fetchval(f"select exists (select from {hypertable.sql} where {condition})"))
    except UNASKABLE:
        return True


async def find_newcomers(
    source: asyncpg.Connection, target: asyncpg.Connection, chunk: int, condition: str | None
) -> dict[int, Newcomer]:
    """Give the chunks of a chunk's hypertable that came after the plan and may have been split off from it, by oid.

    `condition`: the range that it had, None where that is not known. Those whose own range is known are copied, or will be.
    """
    with server_errors("target", "reading the plan"):
        own = await target.fetchrow(_OWN, chunk)
        if own is None:
            return {}
        known = [row["oid"] for row in await target.fetch(_KNOWN, own["hypertable"], chunk)]
    hypertable = _hypertable(own)
    with server_errors("source", "looking for split chunks"):
        others = await _read_newcomers(source, hypertable, [chunk, *known])
    return await keep_overlapping(target, hypertable.root, others, condition)


async def find_unknown(
    source: asyncpg.Connection, target: asyncpg.Connection, hypertable: QualifiedName
) -> dict[int, Newcomer]:
    """Give the chunks of a hypertable of the plan that came after it and whose range nobody knew, by oid."""
    with server_errors("target", "reading the plan"):
        oid = await target.fetchval(
            "select oid from _live_migration.tables where kind = 'hypertable' and not is_left_out and (schema_name, table_name) = ($1, $2)",
            hypertable.schema,
            hypertable.name,
        )
        known = [row["oid"] for row in await target.fetch(_KNOWN, oid or 0, 0)]
    with server_errors("source", "looking for merged chunks"):
        return await _read_newcomers(source, Hypertable(oid or 0, hypertable, hypertable), known)


def _hypertable(own: asyncpg.Record) -> Hypertable:
    return Hypertable(
        own["hypertable"],
        QualifiedName(own["schema_name"], own["table_name"]),
        QualifiedName(own["root_schema"], own["root_name"]),
    )


async def _read_newcomers(
    source: asyncpg.Connection, hypertable: Hypertable, known: Sequence[int]
) -> dict[int, Newcomer]:
    rows = await source.fetch(_OTHERS, hypertable.oid, known)
    ranges = await chunk_ranges(source, [row["oid"] for row in rows])
    return {
        row["oid"]: Newcomer(
            Home(hypertable.name, QualifiedName(row["schema"], row["name"])), ranges.get(row["oid"], "true")
        )
        for row in rows
    }


async def keep_overlapping(
    target: asyncpg.Connection, root: QualifiedName, newcomers: Mapping[int, Newcomer], condition: str | None
) -> dict[int, Newcomer]:
    """Leave out the chunks none of whose rows can meet a condition: the target's planner sees that two ranges exclude one another.

    A condition that cannot be asked there tells nothing: its column may have got another name since.
    """
    if condition is None or not newcomers:
        return dict(newcomers)
    is_flat = await is_plain(target, root)
    async with AsyncExitStack() as stack:
        if not target.is_in_transaction():
            await stack.enter_async_context(target.transaction())
        with server_errors("target", f"comparing ranges of {root}"):
            await target.execute("savepoint comparing; set local constraint_exclusion = on")
            # A planner that rules out the one range by itself tells nothing of two; without TimescaleDB it knows no hash.
            is_told = not is_flat or is_told_without(condition)
            try:
                is_told = is_told and not await _is_refuted(target, root, condition)
                kept = {
                    oid: each
                    for oid, each in newcomers.items()
                    if not is_told
                    or (is_flat and not is_told_without(each.range))
                    or not await _is_refuted(target, root, f"({condition}) and ({each.range})")
                }
            except UNASKABLE:
                kept = dict(newcomers)
            await target.execute("rollback to comparing; release comparing")
    return kept


async def _is_refuted(target: asyncpg.Connection, root: QualifiedName, condition: str) -> bool:
    """Tell whether the planner sees that no row can meet a condition."""
    plan = await target.fetch(_EXPLAIN.format(root=root.sql, condition=condition))
    return any(_CONTRADICTION in row[0] for row in plan)


async def mark_leftover(target: asyncpg.Connection, leftover: Leftover) -> None:
    """Have the chunks copied anew by their lane that may hold what another left; in the caller's transaction."""
    if leftover.grown:
        await target.execute(_MARK, leftover.grown)
    await mark_newcomers(target, leftover.newcomers, leftover.lsn)


async def mark_newcomers(target: asyncpg.Connection, newcomers: Mapping[int, Newcomer], lsn: int) -> None:
    """Have chunks that came after the plan copied anew by their lane: what was missed was before `lsn`, when their ranges were read."""
    for oid, each in newcomers.items():
        reason = "it may hold rows of another that was merged or split"
        await mark_chunk(target, oid, each.home, reason=reason, lsn=lsn, is_new=True, condition=each.range)


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


async def note_chunks(source: asyncpg.Connection, target: asyncpg.Connection, hypertable: int) -> None:
    """Record range and file that the chunks of a hypertable have, which is copied whole: known now, however they were merged or moved before."""
    with server_errors("target", "reading the plan"):
        chunks = [row["oid"] for row in await target.fetch(_CHUNKS, hypertable)]
    with server_errors("source", "looking at chunks"):
        ranges = await chunk_ranges(source, chunks)
        marks = await source.fetch(_FILE_MARKS, chunks)
    with server_errors("target", "recording ranges"):
        await target.executemany(_SET_RANGE, list(ranges.items()))
        await target.executemany(_SET_FILE_MARK, [(row["oid"], row["file_mark"]) for row in marks])
