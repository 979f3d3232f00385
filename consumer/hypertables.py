"""What of a hypertable on the target decides how its rows are changed: dimensions, unique indexes, compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from live_migration.common.catalog import ColumnInfo
from live_migration.common.errors import TargetError
from live_migration.common.relation import QualifiedName

INTEGER_TYPES = frozenset({20, 21, 23})
TIME_TYPES = frozenset({1082, 1114, 1184})


@dataclass(frozen=True, slots=True)
class HypertableInfo:
    """A hypertable of the target.

    `time_column`: that of its first open dimension; None where chunks are made by what a function makes of it. `interval`: of a
    chunk; in microseconds, for a column of integers in their unit. `fixed`: columns that no UPDATE assigns, for it would be refused: those of dimensions
    (the row would leave its chunk) and of unique indexes (a row in a compressed batch may be in the way), identity columns
    GENERATED ALWAYS. `segment_by`: compressed batches hold one value each of these. `stored`: all columns but generated ones,
    those too that the stream lacks.
    """

    id: int
    time_column: str | None
    time_type_oid: int
    interval: int
    fixed: frozenset[str]
    segment_by: tuple[str, ...]
    stored: tuple[ColumnInfo, ...]
    is_materialization: bool
    """Whether it holds the rows of a continuous aggregate: it takes no TRUNCATE."""


_DIMENSIONS = """
    select h.id, d.column_name::text as column, d.column_type::oid as type_oid, d.interval_length as interval,
           d.partitioning_func is not null as is_computed,
           exists (select from _timescaledb_catalog.continuous_agg a where a.mat_hypertable_id = h.id) as is_materialization
    from _timescaledb_catalog.hypertable h join _timescaledb_catalog.dimension d on d.hypertable_id = h.id
    where h.schema_name = $1 and h.table_name = $2
    order by d.interval_length is null, d.id
"""

# columns that unique indexes and exclusion constraints look at: as keys, in expressions, in predicates
_UNIQUE_COLUMNS = """
    select distinct a.attname::text from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum > 0
    where i.indrelid = $1 and (i.indisunique or i.indisexclusion)
      and (a.attnum = any(i.indkey) or exists (
          select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = i.indexrelid
              and d.refclassid = 'pg_class'::regclass and d.refobjid = i.indrelid and d.refobjsubid = a.attnum))
"""

_SEGMENT_BY = "select segmentby from _timescaledb_catalog.compression_settings where relid = $1::oid::regclass"

_SETTINGS = """
    select string_agg(format('set local %s = %s', name, value), '; ') from pg_settings join (values
        ('timescaledb.max_tuples_decompressed_per_dml_transaction', '0'),
        ('timescaledb.enable_dml_decompression', 'on'),
        ('timescaledb.enable_compressed_direct_batch_delete', 'off'),
        ('timescaledb.enable_direct_compress_copy', 'off'),
        ('timescaledb.enable_direct_compress_insert', 'off')
    ) wanted (name, value) using (name)
"""


# Of a database that is in restoring mode no session is asked to leave it.
_IS_STRANDED = """
    select coalesce(current_setting('timescaledb.restoring', true), 'off') in ('on', 'true', 'yes', '1') and not exists (
        select from pg_db_role_setting s where s.setdatabase = (select oid from pg_database where datname = current_database())
            and s.setrole = 0 and array_to_string(s.setconfig, ' ') like '%timescaledb.restoring=%')
"""


async def session_settings(connection: asyncpg.Connection) -> str:
    """Give statements that let a transaction change any number of rows in compressed chunks, each counted; empty without TimescaleDB.

    Raises:
        TargetError: the session is in restoring mode, and our role may not leave it.
    """
    await leave_restoring(connection)
    return await connection.fetchval(_SETTINGS) or ""


async def leave_restoring(connection: asyncpg.Connection) -> None:
    """Leave the restoring mode that the database has left: a session that began in it, one that a pooler keeps, say, would keep it.

    Its rows would lie in the hypertable itself, where nobody else sees them.

    Raises:
        TargetError: our role may not have it so.
    """
    if not await connection.fetchval(_IS_STRANDED):
        return
    try:
        await connection.execute("set timescaledb.restoring = off")
    except asyncpg.InsufficientPrivilegeError as error:
        raise TargetError(
            "a session of ours began in TimescaleDB's restoring mode, and its role may not leave it",
            hint="Close the pooler's connections to the target's database, or GRANT SET ON PARAMETER timescaledb.restoring.",
        ) from error


async def read_hypertable(
    connection: asyncpg.Connection, oid: int, name: QualifiedName, columns: Sequence[ColumnInfo]
) -> HypertableInfo | None:
    """Give what is known of a table on a server with TimescaleDB; None where it is no hypertable."""
    dimensions = await connection.fetch(_DIMENSIONS, name.schema, name.name)
    if not dimensions:
        return None
    unique = await connection.fetch(_UNIQUE_COLUMNS, oid)
    first = dimensions[0]
    return HypertableInfo(
        id=first["id"],
        time_column=None if first["is_computed"] or first["interval"] is None else first["column"],
        time_type_oid=first["type_oid"],
        interval=first["interval"] or 1,
        fixed=frozenset([row["column"] for row in dimensions])
        | frozenset([row[0] for row in unique])
        | frozenset([column.name for column in columns if column.identity == "a"]),
        segment_by=tuple(await connection.fetchval(_SEGMENT_BY, oid) or ()),
        stored=tuple(column for column in columns if not column.generated),
        is_materialization=first["is_materialization"],
    )
