"""Whether the source still has the tables that were planned, and the target the shape that they have now."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count

import asyncpg

from live_migration.common.catalog import ColumnInfo, list_sequences, list_tables
from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import INTERNAL_SCHEMA
from live_migration.coordinator.generated import generated_differences
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.rewrites import mark_rewritten
from live_migration.coordinator.run import Run
from live_migration.coordinator.source_changes import name_changes

_INTERVAL_SECONDS = 60.0
_ROUNDS_BETWEEN_DEFINITIONS = 5
"""All definitions are a longer look at the catalogs, about 0.5 ms a table."""

PARENTS = """
    select i.inhrelid as oid, n.nspname as schema, p.relname as name
    from pg_inherits i join pg_class p on p.oid = i.inhparent join pg_namespace n on n.oid = p.relnamespace
    where p.relkind = 'p'
"""


@dataclass(frozen=True, slots=True)
class Drift:
    """How the source's tables differ from the plan; each a list of what people read."""

    created: tuple[str, ...]
    renamed: tuple[str, ...]
    dropped: tuple[str, ...]
    changed: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """One line for each kind of difference that stands in the way of the cutover; what was dropped may not."""
        lines = []
        if self.created:
            lines.append(f"created on the source and not followed: {name_list(self.created)}")
        if self.renamed:
            lines.append(f"renamed on the source: {name_list(self.renamed)}")
        if self.changed:
            lines.append(
                f"turned into another kind of table on the source, which was not followed: {name_list(self.changed)}"
            )
        return lines


def compare(planned: Mapping[int, QualifiedName], found: Mapping[int, QualifiedName]) -> Drift:
    """Compare tables by oid: a relation is its oid, never its name."""
    return Drift(
        tuple(sorted(str(name) for oid, name in found.items() if oid not in planned)),
        tuple(
            sorted(f"{planned[oid]} to {found[oid]}" for oid in planned.keys() & found if planned[oid] != found[oid])
        ),
        tuple(sorted(str(name) for oid, name in planned.items() if oid not in found)),
    )


async def read_planned(target: asyncpg.Connection) -> dict[int, QualifiedName]:
    """Give the planned tables by oid, without chunks, which come and go with their hypertables, and what is left out."""
    rows = await target.fetch(
        """select oid, schema_name, table_name from _live_migration.tables
           where kind <> 'chunk' and newcomer is distinct from 'gone' and not is_left_out"""
    )
    return {row["oid"]: QualifiedName(row["schema_name"], row["table_name"]) for row in rows}


async def read_kinds(target: asyncpg.Connection) -> dict[int, str]:
    """Give what the planned tables were on the source when they were planned, or brought: plain or hypertables."""
    rows = await target.fetch(
        "select oid, kind from _live_migration.tables where kind <> 'chunk' and newcomer is distinct from 'gone' and not is_left_out"
    )
    return {row["oid"]: row["kind"] for row in rows}


async def read_left_out(target: asyncpg.Connection) -> frozenset[int]:
    """Give the oids of the source's hypertables that the target does not get."""
    return frozenset(
        row["oid"] for row in await target.fetch("select oid from _live_migration.tables where is_left_out")
    )


