"""A table as the source shows it under our lock: lock first, then the snapshot, then a look at its shape and size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import asyncpg

from live_migration.common.catalog import CURRENT_TIMELINE, ColumnInfo
from live_migration.common.postgres import set_lock_timeout, terminate_backend
from live_migration.common.relation import QualifiedName, quote_literal
from live_migration.common.rewriting import FILE_MARK
from live_migration.consumer.claim_endings import CopyOrigin, copying_backends
from live_migration.consumer.claims import PartClaim, TableClaim
from live_migration.consumer.copy_errors import AttemptOver, CopyDeferred, TableStopped, server_errors
from live_migration.consumer.copy_stream import CopyPlan
from live_migration.consumer.parts import BlockRange, plan_parts
from live_migration.consumer.table_shape import (
    ColumnDefinition,
    copied_columns,
    find_differences,
    mending_statements,
    travels_binary,
)

_NAME = """
    select n.nspname, c.relname, c.relkind::text from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = $1
"""

MOMENT = f"select pg_current_snapshot()::text as snapshot, pg_current_wal_insert_lsn() as horizon, {CURRENT_TIMELINE} as timeline"
"""To be the first query after LOCK TABLE: it takes the transaction's snapshot, and only then is the insert position read."""
_UNDER_LOCK = f"""
    {MOMENT},
           exists (select from pg_locks l
                   where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.granted and l.mode in ('AccessShareLock', 'ShareUpdateExclusiveLock')
                     and l.relation = $1 and l.database = (select d.oid from pg_database d where d.datname = current_database())
                  ) as is_locked,
           (select pg_relation_size(c.oid) from pg_class c where c.oid = $1) as size_bytes,
           (select m.amname = 'heap' from pg_class c join pg_am m on m.oid = c.relam where c.oid = $1) as is_heap,
           current_setting('block_size')::int as block_size,
           (select {FILE_MARK} from pg_class c where c.oid = $1) as file_mark
"""

_DEFINITIONS = """
    select a.attrelid as relation, a.attname as name, format_type(a.atttypid, a.atttypmod) as type, a.atttypid as type_oid,
           a.attgenerated::text as generated, a.attidentity::text as identity, a.attnotnull as not_null,
           case when a.attcollation <> t.typcollation and c.oid is not null
                then quote_ident(n.nspname) || '.' || quote_ident(c.collname) else '' end as collation,
           coalesce(pg_get_expr(d.adbin, d.adrelid), '') as expression, a.attinhcount > 0 as is_inherited
    from pg_attribute a join pg_type t on t.oid = a.atttypid
    left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
    left join pg_collation c on c.oid = a.attcollation left join pg_namespace n on n.oid = c.collnamespace
    where a.attrelid = any($1::oid[]) and a.attnum > 0 and not a.attisdropped
    order by a.attrelid, a.attnum
"""

_TARGET = """
    with recursive ancestors as (
        select to_regclass($1)::oid as oid, 0 as height
        union all
        select i.inhparent, a.height + 1 from ancestors a join pg_inherits i on i.inhrelid = a.oid and i.inhseqno = 1
    )
    select c.oid, c.relkind::text as kind, n.nspname as root_schema, r.relname as root_name
    from pg_class c, ancestors a join pg_class r on r.oid = a.oid join pg_namespace n on n.oid = r.relnamespace
    where c.oid = to_regclass($1)::oid
    order by a.height desc limit 1
"""


LockMode = Literal["access share", "share update exclusive"]


class ChunkGone(CopyDeferred):
    """A chunk was dropped on the source, by its retention policy or by hand: there is nothing to copy."""


@dataclass(frozen=True, slots=True)
class LockedTable:
    """A table on the source as seen under our lock, by the transaction that is to copy it."""

    name: QualifiedName
    snapshot: str
    horizon: int
    timeline: int
    size_bytes: int
    is_heap: bool
    block_size: int
    file_mark: str | None
    columns: tuple[ColumnDefinition, ...]

    def parts(self, part_size: int) -> tuple[BlockRange, ...]:
        """Cut the table into ranges of blocks; only a heap has blocks that can be asked for."""
        return plan_parts(self.size_bytes, part_size if self.is_heap else max(self.size_bytes, 1), self.block_size)


