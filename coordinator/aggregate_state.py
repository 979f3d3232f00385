"""How far each continuous aggregate is materialized, and what of it is out of date: taken from the source as it stands after the last barrier.

The rows of an aggregate are copied and followed like others, and so are those that it reads. What TimescaleDB knows beside them is in its
catalog: the watermark, up to which a real-time aggregate reads materialized rows; the threshold, above which no change is logged; the
changes that no refresh has seen. With these as on the source a refresh does there what it would have done here.

A policy of the source may refresh after the last barrier, and the target never gets those rows. So the state is read before the
barriers, too: what either says is out of date is so on the target, and no aggregate is materialized further than it was at first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import asyncpg

from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import Layout

_PREFIX = "_timescaledb_catalog.continuous_aggs"
_TABLES = {
    f"{_PREFIX}_watermark": ("mat_hypertable_id", "watermark"),
    f"{_PREFIX}_invalidation_threshold": ("hypertable_id", "watermark"),
    f"{_PREFIX}_hypertable_invalidation_log": ("hypertable_id", "lowest_modified_value", "greatest_modified_value"),
    f"{_PREFIX}_materialization_invalidation_log": (
        "materialization_id", "lowest_modified_value", "greatest_modified_value"
    ),
    f"{_PREFIX}_materialization_ranges": ("materialization_id", "lowest_modified_value", "greatest_modified_value"),
}  # fmt: skip
"""Columns by table: first the hypertable's id, which differs from server to server."""
_LOG = f"{_PREFIX}_materialization_invalidation_log"
_RANGES = f"{_PREFIX}_materialization_ranges"
_INFINITE = 2**63 - 1


Rows = dict[str, list[tuple[QualifiedName, tuple[int, ...]]]]


@dataclass(frozen=True, slots=True)
class AggregateState:
    """Rows by table; in place of its id the name by which users call a hypertable or aggregate."""

    rows: Rows

    def encode(self) -> bytes:
        found = {
            table: [[name.schema, name.name, *values] for name, values in rows] for table, rows in self.rows.items()
        }
        return json.dumps(found).encode()

    @classmethod
    def decode(cls, content: bytes) -> AggregateState:
        found = json.loads(content)
        return cls({table: [(QualifiedName(s, n), tuple(v)) for s, n, *v in rows] for table, rows in found.items()})

    def since(self, before: AggregateState) -> AggregateState:
        """Give what holds for rows of a moment between `before` and now, whichever."""
        rows = {}
        for table, now in self.rows.items():
            then = before.rows.get(table, [])
            if _TABLES[table][1] == "watermark":
                known = dict(then)
                rows[table] = [(name, min(values, known.get(name, values))) for name, values in now]
            else:
                rows[table] = now + [each for each in then if each not in now]
        return AggregateState(rows)

    @property
    def watermarks(self) -> dict[QualifiedName, int]:
        """The watermarks, in TimescaleDB's own unit."""
        return {name: value for name, (value,) in self.rows.get(f"{_PREFIX}_watermark", [])}


async def read_state(connection: asyncpg.Connection, layout: Layout) -> AggregateState:
    """Read a database's; several queries: call it in a transaction with one snapshot."""
    names = _names(layout)
    rows = {}
    for table, columns in _TABLES.items():
        if await connection.fetchval("select to_regclass($1) is not null", table):
            found = await connection.fetch(f"select {', '.join(columns)} from {table}")
            rows[table] = [(names[row[0]], tuple(row)[1:]) for row in found if row[0] in names]
    return AggregateState(rows)


async def write_state(connection: asyncpg.Connection, layout: Layout, wanted: AggregateState) -> None:
    """Make a database's catalog say the same of the hypertables and aggregates that it has; in the caller's transaction.

    Raises:
        asyncpg.InsufficientPrivilegeError: our role is no superuser.
    """
    ids = {name: key for key, name in _names(layout).items()}
    found = as_invalidations(wanted.rows)
    present = [table for table in found if await connection.fetchval("select to_regclass($1) is not null", table)]
    for table in present:
        columns = _TABLES[table]
        rows = [(ids[name], *values) for name, values in found[table] if name in ids]
        await connection.execute(f"delete from {table} where {columns[0]} = any($1::int[])", list(ids.values()))
        places = ", ".join(f"${n}" for n in range(1, len(columns) + 1))
        await connection.executemany(f"insert into {table} ({', '.join(columns)}) values ({places})", rows)


def as_invalidations(rows: Rows) -> Rows:
    """Put what a refresh that did not end had still to materialize back among what is out of date; pure.

    2.29 never looks at such ranges, which 2.24 does, and a refresh of either looks at the log. A range ends before its second value, an invalidation with it.
    """
    pending = [(name, (first, end if end == _INFINITE else end - 1)) for name, (first, end) in rows.get(_RANGES, [])]
    if not pending:
        return rows
    return {**rows, _LOG: [*rows.get(_LOG, []), *pending], _RANGES: []}


def _names(layout: Layout) -> dict[int, QualifiedName]:
    return {each.id: each.view or each.name for each in layout.hypertables.values()}
