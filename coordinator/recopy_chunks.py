"""What `migrate --recopy` does to chunks, in phase `schema`: behind the new slot, and before anybody may copy.

A chunk that came since the plan may be in neither log nor plan, though it is published: TimescaleDB publishes it with its hypertable, and that was
published before the log began. So every chunk of the source that the plan lacks is copied by its lane.

Where hypertables came over as they are and take rows by now, all their chunks are made anew, empty: the target has chunks of its own then,
others than the source's by name, and lets nobody at a chunk's compressed rows. They are planned again as the source has them now, to
be copied through their hypertable, compressed ones decompressed on the way, as from another version of TimescaleDB; after the
hand-over they are compressed again, as all that came since the plan are. The rows that aggregates have materialized are in chunks like others.

Each step can be repeated after a crash, and all are until the phase ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common.catalog import TableInfo, list_tables
from live_migration.common.errors import SourceError
from live_migration.common.home import Home
from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import frozen_chunks, read_layout, read_slices
from live_migration.consumer.chunk_marks import mark_chunk
from live_migration.coordinator import planning
from live_migration.coordinator.entries import run_entries
from live_migration.coordinator.made_definitions import load_made
from live_migration.coordinator.made_schema import chunk_entries
from live_migration.coordinator.planning import Moment
from live_migration.coordinator.prepare import publish_tables
from live_migration.coordinator.recopy import is_under_way, planned_tables, takes_rows
from live_migration.coordinator.run import Run
from live_migration.coordinator.schema import INSERT_TABLE, MOMENT, PUBLISHING_ATTEMPTS
from live_migration.coordinator.timescale_source import can_watch_compressed
from live_migration.producer.publication import published_tables
from live_migration.producer.slot import await_older_transactions

_STEP = "chunks made anew"

_HYPERTABLES = """
    select oid, coalesce(root_schema, schema_name) as schema, coalesce(root_name, table_name) as name
    from _live_migration.tables where kind = 'hypertable' and newcomer is null
"""
_ROOTS = """
    select oid, schema_name, table_name from _live_migration.tables where kind = 'hypertable' and newcomer is null and not is_left_out
"""
_LAST_ATTEMPT = "select coalesce(max(attempt), 0) from _live_migration.tables"
_OF_PLAN = "hypertable_oid in (select oid from _live_migration.tables where kind = 'hypertable' and newcomer is null)"
_FORGET = f"""
    delete from _live_migration.indexes
    where table_oid in (select oid from _live_migration.tables where kind = 'chunk' and {_OF_PLAN});
    delete from _live_migration.tables where kind = 'chunk' and {_OF_PLAN}
"""
# Marked before the loss, to be copied through their hypertable, which does not route rows yet: they are marked anew, as unknown ones are.
_FORGET_MARKED = (
    f"delete from _live_migration.tables where kind = 'chunk' and copies_to_root and state = 'stopped' and {_OF_PLAN}"
)
# Nobody who copied a chunk of before may end a copy of this one, so attempts go on; and nobody may begin before the phase ends.
_HOLD = f"update _live_migration.tables set state = 'stopped', attempt = $1 where kind = 'chunk' and {_OF_PLAN}"
_MOVE_ON = """
    update _live_migration.tables set snapshot = $2, horizon = $3, timeline = $4 where kind = 'hypertable' and newcomer is null and oid = any($1::oid[])
"""
_CHUNKS_OF = """
    select n.nspname::text as schema, c.relname::text as name
    from pg_inherits i join pg_class c on c.oid = i.inhrelid join pg_namespace n on n.oid = c.relnamespace
    where i.inhparent = to_regclass($1) order by c.oid
