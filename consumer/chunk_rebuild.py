"""Copying anew in its lane's turn: a chunk, through the target's hypertable, of which the stream told not all or too late; a newcomer.

The lane stands still meanwhile, so the rule of every copy holds: a change that the new snapshot shows is passed over from here on.
All that came before the chunk was made must be applied (`rebuild_lsn`), or an older TRUNCATE of the hypertable would take its rows along.

A newcomer, a table or hypertable made after the plan, is copied whole, and so is a hypertable whose chunks the target cannot tell apart (`plain_chunks`). No lane has passed over a change of it that the snapshot of
its row does not show (`target_tables.RebuildFirst`), and the copy's own snapshot is a later one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

import asyncpg

from live_migration.common.catalog import Part
from live_migration.common.errors import Fenced
from live_migration.common.home import Home
from live_migration.common.relation import QualifiedName
from live_migration.common.telemetry import get_logger
from live_migration.common.timescale import chunk_range, compressed_table, compressed_tables
from live_migration.consumer.chunk_copy import look_without
from live_migration.consumer.claim_endings import CopyOrigin
from live_migration.consumer.claims import TableClaim
from live_migration.consumer.copy_errors import CopyDeferred, server_errors
from live_migration.consumer.copy_stream import CopyCount, CopyPlan, stream_copy
from live_migration.consumer.merged_chunks import absorb, look_for_merged, mark_grown, siblings
from live_migration.consumer.plain_chunks import hypertable_to_copy, is_plain
from live_migration.consumer.source_watch import await_committing
from live_migration.consumer.table_snapshot import (
    ChunkGone,
    LockedTable,
    check_target,
    lock_table,
    require_known_timeline,
)

NOT_KNOWN_YET = 2**63 - 1
"""An LSN behind all others."""

log = get_logger(__name__)

_REBUILD = """
    select oid, schema_name, table_name, coalesce(root_schema, schema_name) as root_schema,
           coalesce(root_name, table_name) as root_name, range, coalesce(rebuild, 'rows changed unseen') as reason, kind
    from _live_migration.tables where (kind = 'chunk' or newcomer = 'followed' and rebuild is not null) and {}
    order by kind = 'chunk', oid
"""
_DUE = _REBUILD.format("rebuild is not null and lane = $1 and ($3 or coalesce(rebuild_lsn <= $2, true))")
_ALL = _REBUILD.format("(rebuild is not null or copy_again and kind = 'chunk')")
_MARK = """
    insert into _live_migration.tables
        (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind, hypertable_oid, root_schema,
         root_name, copies_to_root, snapshot, horizon, timeline, rebuild, rebuild_lsn, unseen_lsn)
    select $1, $2, $3, h.lane, h.publication, h.columns, h.binary_copy, 'ready', 'chunk', h.oid, h.root_schema, h.root_name,
           true, h.snapshot, h.horizon, h.timeline, $4, $5, $6
    from _live_migration.tables h where h.kind = 'hypertable' and not h.is_left_out and h.schema_name = $7 and h.table_name = $8
    on conflict (schema_name, table_name) do update
    set rebuild = coalesce(tables.rebuild, excluded.rebuild), unseen_lsn = coalesce(excluded.unseen_lsn, tables.unseen_lsn),
        rebuild_lsn = case when tables.rebuild is null then excluded.rebuild_lsn else tables.rebuild_lsn end
"""
_DONE = """
    update _live_migration.tables
    set rebuild = case when coalesce(rebuild_lsn <= $9, true) and coalesce(unseen_lsn <= $3, true) then null else rebuild end,
        snapshot = $2, horizon = $3, timeline = $4, columns = $5, binary_copy = $6, row_count = $7,
        byte_count = $8, copied_at = clock_timestamp(), error = null, hint = null, copy_again = false
    where oid = $1
"""


# Chunks of a hypertable that was copied whole: what its snapshot shows is theirs. A mark stays where more may have been missed since.
_CHUNKS_DONE = """
    update _live_migration.tables
    set rebuild = case when coalesce(rebuild_lsn <= $5, true) and coalesce(unseen_lsn <= $3, true) then null else rebuild end,
        snapshot = $2, horizon = $3, timeline = $4, copy_again = false
    where hypertable_oid = $1 and kind = 'chunk'
