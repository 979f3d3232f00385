"""Which relations of a database are TimescaleDB's parts of a hypertable: read from the catalogs of 2.16 to 2.29.

The catalogs change between releases (2.29: `chunk.relid` in place of `chunk.schema_name` and `table_name`, compressed tables
named in `compression_settings` alone), so chunks are found by inheritance, which does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import asyncpg

from live_migration.common.relation import QualifiedName

INTERNAL_SCHEMA = "_timescaledb_internal"
"""Where chunks, compressed tables and materializations stand, unless a hypertable names another schema for its chunks."""

_VERSION = "select extversion::text from pg_extension where extname = 'timescaledb'"

_VERSION_TO_BE = """
    select coalesce(
        (select extversion::text from pg_extension where extname = 'timescaledb'),
        (select version::text from pg_available_extension_versions where name = 'timescaledb' and version = $1),
        (select default_version::text from pg_available_extensions where name = 'timescaledb'))
"""

_COLUMNS = """
    select format('%s.%s', c.relname, a.attname)
    from pg_attribute a join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = '_timescaledb_catalog' and c.relname in ('chunk', 'hypertable', 'compression_settings', 'dimension_slice')
      and a.attnum > 0 and not a.attisdropped
"""

_HYPERTABLES = """
    select h.id, c.oid, h.schema_name::text as schema, h.table_name::text as name,
           v.user_view_schema::text as view_schema, v.user_view_name::text as view_name,
           (select d.column_name::text from _timescaledb_catalog.dimension d
            where d.hypertable_id = h.id and d.interval_length is not null order by d.id limit 1) as time_column
    from _timescaledb_catalog.hypertable h
    join pg_namespace n on n.nspname = h.schema_name join pg_class c on c.relnamespace = n.oid and c.relname = h.table_name
    left join _timescaledb_catalog.continuous_agg v on v.mat_hypertable_id = h.id
    where h.compression_state <> 2
    order by h.id
"""

_RANGE = """
    select string_agg(case when a.attnum is not null and exists ({takes_null}) then format('(%I is null or %s)', a.attname, e.condition)
                           else e.condition end, ' and ' order by k.conname)
    from pg_constraint k cross join lateral pg_get_expr(k.conbin, k.conrelid) e (condition)
    left join pg_attribute a on a.attrelid = k.conrelid and k.conkey = array[a.attnum] and not (a.attnotnull and not exists (
        select from pg_constraint v where v.conrelid = k.conrelid and v.contype = 'n' and v.conkey = k.conkey and not v.convalidated))
    where k.conrelid = c.oid and k.contype = 'c' and k.coninhcount = 0
"""
"""A chunk's own constraints, of the relation `c`: those that it inherits are the user's.

A row without the value that is hashed passes that constraint of every chunk, and lies in the one whose range of hashes has zero in
it, whatever the partitioning function: it is not asked. Conditions on time stay bare, for chunks are left out by them.
"""

_TAKES_NULL = """
    select {slices} join _timescaledb_catalog.dimension d on d.id = s.dimension_id
    where p.oid = c.oid and d.column_name = a.attname and d.num_slices is not null and s.range_start <= 0 and s.range_end > 0
"""

_CHUNKS = """
    select i.inhparent as hypertable, c.oid, n.nspname::text as schema, c.relname::text as name, c.relkind::text as kind,
           ({range}) as range
    from pg_inherits i join pg_class c on c.oid = i.inhrelid join pg_namespace n on n.oid = c.relnamespace
    where i.inhparent = any($1::oid[])
    order by c.oid
"""

_COMPRESSED_BY_SETTINGS = """
    select relid::oid as chunk, compress_relid::oid as compressed from _timescaledb_catalog.compression_settings
    where compress_relid is not null
