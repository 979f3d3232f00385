"""What the target's tables look like to the stream: columns, keys and how they compare, and what the copy already holds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import asyncpg

from live_migration.common.catalog import BINARY_SAFE_TYPES, ColumnInfo, read_columns
from live_migration.common.errors import LaneStopped
from live_migration.common.home import Home
from live_migration.common.lanes import BYTEWISE_TYPES
from live_migration.common.relation import (
    FIXED_OIDS,
    TIMESTAMPS,
    Column,
    QualifiedName,
    Relation,
    ReplicaIdentity,
    quote_identifier,
)
from live_migration.common.visibility import EVERYTHING, CopySnapshot
from live_migration.consumer.hypertables import HypertableInfo, read_hypertable
from live_migration.consumer.type_modifiers import may_lose

FOLDABLE_TYPES = BYTEWISE_TYPES
"""Built-in types whose values are equal exactly when their bytes are (text ones under a deterministic collation); enums too."""


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """A column that identifies rows. `index`: in the stream's columns; `equals`: the operator, schema-qualified."""

    index: int
    name: str
    equals: str
    is_foldable: bool


@dataclass(frozen=True, slots=True)
class TargetTable:
    """A table as the applier needs it. `columns` are those of the stream, in its order, as they are on the target; none is generated there.

    `key` is empty where rows have no identity but themselves.
    """

    source_oid: int
    name: QualifiedName
    relation: Relation
    columns: tuple[ColumnInfo, ...]
    key: tuple[KeyColumn, ...]
    is_full: bool
    has_other_unique: bool
    is_deferrable: bool
    is_ordinary: bool
    hypertable: HypertableInfo | None = None
    is_key_indexed: bool = False
    """Whether a unique index has the key's columns and no others."""

    @property
    def sql(self) -> str:
        """The table's name in a statement that must not touch its inheritance children, unless those are what it consists of."""
        return f"only {self.name.sql}" if self.is_ordinary and self.hypertable is None else self.name.sql

    def takes_rows_of(self, other: TargetTable) -> bool:
        """Tell whether another relation's rows go into the same table by the same statements, as those of two chunks do."""
        if self is other or self.name != other.name:
            return self is other
        relation = replace(self.relation, oid=other.source_oid, name=other.relation.name)
        alike = replace(self, source_oid=other.source_oid, relation=relation)
        return self.source_oid != other.source_oid and alike == other

    @property
    def is_foldable(self) -> bool:
        """Whether changes may be folded by the bytes of their key."""
        return bool(self.key) and all(column.is_foldable for column in self.key)

    @property
    def has_always_identity(self) -> bool:
        """Whether a column beside the key is GENERATED ALWAYS AS IDENTITY: no UPDATE assigns it."""
        keys = {column.index for column in self.key}
        return any(column.identity == "a" and i not in keys for i, column in enumerate(self.columns))


_TABLE = """
    select coalesce(t.root_schema, t.schema_name) as schema_name, coalesce(t.root_name, t.table_name) as table_name,
           t.lane, t.lanes, t.is_left_out, t.is_passed_over and t.copy_again as is_passed_over, t.snapshot, t.horizon - '0/0'::pg_lsn as horizon, c.oid, c.relkind::text as kind,
           to_regclass('_timescaledb_catalog.dimension') is not null as has_timescale,
           coalesce((select binary_stream from _live_migration.migration), false) as is_binary,
           t.rebuild is not null and t.kind <> 'chunk'
               or exists (select from _live_migration.tables h where h.oid = t.hypertable_oid and h.rebuild is not null) as is_due
    from _live_migration.tables t
    left join pg_namespace n on n.nspname = coalesce(t.root_schema, t.schema_name)
    left join pg_class c on c.relnamespace = n.oid and c.relname = coalesce(t.root_name, t.table_name)
    where {}
"""
_BY_OID = _TABLE.format("t.oid = $1")
_BY_NAME = _TABLE.format("t.kind = $1 and t.schema_name = $2 and t.table_name = $3")

