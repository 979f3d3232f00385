"""What a plain source's tables are like, as far as it matters for making them hypertables."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import asyncpg

from live_migration.common.catalog import USERS_OWN
from live_migration.common.relation import QualifiedName

TIME_TYPES = {1184: "timestamp with time zone", 1114: "timestamp without time zone", 1082: "date"}
"""By oid: types whose chunks are intervals of time."""
INTEGER_TYPES = {21: 2**15 - 1, 23: 2**31 - 1, 20: 2**63 - 1}
"""By oid: types whose chunks are plain numbers, each with its largest value."""

_UNHASHABLE = (114, 142, 600, 601, 602, 603, 604, 628, 718, 790, 1560, 1562, 3614, 3615)


@dataclass(frozen=True, slots=True)
class Column:
    """A column. `low` and `high`: the bounds of the statistics, in seconds since 1970 for times, None where not known.

    `is_counted`: filled from a sequence.
    """

    name: str
    type: str
    type_oid: int
    not_null: bool = True
    is_generated: bool = False
    is_counted: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def is_time(self) -> bool:
        """Whether its chunks are intervals of time."""
        return self.type_oid in TIME_TYPES

    @property
    def is_integer(self) -> bool:
        """Whether its chunks are plain numbers."""
        return self.type_oid in INTEGER_TYPES

    @property
    def is_hashable(self) -> bool:
        """Whether rows can be spread by its hash."""
        return self.type_oid not in _UNHASHABLE

    @property
    def span(self) -> float | None:
        """From the lowest to the highest value, in seconds for times; None where not known or nothing."""
        if self.low is None or self.high is None or not self.high > self.low:
            return None
        return self.high - self.low


@dataclass(frozen=True, slots=True)
class Key:
    """A unique index or exclusion constraint. `columns`: those that it compares, without expressions and INCLUDE."""

    oid: int
    name: str
    kind: str
    """`primary key`, `unique constraint`, `exclusion constraint` or `unique index`."""
    columns: tuple[str, ...]
    constraint: int | None = None


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """A foreign key that refers to the table; `key`: oid of the index that it needs there."""

    oid: int
    name: str
    table: QualifiedName
    key: int


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a user's, or a partitioned table's root. `size_bytes`: with indexes.

    `leading`: columns that lead an index. `identity_columns`: what UPDATE and DELETE in the stream are identified by, empty
    where they are not, or by the whole row.
    """

    oid: int
    name: QualifiedName
    columns: tuple[Column, ...] = ()
    is_partitioned: bool = False
    is_inherited: bool = False
    is_unlogged: bool = False
    size_bytes: int = 0
    row_estimate: int = 0
    keys: tuple[Key, ...] = ()
    references: tuple[ForeignKey, ...] = ()
    leading: frozenset[str] = frozenset()
    identity_columns: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    not_inherited_checks: tuple[str, ...] = ()
    transition_triggers: tuple[str, ...] = field(default=())

    def column(self, name: str) -> Column | None:
        """Give a column by its name."""
        return next((column for column in self.columns if column.name == name), None)


_TABLES = f"""
    select c.oid, n.nspname::text as schema, c.relname::text as name, c.relkind = 'p' as is_partitioned,
           exists (select from pg_inherits i where c.oid in (i.inhrelid, i.inhparent)) as is_inherited,
           c.relpersistence = 'u' as is_unlogged, pg_total_relation_size(c.oid) as size_bytes,
           greatest(c.reltuples, 0)::bigint as row_estimate,
           array(select w.rulename::text from pg_rewrite w where w.ev_class = c.oid order by 1) as rules,
           array(select k.conname::text from pg_constraint k where k.conrelid = c.oid and k.contype = 'c' and k.connoinherit
                 order by 1) as not_inherited_checks,
           array(select t.tgname::text from pg_trigger t where t.tgrelid = c.oid and t.tgtype & 1 = 1
                 and (t.tgoldtable is not null or t.tgnewtable is not null) order by 1) as transition_triggers,
           array(select a.attname::text from pg_index i join pg_attribute a
                 on a.attrelid = c.oid and a.attnum = any((i.indkey::int2[])[0:i.indnkeyatts - 1])
                 where i.indexrelid = pg_get_replica_identity_index(c.oid) order by a.attnum) as identity_columns
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p') and c.relpersistence in ('p', 'u') and {USERS_OWN}
    order by schema, name
"""

