"""Catalog queries: what tables a database has and what they are made of; the same for source and target."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Literal

import asyncpg

from live_migration.common.relation import QualifiedName, ReplicaIdentity
from live_migration.common.rewriting import FILE_MARK
from live_migration.common.timescale import Layout, read_layout

Part = Literal["table", "hypertable", "chunk", "compressed", "compressed root"]
"""What a table is: of the user's own, a hypertable (which has no rows itself), a chunk, one that holds a chunk's compressed rows,
or the parent of such, without rows."""

BINARY_SAFE_TYPES = frozenset(
    {
        16, 17, 18, 19, 20, 21, 23, 25, 26, 114, 142, 600, 601, 602, 603, 604, 628, 650, 700, 701, 718, 774, 790, 829, 869,
        1042, 1043, 1082, 1083, 1114, 1184, 1186, 1266, 1560, 1562, 1700, 2950, 3614, 3802,
    }
    | {3904, 3906, 3908, 3910, 3912, 3926, 4451, 4532, 4533, 4534, 4535, 4536}
    | {1000, 1001, 1005, 1007, 1014, 1015, 1016, 1009, 1021, 1022, 1115, 1182, 1183, 1185, 1231, 2951, 199, 3807}
    | {3905, 3907, 3909, 3911, 3913, 3927}
)  # fmt: skip
"""Oids of built-in types (then ranges, then arrays) whose binary form is the same on every server from 14 on and holds no oids."""


@dataclass(frozen=True, slots=True)
class ColumnInfo:
    """A table's column. `type` is `format_type` (schema-qualified where not built in); `generated` is '', 's' or 'v'.

    `base_type`: where the type is a domain, what it rests on at last, else ''.
    """

    name: str
    type: str
    type_oid: int
    generated: str
    identity: str
    not_null: bool
    type_modifier: int = -1
    base_type: str = ""

    @property
    def is_binary_safe(self) -> bool:
        """Whether values may travel in binary form."""
        return self.type_oid in BINARY_SAFE_TYPES


@dataclass(frozen=True, slots=True)
class TableInfo:
    """An ordinary table or leaf partition of a user's, or a part of a hypertable.

    `identity_index`: oid of the index that UPDATE and DELETE are identified by, as the server sees it
    (`pg_get_replica_identity_index`), else None; None too where a generated column is in it: the stream lacks those, and
    from 18 on the server refuses UPDATE and DELETE then. `persistence`: 'p' permanent, 'u' unlogged. Of a chunk, and of a table of
    compressed rows: the oid of its `hypertable`; of a chunk: the condition that its rows fulfil, and the oid of the table that
    holds its compressed rows. `file_mark`: see `rewriting`.
    """

    oid: int
    name: QualifiedName
    persistence: str
    identity: ReplicaIdentity
    identity_index: int | None
    columns: tuple[ColumnInfo, ...]
    size_bytes: int
    row_estimate: int
    changed_row_count: int = 0
    part: Part = "table"
    hypertable: int | None = None
    range: str | None = None
    compressed: int | None = None
    file_mark: str | None = None

    @property
    def is_users(self) -> bool:
        """Whether it is what users see: no inner part of a hypertable."""
        return self.part in ("table", "hypertable")

    @property
    def file(self) -> str | None:
        """The number of the file that it lies in, a new one each time that it is written anew."""
        return self.file_mark.split(maxsplit=1)[0] if self.file_mark else None

    @property
    def sql(self) -> str:
        """Its name in a query for all of its rows and no others."""
        return self.name.sql if self.part == "hypertable" else f"only {self.name.sql}"

    @property
    def copied_columns(self) -> tuple[ColumnInfo, ...]:
        """The columns that carry data of their own: all but generated ones."""
        return tuple(column for column in self.columns if not column.generated)

    @property
    def is_binary_safe(self) -> bool:
        """Whether the table may be copied and streamed in binary form."""
        return all(column.is_binary_safe for column in self.copied_columns)


_COLUMNS = """
    select a.attrelid as relation, a.attname as name, format_type(a.atttypid, a.atttypmod) as type, a.atttypid as type_oid,
           a.attgenerated::text as generated, a.attidentity::text as identity, a.attnotnull as not_null, a.atttypmod as type_modifier,
           case when t.typtype = 'd' then (
               with recursive below (oid, modifier, kind) as (
                   select t.typbasetype, t.typtypmod, (select typtype from pg_type where oid = t.typbasetype)
                   union all
                   select d.typbasetype, d.typtypmod, (select typtype from pg_type where oid = d.typbasetype)
                   from below join pg_type d on d.oid = below.oid and d.typtype = 'd')
               select format_type(oid, modifier) from below where kind <> 'd')
           else '' end as base_type
    from pg_attribute a left join pg_type t on t.oid = a.atttypid
    where a.attrelid = any($1::oid[]) and a.attnum > 0 and not a.attisdropped
    order by a.attrelid, a.attnum