# each unique index of a table, with its columns' numbers, whether it may identify rows, and the equality operator of each column
_UNIQUE_INDEXES = """
    select i.indexrelid, i.indisprimary as is_primary, not i.indimmediate as is_deferrable, i.indisexclusion as is_exclusion,
           i.indimmediate and i.indisunique and i.indpred is null and i.indexprs is null
               and not exists (select from unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) k
                               join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k where not a.attnotnull) as is_identity,
           array(select a.attname::text from unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) with ordinality k(attnum, n)
                 join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum order by k.n) as columns,
           array(select format('operator(%I.%s)', s.nspname, o.oprname)
                 from unnest((i.indclass::oid[])[0:i.indnkeyatts - 1]) with ordinality k(opclass, n)
                 join pg_opclass p on p.oid = k.opclass and p.opcmethod = (select oid from pg_am where amname = 'btree')
                 join pg_amop m on m.amopfamily = p.opcfamily and m.amoplefttype = p.opcintype
                     and m.amoprighttype = p.opcintype and m.amopstrategy = 3
                 join pg_operator o on o.oid = m.amopopr join pg_namespace s on s.oid = o.oprnamespace
                 order by k.n) as operators
    from pg_index i join pg_class c on c.oid = i.indexrelid join pg_am a on a.oid = c.relam
    where i.indrelid = $1 and (i.indisunique or i.indisexclusion) and i.indisvalid
    order by i.indisprimary desc, i.indnkeyatts, i.indexrelid
"""

# default btree equality of columns' types, for keys that no unique index of the target covers
_TYPE_OPERATORS = """
    select a.attname::text as name, format('operator(%I.%s)', s.nspname, o.oprname) as operator
    from pg_attribute a
    join pg_type t on t.oid = a.atttypid
    join pg_opclass p on p.opcdefault and p.opcmethod = (select oid from pg_am where amname = 'btree')
        and p.opcintype = case when t.typtype = 'e' then 'anyenum'::regtype when t.typtype = 'r' then 'anyrange'::regtype
                               when t.typcategory = 'A' then 'anyarray'::regtype when t.typtype = 'c' then 'record'::regtype
                               when a.atttypid = 'varchar'::regtype then 'text'::regtype
                               when t.typtype = 'd' then t.typbasetype else a.atttypid end
    join pg_amop m on m.amopfamily = p.opcfamily and m.amoplefttype = p.opcintype and m.amoprighttype = p.opcintype and m.amopstrategy = 3
    join pg_operator o on o.oid = m.amopopr join pg_namespace s on s.oid = o.oprnamespace
    where a.attrelid = $1 and a.attname = any($2::text[])
"""

_FOLDABLE = """
    select a.attname::text as name,
           (a.atttypid = any($3::oid[]) or t.typtype = 'e') and coalesce(l.collisdeterministic, true) as foldable
    from pg_attribute a join pg_type t on t.oid = a.atttypid left join pg_collation l on l.oid = a.attcollation
    where a.attrelid = $1 and a.attname = any($2::text[])
"""


class RelationRefused(LaneStopped):
    """The target cannot take a relation's rows. Changes that the table's copy holds already (`snapshot`) do not matter."""

    def __init__(self, refusal: LaneStopped, relation: Relation, snapshot: CopySnapshot | None) -> None:
        super().__init__(refusal.message, hint=refusal.hint)
        self.relation = relation
        self.snapshot = snapshot


class ChunkChangedUnseen(RelationRefused):
    """Rows of a chunk changed on the source in a way that the stream does not tell: the chunk must be copied anew."""

    def __init__(self, home: Home, relation: Relation, snapshot: CopySnapshot | None) -> None:
        message = f"compressed rows of chunk {home.chunk} of {home.hypertable} changed on the source unseen"
        super().__init__(LaneStopped(message, hint="The chunk is copied again."), relation, snapshot)
        self.home = home
        self.is_undone = False
        """Whether what came before it, a TRUNCATE perhaps, is applied again behind it: the target transaction was not at its end."""


class RebuildFirst(RelationRefused):
    """A newcomer whose rows the lane copies before it applies a change that `snapshot`, which the copy's will include, does not show."""

    def __init__(self, relation: Relation, snapshot: CopySnapshot | None) -> None:
        message = f"{relation.name} was made on the source after the plan and is copied first"
        super().__init__(LaneStopped(message, hint="The lane goes on by itself."), relation, snapshot)