_COLUMNS = """
    select b.relation, b.name, b.type, b.type_oid, b.not_null, b.is_generated, b.is_counted,
           case when b.type_oid in (1082, 1114, 1184) then extract(epoch from b.low::timestamptz)::float8
                when b.type_oid in (20, 21, 23) then b.low::float8 end as low,
           case when b.type_oid in (1082, 1114, 1184) then extract(epoch from b.high::timestamptz)::float8
                when b.type_oid in (20, 21, 23) then b.high::float8 end as high
    from (
        select a.attrelid as relation, a.attnum, a.attname::text as name, format_type(a.atttypid, a.atttypmod) as type,
               a.atttypid as type_oid, a.attnotnull as not_null, a.attgenerated <> '' as is_generated,
               a.attidentity <> '' or coalesce(pg_get_expr(d.adbin, d.adrelid) like 'nextval(%', false) as is_counted,
               h.bounds[1] as low, h.bounds[cardinality(h.bounds)] as high
        from pg_attribute a join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace
        left join pg_attrdef d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
        left join pg_stats s on (s.schemaname, s.tablename, s.attname) = (n.nspname, c.relname, a.attname) and not s.inherited
        cross join lateral (select case when a.atttypid in (20, 21, 23, 1082, 1114, 1184)
                                   then s.histogram_bounds::text::text[] end as bounds) h
        where a.attrelid = any($1::oid[]) and a.attnum > 0 and not a.attisdropped
    ) b
    order by b.relation, b.attnum
"""

_KEYS = """
    select i.indrelid as relation, i.indexrelid as oid, x.relname::text as name, k.oid as constraint,
           i.indisunique or i.indisexclusion as is_key,
           case k.contype when 'p' then 'primary key' when 'u' then 'unique constraint' when 'x' then 'exclusion constraint'
                else 'unique index' end as kind,
           array(select a.attname::text from unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) with ordinality u (number, place)
                 join pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.number order by u.place) as columns,
           (select a.attname::text from pg_attribute a where a.attrelid = i.indrelid and a.attnum = i.indkey[0]) as leading
    from pg_index i join pg_class x on x.oid = i.indexrelid
    left join pg_constraint k on k.conindid = i.indexrelid and k.conrelid = i.indrelid and k.contype in ('p', 'u', 'x')
    where i.indrelid = any($1::oid[]) and i.indislive
    order by i.indrelid, x.relname
"""

_REFERENCES = """
    select f.confrelid as relation, f.oid, f.conname::text as name, n.nspname::text as schema, c.relname::text as table,
           f.conindid as key
    from pg_constraint f join pg_class c on c.oid = f.conrelid join pg_namespace n on n.oid = c.relnamespace
    where f.contype = 'f' and f.conparentid = 0 and f.confrelid = any($1::oid[])
    order by f.confrelid, schema, "table", name
"""


async def read_tables(connection: asyncpg.Connection) -> tuple[Table, ...]:
    """Give a database's tables by name, without extensions'.

    Reading a size takes a lock that waits for whoever changes a table: set `lock_timeout` first. Several queries: call it in
    a transaction with one snapshot where that matters.
    """
    rows = await connection.fetch(_TABLES)
    oids = [row["oid"] for row in rows]
    columns = _by_relation(await connection.fetch(_COLUMNS, oids))
    indexes = _by_relation(await connection.fetch(_KEYS, oids))
    references = _by_relation(await connection.fetch(_REFERENCES, oids))
    return tuple(_table(row, columns[row["oid"]], indexes[row["oid"]], references[row["oid"]]) for row in rows)


def _by_relation(rows: list[asyncpg.Record]) -> dict[int, list[asyncpg.Record]]:
    grouped: dict[int, list[asyncpg.Record]] = defaultdict(list)
    for row in rows:
        grouped[row["relation"]].append(row)
    return grouped


def _table(
    row: asyncpg.Record, columns: list[asyncpg.Record], indexes: list[asyncpg.Record], references: list[asyncpg.Record]
) -> Table:
    return Table(
        row["oid"],
        QualifiedName(row["schema"], row["name"]),
        tuple(map(_column, columns)),
        row["is_partitioned"],
        row["is_inherited"],
        row["is_unlogged"],
        row["size_bytes"],
        row["row_estimate"],
        tuple(
            Key(each["oid"], each["name"], each["kind"], tuple(each["columns"]), each["constraint"])
            for each in indexes
            if each["is_key"]
        ),
        tuple(
            ForeignKey(each["oid"], each["name"], QualifiedName(each["schema"], each["table"]), each["key"])
            for each in references
        ),
        frozenset(each["leading"] for each in indexes if each["leading"]),
        tuple(row["identity_columns"]),
        tuple(row["rules"]),
        tuple(row["not_inherited_checks"]),
        tuple(row["transition_triggers"]),
    )


def _column(row: asyncpg.Record) -> Column:
    fields = {name: value for name, value in row.items() if name != "relation"}
    for bound in ("low", "high"):
        if fields[bound] is not None and not math.isfinite(fields[bound]):
            fields[bound] = None
    return Column(**fields)
