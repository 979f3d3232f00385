"""Copying anew in its lane's turn: a chunk, through the target's hypertable, of which the stream told not all or too late; a newcomer.

The lane stands still meanwhile, so the rule of every copy holds: a change that the new snapshot shows is passed over from here on.
All that came before the chunk was made must be applied (`rebuild_lsn`), or an older TRUNCATE of the hypertable would take its rows along.

A newcomer, a table or hypertable made after the plan, is copied whole, and so is a hypertable whose chunks the target cannot tell apart (`plain_chunks`). No lane has passed over a change of it that the snapshot of
its row does not show (`target_tables.RebuildFirst`), and the copy's own snapshot is a later one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import asyncpg

from live_migration.common.catalog import Part
from live_migration.common.chunk_range import is_same_range
from live_migration.common.errors import Fenced
from live_migration.common.relation import QualifiedName
from live_migration.common.telemetry import get_logger
from live_migration.common.timescale import chunk_range, compressed_table, compressed_tables
from live_migration.consumer.chunk_copy import look_without
from live_migration.consumer.claim_endings import CopyOrigin
from live_migration.consumer.claims import TableClaim
from live_migration.consumer.committing import await_committing
from live_migration.consumer.copy_errors import CopyDeferred, server_errors
from live_migration.consumer.copy_stream import CopyCount, CopyPlan, stream_copy
from live_migration.consumer.merged_chunks import (
    Leftover,
    absorb,
    find_newcomers,
    look_for_merged,
    mark_leftover,
    mark_newcomers,
    note_chunks,
    siblings,
)
from live_migration.consumer.plain_chunks import hypertable_to_copy, is_plain
from live_migration.consumer.table_snapshot import (
    ChunkGone,
    LockedTable,
    check_target,
    lock_table,
    require_known_timeline,
)

log = get_logger(__name__)

_REBUILD = """
    select oid, schema_name, table_name, coalesce(root_schema, schema_name) as root_schema,
           coalesce(root_name, table_name) as root_name, range, coalesce(rebuild, 'rows changed unseen') as reason, kind, {} as is_early
    from _live_migration.tables where (kind = 'chunk' or newcomer = 'followed' and rebuild is not null) and {}
    order by kind = 'chunk', oid
"""
_DUE = _REBUILD.format(
    "coalesce(rebuild_lsn > $2, false)",
    "rebuild is not null and lane = $1 and ($3 or coalesce(rebuild_lsn <= $2, true))",
)
_ALL = _REBUILD.format("false", "(rebuild is not null or copy_again and kind = 'chunk')")
_DONE = """
    update _live_migration.tables
    set rebuild = case when coalesce(rebuild_lsn <= $9, true) and coalesce(unseen_lsn <= $3, true) then null else rebuild end,
        snapshot = $2, horizon = $3, timeline = $4, columns = $5, binary_copy = $6, row_count = $7,
        byte_count = $8, file_mark = $10, copied_at = clock_timestamp(), error = null, hint = null, copy_again = false
    where oid = $1
"""


# Chunks of a hypertable that was copied whole: what its snapshot shows is theirs. A mark stays where more may have been missed since.
_CHUNKS_DONE = """
    update _live_migration.tables
    set rebuild = case when coalesce(rebuild_lsn <= $5, true) and coalesce(unseen_lsn <= $3, true) then null else rebuild end,
        snapshot = $2, horizon = $3, timeline = $4, copy_again = false
    where hypertable_oid = $1 and kind = 'chunk'
"""


@dataclass(frozen=True, slots=True)
class ChunkToRebuild:
    """A chunk (by `kind`, else a newcomer) that its lane must copy anew, and the table on the target that it belongs to, or is.

    `is_early`: its lane has not come so far as it should; what is known of its range is from later then.
    """

    oid: int
    name: QualifiedName
    root: QualifiedName
    range: str | None
    reason: str
    kind: Part = "chunk"
    is_early: bool = False


async def due_chunks(
    target: asyncpg.Connection, lane: int, applied_lsn: int, *, early: bool = False
) -> list[ChunkToRebuild]:
    """Give the chunks that a lane which has applied all before `applied_lsn` must copy anew.

    `early`: those too whose time has not come; they stay marked, for what is applied before that may undo it.
    """
    return [_chunk(row) for row in await target.fetch(_DUE, lane, applied_lsn, early)]


async def all_due_chunks(target: asyncpg.Connection) -> list[ChunkToRebuild]:
    """Give the chunks that must be copied anew once all lanes stand at the last barrier."""
    return [_chunk(row) for row in await target.fetch(_ALL)]


def _chunk(row: asyncpg.Record) -> ChunkToRebuild:
    name = QualifiedName(row["schema_name"], row["table_name"])
    return ChunkToRebuild(
        row["oid"],
        name,
        QualifiedName(row["root_schema"], row["root_name"]),
        row["range"],
        row["reason"],
        row["kind"],
        row["is_early"],
    )


async def find_chunk(source: asyncpg.Connection, name: QualifiedName) -> int | None:
    """Give a chunk's oid on the source; None when it is gone."""
    oid: int | None = await source.fetchval("select to_regclass($1)::oid", name.sql)
    return oid


