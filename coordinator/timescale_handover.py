"""What follows the last barrier on hypertables: chunks that the stream did not tell all of, aggregates' watermarks; after the hand-over
compression as on the source, and at last the jobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

import asyncpg

from live_migration.common.errors import TargetError
from live_migration.common.home import Home
from live_migration.common.postgres import asking, enter_replica_role, refusal_of, session
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import Chunk, Layout, chunk_range, read_layout, read_slices
from live_migration.consumer.chunk_marks import mark_chunk
from live_migration.consumer.chunk_rebuild import ChunkToRebuild, all_due_chunks, find_chunk, rebuild_chunk
from live_migration.consumer.hypertables import session_settings
from live_migration.consumer.source_watch import write_flush_barrier
from live_migration.coordinator import archives
from live_migration.coordinator.aggregate_refresh import keep_watermarks, kept_watermarks
from live_migration.coordinator.aggregate_state import AggregateState, read_state, write_state
from live_migration.coordinator.chunk_watch import mark_unlooked
from live_migration.coordinator.refresh_gaps import close_gaps
from live_migration.coordinator.run import APPLICATION, Run
from live_migration.coordinator.source_jobs import held_target_ids, release_target_jobs
from live_migration.coordinator.statistics import Unfollowed, read_statistics

_EVERYTHING = 2**63 - 1
"""An LSN: behind the last barrier all is applied."""
_AGGREGATES = "aggregates before the barriers"
_COMPRESSION = "compression at the cutover"
_INSERT_ONLY = """
    select oid, schema_name, table_name, statistics from _live_migration.tables where kind = 'hypertable' and publication = 'insert'
