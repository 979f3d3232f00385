"""Relations of the stream that nobody planned. Those that are gone from the source again have their changes passed over.

A chunk made after the plan may be gone because it was merged into another, whose copy then holds its rows: it gets a row of its own in the plan
when a lane meets it first, for that copy to say so (`merged_chunks.absorb`), or, should it be gone by then, to be passed over at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import asyncpg

from live_migration.common.errors import ConnectionLost, LaneStopped
from live_migration.common.home import Home
from live_migration.common.postgres import asking
from live_migration.common.relation import QualifiedName, Relation
from live_migration.common.telemetry import get_logger
from live_migration.common.timescale import read_version
from live_migration.common.visibility import CopySnapshot
from live_migration.consumer.chunk_copy import look_without
from live_migration.consumer.chunk_rebuild import find_chunk
from live_migration.consumer.claim_endings import CopyOrigin
from live_migration.consumer.claims import TableClaim
from live_migration.consumer.committing import await_committing
from live_migration.consumer.copy_errors import CopyDeferred
from live_migration.consumer.decoder import Decoded
from live_migration.consumer.merged_chunks import find_unknown, look_for_merged, mark_leftover, mark_newcomers
from live_migration.consumer.target_tables import NotPlanned

log = get_logger(__name__)

_LET_GO = """
    insert into _live_migration.tables
        (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind, root_schema, root_name, newcomer,
         snapshot, horizon, timeline)
    values ($1, $2, $3, $4, 'insert', '[]', false, 'ready', $5, $6, $7, 'gone', $8, $9, $10)
    on conflict do nothing
"""

_MEET = """
    insert into _live_migration.tables
        (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind, hypertable_oid, root_schema, root_name,
         copies_to_root, newcomer, snapshot, horizon, timeline, seen_range)
    select $1, $2, $3, h.lane, h.publication, h.columns, h.binary_copy, 'ready', 'chunk', h.oid, h.root_schema, h.root_name,
           true, 'met', coalesce($6, h.snapshot), coalesce($7::pg_lsn, h.horizon), coalesce($8, h.timeline), case when $6::text is null then null else 'false' end
    from _live_migration.tables h
    where h.kind = 'hypertable' and not h.is_left_out and h.schema_name = $4 and h.table_name = $5
    on conflict do nothing
"""


# Hypertables that call their chunks so: of one that is gone from the catalog nothing else tells whose it was.
_NAMESAKES = """
    select schema_name::text, table_name::text from _timescaledb_catalog.hypertable
    where associated_schema_name = $1 and starts_with($2, associated_table_prefix || '_')