"""

_COMPRESSED_BY_CHUNK = """
    select p.oid as chunk, q.oid as compressed
    from _timescaledb_catalog.chunk c join _timescaledb_catalog.chunk z on z.id = c.compressed_chunk_id
    join pg_namespace n on n.nspname = c.schema_name join pg_class p on p.relnamespace = n.oid and p.relname = c.table_name
    join pg_namespace m on m.nspname = z.schema_name join pg_class q on q.relnamespace = m.oid and q.relname = z.table_name
"""

_OWN_TABLES = """
    select n.nspname::text as schema, c.relname::text as name
    from pg_depend d join pg_extension e on e.oid = d.refobjid and d.refclassid = 'pg_extension'::regclass
    join pg_class c on c.oid = d.objid and d.classid = 'pg_class'::regclass join pg_namespace n on n.oid = c.relnamespace
    where e.extname = 'timescaledb' and d.deptype = 'e' and c.relkind = 'r'
"""

_NAMES = """
    select c.oid, n.nspname::text as schema, c.relname::text as name
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = any($1::oid[])
"""

_COMPRESSED_ROOTS = """
    select c.oid from _timescaledb_catalog.hypertable h
    join pg_namespace n on n.nspname = h.schema_name join pg_class c on c.relnamespace = n.oid and c.relname = h.table_name
    where h.compression_state = 2
"""


@dataclass(frozen=True, slots=True)
class Hypertable:
    """A hypertable, a continuous aggregate's materialization included (`view` is then what users call it by).

    `id` is TimescaleDB's own. `time_column`: that of its first dimension.
    """

    id: int
    oid: int
    name: QualifiedName
    time_column: str
    view: QualifiedName | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk. `range`: an SQL condition that holds for exactly the rows which belong into it.

    `compressed`: oid of the table that holds its compressed rows, None where it is not compressed. `is_foreign`: its
    rows lie in tiered storage.
    """

    oid: int
    name: QualifiedName
    hypertable: int
    range: str
    compressed: int | None = None
    is_foreign: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """A database's hypertables at one moment; relations by oid.

    `compressed`: which chunk a compressed table belongs to. `compressed_names`: theirs. `compressed_roots`: the parents of
    compressed tables, always empty, which versions before 2.29 have. `own_tables`: the extension's.
    """

    version: str
    hypertables: dict[int, Hypertable] = field(default_factory=dict)
    chunks: dict[int, Chunk] = field(default_factory=dict)
    compressed: dict[int, int] = field(default_factory=dict)
    compressed_names: dict[int, QualifiedName] = field(default_factory=dict)
    compressed_roots: frozenset[int] = frozenset()
    own_tables: frozenset[QualifiedName] = frozenset()

    def hypertable_of(self, oid: int) -> Hypertable | None:
        """Give the hypertable that a relation is, or is a chunk of, or holds compressed rows of; None for all others."""
        oid = self.compressed.get(oid, oid)
        chunk = self.chunks.get(oid)
        return self.hypertables.get(chunk.hypertable if chunk else oid)

    def is_internal(self, oid: int) -> bool:
        """Tell whether a relation holds compressed rows, or would: nothing that users write to."""
        return oid in self.compressed or oid in self.compressed_roots


IS_SUPERUSER = "select usesuper from pg_user where usename = current_user"
FIRST_WATCHED_BY_OWNERS = (2, 29)
"""Before, TimescaleDB refuses a replica identity of a table of compressed rows to all but superusers, who get around it."""


def parse_version(version: str) -> tuple[int, ...]:
    """Give a version's numbers, for comparison; what follows a hyphen (`-dev`) is left out."""
    return tuple(int(part) for part in version.partition("-")[0].split(".") if part.isdigit())


async def can_watch_compressed(source: asyncpg.Connection, version: str) -> bool:
    """Tell whether our role may watch tables of compressed rows on a source with this TimescaleDB."""
    if parse_version(version) >= FIRST_WATCHED_BY_OWNERS:
        return True
    return bool(await source.fetchval(IS_SUPERUSER))