"""


async def copy_unfollowed_chunks(run: Run, source: asyncpg.Connection, unfollowed: Unfollowed) -> None:
    """Copy the chunks anew that wait for it, and those in which rows were changed that the stream does not tell of."""
    await _mark_new_unfollowed(run, source, unfollowed)
    await _mark_suspects(run, source)
    await mark_unlooked(run, source)
    done: set[int] = set()
    while True:  # a chunk that was split has its new neighbours copied, too
        with asking("target", "looking for chunks to copy"):
            chunks = [chunk for chunk in await all_due_chunks(run.target) if chunk.oid not in done]
        if not chunks:
            return
        done.update(chunk.oid for chunk in chunks)
        await _copy_chunks(run, source, chunks)


async def _copy_chunks(run: Run, source: asyncpg.Connection, chunks: Sequence[ChunkToRebuild]) -> None:
    run.reporter.note(f"copying {len(chunks)} chunks that were changed unseen: {name_list(c.name for c in chunks)}")
    settings, migration_id = run.settings, run.migration.id
    whole: set[QualifiedName] = set()

    async def note(message: str) -> None:
        run.reporter.note(message)

    async with session(settings.source_uri(), "source", application=f"{APPLICATION} barrier") as other:
        for chunk in chunks:
            async with run.target_transaction(f"copying chunk {chunk.name}") as target:
                await enter_replica_role(target)
                if more := await session_settings(target):
                    await target.execute(more)
                await rebuild_chunk(
                    source,
                    target,
                    chunk,
                    applied_lsn=_EVERYTHING,
                    lock_timeout=settings.lock_timeout,
                    flush=lambda: write_flush_barrier(other, migration_id),
                    on_wait=note,
                    whole=whole,
                )


async def _mark_new_unfollowed(run: Run, source: asyncpg.Connection, unfollowed: Unfollowed) -> None:
    """Mark chunks made since the plan, of hypertables without identity, in which rows were, or may have been, updated or deleted."""
    now = await read_statistics(source)
    with asking("target", "reading the plan"):
        roots = {
            row["oid"]: (QualifiedName(row["schema_name"], row["table_name"]), row["statistics"])
            for row in await run.target.fetch(_INSERT_ONLY)
        }
        known = {row[0] for row in await run.target.fetch("select oid from _live_migration.tables")}
        for table in unfollowed.tables:
            if table.part != "chunk" or table.oid in known or (found := roots.get(table.hypertable or 0)) is None:
                continue
            root, statistics = found
            if table.changed_row_count or unfollowed.is_doubtful or now is None or statistics != now:
                reason, home = "rows changed, and it has no replica identity", Home(root, table.name)
                await mark_chunk(run.target, table.oid, home, reason=reason, is_new=True, condition=table.range)


async def _mark_suspects(run: Run, source: asyncpg.Connection) -> None:
    """Mark the chunks that lanes have seen being compressed on their way to the last barrier."""
    with asking("target", "looking for chunks to copy"):
        rows = await run.target.fetch("select * from _live_migration.suspects")
    for row in rows:
        root = QualifiedName(row["hypertable_schema"], row["hypertable_name"])
        chunk = QualifiedName(row["chunk_schema"], row["chunk_name"])
        oid, condition = await run.patiently(f"looking for chunk {chunk}", partial(_look_for, source, chunk))
        async with run.target_transaction("marking chunks") as target:
            if oid is not None:
                reason, home = "it was compressed just before the cutover", Home(root, chunk)
                await mark_chunk(target, oid, home, reason=reason, is_new=True, condition=condition)
            await target.execute(
                "delete from _live_migration.suspects where compressed_oid = $1", row["compressed_oid"]
            )


async def _look_for(source: asyncpg.Connection, chunk: QualifiedName) -> tuple[int | None, str | None]:
    oid = await find_chunk(source, chunk)
    return oid, await chunk_range(source, oid) if oid is not None else None


async def keep_aggregates(run: Run, source: asyncpg.Connection) -> None:
    """Note before the last barrier how far the aggregates are materialized: a policy may refresh after it."""
    state = await _read_aggregates(run, source)
    if state is None:
        return
    async with run.target_transaction("noting the aggregates' watermarks") as target:
        await archives.keep(
            target,
            _AGGREGATES,
            state.encode(),
        )


async def _read_aggregates(run: Run, source: asyncpg.Connection) -> AggregateState | None:
    async def look() -> AggregateState | None:
        async with source.transaction(isolation="repeatable_read", readonly=True):
            layout = await read_layout(source)
            return await read_state(source, layout) if layout else None

    return await run.patiently("reading the aggregates' watermarks", look)


async def bring_watermarks(run: Run, source: asyncpg.Connection) -> None:
    """Make each aggregate as far materialized as on the source, and as much of it out of date: that is in no stream.

    Where our role may not write TimescaleDB's catalog the aggregates are refreshed after the hand-over.
    """
    now = await _read_aggregates(run, source)
    with asking("target", "reading the hypertables"):
        ours = await read_layout(run.target)
        before = await archives.read(run.target, _AGGREGATES)
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


async def note_compression(run: Run, source: asyncpg.Connection) -> None:
    """Note which chunks are compressed on the source, which nobody may be able to ask after the hand-over."""
    theirs = await run.patiently("reading the hypertables", lambda: read_layout(source))
    slices = await run.patiently("reading the hypertables", lambda: read_slices(source, theirs)) if theirs else {}
    found = _compression(theirs, slices) if theirs else {}
    async with run.target_transaction("noting which chunks are compressed") as target:
        await archives.keep(
            target,
            _COMPRESSION,
            json.dumps([[name.schema, name.name, bounds, flag] for (name, bounds), flag in found.items()]).encode(),
        )


async def compress_like_source(run: Run) -> None:
    """Compress and decompress the target's chunks as their twins on the source were at the cutover, each in a transaction of its own."""
    with asking("target", "reading the hypertables"):
        content = await archives.read(run.target, _COMPRESSION)
        ours = await read_layout(run.target)
        slices = await read_slices(run.target, ours) if ours else {}
    if ours is None:
        return
    if content is None:
        run.reporter.warning("the hand-over was done by an earlier version: no chunk is compressed as on the source")
        return
    theirs = {(QualifiedName(schema, name), bounds): flag for schema, name, bounds, flag in json.loads(content)}
    to_compress, to_decompress = _unlike(theirs, ours, slices)
    schema = await run.target.fetchval(
        "select extnamespace::regnamespace::text from pg_extension where extname = 'timescaledb'"
    )
    refused: list[str] = []
    for names, doing, call in (
        (to_decompress, "decompressing", "decompress_chunk($1::text::regclass, if_compressed => true)"),
        (to_compress, "compressing", "compress_chunk($1::text::regclass, if_not_compressed => true)"),
    ):
        if names:
            run.reporter.note(f"{doing} {len(names)} chunks as on the source")
        for name in names:
            if problem := await _try(run, doing, name, f"select {schema}.{call}"):
                refused.append(f"{doing} {name}: {problem}")
    if refused:  # jobs must start all the same
        run.reporter.warning(
            f"chunks are not compressed as on the source, for the target refuses it: {name_list(refused)}. Do it by hand."
        )
    if strangers := _without_twin(theirs, ours, slices):
        run.reporter.warning(
            f"ranges that are compressed chunks on the source are cut otherwise on the target, and were left uncompressed: {name_list(strangers)}"
        )