class NotPlanned(LaneStopped):
    """A relation is in the stream and not in the plan: it was made since, and may be gone again."""

    def __init__(self, message: str, relation: Relation, home: Home | None) -> None:
        super().__init__(
            message,
            hint="It was made after the migration was planned; the coordinator brings it to the target, then the lane goes on. "
            "Where it says that it cannot: see why there, or drop it on the source.",
        )
        self.relation = relation
        self.home = home


class Resolution(NamedTuple):
    """The target's table of a relation, and what the relation's copy holds already. Chunks that are alike share one table."""

    table: TargetTable
    snapshot: CopySnapshot | None


class TargetTables:
    """Looks the tables of one lane up.

    `meet`: told the oid and home of a chunk that has no row in the plan, which it may give it.
    """

    def __init__(
        self, connection: asyncpg.Connection, lane: int, meet: Callable[[int, Home], Awaitable[None]] | None = None
    ) -> None:
        self._connection = connection
        self._lane = lane
        self._meet = meet
        self._shared: dict[tuple[int, ReplicaIdentity, tuple[Column, ...]], TargetTable] = {}

    async def resolve(self, relation: Relation, home: Home | None = None) -> Resolution:
        """Give the target's table for a source relation; for a chunk the hypertable that it belongs to (`home`).

        Raises:
            NotPlanned: the relation is not part of the migration.
            RelationRefused: the target cannot take its rows.
            RebuildFirst: its rows are to be copied first.
            ChunkChangedUnseen: it holds compressed rows.
        """
        row = await self._find(relation, home)
        if row is None:
            message = (
                f"relation {relation.name} (oid {relation.oid}) is in the stream but not part of the migration yet"
            )
            raise NotPlanned(message, relation, home)
        if row["is_left_out"]:
            name = home.hypertable if home else relation.name
            raise RelationRefused(LaneStopped(f"{name} is not carried over to the target"), relation, EVERYTHING)
        if row["is_passed_over"]:
            raise RelationRefused(
                LaneStopped(f"{relation.name} is copied once more at the cutover"), relation, EVERYTHING
            )
        snapshot = CopySnapshot.parse(row["snapshot"], int(row["horizon"])) if row["snapshot"] else None
        if row["is_due"]:
            raise RebuildFirst(relation, snapshot)
        if home is not None and home.is_compressed:
            raise ChunkChangedUnseen(home, relation, snapshot)
        try:
            if home is None:
                return Resolution(await self._describe(relation, row), snapshot)
            return Resolution(await self._describe_chunk(relation, row), snapshot)
        except LaneStopped as refusal:
            raise RelationRefused(refusal, relation, snapshot) from refusal

    async def _describe_chunk(self, relation: Relation, row: asyncpg.Record) -> TargetTable:
        """Describe the hypertable that takes a chunk's rows: once for all chunks whose rows look alike."""
        alike = (row["oid"] or 0, relation.identity, relation.columns)
        if alike not in self._shared:
            self._shared[alike] = await self._describe(relation, row)
        return self._shared[alike]

    async def _find(self, relation: Relation, home: Home | None) -> asyncpg.Record | None:
        """Give a relation's row of the plan. A chunk without one was made after the plan, or was gone before it.

        It has the snapshot of its hypertable then, which is the plan's: what that shows of a chunk that was gone is nothing.
        """
        if home is None:
            return await self._connection.fetchrow(_BY_OID, relation.oid)
        if home.is_compressed:
            row = await self._connection.fetchrow(_BY_NAME, "chunk", home.chunk.schema, home.chunk.name)
        else:
            row = await self._connection.fetchrow(_BY_OID, relation.oid)
            if row is None and self._meet is not None:
                await self._meet(relation.oid, home)
                row = await self._connection.fetchrow(_BY_OID, relation.oid)
        if row is None:
            row = await self._connection.fetchrow(_BY_NAME, "hypertable", home.hypertable.schema, home.hypertable.name)
        if row is None:
            message = f"hypertable {home.hypertable} is in the stream but not part of the migration yet"
            raise NotPlanned(message, relation, home)
        return row

    async def _describe(self, relation: Relation, row: asyncpg.Record) -> TargetTable:
        name = QualifiedName(row["schema_name"], row["table_name"])
        if not row["lane"] <= self._lane < row["lane"] + row["lanes"]:
            raise LaneStopped(
                f"table {name} was renamed to {relation.name} on the source: from then on its changes stand in lane {self._lane}, "
                f"those before in lane {row['lane']}, and their order is lost",
                hint="Run `live-migration clean` and start again; rename no table while it is migrated.",
            )
        if row["oid"] is None:
            raise LaneStopped(
                f"table {name} does not exist on the target", hint="Restore it there; the lane then goes on by itself."
            )
        if row["is_binary"]:
            await self._require_binary_safe(relation)
        on_target = (await read_columns(self._connection, [row["oid"]])).get(row["oid"], ())
        columns = await self._match_columns(relation, name, on_target)
        indexes = await self._connection.fetch(_UNIQUE_INDEXES, row["oid"])
        key_names = _key_names(relation, indexes)
        table = TargetTable(
            relation.oid,
            name,
            relation,
            columns,
            await self._key(relation, row["oid"], key_names, indexes),
            relation.identity is ReplicaIdentity.FULL,
            any(set(index["columns"]) != set(key_names) or not index["is_identity"] for index in indexes),
            any(index["is_deferrable"] for index in indexes),
            row["kind"] == "r",
            await read_hypertable(self._connection, row["oid"], name, on_target) if row["has_timescale"] else None,
            any(
                index["is_identity"] and not index["is_exclusion"] and set(index["columns"]) == set(key_names)
                for index in indexes
            ),
        )
        if row["lanes"] > 1 and key_names and not table.is_full:  # else one lane takes all of its rows
            _require_order_per_key(table, row["lanes"])
        return table

    async def _require_binary_safe(self, relation: Relation) -> None:
        """Refuse a column that came after the form of the stream was chosen, whose values in it mean another thing here, as oids do."""
        columns = [column for column in relation.columns if column.type_oid not in BINARY_SAFE_TYPES]
        if not columns:
            return
        types = await self._type_names([(column.type_oid, column.type_modifier) for column in columns])
        found = ", ".join(f"{column.name} ({kind})" for column, kind in zip(columns, types, strict=True))
        raise LaneStopped(
            f"the source's table {relation.name} has columns that the stream cannot carry in the binary form that its tables allowed at the "
            f"start: {found}",
            hint="Run `live-migration migrate --recopy`: it copies every table again, and chooses the text form.",
        )

    async def _match_columns(
        self, relation: Relation, name: QualifiedName, on_target: Sequence[ColumnInfo]
    ) -> tuple[ColumnInfo, ...]:
        found = {column.name: column for column in on_target}
        missing = [column for column in relation.columns if column.name not in found]
        if missing:
            types = await self._type_names([(column.type_oid, column.type_modifier) for column in missing])
            adds = ", ".join(f"ADD COLUMN {quote_identifier(c.name)} {t}" for c, t in zip(missing, types, strict=True))
            here = {column.name for column in relation.columns}
            gone = [column for column in found.values() if column.name not in here and not column.generated]
            renames = (
                f" A column that was only renamed ({', '.join(c.name for c in gone)}?): RENAME COLUMN." if gone else ""
            )
            raise LaneStopped(
                f"the source's table {relation.name} has columns that the target's lacks: {', '.join(c.name for c in missing)}",
                hint="Mend the target as the source was altered, the lane then goes on by itself. New columns, with the source's "
                f"defaults, which the stream does not tell: ALTER TABLE {name.sql} {adds};{renames}",
            )
        for column in relation.columns:
            target = found[column.name]
            if _has_other_type(column, target):
                (type_name,) = await self._type_names([(column.type_oid, column.type_modifier)])
                quoted = quote_identifier(column.name)
                # On the source that writes nothing anew in a session in UTC; where another's zone counted, the table is copied once more.
                is_zoned = column.type_oid != target.type_oid and {column.type_oid, target.type_oid} <= TIMESTAMPS
                using = f" USING {quoted} AT TIME ZONE 'UTC'" if is_zoned else ""
                alter = f"ALTER TABLE {name.sql} ALTER COLUMN {quoted} TYPE {type_name}{using};"
                raise LaneStopped(
                    f"column {column.name} of {relation.name} is {type_name} on the source and {target.type} on the target",
                    hint=f"Mend the target, the lane then goes on by itself: {alter}",
                )
            # The stream brings no generated column: this one's values are given on the source now.
            if target.generated:
                raise _generated_here(relation, name, target)
        return tuple(found[column.name] for column in relation.columns)

    async def _type_names(self, types: Sequence[tuple[int, int]]) -> list[str]:
        """Name types by the source's oids; user-defined ones, whose oids mean nothing here, are left to the reader."""
        names = []
        for oid, modifier in types:
            name = (
                await self._connection.fetchval("select format_type($1::oid, $2::int)", oid, modifier)
                if oid < FIXED_OIDS
                else None
            )
            names.append(name or "<its type on the source>")
        return names

    async def _key(
        self, relation: Relation, oid: int, names: Sequence[str], indexes: Sequence[asyncpg.Record]
    ) -> tuple[KeyColumn, ...]:
        if not names:
            return ()
        operators = await self._operators(oid, names, indexes)
        rows = await self._connection.fetch(_FOLDABLE, oid, list(names), list(FOLDABLE_TYPES))
        foldable = {row["name"]: row["foldable"] for row in rows}
        positions = {column.name: i for i, column in enumerate(relation.columns)}
        return tuple(KeyColumn(positions[name], name, operators[name], foldable[name]) for name in names)

    async def _operators(self, oid: int, names: Sequence[str], indexes: Sequence[asyncpg.Record]) -> dict[str, str]:
        for index in indexes:
            if set(index["columns"]) == set(names) and len(index["operators"]) == len(index["columns"]):
                return dict(zip(index["columns"], index["operators"], strict=True))
        rows = await self._connection.fetch(_TYPE_OPERATORS, oid, list(names))
        operators = {row["name"]: row["operator"] for row in rows}
        if lacking := [name for name in names if name not in operators]:
            raise LaneStopped(
                f"key columns {', '.join(lacking)} of relation oid {oid} have no equality on the target",
                hint="Give the target's table a unique index over the replica identity's columns.",
            )
        return operators


