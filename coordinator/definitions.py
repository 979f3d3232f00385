"""What a database's tables, views, functions and types are like beyond their columns' types, by name: indexes, constraints, defaults, triggers, policies.

Read by the same queries on either side and at any time, so that two readings can be compared: our sessions have an empty search_path, and
every name comes in full.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg

from live_migration.common.catalog import USERS_OWN
from live_migration.common.timescale import read_layout
from live_migration.coordinator.hypertable_entries import own_relations, read_aggregate_views

LATE = frozenset({"foreign key", "trigger", "rule", "policy", "row security"})
"""Kinds that come to the target at the hand-over alone, and then as the source has them by then."""
ARCHIVE = "definitions"
_PROGRAMS = "n.nspname !~ '^(pg_|_timescaledb_)' and n.nspname not in ('information_schema', '_live_migration')"
_OWN = f"""
    with own as (
        select c.oid, n.nspname as schema, c.relname as name, c.relkind as kind, c.relispartition as is_partition,
               format('%I.%I', n.nspname, c.relname) as sql
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relkind in ('r', 'p', 'v', 'm') and c.relpersistence in ('p', 'u') and {USERS_OWN}
          and n.nspname !~ '^_timescaledb_' and not exists (select from unnest($1::oid[]) x where x = c.oid)
          and ($3::text[] is null or (n.nspname, c.relname) in (select * from unnest($3::text[], $4::text[])))
    )
    select $2::text as kind, schema, relation, name, case when relkind in ('r', 'p') then table_oid else 0 end::bigint as "table",
           catalog::bigint, oid::bigint, definition, made_by, gone_by
    from ("""
# Each gives: schema, relation, name, relkind, table_oid, catalog, oid, definition, made_by, gone_by.
_OF_RELATIONS = {
    "index": """
        select t.schema, t.name as relation, i.relname as name, t.kind as relkind, t.oid as table_oid, 1259 as catalog, x.indexrelid as oid,
               -- A partitioned table's is to be made with those of its partitions.
               replace(pg_get_indexdef(x.indexrelid), format(' ON ONLY %s ', t.sql), format(' ON %s ', t.sql)) as definition,
               replace(pg_get_indexdef(x.indexrelid), format(' ON ONLY %s ', t.sql), format(' ON %s ', t.sql)) as made_by,
               format('DROP INDEX %I.%I', t.schema, i.relname) as gone_by
        from pg_index x join own t on t.oid = x.indrelid join pg_class i on i.oid = x.indexrelid
        where x.indisvalid and not i.relispartition and not exists (
            select from pg_constraint k where k.conindid = x.indexrelid and k.conrelid = x.indrelid and k.contype in ('p', 'u', 'x'))
    """,
    "constraint": """
        select t.schema, t.name as relation, k.conname as name, t.kind as relkind, t.oid as table_oid, 2606 as catalog, k.oid,
               pg_get_constraintdef(k.oid) as definition, format('ALTER TABLE %s ADD CONSTRAINT %I ', t.sql, k.conname) || pg_get_constraintdef(k.oid) as made_by,
               format('ALTER TABLE %s DROP CONSTRAINT %I', t.sql, k.conname) as gone_by
        from pg_constraint k join own t on t.oid = k.conrelid
        where k.contype in ('p', 'u', 'x', 'c') and k.conparentid = 0 and (k.coninhcount = 0 or k.conislocal)
    """,
    "foreign key": """
        select t.schema, t.name as relation, k.conname as name, t.kind as relkind, t.oid as table_oid, 2606 as catalog, k.oid,
               pg_get_constraintdef(k.oid) as definition, format('ALTER TABLE %s ADD CONSTRAINT %I ', t.sql, k.conname) || pg_get_constraintdef(k.oid) as made_by,
               format('ALTER TABLE %s DROP CONSTRAINT %I', t.sql, k.conname) as gone_by
        from pg_constraint k join own t on t.oid = k.conrelid where k.contype = 'f' and k.conparentid = 0
    """,
    "column": """
        select t.schema, t.name as relation, a.attname as name, t.kind as relkind, t.oid as table_oid, 1249 as catalog, 0 as oid,
               concat_ws(' ', case when a.attnotnull then 'NOT NULL' end, 'IDENTITY ' || nullif(a.attidentity::text, ''),
                         'GENERATED ' || nullif(a.attgenerated::text, ''), pg_get_expr(d.adbin, d.adrelid)) as definition,
               format('ALTER TABLE %s ALTER COLUMN %I %s NOT NULL', t.sql, a.attname, case when a.attnotnull then 'SET' else 'DROP' end) ||
               case when a.attidentity <> '' then '; -- GENERATED AS IDENTITY' when a.attgenerated <> '' then format('; -- GENERATED ALWAYS AS (%s)', pg_get_expr(d.adbin, d.adrelid))
                    else format('; ALTER TABLE %s ALTER COLUMN %I %s', t.sql, a.attname, coalesce('SET DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), 'DROP DEFAULT'))
               end as made_by, '' as gone_by
        from pg_attribute a join own t on t.oid = a.attrelid left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where a.attnum > 0 and not a.attisdropped and t.kind in ('r', 'p') and not t.is_partition
    """,
    "trigger": """
        select t.schema, t.name as relation, g.tgname as name, t.kind as relkind, t.oid as table_oid, 2620 as catalog, g.oid,
               pg_get_triggerdef(g.oid) || ' ' || g.tgenabled::text as definition,
               pg_get_triggerdef(g.oid) || case g.tgenabled when 'O' then '' else format('; ALTER TABLE %s %s TRIGGER %I', t.sql,
                   case g.tgenabled when 'D' then 'DISABLE' when 'R' then 'ENABLE REPLICA' else 'ENABLE ALWAYS' end, g.tgname) end as made_by,
               format('DROP TRIGGER %I ON %s', g.tgname, t.sql) as gone_by
        from pg_trigger g join own t on t.oid = g.tgrelid join pg_proc p on p.oid = g.tgfoid join pg_namespace n on n.oid = p.pronamespace
        where not g.tgisinternal and g.tgparentid = 0 and n.nspname !~ '^_timescaledb_'
    """,
    "rule": """
        select t.schema, t.name as relation, r.rulename as name, t.kind as relkind, t.oid as table_oid, 2618 as catalog, r.oid,
               pg_get_ruledef(r.oid) || ' ' || r.ev_enabled::text as definition,
               rtrim(pg_get_ruledef(r.oid), ';') || case r.ev_enabled when 'O' then '' else format('; ALTER TABLE %s %s RULE %I', t.sql,
                   case r.ev_enabled when 'D' then 'DISABLE' when 'R' then 'ENABLE REPLICA' else 'ENABLE ALWAYS' end, r.rulename) end as made_by,
               format('DROP RULE %I ON %s', r.rulename, t.sql) as gone_by
        from pg_rewrite r join own t on t.oid = r.ev_class where r.rulename <> '_RETURN'
    """,
    "policy": """
        select schema, relation, name, relkind, table_oid, 3256 as catalog, oid, made_by as definition, made_by, format('DROP POLICY %I ON %s', name, sql) as gone_by
        from (select t.schema, t.name as relation, p.polname as name, t.kind as relkind, t.oid as table_oid, p.oid, t.sql,
                     concat_ws(' ', format('CREATE POLICY %I ON %s', p.polname, t.sql), case when not p.polpermissive then 'AS RESTRICTIVE' end, 'FOR ' ||
                               case p.polcmd when 'r' then 'SELECT' when 'a' then 'INSERT' when 'w' then 'UPDATE' when 'd' then 'DELETE' else 'ALL' end,
                               'TO ' || (select string_agg(case role when 0 then 'PUBLIC' else quote_ident(r.rolname) end, ', ' order by r.rolname)
                                         from unnest(p.polroles) role left join pg_roles r on r.oid = role),
                               'USING (' || pg_get_expr(p.polqual, p.polrelid) || ')',
                               'WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')') as made_by
              from pg_policy p join own t on t.oid = p.polrelid) policies
    """,
    "row security": """
        select t.schema, t.name as relation, '' as name, t.kind as relkind, t.oid as table_oid, 0 as catalog, 0 as oid,
               concat_ws(' ', case when c.relrowsecurity then 'ENABLE' end, case when c.relforcerowsecurity then 'FORCE' end) as definition,
               format('ALTER TABLE %s %s ROW LEVEL SECURITY; ALTER TABLE %s %s ROW LEVEL SECURITY', t.sql,
                      case when c.relrowsecurity then 'ENABLE' else 'DISABLE' end, t.sql, case when c.relforcerowsecurity then 'FORCE' else 'NO FORCE' end) as made_by,
               '' as gone_by
        from pg_class c join own t on t.oid = c.oid where t.kind in ('r', 'p')
    """,
    "view": """
        select t.schema, t.name as relation, '' as name, t.kind as relkind, t.oid as table_oid, 1259 as catalog, t.oid,
               concat_ws(' ', t.kind::text, array_to_string(c.reloptions, ', '), pg_get_viewdef(t.oid)) as definition,
               case t.kind when 'v' then 'CREATE OR REPLACE VIEW ' else 'CREATE MATERIALIZED VIEW ' end || t.sql ||
               coalesce(' WITH (' || array_to_string(c.reloptions, ', ') || ')', '') || ' AS ' || rtrim(pg_get_viewdef(t.oid), ';') as made_by,
               case t.kind when 'v' then 'DROP VIEW ' else 'DROP MATERIALIZED VIEW ' end || t.sql as gone_by
        from pg_class c join own t on t.oid = c.oid where t.kind in ('v', 'm')
    """,
}
_FUNCTIONS = f"""
    select 'function' as kind, n.nspname as schema, '' as relation, format('%s(%s)', p.proname, pg_get_function_identity_arguments(p.oid)) as name,
           0::bigint as "table", 1255::bigint as catalog, p.oid::bigint, pg_get_functiondef(p.oid) as definition, rtrim(pg_get_functiondef(p.oid)) as made_by,
           format('DROP ROUTINE %I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) as gone_by
    from pg_proc p join pg_namespace n on n.oid = p.pronamespace
    where p.prokind in ('f', 'p', 'w') and {_PROGRAMS}
      and not exists (select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype in ('e', 'i'))
"""
_TYPES = f"""
    select 'type' as kind, n.nspname as schema, '' as relation, t.typname as name, 0::bigint as "table", 1247::bigint as catalog, t.oid::bigint,
           d.definition, d.definition as made_by, format('DROP TYPE %I.%I', n.nspname, t.typname) as gone_by
    from pg_type t join pg_namespace n on n.oid = t.typnamespace left join pg_class c on c.oid = t.typrelid
    cross join lateral (select case t.typtype
        when 'e' then format('CREATE TYPE %I.%I AS ENUM (%s)', n.nspname, t.typname,
                             (select string_agg(quote_literal(enumlabel), ', ' order by enumsortorder) from pg_enum where enumtypid = t.oid))
        when 'd' then concat_ws(' ', format('CREATE DOMAIN %I.%I AS %s', n.nspname, t.typname, format_type(t.typbasetype, t.typtypmod)),
                                'DEFAULT ' || t.typdefault, case when t.typnotnull then 'NOT NULL' end,
                                (select string_agg(format('CONSTRAINT %I %s', conname, pg_get_constraintdef(k.oid)), ' ' order by conname)
                                 from pg_constraint k where contypid = t.oid and contype = 'c'))
        else format('CREATE TYPE %I.%I AS (%s)', n.nspname, t.typname,
                    (select string_agg(format('%I %s', attname, format_type(atttypid, atttypmod)), ', ' order by attnum)
                     from pg_attribute where attrelid = t.typrelid and attnum > 0 and not attisdropped))
        end as definition) d
    where (t.typtype in ('e', 'd') or (t.typtype = 'c' and c.relkind = 'c')) and {_PROGRAMS}
      and not exists (select from pg_depend d where d.classid = 'pg_type'::regclass and d.objid = t.oid and d.deptype = 'e')
"""

_OF_NONE = {"function": _FUNCTIONS, "type": _TYPES}
_GIVE_WAY = """
    select set_config('lock_timeout', greatest(1, least(setting::int / 2, 2000)) || 'ms', true) from pg_settings where name = 'deadlock_timeout'
"""
"""Half of how long the server waits before it looks for deadlocks: then those who wait for us have not waited so long."""
_BATCH = 50


@dataclass(frozen=True, slots=True)
class Definition:
    """One object as a database has it. `table`: the oid of the table that it belongs to, else 0; (`catalog`, `oid`): its catalog row.

    `made_by` and `gone_by`: statements that make it as it is, and that take it away.
    """

    kind: str
    schema: str
    relation: str
    name: str
    table: int
    catalog: int
    oid: int
    definition: str
    made_by: str
    gone_by: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is known by on either side."""
        return self.kind, self.schema, self.relation, self.name

    @property
    def label(self) -> str:
        """What people know it by."""
        if not self.relation:
            return f"{self.kind} {self.schema}.{self.name}"
        where = f"{self.schema}.{self.relation}"
        return f"{self.kind} {self.name} of {where}" if self.name else f"{self.kind} {where}"


async def read_definitions_of_all(connection: asyncpg.Connection, *, kinds: Iterable[str] = ()) -> list[Definition]:
    """Give what a database has, of these `kinds` or of all; not what extensions bring, nor what TimescaleDB makes itself."""
    wanted = frozenset(kinds)
    async with connection.transaction(readonly=True):
        inner = await _read_inner(connection)
        rows = []
        for kind in _OF_RELATIONS:
            if not wanted or kind in wanted:
                rows += await _read_kind(connection, kind, inner)
        for kind, query in _OF_NONE.items():
            if not wanted or kind in wanted:
                rows += await connection.fetch(query)
    return _definitions(rows)


async def read_some_definitions(
    connection: asyncpg.Connection, keys: Iterable[tuple[str, str, str, str]]
) -> list[Definition]:
    """Give what a database has of the kinds and relations of these keys, and others of them; for one in which lanes are at work.

    What prints views and expressions keeps locks on their tables until its transaction ends: these are short, and give way at a lock before
    the server looks who is in a deadlock, so that it ends no lane for us.

    Raises:
        asyncpg.LockNotAvailableError | asyncpg.DeadlockDetectedError: somebody was in the way; to be tried again.
    """
    relations: dict[str, list[tuple[str, str]]] = {}
    for kind, schema, relation, _ in keys:
        relations.setdefault(kind, []).append((schema, relation))
    async with _giving_way(connection):
        inner = await _read_inner(connection)
    rows: list[asyncpg.Record] = []
    for kind, names in relations.items():
        if kind in _OF_NONE:
            async with _giving_way(connection):
                rows += await connection.fetch(_OF_NONE[kind])
            continue
        some = sorted(set(names))
        for start in range(0, len(some), _BATCH):
            async with _giving_way(connection):
                rows += await _read_kind(connection, kind, inner, some[start : start + _BATCH])
    return _definitions(rows)


@asynccontextmanager
async def _giving_way(connection: asyncpg.Connection) -> AsyncIterator[None]:
    async with connection.transaction(readonly=True):
        await connection.execute(_GIVE_WAY)
        yield


async def _read_inner(connection: asyncpg.Connection) -> list[int]:
    layout = await read_layout(connection)
    return own_relations(layout, await read_aggregate_views(connection)) if layout else []


async def _read_kind(
    connection: asyncpg.Connection, kind: str, inner: list[int], only: Sequence[tuple[str, str]] | None = None
) -> list[asyncpg.Record]:
    """Give rows of one kind, `only` of these relations, by schema and name, or of all."""
    schemas, names = (None, None) if only is None else ([schema for schema, _ in only], [name for _, name in only])
    rows: list[asyncpg.Record] = await connection.fetch(
        f"{_OWN}{_OF_RELATIONS[kind]}) found", inner, kind, schemas, names
    )
    return rows


def _definitions(rows: Iterable[asyncpg.Record]) -> list[Definition]:
    """The definition of what was dropped since the snapshot is null."""
    return [Definition(**dict(row)) for row in rows if row["definition"] is not None]


def encode(definitions: Iterable[Definition]) -> bytes:
    """Give definitions for the state, without the statements that make things as they were then."""
    rows = [
        (d.kind, d.schema, d.relation, d.name, d.table, d.catalog, d.oid, d.definition, "", d.gone_by)
        for d in definitions
    ]
    return zlib.compress(json.dumps(rows).encode(), 1)


def decode(content: bytes) -> list[Definition]:
    """Give what `encode` kept."""
    return [Definition(*each) for each in json.loads(zlib.decompress(content))]
