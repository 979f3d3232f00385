"""Chunks and tables of compressed rows that came after the plan: each is published, and what was missed before is copied anew.

A chunk made by a session that TimescaleDB's own publishing of new chunks does not reach lacks its updates and deletes in the
stream, or all of it. A chunk compressed since the plan has a table of compressed rows that nobody watches yet. Where new tables of
compressed rows are not in the stream from the first on, one may come and go between two looks: the chunk lies in another file then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import asyncpg

from live_migration.common.catalog import TableInfo
from live_migration.common.chunk_range import is_same_range
from live_migration.common.errors import SourceError
from live_migration.common.home import Home
from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.common.state import Phase
from live_migration.common.timescale import read_version
from live_migration.consumer.chunk_marks import NOT_KNOWN_YET, is_marking, is_waiting, mark_chunk, set_marks
from live_migration.coordinator import planning
from live_migration.coordinator.barrier import emit_call
from live_migration.coordinator.dropped_chunks import find_successors, note_ranges
from live_migration.coordinator.prepare import publish_compressed
from live_migration.coordinator.run import Run
from live_migration.coordinator.timescale_source import can_watch_compressed, publishes_schemas
from live_migration.producer.publication import LockTimeout, PublishedTable, add_tables, published_tables
from live_migration.producer.slot import SlotTimeout, await_older_transactions

INTERVAL_SECONDS = 15.0
_PATIENCE_SECONDS = 5.0
"""For a lock on the source: whoever else follows what came, the cutover too, waits for us meanwhile."""
_ATTEMPTS = 20

_PLAN = """
    select oid, schema_name, table_name, kind, publication, compressed_oid, range, split_part(file_mark, ' ', 1) as file,
           rebuild is not null or state not in ('copied', 'ready') as is_to_be_copied, coalesce(newcomer, '') = 'met' as is_met
    from _live_migration.tables
    where kind <> 'table' and coalesce(newcomer, 'followed') in ('followed', 'met') and not is_left_out