async def read_version(connection: asyncpg.Connection) -> str | None:
    """Give the version of a database's TimescaleDB; None where it has none."""
    version: str | None = await connection.fetchval(_VERSION)
    return version


async def read_version_to_be(connection: asyncpg.Connection, wanted: str) -> str | None:
    """Give the version that a database has, or would get: `wanted` where the server offers it, else its default.

    None where the server has no TimescaleDB at all.
    """
    version: str | None = await connection.fetchval(_VERSION_TO_BE, wanted)
    return version


async def read_layout(connection: asyncpg.Connection) -> Layout | None:
    """Give a database's hypertables; None where it has no TimescaleDB.

    Several queries: call it in a transaction with one snapshot where that matters.
    """
    version = await read_version(connection)
    if version is None:
        return None
    columns = await _read_columns(connection)
    hypertables = {
        row["oid"]: Hypertable(
            row["id"],
            row["oid"],
            QualifiedName(row["schema"], row["name"]),
            row["time_column"] or "",
            QualifiedName(row["view_schema"], row["view_name"]) if row["view_name"] else None,
        )
        for row in await connection.fetch(_HYPERTABLES)
    }
    has_chunk_column = "chunk.compressed_chunk_id" in columns
    pairs = await connection.fetch(_COMPRESSED_BY_CHUNK if has_chunk_column else _COMPRESSED_BY_SETTINGS)
    compressed_of = {row["chunk"]: row["compressed"] for row in pairs}
    chunks = {
        row["oid"]: Chunk(
            row["oid"],
            QualifiedName(row["schema"], row["name"]),
            row["hypertable"],
            row["range"] or "true",
            compressed_of.get(row["oid"]),
            row["kind"] != "r",
        )
        for row in await connection.fetch(_CHUNKS.format(range=_range(columns)), list(hypertables))
    }
    roots = frozenset(row["oid"] for row in await connection.fetch(_COMPRESSED_ROOTS))
    names = await connection.fetch(_NAMES, list(compressed_of.values()))
    own = await connection.fetch(_OWN_TABLES)
    return Layout(
        version,
        hypertables,
        chunks,
        {z: c for c, z in compressed_of.items()},
        {row["oid"]: QualifiedName(row["schema"], row["name"]) for row in names},
        roots,
        frozenset(QualifiedName(row["schema"], row["name"]) for row in own),
    )


async def _read_columns(connection: asyncpg.Connection) -> set[str]:
    """Give the columns of TimescaleDB's catalog that differ from version to version."""
    return {row[0] for row in await connection.fetch(_COLUMNS)}


async def is_hypertable(connection: asyncpg.Connection, name: QualifiedName) -> bool:
    """Tell whether a table is a hypertable; never where there is no TimescaleDB."""
    if await read_version(connection) is None:
        return False
    query = "select exists (select from _timescaledb_catalog.hypertable where schema_name = $1 and table_name = $2)"
    return bool(await connection.fetchval(query, name.schema, name.name))


async def read_slices(connection: asyncpg.Connection, layout: Layout) -> dict[int, str]:
    """Give the bounds of each chunk in its hypertable's dimensions, by oid: JSON as `_timescaledb_functions.create_chunk` takes it.

    Equal on every server for chunks that hold the same range of the same hypertable.
    """
    # From the catalog's tables, for TimescaleDB's own function looks past the snapshot, and fails on a chunk that was dropped since.
    slices = _slices(await _read_columns(connection))
    rows = await connection.fetch(
        f"""select p.oid, jsonb_object_agg(d.column_name, jsonb_build_array(s.range_start, s.range_end))::text as slices
            {slices} join _timescaledb_catalog.dimension d on d.id = s.dimension_id
            where p.oid = any($1::oid[]) group by p.oid""",
        [chunk.oid for chunk in layout.chunks.values() if not chunk.is_foreign],
    )
    return {row["oid"]: row["slices"] for row in rows}