async def lock_table(
    connection: asyncpg.Connection, claim: TableClaim, lock_timeout: float, *, tree: Sequence[str] | None = None
) -> LockedTable:
    """Begin a transaction that holds the table's lock and, taken after it, a snapshot; then describe the table.

    `tree`: its children are locked, too, and these other tables, by their names in SQL. Where rows are compressed the lock is one
    that recompression waits for: once it is done TimescaleDB takes the chunk for fully compressed, whatever our snapshot shows beside
    the compressed rows, and a query leaves those rows out (seen). Nobody's reading and writing waits for it.

    Raises:
        CopyDeferred: somebody holds a conflicting lock.
        TableStopped: the table is not what was planned any more.
    """
    with server_errors("source", f"looking at {claim.name}"):
        _check_name(claim, await connection.fetchrow(_NAME, claim.oid))
    what = f"only {claim.name.sql}" if tree is None else claim.name.sql
    also = [claim.compressed[0]] if claim.compressed else tree or ()
    mode: LockMode = "share update exclusive" if also else "access share"
    await begin_locked(connection, claim.name, lock_timeout, ", only ".join([what, *also]), mode)
    with server_errors("source", f"looking at {claim.name}"):
        seen = await connection.fetchrow(_UNDER_LOCK, claim.oid)
        _check_name(claim, await connection.fetchrow(_NAME, claim.oid))
        if not seen["is_locked"]:
            raise CopyDeferred(f"{claim.name} changed places with another table while it was locked")
        columns = await read_definitions(connection, claim.oid)
    return LockedTable(
        claim.name,
        seen["snapshot"],
        seen["horizon"],
        seen["timeline"],
        seen["size_bytes"],
        seen["is_heap"],
        seen["block_size"],
        seen["file_mark"],
        columns,
    )


async def import_snapshot(connection: asyncpg.Connection, claim: PartClaim, lock_timeout: float) -> None:
    """Begin a transaction that has the holder's snapshot, and the table's lock as well.

    The lock comes first: that the import succeeds, which it does only while the holder's transaction lives, then shows
    that the table was under lock, his and ours, all the time from the snapshot on.

    Raises:
        CopyDeferred: the lock cannot be had just now: somebody waits behind the holder, who will give way if that lasts.
        AttemptOver: the holder is gone.
    """
    await begin_locked(connection, claim.name, lock_timeout)
    try:
        with server_errors("source", f"importing the snapshot of {claim.name}"):
            await connection.execute(f"set transaction snapshot {quote_literal(claim.snapshot_id)}")
            seen = await connection.fetchrow(_UNDER_LOCK, claim.oid)
    except (CopyDeferred, TableStopped) as error:
        raise AttemptOver(f"the snapshot of {claim.name} cannot be had any more: {error.message}") from error
    if not seen["is_locked"]:
        raise AttemptOver(f"{claim.name} changed places with another table while it was copied")
    if seen["snapshot"] != claim.snapshot:  # names begin anew when the server does
        raise AttemptOver(f"the snapshot of {claim.name} is gone: another one bears its name")
    if seen["timeline"] != claim.timeline:  # another server may have a snapshot of the same name
        raise AttemptOver(f"the source failed over while {claim.name} was copied")


async def begin_locked(
    connection: asyncpg.Connection,
    name: QualifiedName,
    lock_timeout: float,
    relations: str = "",
    mode: LockMode = "access share",
) -> None:
    """Begin a transaction that holds the lock of a table, or of `relations` as LOCK TABLE has them; no snapshot is taken yet.

    Raises:
        CopyDeferred: somebody holds a conflicting lock, or there is no such table any more.
    """
    with server_errors("source", f"locking {name}"):
        try:
            await connection.execute(
                "begin isolation level repeatable read read only;"
                f" {set_lock_timeout(lock_timeout)};"
                f" lock table {relations or f'only {name.sql}'} in {mode} mode"
            )
        except asyncpg.UndefinedTableError as error:
            raise CopyDeferred(f"{name} was renamed or dropped on the source just now") from error


def _check_name(claim: TableClaim, row: asyncpg.Record | None) -> None:
    """Raise TableStopped unless the relation with the planned oid is still an ordinary table of the planned name."""
    where = f"table {claim.name} (oid {claim.oid} on the source)"
    if row is None and claim.is_chunk:
        raise ChunkGone(f"chunk {claim.name} was dropped on the source")
    if row is None:
        raise TableStopped(
            f"{where} was dropped on the source",
            hint="A table made anew is another one. Run `live-migration clean` and start the migration again.",
        )
    name = QualifiedName(row["nspname"], row["relname"])
    if name != claim.name:
        raise TableStopped(
            f"{where} is now named {name}",
            hint=f"Give it back its name {claim.name} on the source; the copy then goes on by itself.",
        )
    if row["relkind"] != "r":
        raise TableStopped(f"{where} is not an ordinary table any more", hint="Undo that on the source.")


async def read_definitions(connection: asyncpg.Connection, oid: int) -> tuple[ColumnDefinition, ...]:
    """Give a relation's columns with all that makes them, in attnum order."""
    return (await read_all_definitions(connection, [oid])).get(oid, ())


async def read_all_definitions(
    connection: asyncpg.Connection, oids: Sequence[int]
) -> dict[int, tuple[ColumnDefinition, ...]]:
    """Do the same for several by oid; one without columns is absent."""
    definitions: dict[int, list[ColumnDefinition]] = {}
    for row in await connection.fetch(_DEFINITIONS, oids):
        fields = dict(row)
        relation = fields.pop("relation")
        own = {field: fields.pop(field) for field in ("collation", "expression", "is_inherited")}
        definitions.setdefault(relation, []).append(ColumnDefinition(ColumnInfo(**fields), **own))
    return {oid: tuple(found) for oid, found in definitions.items()}