"""
"""Of chunks that a lane has met it counts only whether, and in which file, they were copied: nobody has looked at them."""
_UNWATCHED = "it was compressed, and what then changed was not told at first"
_AGAIN = "it holds the range of one that was dropped, whose rows the target has"
_MOVED = "it was written anew, as by compression, and what changed meanwhile was not told"


@dataclass(frozen=True, slots=True)
class Known:
    """The hypertables and chunks of the plan. `roots`: by oid, whether they are published with all operations.

    `ranges`: those of chunks that were planned, marked here or copied; one that came since and that its lane marked has none at first.
    `files`: in which each chunk was when it was copied. `to_be_copied`: chunks whose next copy is still to come.
    """

    roots: dict[int, tuple[QualifiedName, bool]] = field(default_factory=dict)
    chunks: frozenset[int] = frozenset()
    compressed: frozenset[int] = frozenset()
    ranges: Mapping[int, str] = field(default_factory=dict)
    files: Mapping[int, str] = field(default_factory=dict)
    to_be_copied: frozenset[int] = frozenset()

    def is_new(self, chunk: TableInfo) -> bool:
        """Tell whether a chunk came after the plan and is in no copy."""
        return chunk.oid not in self.ranges


@dataclass(frozen=True, slots=True)
class Missed:
    """A chunk that the stream does not tell all of, and why. `is_new`: it came after the plan, and no copy has it yet."""

    chunk: TableInfo
    root: QualifiedName
    reason: str
    is_new: bool


def find_missed(
    known: Known, tables: Sequence[TableInfo], in_all: frozenset[int], in_insert: frozenset[int]
) -> list[Missed]:
    """Give the chunks that are not published as their hypertable is, or are known and not published at all. Pure.

    One that was marked may be unpublished all the same: whoever marked it, or met it in the stream, may have come no further.
    """
    missed = []
    for table in tables:
        root = known.roots.get(table.hypertable or 0)
        if table.part != "chunk" or root is None:
            continue
        name, has_all = root
        is_strange = table.oid not in known.chunks
        if table.oid not in (in_all if has_all and is_strange else in_all | in_insert):
            reason = "it was made by a session that publishes no new chunks"
            missed.append(Missed(table, name, reason, is_new=known.is_new(table)))
    return missed


def find_unwatched(
    known: Known, tables: Sequence[TableInfo], present: frozenset[int], suspects: Collection[QualifiedName]
) -> list[Missed]:
    """Give the chunks that were compressed into a table whose changes were not told yet: whether any came is unknown. Pure."""
    unwatched = {t.oid for t in tables if t.part == "compressed" and t.oid not in present | known.compressed}
    return [
        Missed(table, known.roots[table.hypertable or 0][0], _UNWATCHED, is_new=known.is_new(table))
        for table in tables
        if table.part == "chunk" and table.hypertable in known.roots
        if table.compressed in unwatched or table.name in suspects
    ]


def find_grown(known: Known, tables: Sequence[TableInfo]) -> list[Missed]:
    """Give the chunks of the plan that hold another range than then: others were merged into them or split off, which is in no stream. Pure."""
    return [
        Missed(table, known.roots[table.hypertable or 0][0], "others were merged into it, or split off", is_new=False)
        for table in tables
        if table.part == "chunk" and table.hypertable in known.roots
        if not is_same_range(known.ranges.get(table.oid, table.range), table.range)
    ]


def find_moved(known: Known, tables: Sequence[TableInfo]) -> list[Missed]:
    """Give the chunks that lie in another file than when they were copied, or made, for then a file has its table's oid. Pure.

    Compression and a merge make a new file, as VACUUM FULL, CLUSTER and TRUNCATE do, which cost a copy for nothing.
    """
    return [
        Missed(table, known.roots[table.hypertable or 0][0], _MOVED, is_new=known.is_new(table))
        for table in tables
        if table.part == "chunk" and table.hypertable in known.roots and table.oid not in known.to_be_copied
        if table.file not in (None, known.files.get(table.oid, str(table.oid)))
    ]


async def watch_chunks(run: Run) -> None:
    """Follow chunks now and then; never returns, and does nothing where the source has no TimescaleDB."""
    async with run.source_session("chunks") as source, run.target_session("chunks") as target:
        with asking("source", "looking for TimescaleDB"):
            if await read_version(source) is None:
                await asyncio.Event().wait()
        while True:
            try:
                await follow_chunks(run, source, target, phases=(Phase.COPY, Phase.REPLAY))
            except (SlotTimeout, LockTimeout) as error:  # the marks are there, and the next look goes on with them
                waits = f"chunks that came since the plan wait to be followed: {error.message}"
                run.reporter.warn_on_change("chunks", waits)
            else:
                run.reporter.warn_on_change("chunks", "")
            await asyncio.sleep(INTERVAL_SECONDS)


async def follow_chunks(
    run: Run, source: asyncpg.Connection, target: asyncpg.Connection, *, phases: Sequence[Phase] = tuple(Phase)
) -> int:
    """Publish what came since, and have copied anew what was missed; give how many chunks that is.

    In other `phases` than these it does nothing: what it writes into the WAL between two barriers would look like a write.

    Raises:
        SlotTimeout | LockTimeout: somebody stands in the way for now; to be called again, for what was marked waits for that.
    """
    async with run.following:
        for attempt in count(1):
            if run.phase not in phases:
                return 0
            try:
                return await _follow_chunks(run, source, target)
            except SourceError as error:
                if attempt == _ATTEMPTS or not isinstance(error.__cause__, asyncpg.UndefinedTableError):
                    raise  # else a chunk was dropped or decompressed meanwhile
    raise AssertionError


async def mark_unlooked(run: Run, source: asyncpg.Connection) -> None:
    """Mark behind the last barrier what chunks missed since the last look; they are copied by whoever marks them."""
    with asking("target", "reading the plan"):
        known = _known(await run.target.fetch(_PLAN))
    if known.roots:
        in_all, _ = await _published(run, source)
        tables = await run.list_tables(source)
        watches = await can_watch_compressed(source)
        missed = await _find_changed(run, source, run.target, known, tables, in_all, watches=watches)
        await _mark(run.target, missed, lsn=None)


async def unpublished_chunks(run: Run, source: asyncpg.Connection) -> list[QualifiedName]:
    """Give the chunks whose changes the stream does not tell, for they were made since `follow_chunks`. Writes nothing."""
    with asking("target", "reading the plan"):
        known = _known(await run.target.fetch(_PLAN))
    if not known.roots:
        return []
    tables = await run.list_tables(source)
    return [each.chunk.name for each in find_missed(known, tables, *await _published(run, source))]


async def _published(run: Run, source: asyncpg.Connection) -> tuple[frozenset[int], frozenset[int]]:
    with asking("source", "reading the publications"):
        return (
            frozenset(await published_tables(source, run.settings.publication)),
            frozenset(await published_tables(source, run.settings.insert_publication)),
        )


async def _follow_chunks(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> int:
    settings = run.settings
    with asking("target", "reading the plan"):
        known = _known(await target.fetch(_PLAN))
        suspects = await read_suspects(target)
    tables = await run.list_tables(source)
    in_all, in_insert = await _published(run, source)
    missed = find_missed(known, tables, in_all, in_insert)
    watches = await can_watch_compressed(source)
    names = set(suspects.values())
    await note_ranges(target, tables)
    missed += await _find_changed(run, source, target, known, tables, in_all, watches=watches, suspects=names)
    missed = list({each.chunk.oid: each for each in missed}.values())
    is_under_way = await is_marking(target)
    has_new = watches and any(table.part == "compressed" and table.oid not in in_all for table in tables)
    if not (missed or has_new or suspects or is_under_way):
        if run.phase is Phase.REPLAY and await is_waiting(
            target
        ):  # for its lane to come so far, which a lane without changes does not
            await emit_call(source, str(run.migration.id))
        return 0
    # First the marks, for what is published looks afterwards as if nothing had been missed.
    await _mark(target, missed, lsn=NOT_KNOWN_YET)
    for publication, wanted in ((settings.publication, True), (settings.insert_publication, False)):
        chunks = [each.chunk for each in missed if _goes_into_all(run, each.chunk) is wanted]
        wanted_tables = [PublishedTable(chunk.oid, chunk.name) for chunk in chunks]
        await add_tables(
            source, publication, wanted_tables, lock_timeout=settings.lock_timeout, patience=_PATIENCE_SECONDS
        )
    await publish_compressed(run, source, target, tables, patience=_PATIENCE_SECONDS)
    await await_older_transactions(
        source, timeout=settings.slot_timeout, on_wait=run.reporter.note, what="publishing new chunks"
    )
    await run.publications_changed(target)
    await _set_marks(run, source, target, list(suspects))
    if missed:
        run.reporter.note(f"{len(missed)} chunks are copied anew: {name_list(each.chunk.name for each in missed)}")
    return len(missed)


async def _find_changed(
    run: Run,
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    known: Known,
    tables: Sequence[TableInfo],
    published: frozenset[int],
    *,
    watches: bool,
    suspects: Collection[QualifiedName] = (),
) -> list[Missed]:
    """Give the chunks whose rows may have changed untold, each once. `watches`: whether tables of compressed rows are published at all."""
    found = find_grown(known, tables)
    if known.roots:
        found += [
            Missed(chunk, root, _AGAIN, is_new=True) for chunk, root in await find_successors(run, target, tables)
        ]
    if watches:
        found += find_unwatched(known, tables, published, suspects)
        if not await publishes_schemas(run, source):
            found += find_moved(known, tables)
    return list({each.chunk.oid: each for each in found}.values())


async def read_suspects(target: asyncpg.Connection) -> dict[tuple[int, str], QualifiedName]:
    """Give the chunks that lanes have seen being compressed, or decompressed unwatched; by oid and transaction of the note."""
    rows = await target.fetch(
        "select compressed_oid, xmin::text as noted, chunk_schema, chunk_name from _live_migration.suspects"
    )
    return {
        (row["compressed_oid"], row["noted"]): QualifiedName(row["chunk_schema"], row["chunk_name"]) for row in rows
    }


def _goes_into_all(run: Run, chunk: TableInfo) -> bool:
    return planning.has_identity(chunk, run.migration.source_version)


async def _mark(target: asyncpg.Connection, missed: Sequence[Missed], *, lsn: int | None) -> None:
    """Mark chunks to be copied anew: what was missed of them was before `lsn`, where there is a lane to come so far."""
    with asking("target", "marking chunks"):
        for each in missed:
            home = Home(each.root, each.chunk.name)
            await mark_chunk(
                target,
                each.chunk.oid,
                home,
                reason=each.reason,
                lsn=lsn,
                is_new=each.is_new,
                condition=each.chunk.range,
            )


async def _set_marks(
    run: Run, source: asyncpg.Connection, target: asyncpg.Connection, suspects: Collection[tuple[int, str]]
) -> None:
    """Say from where on marked chunks are told of: all that was missed is before now."""
    with asking("source", "reading the WAL's end"):
        lsn = int(await source.fetchval("select pg_current_wal_insert_lsn()"))
    with asking("target", "marking chunks"):
        async with target.transaction():
            await set_marks(target, lsn)
            await target.executemany(
                "delete from _live_migration.suspects where compressed_oid = $1 and xmin::text = $2", suspects
            )
    await emit_call(source, str(run.migration.id))  # it also brings every lane past that position


def _known(rows: Sequence[asyncpg.Record]) -> Known:
    chunks = [row for row in rows if row["kind"] == "chunk" and not row["is_met"]]
    return Known(
        {
            row["oid"]: (QualifiedName(row["schema_name"], row["table_name"]), row["publication"] == "all")
            for row in rows
            if row["kind"] == "hypertable"
        },
        frozenset(row["oid"] for row in chunks),
        frozenset(row["compressed_oid"] for row in chunks if row["compressed_oid"] is not None),
        {row["oid"]: row["range"] for row in chunks if row["range"] is not None},
        {row["oid"]: row["file"] for row in rows if row["kind"] == "chunk" and row["file"]},
        frozenset(row["oid"] for row in rows if row["is_to_be_copied"]),
    )