"""


@dataclass(frozen=True, slots=True)
class _Found:
    """What one snapshot of the source showed of the plan's hypertables: which are there, their chunks and those chunks' bounds, by oid."""

    moment: Moment
    hypertables: tuple[int, ...]
    chunks: tuple[TableInfo, ...]
    by_oid: dict[int, TableInfo]
    in_all: frozenset[int]
    slices: dict[int, str]
    frozen: tuple[QualifiedName, ...]


async def renew_chunks(run: Run) -> None:
    """Have all chunks of the source copied, where a recopy is under way; else nothing is done."""
    if not await is_under_way(run.target):
        return
    async with run.source_session("recopy") as source:
        if await takes_rows(run.target):
            await _make_anew(run, source)
        else:
            await _mark_unplanned(run, source)


async def _mark_unplanned(run: Run, source: asyncpg.Connection) -> None:
    """Have the chunks that the plan lacks copied by their lanes: what was missed of them is before now."""
    made = await load_made(run.target)
    tables = await run.list_tables(source)
    with asking("source", "reading the WAL's end"):
        lsn = int(await source.fetchval("select pg_current_wal_insert_lsn()"))
    async with run.target_transaction("marking chunks") as target:
        if made is None:
            await target.execute(_FORGET_MARKED)
        known = await planned_tables(target) or frozenset()
        roots = {row["oid"]: QualifiedName(row["schema_name"], row["table_name"]) for row in await target.fetch(_ROOTS)}
        for chunk in tables:
            if chunk.part == "chunk" and chunk.hypertable in roots and chunk.oid not in known:
                home = Home(roots[chunk.hypertable], chunk.name)
                reason = "it was made after the plan"
                await mark_chunk(target, chunk.oid, home, reason=reason, lsn=lsn, is_new=True, condition=chunk.range)


async def _make_anew(run: Run, source: asyncpg.Connection) -> None:
    found = await _look(run, source)
    if found.frozen:
        run.reporter.warning(
            f"chunks are frozen on the source and will not be so on the target: {name_list(found.frozen)}. Freeze them there before jobs start"
        )
    await _plan_anew(run, found)
    await _drop_chunks(run, found.hypertables)
    await _make_chunks(run, found.slices)


async def _look(run: Run, source: asyncpg.Connection) -> _Found:
    """Look at the source in a snapshot in which every chunk is published, so that the stream tells what the snapshot does not show."""
    for _ in range(PUBLISHING_ATTEMPTS):
        # At first, too: a coordinator that died may have published and not waited.
        await await_older_transactions(
            source, timeout=run.settings.slot_timeout, on_wait=run.reporter.note, what="publishing new chunks"
        )
        found = await run.patiently("reading the hypertables", lambda: _look_once(run, source))
        if not isinstance(found, frozenset):
            return found
        await publish_tables(run, source, only=found)
        await run.publications_changed(run.target)
    raise SourceError("chunks on the source come faster than they can be published", hint="Try again later.")


async def _look_once(run: Run, source: asyncpg.Connection) -> _Found | frozenset[int]:
    """Give what the source has of the plan's hypertables; where a chunk is not published, the oids of all that are to be."""
    with asking("target", "reading the plan"):
        roots = {row["oid"] for row in await run.target.fetch(_HYPERTABLES)}
        planned = await planned_tables(run.target) or frozenset()
    async with source.transaction(isolation="repeatable_read", readonly=True):
        moment = Moment(**dict(await source.fetchrow(MOMENT)))
        tables = await list_tables(source)
        in_all = frozenset(await published_tables(source, run.settings.publication))
        in_insert = frozenset(await published_tables(source, run.settings.insert_publication))
        watches = await can_watch_compressed(source)
        layout = await read_layout(source)
        slices = await read_slices(source, layout) if layout else {}
        frozen = await frozen_chunks(source) if layout else []
    chunks = [table for table in tables if table.part == "chunk" and table.hypertable in roots]
    inner = [table for table in tables if watches and table.part == "compressed"]
    if any(table.oid not in in_all | in_insert for table in (*chunks, *inner)):
        return planned | {chunk.oid for chunk in chunks}
    by_oid = {table.oid: table for table in tables}
    present = tuple(sorted(roots & by_oid.keys()))
    return _Found(moment, present, tuple(chunks), by_oid, in_all, slices, tuple(frozen))


async def _plan_anew(run: Run, found: _Found) -> None:
    """Put the source's chunks of now into the plan, in place of those of before; of all others the hypertables' new snapshot tells."""
    rows = [
        planning.table_row(
            chunk,
            run.migration.lane_map,
            "all" if chunk.oid in found.in_all else "insert",
            found.by_oid,
            found.moment,
            (),
        )
        for chunk in found.chunks
    ]
    moment = found.moment
    async with run.target_transaction("planning the chunks anew") as target:
        attempt = await target.fetchval(_LAST_ATTEMPT)
        await target.execute(_FORGET)
        await target.executemany(INSERT_TABLE, rows)
        await target.execute(_HOLD, attempt)
        await target.execute(_MOVE_ON, list(found.hypertables), moment.snapshot, moment.horizon, moment.timeline)
        await target.execute("delete from _live_migration.steps where name = $1", _STEP)


async def _drop_chunks(run: Run, hypertables: Sequence[int]) -> None:
    """Drop the target's chunks of these hypertables, each in a transaction of its own: many of them would want too many locks."""
    with asking("target", "looking for chunks"):
        roots = [
            QualifiedName(row["schema"], row["name"])
            for row in await run.target.fetch(_HYPERTABLES)
            if row["oid"] in hypertables
        ]
        chunks = [QualifiedName(*row) for root in roots for row in await run.target.fetch(_CHUNKS_OF, root.sql)]
    for chunk in chunks:
        await _drop_chunk(run, chunk)


async def _drop_chunk(run: Run, chunk: QualifiedName) -> None:
    async with run.target_transaction(f"dropping chunk {chunk}") as target:
        await target.execute(f"drop table {chunk.sql}")  # with the table of its compressed rows


async def _make_chunks(run: Run, slices: dict[int, str]) -> None:
    """Make the chunks with the source's bounds: by these they are told when they are compressed, and no two copies wait to make one."""
    await run_entries(run, _STEP, await chunk_entries(run, slices))