"""


async def meet_chunk(
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    oid: int,
    home: Home,
    decoded: Decoded,
    lock_timeout: float,
) -> bool:
    """Give a chunk that was made after the plan its row; does nothing where it has one, or its hypertable has none.

    `decoded`: the transaction that tells of it.

    Tells whether chunks were marked to be copied anew: those that may have taken it up.

    Raises:
        CopyDeferred | ConnectionLost: the source cannot be asked just now.
    """
    with asking("source", f"looking for chunk {home.chunk}"):
        is_there = await source.fetchval("select exists (select from pg_class where oid = $1)", oid)
    origin = None if is_there else await look_without(source, TableClaim(oid, home.chunk, 0, has_parts=False))
    if origin is not None and not _shows(origin, decoded):
        origin = None  # nobody sees yet who made it
    names = home.chunk.schema, home.chunk.name, home.hypertable.schema, home.hypertable.name
    with asking("target", f"meeting chunk {home.chunk}"):
        async with target.transaction():
            if origin is None:
                await target.execute(_MEET, oid, *names, None, None, None)
                return False
            if await target.fetchval("select source_timeline from _live_migration.migration") != origin.timeline:
                raise ConnectionLost(f"source: it failed over while chunk {home.chunk} was looked for")
            await target.execute(_MEET, oid, *names, origin.snapshot, origin.horizon, origin.timeline)
            leftover = await look_for_merged(source, target, oid, lock_timeout)
            await mark_leftover(target, leftover)
    log.info("a chunk that is gone from the source is passed over", chunk=str(home.chunk))
    return bool(leftover.grown or leftover.newcomers)


async def find_unseen(
    source: asyncpg.Connection, home: Home, relation: Relation, on_wait: Callable[[str], Awaitable[None]]
) -> int:
    """Give the oid of a chunk whose rows changed unseen, as `relation` tells; where it is gone, that of the relation, to find that out by.

    `on_wait`: told whom it waits for, where that lasts: who made the chunk may be about to become visible.

    Raises:
        LaneStopped: the chunk is not there by its name, and what holds its compressed rows is.
    """
    with asking("source", f"looking for chunk {home.chunk}"):
        if oid := await find_chunk(source, home.chunk):
            return oid
        if home.is_compressed:
            await await_committing(source, lambda what: on_wait(f"chunk {home.chunk} is looked for: it {what}"))
            if oid := await find_chunk(source, home.chunk):
                return oid
            if await source.fetchval("select exists (select from pg_class where oid = $1)", relation.oid):
                raise LaneStopped(
                    f"chunk {home.chunk} is not on the source, but {relation.name}, which holds its compressed rows, is",
                    hint="Was it renamed? Give it its name back; the lane then goes on by itself.",
                )
    return relation.oid


async def let_go_if_gone(
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    lane: int,
    stranger: NotPlanned,
    decoded: Decoded,
    on_wait: Callable[[str], Awaitable[None]],
) -> bool:
    """Record a relation that is gone from the source with a snapshot that shows all of its changes, and so all are passed over.

    False when it, or the chunk whose compressed rows it held, is there: then the coordinator brings the hypertable. One that is not part of the plan
    yet will be copied whole, later than this. `decoded`: the transaction that tells of it; `on_wait`: told whom it waits for, where that lasts.
    """
    relation, home = stranger.relation, stranger.home
    try:
        origin = await _look_behind(source, stranger, decoded, on_wait)
    except CopyDeferred:
        return False
    # Another table may bear the name by now; chunks' names, which their compressed rows are found by, do not come again.
    suffix = f" (dropped, oid {relation.oid})"
    names = (home.chunk.name, home.chunk.name + suffix) if home else (relation.name.name + suffix,)
    root = home.hypertable if home else relation.name
    with asking("target", f"letting go of {relation.name}"):
        if await target.fetchval("select source_timeline from _live_migration.migration") != origin.timeline:
            return False
        for (
            name
        ) in names:  # the chunk's own is taken where the table of its compressed rows was let go before it, or after it
            status = await target.execute(
                _LET_GO,
                relation.oid,
                home.chunk.schema if home else relation.name.schema,
                name,
                lane,
                "chunk" if home else "table",
                root.schema,
                root.name,
                origin.snapshot,
                origin.horizon,
                origin.timeline,
            )
            if status == "INSERT 0 1":
                break
        if home is None:
            await _mark_namesakes(source, target, relation.name)
    log.info("a relation that is gone from the source is passed over", relation=str(relation.name))
    return bool(status == "INSERT 0 1")


async def _look_behind(
    source: asyncpg.Connection, stranger: NotPlanned, decoded: Decoded, on_wait: Callable[[str], Awaitable[None]]
) -> CopyOrigin:
    """Give a snapshot in which a relation is gone and that shows the transaction which tells of it.

    A commit is streamed before it is visible: a snapshot without it shows nothing of what it made, and that is no sign that it is gone.

    Raises:
        CopyDeferred: it is there, or it cannot be told yet.
    """
    relation, home = stranger.relation, stranger.home
    claim, chunk = TableClaim(relation.oid, relation.name, 0, has_parts=False), None if home is None else home.chunk
    origin = await look_without(source, claim, chunk)
    if not _shows(origin, decoded):
        with asking("source", f"looking for {relation.name}"):
            await await_committing(source, lambda what: on_wait(f"relation {relation.name} is looked for: it {what}"))
        origin = await look_without(source, claim, chunk)
    if not _shows(origin, decoded):
        raise CopyDeferred(f"the transaction that tells of {relation.name} is not visible yet")
    return origin


def _shows(origin: CopyOrigin, decoded: Decoded) -> bool:
    assert origin.snapshot is not None
    assert origin.horizon is not None
    return CopySnapshot.parse(origin.snapshot, origin.horizon).includes(decoded.commit_lsn, decoded.xid)


async def _mark_namesakes(source: asyncpg.Connection, target: asyncpg.Connection, name: QualifiedName) -> None:
    """Have copied what may have taken up a chunk that was made and gone before anybody could ask whose it was."""
    with asking("source", f"looking for {name}"):
        if await read_version(source) is None:
            return
        roots = [QualifiedName(*row) for row in await source.fetch(_NAMESAKES, name.schema, name.name)]
        lsn = int(await source.fetchval("select pg_current_wal_insert_lsn()"))
    for root in roots:
        await mark_newcomers(target, await find_unknown(source, target, root), lsn)
