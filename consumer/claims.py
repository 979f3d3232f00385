"""Claims on tables, parts and indexes: who may work on what.

A claim is a lease, not a lock (DESIGN.md, section 2): it names owner and backends, and holds until `lease_until` unless it is renewed
(`live_migration.consumer.lease_keeper`); `live_migration.consumer.claim_endings` ends it.

What a claimer finds free is claimed in one statement; claims that ran out are freed by the keeper, which first ends their backends.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import asyncpg

from live_migration.common.relation import QualifiedName
from live_migration.consumer.copy_stream import CopyPlan
from live_migration.consumer.parts import BlockRange
from live_migration.consumer.sessions import Backend

"""Advisory lock: indexes are claimed one after another, as the rule for one table's looks at several rows."""


@dataclass(frozen=True, slots=True)
class TableClaim:
    """A table to be copied from its beginning. `has_parts`: of an earlier attempt.

    `is_chunk`: of a hypertable; `compressed`: name in SQL and oid of the table that held its compressed rows when it was planned.
    `root`: the target's hypertable that the rows are copied through, None where they go into a table of the same name; `range`: condition
    that holds for a chunk's rows alone. `is_into_plain`: the root is a plain table, which keeps no chunks apart.
    """

    oid: int
    name: QualifiedName
    attempt: int
    has_parts: bool
    is_chunk: bool = False
    compressed: tuple[str, int] | None = None
    root: QualifiedName | None = None
    range: str | None = None
    is_into_plain: bool = False

    def __str__(self) -> str:
        return str(self.name)


@dataclass(frozen=True, slots=True)
class PartClaim:
    """A part of a table whose snapshot somebody holds."""

    oid: int
    name: QualifiedName
    attempt: int
    part: int
    blocks: BlockRange
    snapshot_id: str
    plan: CopyPlan
    timeline: int
    snapshot: str

    def __str__(self) -> str:
        return f"{self.name}, part {self.part}"


@dataclass(frozen=True, slots=True)
class IndexClaim:
    """An index or constraint to be made."""

    oid: int
    table_oid: int
    table: QualifiedName
    name: str
    statements: tuple[str, ...]

    def __str__(self) -> str:
        return f"index {self.name} of {self.table}"


Claim = TableClaim | PartClaim | IndexClaim


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who claims: the consumer, the backends that will do the work, and for how long."""

    owner: str
    target: Backend
    source: Backend | None
    lease: float


_LEASE = (
    """owner = $1, backend_pid = $2, backend_start = $3, lease_until = clock_timestamp() + make_interval(secs => $4)"""
)
_SOURCE = "source_pid = $5, source_start = $6"

_BEGIN_ATTEMPT = f"""
    update _live_migration.tables t
    set state = 'copying', attempt = attempt + 1, snapshot_id = null, snapshot = null, horizon = null, timeline = null, row_count = 0, byte_count = 0,
        started_at = clock_timestamp(), copied_at = null, retry_at = null, {_LEASE}, {_SOURCE}
    from candidate c where t.oid = c.oid
    returning t.oid, schema_name, table_name, attempt, kind, compressed_oid, compressed_name, range, copies_to_root, root_schema, root_name,
              exists (select from _live_migration.parts p where p.oid = t.oid) as has_parts
"""

_CLAIM_TABLE = f"""
    with planned as (
        select oid from _live_migration.tables
        where state = 'planned' and coalesce(retry_at <= clock_timestamp(), true)
        order by size_bytes desc, oid limit 1 for update skip locked
    ), stopped as (
        select oid from _live_migration.tables
        where state = 'stopped' and retry_at <= clock_timestamp() and not exists (select from planned)
        order by size_bytes desc, oid limit 1 for update skip locked
    ), candidate as (select oid from planned union all select oid from stopped)
    {_BEGIN_ATTEMPT}
"""
"""Two queries, each by its index: with one, every claim would look at all the tables that wait."""

GROUP_TABLES = 64
"""Tables copied in one transaction at most: each has several locks on the target, for which a server has some thousand places."""
GROUP_TABLE_BYTES = 128 << 10
"""Size of a table, as planned, up to which it is copied together with others."""
_FAIR_SHARE = 4
"""A group is at most this part of the small tables that wait: the last of them are left for others to take."""

_WAITS_SMALL = """state = 'planned' and size_bytes <= $7 and kind = 'table' and not copies_to_root
            and retry_at is null and error is null"""
_CLAIM_GROUP = f"""
    with waiting as (
        select oid from _live_migration.tables where {_WAITS_SMALL} order by size_bytes desc, oid limit $8 * {_FAIR_SHARE}
    ), candidate as (
        select oid from _live_migration.tables t
        where {_WAITS_SMALL} and not exists (select from _live_migration.parts p where p.oid = t.oid)
          and not exists (select from _live_migration.tables b
                          where b.state = 'planned' and b.size_bytes > $7 and coalesce(b.retry_at <= clock_timestamp(), true))
        order by size_bytes desc, oid
        limit (select count(*) / {_FAIR_SHARE} from waiting) for update skip locked
    )
    {_BEGIN_ATTEMPT}