async def rebuild_chunk(
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    chunk: ChunkToRebuild,
    *,
    applied_lsn: int,
    lock_timeout: float,
    flush: Callable[[], Awaitable[None]],
    on_wait: Callable[[str], Awaitable[None]],
    whole: set[QualifiedName],
) -> CopyCount:
    """Empty a chunk's range of the target's hypertable and copy the chunk into it, a newcomer wholly; inside a transaction on the
    target, in the replica role.

    `applied_lsn`: all before it is applied. `on_wait`: told whom it waits for on the source, where that lasts. `whole`: hypertables that the caller had copied whole, of which one chunk is as good as all.

    Raises:
        CopyDeferred | TableStopped | ConnectionLost: it cannot be copied just now; nothing may be committed.
    """
    if chunk.root in whole:
        return CopyCount(0, 0)
    if chunk.kind == "chunk" and (hypertable := await hypertable_to_copy(source, target, chunk.oid, chunk.root)):
        chunk = replace(chunk, oid=hypertable[0], name=hypertable[1], range=None, kind="hypertable")
        whole.add(chunk.root)
    is_chunk = chunk.kind == "chunk"
    leftover = Leftover()
    with server_errors("source", f"looking at {chunk.name}"):
        await await_committing(source, lambda what: on_wait(f"copy of {chunk.name} {what}"))
        compressed = await compressed_table(source, chunk.oid) if is_chunk else None
    claim = TableClaim(chunk.oid, chunk.name, 0, has_parts=False, is_chunk=is_chunk, compressed=compressed)
    try:
        origin, plan, condition = await _look(source, target, chunk, claim, lock_timeout)
    except ChunkGone:
        await source.execute("rollback")
        origin, plan, condition = await look_without(source, claim), None, chunk.range
        leftover = await look_for_merged(source, target, chunk.oid, lock_timeout, is_early=chunk.is_early)
    await flush()
    count = CopyCount(0, 0)
    await mark_leftover(target, leftover)
    if plan is not None:
        if is_chunk and condition and (chunk.is_early or not is_same_range(condition, chunk.range)):
            await _note_neighbours(source, target, chunk, condition, origin)
        if chunk.kind == "hypertable":
            await note_chunks(source, target, chunk.oid)
        await _empty(target, chunk, condition)
        count = await stream_copy(source, target, plan, blocks=None, freeze=False, on_bytes=lambda _: None)
        with server_errors("source", f"ending the copy of {chunk.name}"):
            await source.execute("rollback")
    await _finish(target, chunk, origin, count, applied_lsn)
    log.info("chunk copied anew", chunk=str(chunk.name), reason=chunk.reason, rows=count.rows, bytes=count.bytes)
    return count


async def _note_neighbours(
    source: asyncpg.Connection, target: asyncpg.Connection, chunk: ChunkToRebuild, condition: str, origin: CopyOrigin
) -> None:
    """Record what a chunk has taken up, and have copied what may have been split off from it, as the copy's snapshot shows it."""
    assert origin.horizon is not None
    newcomers = await find_newcomers(source, target, chunk.oid, None if chunk.is_early else chunk.range)
    await absorb(target, chunk.oid, condition, await siblings(source, chunk.oid), origin)
    await mark_newcomers(target, newcomers, origin.horizon)


async def _look(
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    chunk: ChunkToRebuild,
    claim: TableClaim,
    lock_timeout: float,
) -> tuple[CopyOrigin, CopyPlan, str | None]:
    condition = None
    if chunk.kind == "hypertable":
        locked = await _lock_hypertable(source, claim, lock_timeout)
    else:
        locked = await lock_table(source, claim, lock_timeout)
    if chunk.kind == "chunk":
        with server_errors("source", f"looking at {chunk.name}"):
            if await compressed_table(source, chunk.oid) != claim.compressed:
                raise CopyDeferred(f"chunk {chunk.name} is being compressed or decompressed just now")
            condition = await chunk_range(source, chunk.oid)
    await require_known_timeline(target, locked.name, locked.timeline)
    plan, origin = await check_target(target, locked, chunk.root, decompresses=chunk.kind != "table")
    return origin, plan, condition


async def _lock_hypertable(source: asyncpg.Connection, claim: TableClaim, lock_timeout: float) -> LockedTable:
    """Lock a hypertable with all its chunks and the tables of their compressed rows, and only then take the snapshot."""
    with server_errors("source", f"looking at {claim.name}"):
        tables = await compressed_tables(source, claim.oid)
    locked = await lock_table(source, claim, lock_timeout, tree=tables)
    with server_errors("source", f"looking at {claim.name}"):
        if await compressed_tables(source, claim.oid) != tables:
            raise CopyDeferred(f"chunks of {claim.name} are being compressed or decompressed just now")
    return locked


async def _empty(target: asyncpg.Connection, chunk: ChunkToRebuild, condition: str | None) -> None:
    if chunk.kind != "chunk":
        # A materialization takes no TRUNCATE.
        is_whole = chunk.kind == "table" or await is_plain(target, chunk.root)
        statement = f"truncate only {chunk.root.sql}" if is_whole else f"delete from {chunk.root.sql}"
        with server_errors("target", f"emptying {chunk.root}"):
            await target.execute(statement)
        return
    with server_errors("target", f"emptying the range of {chunk.name} in {chunk.root}"):
        await target.execute(f"delete from {chunk.root.sql} where {condition or chunk.range or 'false'}")


async def _finish(
    target: asyncpg.Connection, chunk: ChunkToRebuild, origin: CopyOrigin, count: CopyCount, applied_lsn: int
) -> None:
    with server_errors("target", f"finishing {chunk.name}"):
        status = await target.execute(
            _DONE,
            chunk.oid,
            origin.snapshot,
            origin.horizon,
            origin.timeline,
            origin.columns,
            origin.is_binary,
            count.rows,
            count.bytes,
            applied_lsn,
            origin.file_mark,
        )
    if status != "UPDATE 1":
        raise Fenced(f"{chunk.name} is not part of the plan any more")
    if chunk.kind == "hypertable":
        with server_errors("target", f"finishing the chunks of {chunk.name}"):
            await target.execute(_CHUNKS_DONE, chunk.oid, origin.snapshot, origin.horizon, origin.timeline, applied_lsn)
