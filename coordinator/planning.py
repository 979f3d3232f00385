"""Which table goes into which publication, and how each is carried. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from live_migration.common.catalog import ColumnInfo, TableInfo
from live_migration.common.lanes import LaneMap
from live_migration.common.relation import QualifiedName, ReplicaIdentity

Membership = Literal["all", "insert"]
GENERATED_IN_FULL = 180_000
"""From this version on the source refuses UPDATE and DELETE on a published table that is FULL and has a generated column.

Before it (tried on 14 to 17) they succeed, and the old row in the stream simply lacks the generated columns.
"""


@dataclass(frozen=True, slots=True)
class Memberships:
    """Where each table goes; `unlogged` into no publication."""

    all: tuple[TableInfo, ...]
    insert: tuple[TableInfo, ...]
    unlogged: tuple[TableInfo, ...]


def has_identity(table: TableInfo, source_version: int) -> bool:
    """Tell whether UPDATE and DELETE succeed on the source when the table is published with all operations."""
    if table.identity is ReplicaIdentity.FULL:
        return source_version < GENERATED_IN_FULL or not any(column.generated for column in table.columns)
    return table.identity_index is not None


def may_become_full(table: TableInfo, source_version: int) -> bool:
    """Tell whether REPLICA IDENTITY FULL would let UPDATE and DELETE through, and can be taken back.

    An index that is the identity and holds a generated column would be forgotten by the server.
    """
    if not any(column.generated for column in table.columns):
        return True
    return source_version < GENERATED_IN_FULL and table.identity is not ReplicaIdentity.INDEX


def is_followed(table: TableInfo) -> bool:
    """Tell whether a table's changes are users' own: it is logged, and no inner table of compressed rows."""
    return table.persistence == "p" and (table.is_users or table.part == "chunk")


def assign(tables: Iterable[TableInfo], source_version: int) -> Memberships:
    """Assign tables to the publications; those of compressed rows are published apart."""
    logged = [table for table in tables if is_followed(table)]
    return Memberships(
        tuple(table for table in logged if has_identity(table, source_version)),
        tuple(table for table in logged if not has_identity(table, source_version)),
        tuple(table for table in tables if table.persistence == "u" and table.is_users),
    )


def columns_json(columns: Iterable[ColumnInfo]) -> str:
    """Give columns as the state keeps them."""
    return json.dumps([{"name": c.name, "type": c.type, "generated": c.generated} for c in columns])


@dataclass(frozen=True, slots=True)
class Moment:
    """The snapshot that a plan is of, where the WAL then ended, the timeline, and which statistics the source then counted in."""

    snapshot: str
    horizon: int
    timeline: int
    statistics: str | None


def table_row(
    table: TableInfo,
    lanes: LaneMap,
    membership: Membership,
    others: Mapping[int, TableInfo],
    moment: Moment,
    made: Collection[QualifiedName] | None = None,
    *,
    is_left_out: bool = False,
) -> tuple[object, ...]:
    """Give a table's row for `_live_migration.tables`: the values of `TABLE_COLUMNS`.

    Args:
        table: to be followed.
        lanes: of the change log.
        membership: its publication.
        others: all tables of the plan by oid, for what a chunk belongs to.
        moment: of the plan. A hypertable has no rows to copy, its snapshot says which chunks were gone by then.
        made: names of the hypertables that are made anew on the target, for rows to be copied through them; None where none is.
        is_left_out: the target does not get it, nor its chunks; their changes are passed over.
    """
    is_root = table.part == "hypertable"
    becomes_root = made is not None and table.part == "table" and table.name in made
    root = others.get(table.hypertable or 0, table if is_root or becomes_root else None)
    compressed = others.get(table.compressed or 0)
    own = lanes.lanes_of(root.name if root else table.name)
    return (
        table.oid,
        table.name.schema,
        table.name.name,
        own[0],
        len(own),
        membership,
        columns_json(table.columns),
        table.is_binary_safe,
        table.row_estimate,
        table.size_bytes + (compressed.size_bytes if compressed else 0),
        table.changed_row_count,
        table.part,
        table.hypertable,
        compressed.oid if compressed else None,
        compressed.name.sql if compressed else None,
        table.range,
        root.name.schema if root else None,
        root.name.name if root else None,
        made is not None and (becomes_root or table.part == "chunk"),
        "copied" if is_root else "planned",
        moment.snapshot if is_root else None,
        moment.horizon if is_root else None,
        moment.timeline if is_root else None,
        is_left_out,
        moment.statistics,
        table.file_mark,
    )


TABLE_COLUMNS = (
    "oid", "schema_name", "table_name", "lane", "lanes", "publication", "columns", "binary_copy", "row_estimate", "size_bytes",
    "changed_row_count", "kind", "hypertable_oid", "compressed_oid", "compressed_name", "range", "root_schema", "root_name",
    "copies_to_root", "state", "snapshot", "horizon", "timeline", "is_left_out",
    "statistics", "file_mark",
)  # fmt: skip