def _slices(columns: set[str]) -> str:
    """Give what a query joins that asks for the bounds (`s`) of chunks (`p`, as relations)."""
    if "chunk.relid" in columns:
        relation = "join pg_class p on p.oid = h.relid"
    else:
        relation = """join pg_namespace n on n.nspname = h.schema_name
                      join pg_class p on p.relnamespace = n.oid and p.relname = h.table_name"""
    if "dimension_slice.chunk_id" in columns:
        slices = "join _timescaledb_catalog.dimension_slice s on s.chunk_id = h.id"
    else:
        slices = """join _timescaledb_catalog.chunk_constraint k on k.chunk_id = h.id
                    join _timescaledb_catalog.dimension_slice s on s.id = k.dimension_slice_id"""
    return f"from _timescaledb_catalog.chunk h {relation} {slices}"


def _range(columns: set[str]) -> str:
    """Give the query for the condition that holds for exactly the rows of a chunk (`c`, as a relation)."""
    return _RANGE.format(takes_null=_TAKES_NULL.format(slices=_slices(columns)))


_ONE_BY_SETTINGS = """
    select n.nspname::text as schema, c.relname::text as name, c.oid
    from _timescaledb_catalog.compression_settings s
    join pg_class c on c.oid = s.compress_relid join pg_namespace n on n.oid = c.relnamespace
    where s.relid = $1::oid
"""

_ONE_BY_CHUNK = """
    select m.nspname::text as schema, q.relname::text as name, q.oid
    from pg_class p join pg_namespace n on n.oid = p.relnamespace
    join _timescaledb_catalog.chunk c on c.schema_name = n.nspname and c.table_name = p.relname
    join _timescaledb_catalog.chunk z on z.id = c.compressed_chunk_id
    join pg_namespace m on m.nspname = z.schema_name join pg_class q on q.relnamespace = m.oid and q.relname = z.table_name
    where p.oid = $1::oid
"""


async def compressed_table(connection: asyncpg.Connection, chunk: int) -> tuple[str, int] | None:
    """Give name (in SQL) and oid of the table that holds a chunk's compressed rows; None where it has none."""
    columns = await _read_columns(connection)
    query = _ONE_BY_CHUNK if "chunk.compressed_chunk_id" in columns else _ONE_BY_SETTINGS
    row = await connection.fetchrow(query, chunk)
    return (QualifiedName(row["schema"], row["name"]).sql, row["oid"]) if row else None


async def compressed_tables(connection: asyncpg.Connection, hypertable: int) -> list[str]:
    """Give the names (in SQL, sorted) of the tables that hold the compressed rows of a hypertable's chunks."""
    layout = await read_layout(connection)
    if layout is None:
        return []
    chunks = layout.chunks
    return sorted(
        layout.compressed_names[oid].sql
        for oid, chunk in layout.compressed.items()
        if chunk in chunks and chunks[chunk].hypertable == hypertable and oid in layout.compressed_names
    )


_FROZEN = 4
"""A flag of a chunk's status."""


async def read_chunk_status(connection: asyncpg.Connection, name: QualifiedName) -> int | None:
    """Give TimescaleDB's flags of a chunk, which say where a query looks for its rows: compressed, beside those, or both."""
    where, arguments = await _where_chunk(connection, name)
    status: int | None = await connection.fetchval(
        f"select status from _timescaledb_catalog.chunk where {where}", *arguments
    )
    return status


async def frozen_chunks(connection: asyncpg.Connection) -> list[QualifiedName]:
    """Give the chunks that are frozen: no row of theirs may change, and no retention policy drops them."""
    columns = {row[0] for row in await connection.fetch(_COLUMNS)}
    if "chunk.relid" in columns:
        relation = "join pg_class p on p.oid = c.relid join pg_namespace n on n.oid = p.relnamespace"
        names = "n.nspname::text, p.relname::text"
    else:
        relation, names = "", "c.schema_name::text, c.table_name::text"
    rows = await connection.fetch(
        f"select {names} from _timescaledb_catalog.chunk c {relation} where c.status & {_FROZEN} <> 0 order by 1, 2"
    )
    return [QualifiedName(*row) for row in rows]


