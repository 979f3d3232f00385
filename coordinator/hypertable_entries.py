"""Which entries of a source's archive a target of another version must not run, and which only once aggregates are there.

pg_dump writes chunks, tables of compressed rows, materializations and the views of continuous aggregates like any others. TimescaleDB
makes these anew, so they are left out. What stands on an aggregate, a user's view for instance, comes after it; pg_dump's own
order does not tell, for an aggregate's views look as if they came from its materialization.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import asyncpg

from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import Layout, read_layout
from live_migration.coordinator.dump_script import Entry

_AGGREGATE_VIEWS = """
    select c.oid from _timescaledb_catalog.continuous_agg a
    cross join lateral (values (a.user_view_schema, a.user_view_name), (a.partial_view_schema, a.partial_view_name),
                               (a.direct_view_schema, a.direct_view_name)) v (schema, name)
    join pg_namespace n on n.nspname = v.schema join pg_class c on c.relnamespace = n.oid and c.relname = v.name
"""

_PARTS = """
    select 'pg_class'::regclass::oid as catalog, u.oid from unnest($1::oid[]) u (oid)
    union all select 'pg_class'::regclass, indexrelid from pg_index where indrelid = any($1::oid[])
    union all select 'pg_constraint'::regclass, oid from pg_constraint where conrelid = any($1::oid[])
    union all select 'pg_trigger'::regclass, oid from pg_trigger where tgrelid = any($1::oid[])
    union all select 'pg_attrdef'::regclass, oid from pg_attrdef where adrelid = any($1::oid[])
    union all select 'pg_statistic_ext'::regclass, oid from pg_statistic_ext where stxrelid = any($1::oid[])
    union all select 'pg_policy'::regclass, oid from pg_policy where polrelid = any($1::oid[])
    union all select 'pg_rewrite'::regclass, oid from pg_rewrite where ev_class = any($1::oid[])
    union all select 'pg_publication_rel'::regclass, oid from pg_publication_rel where prrelid = any($1::oid[])
    union all select 'pg_trigger'::regclass, t.oid from pg_trigger t join pg_proc p on p.oid = t.tgfoid
              join pg_namespace n on n.oid = p.pronamespace where n.nspname like '\\_timescaledb\\_%'
"""
"""The relations themselves, and what hangs on them; last TimescaleDB's own triggers on hypertables."""

_DEPENDENTS = """
    with recursive found (catalog, oid) as (
        select 'pg_class'::regclass::oid, u.oid from unnest($1::oid[]) u (oid)
        union
        select d.catalog, d.oid from found f
        cross join lateral (
            select coalesce(case when w.oid is not null then 'pg_class'::regclass::oid end, p.classid) as catalog,
                   coalesce(w.ev_class, p.objid) as oid
            from pg_depend p left join pg_rewrite w on p.classid = 'pg_rewrite'::regclass and w.oid = p.objid
            where p.refclassid = f.catalog and p.refobjid = f.oid and p.deptype in ('n', 'a', 'i')
        ) d
    )
    select catalog, oid from found
"""
_INTERNAL = "_timescaledb_"
NAME = r'(?:"(?:[^"]|"")+"|[^\s".;]+)'
_ONLY = re.compile(rf"^ALTER TABLE ONLY (?P<schema>{NAME})\.(?P<name>{NAME})(?=\s)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class EntriesOfTimescale:
    """(catalog, oid) of rows on the source. `made`: what TimescaleDB makes itself; `after_aggregates`: what stands on those.

    `left_out`: what the target cannot have, nor comments on it.
    """

    made: frozenset[tuple[int, int]]
    after_aggregates: frozenset[tuple[int, int]]
    left_out: frozenset[tuple[int, int]] = frozenset()

    def to_run(self, entries: Iterable[Entry]) -> list[Entry]:
        """Give the entries, of one section, that are run on the target at some time, in their order."""
        entries = list(entries)
        absent = {each.number for each in entries if (each.catalog, each.oid) in self.left_out}
        keys = self.made | self.left_out
        return [
            each
            for each in entries
            if (each.catalog, each.oid) not in keys
            and not (each.catalog == 0 and (each.schema.startswith(_INTERNAL) or not absent.isdisjoint(each.needs)))
        ]


async def read_entries_of_timescale(connection: asyncpg.Connection) -> EntriesOfTimescale:
    """Give what of an archive is to be treated otherwise; empty without TimescaleDB.

    Several queries: call it in the transaction with the archive's snapshot.
    """
    layout = await read_layout(connection)
    if layout is None:
        return EntriesOfTimescale(frozenset(), frozenset())
    views = await read_aggregate_views(connection)
    made = await read_parts(connection, own_relations(layout, views))
    after = {tuple(row) for row in await connection.fetch(_DEPENDENTS, views)} - made
    return EntriesOfTimescale(made, frozenset(after))


async def read_aggregate_views(connection: asyncpg.Connection) -> list[int]:
    """Give the oids of the views that continuous aggregates consist of."""
    return [row["oid"] for row in await connection.fetch(_AGGREGATE_VIEWS)]


def own_relations(layout: Layout, views: Iterable[int]) -> list[int]:
    """Give the oids of all that TimescaleDB has made itself; `views`: those of aggregates."""
    materializations = [each.oid for each in layout.hypertables.values() if each.view]
    return [*views, *materializations, *layout.chunks, *layout.compressed, *layout.compressed_roots]


async def read_parts(connection: asyncpg.Connection, relations: Iterable[int]) -> frozenset[tuple[int, int]]:
    """Give (catalog, oid) of relations, of what hangs on them, and of TimescaleDB's triggers on others."""
    return frozenset(tuple(row) for row in await connection.fetch(_PARTS, list(relations)))


def part_entries(entries: Iterable[Entry], keys: EntriesOfTimescale) -> tuple[list[Entry], list[Entry]]:
    """Part a section's entries into those to run before hypertables and aggregates are made, and those to run after.

    What TimescaleDB makes, and what the target cannot have, is in neither. Comments come after, for they name no catalog row that tells what they are on.
    """
    before: list[Entry] = []
    after: list[Entry] = []
    for entry in keys.to_run(entries):
        key = (entry.catalog, entry.oid)
        is_late = key in keys.after_aggregates or (entry.catalog == 0 and entry.type in ("COMMENT", "SECURITY LABEL"))
        (after if is_late else before).append(entry)
    return before, after


def without_only(entry: Entry, hypertables: Collection[QualifiedName]) -> Entry:
    """Give an entry of post-data so that it can be run on a hypertable, which refuses the ONLY that pg_dump writes."""

    def relax(found: re.Match[str]) -> str:
        name = QualifiedName(unquoted(found["schema"]), unquoted(found["name"]))
        return found[0].replace(" ONLY ", " ", 1) if name in hypertables else found[0]

    return dataclasses.replace(entry, statements=_ONLY.sub(relax, entry.statements))


def unquoted(name: str) -> str:
    """Give the name that an identifier of the archive stands for."""
    return name[1:-1].replace('""', '"') if name.startswith('"') else name