async def find_drift(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> Drift:
    """Compare the source's logged tables with the plan."""
    with asking("target", "reading the plan"):
        planned, left_out = await read_planned(target), await read_left_out(target)
        kinds = await read_kinds(target)
    tables = [t for t in await run.list_tables(source) if t.persistence == "p" and t.is_users]
    drift = compare(planned, {t.oid: t.name for t in tables if t.oid not in left_out})
    # What takes a table's rows on the target was made for that kind: rows of a hypertable are in none of its own.
    changed = sorted(f"{t.name}, now a {t.part}" for t in tables if kinds.get(t.oid, t.part) != t.part)
    return replace(drift, changed=tuple(changed))


async def watch_drift(run: Run) -> None:
    """Name tables that go, change their name or kind, or are written anew, and what else is changed, each change once; never returns."""
    async with run.source_session("drift") as source, run.target_session("drift") as target:
        for rounds in count():
            drift = await find_drift(run, source, target)
            # What was created is brought, or named, by `newcomers`.
            for kind, names in (("renamed", drift.renamed), ("dropped", drift.dropped), ("changed", drift.changed)):
                _name_each(run.reporter, kind, names)
            await mark_rewritten(run, source, target)
            if rounds % _ROUNDS_BETWEEN_DEFINITIONS == 0:
                await name_changes(run, source, target)
            await asyncio.sleep(_INTERVAL_SECONDS)


def _name_each(reporter: Reporter, kind: str, names: tuple[str, ...]) -> None:
    consequence = {
        "renamed": "stays under its old name on the target; the cutover is refused",
        "changed": "is not followed as that, and the cutover is refused: `clean` and start again",
        "dropped": "stays on the target as of its last change; a partition, or hypertable, stands in the way of the cutover",
    }[kind]
    for name in names:
        reporter.warn_on_change(f"drift {kind} {name}", f"table {name}, {kind} on the source, {consequence}")


@dataclass(frozen=True, slots=True)
class Shape:
    """What must be equal on both sides at the cutover."""

    persistence: str
    parent: QualifiedName | None
    columns: tuple[tuple[str, str, str], ...]


async def read_shapes(connection: asyncpg.Connection) -> dict[QualifiedName, Shape]:
    """Give the shape of each table of a database: columns with type and kind, partitioned parent."""
    parents = {row["oid"]: QualifiedName(row["schema"], row["name"]) for row in await connection.fetch(PARENTS)}
    return {
        table.name: Shape(table.persistence, parents.get(table.oid), _columns(table.columns))
        for table in await list_tables(connection)
        if table.is_users
        and table.name.schema != INTERNAL_SCHEMA  # what holds an aggregate's rows has a name of its own on each server
    }


def _columns(columns: tuple[ColumnInfo, ...]) -> tuple[tuple[str, str, str], ...]:
    return tuple(sorted((column.name, column.type, column.generated) for column in columns))


async def read_other_names(target: asyncpg.Connection) -> dict[QualifiedName, QualifiedName]:
    """Give the names of hypertables that the target has by another name than the source: what aggregates materialize into."""
    rows = await target.fetch(
        """select schema_name, table_name, root_schema, root_name from _live_migration.tables
           where kind = 'hypertable' and (root_schema, root_name) <> (schema_name, table_name)"""
    )
    return {
        QualifiedName(row["schema_name"], row["table_name"]): QualifiedName(row["root_schema"], row["root_name"])
        for row in rows
    }


async def shape_differences(run: Run, source: asyncpg.Connection, target: asyncpg.Connection) -> list[str]:
    """Say where the target lacks a table, a column or a sequence of the source, or has it otherwise, or computes it by another expression."""
    ours = await run.patiently("reading the tables' shape", lambda: read_shapes(source))
    sequences = await run.patiently("listing sequences", lambda: list_sequences(source))
    with asking("target", "reading the tables' shape"):
        theirs, there = await read_shapes(target), set(await list_sequences(target))
        names = await read_other_names(target)
    found = [
        line
        for name, shape in sorted(ours.items())
        if (line := _difference(name, shape, theirs.get(names.get(name, name))))
    ]
    found += await generated_differences(run, source, target)
    missing = [str(name) for name in sequences if name not in there]
    return found + ([f"the target lacks sequences: {name_list(missing)}"] if missing else [])


def _difference(name: QualifiedName, here: Shape, there: Shape | None) -> str:
    if there is None:
        kind = "unlogged table" if here.persistence == "u" else "table"
        return f"the target lacks {kind} {name}"
    if here.columns != there.columns:
        only_here = [f"{column} {kind}" for column, kind, _ in sorted(set(here.columns) - set(there.columns))]
        only_there = [f"{column} {kind}" for column, kind, _ in sorted(set(there.columns) - set(here.columns))]
        return (
            f"{name} has columns {only_here or 'none'} on the source alone, {only_there or 'none'} on the target alone"
        )
    if here.parent != there.parent:
        return f"{name} is a partition of {here.parent or 'no table'} on the source, of {there.parent or 'none'} on the target"
    return ""
