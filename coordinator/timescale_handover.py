"""What follows the last barrier on hypertables: chunks that the stream did not tell all of, aggregates' watermarks; after the hand-over
compression as on the source, and at last the jobs."""

from __future__ import annotations

from collections.abc import Iterable

import asyncpg

from live_migration.common.catalog import TableInfo
from live_migration.common.errors import TargetError
from live_migration.common.home import Home
from live_migration.common.postgres import asking, session
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import Chunk, Layout, read_layout, read_slices
from live_migration.consumer.chunk_marks import mark_chunk
from live_migration.consumer.chunk_rebuild import all_due_chunks, find_chunk, rebuild_chunk
from live_migration.consumer.hypertables import session_settings
from live_migration.consumer.source_watch import write_flush_barrier
from live_migration.coordinator.aggregate_refresh import keep_watermarks
from live_migration.coordinator.aggregate_state import AggregateState, read_state, write_state
from live_migration.coordinator.run import APPLICATION, Run
from live_migration.coordinator.source_jobs import release_target_jobs

_EVERYTHING = 2**63 - 1
"""An LSN: behind the last barrier all is applied."""
_AGGREGATES = "aggregates before the barriers"
_INSERT_ONLY = """
    select oid, schema_name, table_name from _live_migration.tables where kind = 'hypertable' and publication = 'insert'
"""


async def copy_unfollowed_chunks(run: Run, source: asyncpg.Connection, tables: Iterable[TableInfo]) -> None:
    """Copy the chunks anew that wait for it, and those in which rows were changed that the stream does not tell of."""
    await _mark_new_unfollowed(run, tables)
    await _mark_suspects(run, source)
    with asking("target", "looking for chunks to copy"):
        chunks = await all_due_chunks(run.target)
    if not chunks:
        return
    run.reporter.note(f"copying {len(chunks)} chunks that were changed unseen: {name_list(c.name for c in chunks)}")
    settings, migration_id = run.settings, run.migration.id
    whole: set[QualifiedName] = set()
    async with session(settings.source_uri(), "source", application=f"{APPLICATION} barrier") as other:
        for chunk in chunks:
            async with run.target_transaction(f"copying chunk {chunk.name}") as target:
                await target.execute("set local session_replication_role = replica")
                if more := await session_settings(target):
                    await target.execute(more)
                await rebuild_chunk(
                    source,
                    target,
                    chunk,
                    applied_lsn=_EVERYTHING,
                    lock_timeout=settings.lock_timeout,
                    flush=lambda: write_flush_barrier(other, migration_id),
                    whole=whole,
                )


async def _mark_new_unfollowed(run: Run, tables: Iterable[TableInfo]) -> None:
    """Mark chunks made since the plan, of hypertables without identity, in which rows were updated or deleted."""
    with asking("target", "reading the plan"):
        roots = {
            row["oid"]: QualifiedName(row["schema_name"], row["table_name"])
            for row in await run.target.fetch(_INSERT_ONLY)
        }
        known = {row[0] for row in await run.target.fetch("select oid from _live_migration.tables")}
        for table in tables:
            root = roots.get(table.hypertable or 0)
            if table.part == "chunk" and root is not None and table.oid not in known and table.changed_row_count:
                await mark_chunk(
                    run.target, table.oid, Home(root, table.name), reason="rows changed, and it has no replica identity"
                )


async def _mark_suspects(run: Run, source: asyncpg.Connection) -> None:
    """Mark the chunks that lanes have seen being compressed on their way to the last barrier."""
    with asking("target", "looking for chunks to copy"):
        rows = await run.target.fetch("select * from _live_migration.suspects")
    for row in rows:
        root = QualifiedName(row["hypertable_schema"], row["hypertable_name"])
        chunk = QualifiedName(row["chunk_schema"], row["chunk_name"])
        with asking("source", f"looking for chunk {chunk}"):
            oid = await find_chunk(source, chunk)
        async with run.target_transaction("marking chunks") as target:
            if oid is not None:
                await mark_chunk(target, oid, Home(root, chunk), reason="it was compressed just before the cutover")
            await target.execute(
                "delete from _live_migration.suspects where compressed_oid = $1", row["compressed_oid"]
            )


