"""Tables of the plan that were dropped on the source: the target keeps them as they were at the last change, but not within what the source has."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import asyncpg

from live_migration.common.postgres import asking
from live_migration.common.progress import name_list
from live_migration.common.relation import QualifiedName
from live_migration.coordinator.drift import read_planned
from live_migration.coordinator.run import Run

_GONE = """
    select t.oid, t.schema_name, t.table_name, t.kind = 'table' and t.newcomer is null as is_plain, r.oid is not null as is_there,
           array(select n.nspname || '' from pg_partition_ancestors(r.oid) with ordinality a (oid, i)
                 join pg_class c on c.oid = a.oid join pg_namespace n on n.oid = c.relnamespace order by a.i) as schemas,
           array(select c.relname || '' from pg_partition_ancestors(r.oid) with ordinality a (oid, i)
                 join pg_class c on c.oid = a.oid join pg_namespace n on n.oid = c.relnamespace order by a.i) as names
    from _live_migration.tables t
    left join pg_class r on r.oid = to_regclass(format('%I.%I', coalesce(t.root_schema, t.schema_name), coalesce(t.root_name, t.table_name)))
    where t.oid = any($1::oid[]) order by 2, 3
"""
_ROOTS = """
    select n.nspname as schema, c.relname as name from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.relkind = 'p'
"""


async def settle_dropped(run: Run, source: asyncpg.Connection) -> list[str]:
    """Give what stands in the way of the cutover of tables that were dropped on the source; name the others, which stay, in a warning."""
    with asking("target", "reading the plan"):
        planned = await read_planned(run.target)
    tables = await run.list_tables(source)
    followed = {table.oid for table in tables if table.persistence == "p" and table.is_users}
    with asking("source", "listing partitioned tables"):
        roots = {QualifiedName(row["schema"], row["name"]) for row in await source.fetch(_ROOTS)}
    with asking("target", "looking at tables that were dropped on the source"):
        rows = await run.target.fetch(_GONE, list(planned.keys() - followed))
    present = {table.oid for table in tables}
    problems, kept = [], []
    for row in rows:
        name = QualifiedName(row["schema_name"], row["table_name"])
        if row["oid"] in present:
            problems.append(f"not logged any more on the source: {name}")
        elif not row["is_plain"]:
            problems.append(f"dropped on the source: {name}")
        elif not row["is_there"]:
            problems.append(
                f"{name}, dropped on the source, is gone from the target, too, where its triggers and the like of the plan are still to come: "
                "make it there again, empty, and drop it after the cutover"
            )
        elif detach := _detachment(
            [QualifiedName(*each) for each in zip(row["schemas"], row["names"], strict=True)], roots
        ):
            problems.append(
                f"{name}, dropped on the source, shows its rows in a partitioned table of the target: `{detach}`"
            )
        else:
            kept.append(name)
    if kept:
        run.reporter.warn_on_change(
            "dropped tables",
            f"dropped on the source since the plan, and left on the target as of the last change: {name_list(kept)}",
        )
    return problems


def _detachment(path: list[QualifiedName], roots: Collection[QualifiedName]) -> str | None:
    """Give the statement that takes a table of the target out of what the source has. `path`: it and its ancestors, upwards."""
    for child, parent in itertools.pairwise(path):
        if parent in roots:
            return f"alter table {parent.sql} detach partition {child.sql}"
    return None
