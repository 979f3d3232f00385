"""What of a source's schema a target without TimescaleDB cannot have: TimescaleDB's own parts, and users' objects that stand on them.

A user's view, index, function, policy or trigger that needs TimescaleDB is left out, by name. A table that needs it for its columns
or constraints cannot be made at all. The bodies of functions in text are not looked into, by PostgreSQL neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from live_migration.common.timescale import read_layout
from live_migration.coordinator.hypertable_entries import (
    EntriesOfTimescale,
    own_relations,
    read_aggregate_views,
    read_parts,
)

# Names of columns stand in pg_depend as (table, number), so that none makes its table a dependent here.
_DEPENDENTS = """
    with recursive member (catalog, oid) as (
        select d.classid, d.objid from pg_depend d join pg_extension e on d.refobjid = e.oid
        where d.refclassid = 'pg_extension'::regclass and e.extname = 'timescaledb' and d.deptype = 'e'
    ), found (catalog, oid) as (
        select catalog, oid from member where catalog <> 'pg_namespace'::regclass
        union select 'pg_class'::regclass, u.oid from unnest($1::oid[]) u (oid)
        union
        select d.catalog, d.oid from found f
        cross join lateral (
            select case when c.oid is null then p.classid else 'pg_class'::regclass end as catalog, coalesce(c.oid, p.objid) as oid
            from pg_depend p left join pg_rewrite w on p.classid = 'pg_rewrite'::regclass and w.oid = p.objid
            left join pg_class c on c.oid = w.ev_class and c.relkind in ('v', 'm')
            where p.refclassid = f.catalog and p.refobjid = f.oid and p.objsubid = 0 and p.deptype in ('n', 'a', 'i')
        ) d
    ), dependent as (
        select f.catalog, f.oid, coalesce(c.relkind, ' ') as kind,
               c.relkind in ('r', 'p', 'f') or a.oid is not null or k.contype = 'c' as is_needed,
               coalesce(i.indrelid, a.adrelid, nullif(k.conrelid, 0), g.tgrelid, w.ev_class, y.polrelid, s.stxrelid, f.oid) as relation
        from found f
        left join pg_class c on f.catalog = 'pg_class'::regclass and c.oid = f.oid
        left join pg_index i on i.indexrelid = c.oid
        left join pg_attrdef a on f.catalog = 'pg_attrdef'::regclass and a.oid = f.oid
        left join pg_constraint k on f.catalog = 'pg_constraint'::regclass and k.oid = f.oid
        left join pg_trigger g on f.catalog = 'pg_trigger'::regclass and g.oid = f.oid
        left join pg_rewrite w on f.catalog = 'pg_rewrite'::regclass and w.oid = f.oid
        left join pg_policy y on f.catalog = 'pg_policy'::regclass and y.oid = f.oid
        left join pg_statistic_ext s on f.catalog = 'pg_statistic_ext'::regclass and s.oid = f.oid
        where f.catalog <> 'pg_type'::regclass and coalesce(c.relkind, ' ') <> 't' and coalesce(k.conparentid, 0) = 0
          and not coalesce(g.tgisinternal, false)
          and not exists (select from pg_class t where t.oid = i.indrelid and t.relkind = 't')
        union
        select p.classid, p.objid, c.relkind, true, p.objid
        from found f join pg_depend p on p.refclassid = f.catalog and p.refobjid = f.oid and p.deptype in ('n', 'a')
        join pg_class c on p.classid = 'pg_class'::regclass and c.oid = p.objid and c.relkind in ('r', 'p', 'f')
        where p.objsubid > 0
    )
    select d.catalog, d.oid, d.relation, d.kind = 'i' as is_index, coalesce(d.is_needed, false) as is_needed,
           coalesce(o.type || ' ' || o.identity, d.oid::text) as name
    from dependent d cross join lateral pg_identify_object(d.catalog, d.oid, 0) o
    where (d.catalog, d.oid) not in (select catalog, oid from member) and d.relation <> all($1::oid[])
      and d.relation not in (select oid from member where catalog = 'pg_class'::regclass)
    order by name
"""

_ITSELF = """
    select 'pg_extension'::regclass::oid, oid from pg_extension where extname = 'timescaledb'
    union all
    select 'pg_publication_namespace'::regclass, r.oid from pg_publication_namespace r
    join pg_depend d on d.classid = 'pg_namespace'::regclass and d.objid = r.pnnspid and d.deptype = 'e'
    join pg_extension e on d.refclassid = 'pg_extension'::regclass and e.oid = d.refobjid and e.extname = 'timescaledb'
"""
_ITSELF_ALONE = "select 'pg_extension'::regclass::oid, oid from pg_extension where extname = 'timescaledb'"
_HAS_SCHEMAS_PUBLISHED = "select to_regclass('pg_catalog.pg_publication_namespace') is not null"


@dataclass(frozen=True, slots=True)
class FlatEntries:
    """What a plain target cannot have. `entries`: of the archive, all of it; `indexes`: oids of users' indexes among it.

    `left_out`: what users know of it, each as 'view public.v'. `refused`: what their tables cannot do without.
    """

    entries: EntriesOfTimescale
    indexes: frozenset[int] = frozenset()
    left_out: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


async def read_flat_entries(connection: asyncpg.Connection) -> FlatEntries:
    """Give what of an archive must not be run on a target without TimescaleDB; nothing where the source has none.

    Several queries: call it in the transaction with the archive's snapshot.
    """
    layout = await read_layout(connection)
    if layout is None:
        return FlatEntries(EntriesOfTimescale(frozenset(), frozenset()))
    relations = own_relations(layout, await read_aggregate_views(connection))
    parts = await read_parts(connection, relations)
    has_schemas = await connection.fetchval(_HAS_SCHEMAS_PUBLISHED)
    itself = await connection.fetch(_ITSELF if has_schemas else _ITSELF_ALONE)
    rows = [row for row in await connection.fetch(_DEPENDENTS, relations) if (row["catalog"], row["oid"]) not in parts]
    absent = [row for row in rows if not row["is_needed"]]
    keys = {(row["catalog"], row["oid"]) for row in absent}
    views = {row["oid"] for row in absent if row["oid"] == row["relation"]}
    return FlatEntries(
        EntriesOfTimescale(frozenset(), frozenset(), parts | keys | {tuple(row) for row in itself}),
        frozenset(row["oid"] for row in absent if row["is_index"]),
        tuple(row["name"] for row in absent if row["oid"] in views or row["relation"] not in views),
        tuple(row["name"] for row in rows if row["is_needed"]),
    )