async def keep_aggregates(run: Run, source: asyncpg.Connection) -> None:
    """Note before the last barriers how far the aggregates are materialized: a policy may refresh after them."""
    state = await _read_aggregates(source)
    if state is None:
        return
    async with run.target_transaction("noting the aggregates' watermarks") as target:
        await target.execute(
            "insert into _live_migration.archives values ($1, $2) on conflict (name) do update set content = excluded.content",
            _AGGREGATES,
            state.encode(),
        )


async def _read_aggregates(source: asyncpg.Connection) -> AggregateState | None:
    with asking("source", "reading the aggregates' watermarks"):
        async with source.transaction(isolation="repeatable_read", readonly=True):
            layout = await read_layout(source)
            return await read_state(source, layout) if layout else None


async def bring_watermarks(run: Run, source: asyncpg.Connection) -> None:
    """Make each aggregate as far materialized as on the source, and as much of it out of date: that is in no stream.

    Where our role may not write TimescaleDB's catalog the aggregates are refreshed after the hand-over.
    """
    now = await _read_aggregates(source)
    with asking("target", "reading the hypertables"):
        ours = await read_layout(run.target)
        before = await run.target.fetchval("select content from _live_migration.archives where name = $1", _AGGREGATES)
    if now is None or ours is None or not now.watermarks:
        return
    wanted = now.since(AggregateState.decode(before)) if before else now
    try:
        async with run.target_transaction("setting the aggregates' watermarks") as target:
            await write_state(target, ours, wanted)
    except TargetError as error:
        if not isinstance(error.__cause__, asyncpg.InsufficientPrivilegeError):
            raise
        await keep_watermarks(run, wanted)


async def compress_like_source(run: Run) -> None:
    """Compress the target's chunks whose twins on the source are compressed, and decompress those whose twins are not; each in a
    transaction of its own."""
    async with run.source_session("compression") as source:
        theirs = await run.patiently("reading the hypertables", lambda: read_layout(source))
        their_slices = (
            await run.patiently("reading the hypertables", lambda: read_slices(source, theirs)) if theirs else {}
        )
    with asking("target", "reading the hypertables"):
        ours = await read_layout(run.target)
    if theirs is None or ours is None:
        return
    with asking("target", "reading the hypertables"):
        our_slices = await read_slices(run.target, ours)
    schema = await run.target.fetchval(
        "select extnamespace::regnamespace::text from pg_extension where extname = 'timescaledb'"
    )
    wanted, unwanted = _twins(theirs, their_slices, ours, our_slices)
    for doing, names, call in (
        ("compressing", wanted, "compress_chunk($1::text::regclass, if_not_compressed => true)"),
        ("decompressing", unwanted, "decompress_chunk($1::text::regclass, if_compressed => true)"),
    ):
        if names:
            run.reporter.note(f"{doing} {len(names)} chunks as on the source")
        for name in names:
            with asking("target", f"{doing} {name}"):
                await run.target.execute(f"select {schema}.{call}", name.sql)


def _twins(
    theirs: Layout, their_slices: dict[int, str], ours: Layout, our_slices: dict[int, str]
) -> tuple[list[QualifiedName], list[QualifiedName]]:
    """Give our chunks that hold the same range of the same hypertable as a compressed one of theirs, and the compressed ones of ours whose
    twin is not compressed."""

    def key(layout: Layout, chunk: Chunk, slices: dict[int, str]) -> tuple[QualifiedName, str | None]:
        hypertable = layout.hypertables[chunk.hypertable]
        return hypertable.view or hypertable.name, slices.get(chunk.oid)

    is_compressed = {key(theirs, chunk, their_slices): chunk.compressed is not None for chunk in theirs.chunks.values()}
    twins = [(chunk, is_compressed.get(key(ours, chunk, our_slices))) for chunk in ours.chunks.values()]
    return (
        sorted(chunk.name for chunk, wanted in twins if wanted),
        sorted(chunk.name for chunk, wanted in twins if wanted is False and chunk.compressed is not None),
    )


async def release_jobs(run: Run) -> None:
    """Give the target's jobs the schedule that they have on the source."""
    if scheduled := await release_target_jobs(run):
        run.reporter.note(f"jobs of the target are scheduled now: {name_list(scheduled)}")