async def require_known_timeline(connection: asyncpg.Connection, name: QualifiedName, timeline: int) -> None:
    """Compare the timeline that the snapshot of a table was taken on with the one that the coordinator knows.

    A coordinator that follows the source to a new one later ends all attempts that are under way, and looks at the horizons
    of those that are over.

    Raises:
        TableStopped: the source failed over, and the coordinator has not seen it yet; or this is the former primary.
    """
    with server_errors("target", f"looking at {name}"):
        known = await connection.fetchval("select source_timeline from _live_migration.migration")
    if known != timeline:
        raise TableStopped(
            f"source: {name}: the server is on timeline {timeline}, the migration on {known}",
            hint="After a failover `live-migration migrate` follows the source by itself; where this lasts, SOURCE leads a "
            "consumer to another server than the coordinator.",
        )


async def check_target(
    connection: asyncpg.Connection, table: LockedTable, root: QualifiedName | None = None, *, decompresses: bool = False
) -> tuple[CopyPlan, CopyOrigin]:
    """Compare the source's table with the target's as it is now, and give how the rows are to travel.

    With `root` they go through that hypertable, which may have another name; `decompresses`: see CopyPlan.

    Raises:
        TableStopped: the target cannot take the rows; the hint holds the statements that mend it, one a line.
    """
    if root is not None and (decompresses or root != table.name):
        return await _check_root(connection, table, root, decompresses=decompresses)
    with server_errors("target", f"looking at {table.name}"):
        row = await connection.fetchrow(_TARGET, table.name.sql)
        if row is None or row["kind"] != "r":
            what = "there is no such table" if row is None else "it is not an ordinary table"
            raise TableStopped(
                f"target: {table.name}: {what}",
                hint="Make the table there as it is on the source; the copy then begins.",
            )
        target = await read_definitions(connection, row["oid"])
    differences = find_differences(table.columns, target)
    if differences:
        root = QualifiedName(row["root_schema"], row["root_name"])
        statements = mending_statements(table.name.sql, root.sql, table.columns, target)
        raise TableStopped(
            f"{table.name} has another shape on the source than on the target: {'; '.join(differences)}",
            hint="\n".join(["Run this on the target; the copy then goes on by itself:", *statements]),
        )
    return plan_copy(table, target, root)


async def _check_root(
    connection: asyncpg.Connection, table: LockedTable, root: QualifiedName, *, decompresses: bool
) -> tuple[CopyPlan, CopyOrigin]:
    """Do the same for a chunk, whose hypertable alone has a twin on the target."""
    with server_errors("target", f"looking at {root}"):
        oid = await connection.fetchval("select to_regclass($1)::oid", root.sql)
        target = await read_definitions(connection, oid) if oid is not None else ()
    if differences := find_differences(table.columns, _as_null(target, table.columns)):
        raise TableStopped(
            f"{root} has another shape on the source than on the target: {'; '.join(differences)}",
            hint="Mend the target as the source was altered; the chunk is then copied by itself.",
        )
    return plan_copy(table, target, root, decompresses=decompresses)


def _as_null(target: Sequence[ColumnDefinition], source: Sequence[ColumnDefinition]) -> tuple[ColumnDefinition, ...]:
    """Give the target's columns, null where the source's may be: newer releases refuse nulls in an aggregate's time, which has none."""
    may_be_null = {column.name for column in source if not column.info.not_null}
    return tuple(
        replace(column, info=replace(column.info, not_null=column.info.not_null and column.name not in may_be_null))
        for column in target
    )


def plan_copy(
    table: LockedTable,
    target: Sequence[ColumnDefinition],
    root: QualifiedName | None,
    *,
    decompresses: bool = False,
) -> tuple[CopyPlan, CopyOrigin]:
    """Give how a table's rows travel into columns that can take them, and what is kept of it."""
    is_binary = travels_binary(table.columns, target)
    columns = tuple(column.name for column in copied_columns(table.columns))
    origin = CopyOrigin(
        table.snapshot,
        table.horizon,
        table.timeline,
        _columns_json(table.columns),
        is_binary,
        file_mark=table.file_mark,
    )
    return CopyPlan(table.name, columns, is_binary, target=root, decompresses=decompresses), origin


def _columns_json(columns: Sequence[ColumnDefinition]) -> str:
    """Give columns as `_live_migration.tables` keeps them."""
    return json.dumps(
        [{"name": c.info.name, "type": c.info.type, "generated": c.info.generated} for c in columns], ensure_ascii=False
    )


async def end_earlier_parts(connection: asyncpg.Connection, claim: TableClaim) -> None:
    """End the target sessions that still copy parts of an attempt that is over: they keep the table from being emptied."""
    with server_errors("target", f"ending earlier copies of {claim.name}"):
        for backend in await copying_backends(connection, claim.oid):
            await terminate_backend(connection, backend.pid, backend.started)
        await connection.execute("delete from _live_migration.parts where oid = $1", claim.oid)