"""
_IS_MARKED = "select rebuild is not null or copy_again from _live_migration.tables where oid = $1"


@dataclass(frozen=True, slots=True)
class ChunkToRebuild:
    """A chunk (by `kind`, else a newcomer) that its lane must copy anew, and the table on the target that it belongs to, or is."""

    oid: int
    name: QualifiedName
    root: QualifiedName
    range: str | None
    reason: str
    kind: Part = "chunk"


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
    )


async def mark_chunk(
    target: asyncpg.Connection, oid: int, home: Home, *, reason: str, lsn: int | None = None, is_new: bool = False
) -> None:
    """Say that a chunk is to be copied anew by its lane: what was missed of it was before `lsn`.

    `is_new`: it was made after the plan, so all before `lsn` must have been applied first.
    """
    await target.execute(
        _MARK,
        oid,
        home.chunk.schema,
        home.chunk.name,
        reason,
        lsn if is_new else None,
        lsn,
        home.hypertable.schema,
        home.hypertable.name,
    )


async def is_marking(target: asyncpg.Connection) -> bool:
    """Tell whether chunks are marked from a position on that is not known: whoever marked them did not get to the end."""
    return bool(
        await target.fetchval("select exists (select from _live_migration.tables where unseen_lsn = $1)", NOT_KNOWN_YET)
    )


async def set_marks(target: asyncpg.Connection, lsn: int) -> None:
    """Say that what was missed of the chunks marked so far was before `lsn`."""
    await target.execute(
        """update _live_migration.tables
           set unseen_lsn = $2, rebuild_lsn = case when rebuild_lsn = $1 then $2 else rebuild_lsn end where unseen_lsn = $1""",
        NOT_KNOWN_YET,
        lsn,
    )


async def note_suspects(target: asyncpg.Connection, suspects: Mapping[int, Home]) -> None:
    """Take note of chunks that were compressed, in the transaction that applies it: the coordinator has them copied anew."""
    await target.executemany(
        "insert into _live_migration.suspects values ($1, $2, $3, $4, $5) on conflict do nothing",
        [
            (oid, home.chunk.schema, home.chunk.name, home.hypertable.schema, home.hypertable.name)
            for oid, home in suspects.items()
        ],
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
) -> CopyCount:
    """Empty a chunk's range of the target's hypertable and copy the chunk into it, a newcomer wholly; inside a transaction on the
    target, in the replica role.

    `applied_lsn`: all before it is applied. One that waits no more, for its hypertable was copied whole meanwhile, is left as it is.

    Raises:
        CopyDeferred | TableStopped | ConnectionLost: it cannot be copied just now; nothing may be committed.
    """
    with server_errors("target", f"looking at {chunk.name}"):
        if not await target.fetchval(_IS_MARKED, chunk.oid):
            return CopyCount(0, 0)
    if chunk.kind == "chunk" and (whole := await hypertable_to_copy(source, target, chunk.oid, chunk.root)):
        chunk = replace(chunk, oid=whole[0], name=whole[1], range=None, kind="hypertable")
    is_chunk = chunk.kind == "chunk"
    grown: list[int] = []
    with server_errors("source", f"looking at {chunk.name}"):
        await await_committing(source)
        compressed = await compressed_table(source, chunk.oid) if is_chunk else None
    claim = TableClaim(chunk.oid, chunk.name, 0, has_parts=False, is_chunk=is_chunk, compressed=compressed)
    try:
        origin, plan, condition = await _look(source, target, chunk, claim, lock_timeout)
    except ChunkGone:
        await source.execute("rollback")
        origin, plan, condition = await look_without(source, claim), None, chunk.range
        grown = (await look_for_merged(source, target, chunk.oid, lock_timeout)).grown
    await flush()
    count = CopyCount(0, 0)
    await mark_grown(target, grown)
    if plan is not None:
        if is_chunk and condition and chunk.range and condition != chunk.range:
            await absorb(target, chunk.oid, condition, await siblings(source, chunk.oid), origin)
        await _empty(target, chunk, condition)
        count = await stream_copy(source, target, plan, blocks=None, freeze=False, on_bytes=lambda _: None)
        with server_errors("source", f"ending the copy of {chunk.name}"):
            await source.execute("rollback")
    await _finish(target, chunk, origin, count, applied_lsn)
    log.info("chunk copied anew", chunk=str(chunk.name), reason=chunk.reason, rows=count.rows, bytes=count.bytes)
    return count


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
    await require_known_timeline(target, locked)
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
        )
    if status != "UPDATE 1":
        raise Fenced(f"{chunk.name} is not part of the plan any more")
    if chunk.kind == "hypertable":
        with server_errors("target", f"finishing the chunks of {chunk.name}"):
            await target.execute(_CHUNKS_DONE, chunk.oid, origin.snapshot, origin.horizon, origin.timeline, applied_lsn)