async def _try(run: Run, doing: str, chunk: QualifiedName, statement: str) -> str | None:
    """Run a statement on a chunk; give what the target says against it."""
    with asking("target", f"{doing} {chunk}"):
        try:
            await run.target.execute(statement, chunk.sql)
        except asyncpg.PostgresError as error:
            return refusal_of(error)
    return None


_Twins = dict[tuple[QualifiedName, str], bool]
"""Whether a chunk is compressed, by what users call its hypertable and its bounds in that: these are equal on every server."""


def _compression(layout: Layout, slices: dict[int, str]) -> _Twins:
    return {
        (_called(layout, chunk), slices[chunk.oid]): chunk.compressed is not None
        for chunk in layout.chunks.values()
        if chunk.oid in slices
    }


def _called(layout: Layout, chunk: Chunk) -> QualifiedName:
    hypertable = layout.hypertables[chunk.hypertable]
    return hypertable.view or hypertable.name


def _unlike(theirs: _Twins, ours: Layout, slices: dict[int, str]) -> tuple[list[QualifiedName], list[QualifiedName]]:
    """Give our chunks to compress, one that is compressed in part included, and those to decompress; one without a twin is left."""
    twins = {
        chunk.name: (theirs[key], chunk.compressed is not None)
        for chunk in ours.chunks.values()
        if (key := (_called(ours, chunk), slices.get(chunk.oid, ""))) in theirs
    }
    return (
        sorted(name for name, (wanted, _) in twins.items() if wanted),
        sorted(name for name, (wanted, is_compressed) in twins.items() if is_compressed and not wanted),
    )


def _without_twin(theirs: _Twins, ours: Layout, slices: dict[int, str]) -> list[str]:
    """Name what is compressed on the source in a range that no chunk of the target has, of hypertables that both have."""
    names = {_called(ours, chunk) for chunk in ours.chunks.values()}
    present = {(_called(ours, chunk), slices.get(chunk.oid, "")) for chunk in ours.chunks.values()}
    return sorted(
        f"{name} {bounds}"
        for (name, bounds), flag in theirs.items()
        if flag and name in names and (name, bounds) not in present
    )


async def release_jobs(run: Run) -> None:
    """Give the target's jobs the schedule that they have on the source, once aggregates are where refresh policies reach from."""
    jobs, floors = await held_target_ids(run.target), await kept_watermarks(run.target)
    outcome = await close_gaps(run.target, "target", jobs, since=run.migration.created_at, floors=floors)
    if outcome.refreshed:
        run.reporter.note(f"refreshed from where they ended when jobs were paused: {name_list(outcome.refreshed)}")
    for line in outcome.failed:
        run.reporter.warning(line)
    if scheduled := await release_target_jobs(run):
        run.reporter.note(f"jobs of the target are scheduled now: {name_list(scheduled)}")