"""

_CLAIM_PART = f"""
    with candidate as (
        select p.oid, p.part
        from _live_migration.parts p join _live_migration.tables t on t.oid = p.oid and t.attempt = p.attempt
        where p.state = 'pending' and t.state = 'copying' and t.snapshot_id is not null and t.lease_until > clock_timestamp()
        order by p.size_bytes desc, p.oid, p.part
        limit 1 for update of p skip locked
    )
    update _live_migration.parts p set state = 'copying', row_count = 0, byte_count = 0, {_LEASE}, {_SOURCE}
    from candidate c, _live_migration.tables t
    where p.oid = c.oid and p.part = c.part and t.oid = c.oid and t.snapshot_id is not null
    returning p.oid, t.schema_name, t.table_name, p.attempt, p.part, p.first_block, p.end_block, p.size_bytes, t.snapshot_id, t.snapshot,
              t.columns, t.binary_copy, t.timeline, t.copies_to_root, t.root_schema, t.root_name
"""

_CLAIM_INDEX = "select * from _live_migration.claim_index($1, $2, $3, $4)"


async def claim_table(connection: asyncpg.Connection, who: Claimant) -> TableClaim | None:
    """Claim the biggest table that waits for its copy; its attempt number rises. None: there is none just now."""
    row = await connection.fetchrow(_CLAIM_TABLE, *_fields(who), *_source_fields(who))
    return None if row is None else _table_claim(row)


async def claim_group(connection: asyncpg.Connection, who: Claimant, part_size: int) -> list[TableClaim]:
    """Claim small tables that are copied together, once nothing bigger waits; none where there are not many.

    One that was set back is never among them: whatever keeps it from being copied is its own affair, and is said of it alone.
    """
    size = min(GROUP_TABLE_BYTES, part_size)
    rows = await connection.fetch(_CLAIM_GROUP, *_fields(who), *_source_fields(who), size, GROUP_TABLES)
    return [_table_claim(row) for row in rows]


def _table_claim(row: asyncpg.Record) -> TableClaim:
    return TableClaim(
        row["oid"],
        QualifiedName(row["schema_name"], row["table_name"]),
        row["attempt"],
        row["has_parts"],
        row["kind"] == "chunk",
        (row["compressed_name"], row["compressed_oid"]) if row["compressed_oid"] is not None else None,
        _root(row),
        row["range"],
    )


def _root(row: asyncpg.Record) -> QualifiedName | None:
    return QualifiedName(row["root_schema"], row["root_name"]) if row["copies_to_root"] else None


async def claim_part(connection: asyncpg.Connection, who: Claimant) -> PartClaim | None:
    """Claim the biggest part that waits, of a table whose snapshot is held. None: there is none just now."""
    row = await connection.fetchrow(_CLAIM_PART, *_fields(who), *_source_fields(who))
    if row is None:
        return None
    columns = tuple(column["name"] for column in json.loads(row["columns"]) if not column["generated"])
    name = QualifiedName(row["schema_name"], row["table_name"])
    return PartClaim(
        row["oid"],
        name,
        row["attempt"],
        row["part"],
        BlockRange(row["first_block"], row["end_block"], row["size_bytes"]),
        row["snapshot_id"],
        CopyPlan(name, columns, row["binary_copy"], target=_root(row)),
        row["timeline"],
        row["snapshot"],
    )


async def claim_index(connection: asyncpg.Connection, who: Claimant) -> IndexClaim | None:
    """Claim an index of a copied table: primary keys first, then unique ones, then the biggest.

    What locks its table (a constraint) is never claimed beside another of the same table: claims wait for one another, in a
    function, since a consumer that is stopped between two statements would keep that lock and hold up everybody.
    """
    row = await connection.fetchrow(_CLAIM_INDEX, *_fields(who))
    if row is None:
        return None
    table = QualifiedName(row["schema_name"], row["table_name"])
    return IndexClaim(row["oid"], row["table_oid"], table, row["name"], tuple(row["statements"]))


def _fields(who: Claimant) -> tuple[object, ...]:
    return who.owner, who.target.pid, who.target.started, who.lease


def _source_fields(who: Claimant) -> tuple[object, ...]:
    return (who.source.pid, who.source.started) if who.source else (None, None)