async def write_chunk_status(connection: asyncpg.Connection, name: QualifiedName, status: int) -> None:
    """Set a chunk's flags, to be those of the chunk whose rows it got."""
    where, arguments = await _where_chunk(connection, name)
    number = len(arguments) + 1
    await connection.execute(
        f"update _timescaledb_catalog.chunk set status = ${number} where {where} and status <> ${number}",
        *arguments,
        status,
    )


@dataclass(frozen=True, slots=True)
class ColumnBounds:
    """Between which values of a column a chunk's rows lie, as TimescaleDB knows it; queries pass over a chunk by that while it is valid."""

    column: str
    start: int
    end: int
    is_valid: bool


async def read_column_bounds(connection: asyncpg.Connection, name: QualifiedName) -> list[ColumnBounds]:
    """Give the bounds of the columns that a chunk is left out by (`enable_chunk_skipping`, 2.16 on)."""
    if not await _has_column_bounds(connection):
        return []
    where, arguments = await _where_chunk(connection, name)
    rows = await connection.fetch(
        f"""select column_name::text, range_start, range_end, valid from _timescaledb_catalog.chunk_column_stats
            where chunk_id = (select id from _timescaledb_catalog.chunk where {where}) order by 1""",
        *arguments,
    )
    return [ColumnBounds(*row) for row in rows]


async def write_column_bounds(
    connection: asyncpg.Connection, name: QualifiedName, bounds: Sequence[ColumnBounds]
) -> None:
    """Set a chunk's bounds to be those of the chunk whose rows it got; what is known of other columns holds no more."""
    if not await _has_column_bounds(connection):
        return
    where, arguments = await _where_chunk(connection, name)
    n = len(arguments)
    await connection.execute(
        f"""update _timescaledb_catalog.chunk_column_stats k
            set range_start = coalesce(b.range_start, k.range_start), range_end = coalesce(b.range_end, k.range_end),
                valid = coalesce(b.valid, false)
            from _timescaledb_catalog.chunk_column_stats o
            left join unnest(${n + 1}::text[], ${n + 2}::bigint[], ${n + 3}::bigint[], ${n + 4}::bool[])
                      b (column_name, range_start, range_end, valid) on b.column_name = o.column_name
            where o.id = k.id and k.chunk_id = (select id from _timescaledb_catalog.chunk where {where})""",
        *arguments,
        [each.column for each in bounds],
        [each.start for each in bounds],
        [each.end for each in bounds],
        [each.is_valid for each in bounds],
    )


async def _has_column_bounds(connection: asyncpg.Connection) -> bool:
    return bool(await connection.fetchval("select to_regclass('_timescaledb_catalog.chunk_column_stats') is not null"))


async def _where_chunk(connection: asyncpg.Connection, name: QualifiedName) -> tuple[str, tuple[str, ...]]:
    columns = await _read_columns(connection)
    if "chunk.relid" in columns:
        return "relid = to_regclass($1)", (name.sql,)
    return "schema_name = $1 and table_name = $2", (name.schema, name.name)


async def chunk_range(connection: asyncpg.Connection, chunk: int) -> str | None:
    """Give the condition that holds for the rows of a chunk alone; None where it is gone."""
    query = f"select ({_range(await _read_columns(connection))}) from pg_class c where c.oid = $1"
    condition: str | None = await connection.fetchval(query, chunk)
    return condition


async def chunk_ranges(connection: asyncpg.Connection, chunks: list[int]) -> dict[int, str]:
    """Give the conditions of those of the chunks that are there, by oid, as `read_layout` does."""
    query = f"select c.oid, ({_range(await _read_columns(connection))}) as range from pg_class c where c.oid = any($1::oid[])"
    return {row["oid"]: row["range"] or "true" for row in await connection.fetch(query, chunks)}