"""

USERS_OWN = """n.nspname !~ '^pg_' and n.nspname not in ('information_schema', '_live_migration')
      and not exists (select from pg_depend d
                      where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')"""
"""Of a relation `c` of pg_class in schema `n`: no system's, no extension's and none of ours."""

_TABLES = f"""
    select c.oid, n.nspname as schema, c.relname as name, c.relpersistence::text as persistence,
           c.relreplident::text as identity,
           (select i.indexrelid from pg_index i
            where i.indexrelid = pg_get_replica_identity_index(c.oid) and not exists (
                select from pg_attribute a
                where a.attrelid = c.oid and a.attgenerated <> '' and a.attnum = any((i.indkey::int2[])[0:i.indnkeyatts - 1]))
           ) as identity_index,
           coalesce(pg_relation_size(c.oid), 0) as size, greatest(c.reltuples, 0)::bigint as rows,
           pg_stat_get_tuples_updated(c.oid) + pg_stat_get_tuples_deleted(c.oid) as changed_rows,
           {FILE_MARK} as file_mark
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'r' and c.relpersistence in ('p', 'u') and {USERS_OWN}
    order by c.oid
"""

SequencePosition = tuple[QualifiedName, int, bool]
"""A sequence, its last value, and whether that was given out."""

_SEQUENCES_AT_ONCE = 100
_SEQUENCES = f"""
    select n.nspname as schema, c.relname as name
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'S' and c.relpersistence in ('p', 'u') and {USERS_OWN}
    order by 1, 2
"""

_SEQUENCE_PARAMETERS = f"""
    select n.nspname as schema, c.relname as name, format_type(s.seqtypid, null) as type, s.seqstart as start, s.seqincrement as increment,
           s.seqmin as minimum, s.seqmax as maximum, s.seqcache as cache, s.seqcycle as is_cycle
    from pg_sequence s join pg_class c on c.oid = s.seqrelid join pg_namespace n on n.oid = c.relnamespace
    where c.relpersistence in ('p', 'u') and {USERS_OWN}
"""


@dataclass(frozen=True, slots=True)
class SequenceParameters:
    """What a sequence counts by."""

    type: str
    start: int
    increment: int
    minimum: int
    maximum: int
    cache: int
    is_cycle: bool

    @property
    def clauses(self) -> str:
        """Give them as ALTER SEQUENCE takes them."""
        return (
            f"AS {self.type} INCREMENT BY {self.increment} MINVALUE {self.minimum} MAXVALUE {self.maximum} "
            f"START WITH {self.start} CACHE {self.cache} {'CYCLE' if self.is_cycle else 'NO CYCLE'}"
        )


CURRENT_TIMELINE = "('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int"
"""The timeline that a primary writes on, from the name of its WAL file: an expression, which fails on a standby."""


async def read_columns(connection: asyncpg.Connection, oids: Iterable[int]) -> dict[int, tuple[ColumnInfo, ...]]:
    """Give the columns of relations by oid, in attnum order; a relation that is gone, or has no column, is absent."""
    columns: dict[int, list[ColumnInfo]] = {}
    for row in await connection.fetch(_COLUMNS, list(oids)):
        fields = dict(row)
        columns.setdefault(fields.pop("relation"), []).append(ColumnInfo(**fields))
    return {oid: tuple(found) for oid, found in columns.items()}


async def list_sequences(connection: asyncpg.Connection) -> list[QualifiedName]:
    """Give the database's sequences, in the order of their names."""
    return [QualifiedName(row["schema"], row["name"]) for row in await connection.fetch(_SEQUENCES)]


async def sequence_parameters(connection: asyncpg.Connection) -> dict[QualifiedName, SequenceParameters]:
    """Give what each sequence counts by."""
    found = {}
    for row in await connection.fetch(_SEQUENCE_PARAMETERS):
        schema, name, *parameters = row
        found[QualifiedName(schema, name)] = SequenceParameters(*parameters)
    return found


async def sequence_positions(connection: asyncpg.Connection) -> AsyncIterator[list[SequencePosition]]:
    """Give where each sequence stands, many at a time: each query costs a round trip."""
    names = await list_sequences(connection)
    for first in range(0, len(names), _SEQUENCES_AT_ONCE):
        some = names[first : first + _SEQUENCES_AT_ONCE]
        selects = [f"select {number} as n, last_value, is_called from {name.sql}" for number, name in enumerate(some)]
        rows = await connection.fetch(" union all ".join(selects))
        yield [(some[row["n"]], row["last_value"], row["is_called"]) for row in rows]


async def list_tables(connection: asyncpg.Connection) -> list[TableInfo]:
    """Give a database's own tables: ordinary ones, leaf partitions, hypertables with their parts; not extensions' and temporary ones."""
    rows = await connection.fetch(_TABLES)
    layout = await read_layout(connection)
    columns = await read_columns(connection, [row["oid"] for row in rows])
    return [
        TableInfo(
            row["oid"],
            QualifiedName(row["schema"], row["name"]),
            row["persistence"],
            ReplicaIdentity(row["identity"]),
            row["identity_index"],
            columns.get(row["oid"], ()),
            row["size"],
            row["rows"],
            row["changed_rows"],
            *_part(layout, row["oid"]),
            file_mark=row["file_mark"],
        )
        for row in rows
    ]


def _part(layout: Layout | None, oid: int) -> tuple[Part, int | None, str | None, int | None]:
    """Give what a table is: the fields of TableInfo from `part` on."""
    if layout is None:
        return "table", None, None, None
    if chunk := layout.chunks.get(oid):
        return "chunk", chunk.hypertable, chunk.range, chunk.compressed
    if oid in layout.hypertables:
        return "hypertable", None, None, None
    if oid in layout.compressed:
        owner = layout.chunks.get(layout.compressed[oid])
        return "compressed", owner.hypertable if owner else None, None, None
    return ("compressed root" if oid in layout.compressed_roots else "table"), None, None, None
