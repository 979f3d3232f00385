"""Chunks that were dropped on the source, whose rows the target keeps: what comes into their range again must take those rows' place.

No stream tells of `drop_chunks`. Where a newer chunk of the source holds the range of one that is gone, rows that were dropped and loaded again
would stand twice on the target: the newer chunk is copied anew, once, which empties its range.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common.catalog import TableInfo
from live_migration.common.chunk_range import find_renames, is_same_range, with_names
from live_migration.common.home import Home
from live_migration.common.postgres import asking
from live_migration.common.relation import QualifiedName
from live_migration.consumer.merged_chunks import Newcomer, keep_overlapping
from live_migration.coordinator.run import Run

_CHUNKS = """
    select c.oid, c.hypertable_oid, c.range is not null as has_range, coalesce(c.range, c.seen_range) as range, h.schema_name, h.table_name,
           coalesce(h.root_schema, h.schema_name) as root_schema, coalesce(h.root_name, h.table_name) as root_name
    from _live_migration.tables c join _live_migration.tables h on h.oid = c.hypertable_oid
    where c.kind = 'chunk' and coalesce(c.newcomer, 'followed') in ('followed', 'met')
      and coalesce(h.newcomer, 'followed') = 'followed' and not h.is_left_out
"""
_NOTED = "select oid, coalesce(hypertable_oid, 0), range, seen_range from _live_migration.tables where kind = 'chunk'"
_NOTE = """
    update _live_migration.tables set range = $4, seen_range = $5
    where oid = $1 and range is not distinct from $2 and seen_range is not distinct from $3
"""
_NOTHING = "false"


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """A chunk that has a row in the plan. `range`: as it is known, None where it is not. `has_copy`: it was planned, or is copied, or will be."""

    oid: int
    hypertable: int
    range: str | None
    has_copy: bool


Pair = tuple[int, int, int]


def pair_of(gone: PlannedChunk, chunk: TableInfo) -> Pair:
    """Give what tells two chunks with their ranges from all others."""
    return gone.oid, chunk.oid, hash((gone.range, chunk.range))


def pairs_to_compare(
    planned: Sequence[PlannedChunk], tables: Sequence[TableInfo], excluded: Collection[Pair]
) -> list[tuple[PlannedChunk, TableInfo]]:
    """Give chunks that are gone, each with a newer one of its hypertable that no copy has and that may hold its range; pure.

    `excluded`: pairs that are known to share no row.
    """
    present = {table.oid for table in tables}
    copied = {chunk.oid for chunk in planned if chunk.has_copy}
    gone: dict[int, list[PlannedChunk]] = {}
    for chunk in planned:
        if chunk.oid not in present and chunk.range != _NOTHING:
            gone.setdefault(chunk.hypertable, []).append(chunk)
    return [
        (chunk, table)
        for table in tables
        if table.part == "chunk" and table.oid not in copied
        for chunk in gone.get(table.hypertable or 0, ())
        if pair_of(chunk, table) not in excluded
    ]


async def find_successors(
    run: Run, target: asyncpg.Connection, tables: Sequence[TableInfo]
) -> list[tuple[TableInfo, QualifiedName]]:
    """Give the newer chunks that hold the range of one that is gone, each with its hypertable, and that no copy has yet."""
    with asking("target", "reading the plan"):
        rows = await target.fetch(_CHUNKS)
    planned = [PlannedChunk(row["oid"], row["hypertable_oid"], row["range"], row["has_range"]) for row in rows]
    names = {
        row["hypertable_oid"]: (
            QualifiedName(row["schema_name"], row["table_name"]),
            QualifiedName(row["root_schema"], row["root_name"]),
        )
        for row in rows
    }
    found: dict[int, tuple[TableInfo, QualifiedName]] = {}
    for gone, chunk in pairs_to_compare(planned, tables, run.apart):
        if chunk.oid in found:
            continue
        name, root = names[gone.hypertable]
        newcomer = Newcomer(Home(name, chunk.name), chunk.range or "true")
        with asking("target", f"comparing ranges of {root}"):
            shares = await keep_overlapping(target, root, {chunk.oid: newcomer}, gone.range)
        if shares:
            found[chunk.oid] = chunk, name
        else:
            run.apart.add(pair_of(gone, chunk))
    return list(found.values())


async def note_ranges(target: asyncpg.Connection, tables: Sequence[TableInfo]) -> None:
    """Record the ranges of chunks that came after the plan, so that they are known when these are dropped, and in all ranges what columns are called by now."""
    with asking("target", "recording ranges"):
        rows = [NotedRange(*row) for row in await target.fetch(_NOTED)]
        changed = changed_ranges(rows, {table.oid: table.range for table in tables if table.part == "chunk"})
        # A lane may have recorded another range meanwhile.
        await target.executemany(_NOTE, [(*old, *new) for old, new in changed])


@dataclass(frozen=True, slots=True)
class NotedRange:
    """What is kept of a chunk's range. `range`: as it was copied, or will be; `seen`: of one that came after the plan, as it was seen."""

    oid: int
    hypertable: int
    range: str | None
    seen: str | None


def changed_ranges(
    noted: Sequence[NotedRange], now: Mapping[int, str | None]
) -> list[tuple[tuple[int, str | None, str | None], tuple[str | None, str | None]]]:
    """Give what is to be noted otherwise: oid and ranges as they are noted, and as they are to be; pure.

    `now`: the ranges of chunks that are there. Of those that are gone the columns are called as in the others of their hypertable.
    """
    renames: dict[int, dict[str, str]] = {}
    for each in noted:
        before, is_now = each.range or each.seen, now.get(each.oid)
        if before and is_now and before != is_now:
            renames.setdefault(each.hypertable, {}).update(find_renames(before, is_now))
    changed = []
    for each in noted:
        names = renames.get(each.hypertable, {})
        if each.oid in now:
            condition = now[each.oid] if is_same_range(each.range, now[each.oid]) else each.range
            seen = now[each.oid] if each.range is None else each.seen
        else:
            condition, seen = (
                with_names(known, names) if known and names else known for known in (each.range, each.seen)
            )
        if (condition, seen) != (each.range, each.seen):
            changed.append(((each.oid, each.range, each.seen), (condition, seen)))
    return changed