def _has_other_type(column: Column, target: ColumnInfo) -> bool:
    """Tell whether the target's type is another, or may lose something of the source's values.

    One that was made wider before the source's takes them all. Of types that both are user-defined nothing is told here: a domain
    may be exchanged for another, upon which the coordinator has the table copied once more.
    """
    if min(column.type_oid, target.type_oid) < FIXED_OIDS and column.type_oid != target.type_oid:
        return True
    return may_lose(column.type_oid, column.type_modifier, target.type_modifier)


def _generated_here(relation: Relation, name: QualifiedName, column: ColumnInfo) -> LaneStopped:
    quoted = quote_identifier(column.name)
    return LaneStopped(
        f"column {column.name} of {relation.name} is generated on the target only",
        hint="Mend the target as the source was altered, the lane then goes on by itself: "
        f"ALTER TABLE {name.sql} ALTER COLUMN {quoted} DROP EXPRESSION; or, where it was dropped and added anew, "
        f"ALTER TABLE {name.sql} DROP COLUMN {quoted}, ADD COLUMN {quoted} {column.type};",
    )


def _require_order_per_key(table: TargetTable, lane_count: int) -> None:
    """Raise LaneStopped where rows of a table that has several lanes are tied together by more than their key."""
    if table.has_other_unique or table.is_deferrable or table.hypertable is not None:
        raise LaneStopped(
            f"table {table.name} has {lane_count} lanes, in which only the order of each key's changes holds, but on the target more "
            "than its key ties rows together: another unique index, an exclusion constraint, a deferrable key, or it is a hypertable",
            hint="Drop that index or constraint on the target (make it again after the cutover); the lanes then go on by themselves.",
        )


def _key_names(relation: Relation, indexes: Sequence[asyncpg.Record]) -> tuple[str, ...]:
    """Give the columns that identify a row: the replica identity's, or under FULL those of a unique index of the target's."""
    if relation.identity is not ReplicaIdentity.FULL:
        return tuple(column.name for column in relation.columns if column.is_key)
    names = {column.name for column in relation.columns}
    for index in indexes:
        if index["is_identity"] and not index["is_exclusion"] and index["columns"] and set(index["columns"]) <= names:
            return tuple(index["columns"])
    return ()
