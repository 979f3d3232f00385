"""Relations of the stream that nobody planned and that are gone from the source again: their changes are passed over."""

from __future__ import annotations

import asyncpg

from live_migration.common.postgres import asking
from live_migration.common.telemetry import get_logger
from live_migration.consumer.chunk_copy import look_without
from live_migration.consumer.claims import TableClaim
from live_migration.consumer.copy_errors import CopyDeferred
from live_migration.consumer.target_tables import NotPlanned

log = get_logger(__name__)

_LET_GO = """
    insert into _live_migration.tables
        (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind, root_schema, root_name, newcomer,
         snapshot, horizon, timeline)
    values ($1, $2, $3, $4, 'insert', '[]', false, 'ready', $5, $6, $7, 'gone', $8, $9, $10)
    on conflict do nothing
"""


async def let_go_if_gone(
    source: asyncpg.Connection, target: asyncpg.Connection, lane: int, stranger: NotPlanned
) -> bool:
    """Record a relation that is gone from the source with a snapshot that shows all of its changes, and so all are passed over.

    False when it is there, or its hypertable is: then the coordinator brings it. A hypertable that is gone was never part of the plan.
    """
    relation, home = stranger.relation, stranger.home
    with asking("source", f"looking for {relation.name}"):
        if home is not None and await source.fetchval("select to_regclass($1) is not null", home.hypertable.sql):
            return False
    try:
        origin = await look_without(source, TableClaim(relation.oid, relation.name, 0, has_parts=False))
    except CopyDeferred:
        return False
    # Another table may bear the name by now; chunks' names, which their compressed rows are found by, do not come again.
    name = home.chunk.name if home else f"{relation.name.name} (dropped, oid {relation.oid})"
    root = home.hypertable if home else relation.name
    with asking("target", f"letting go of {relation.name}"):
        if await target.fetchval("select source_timeline from _live_migration.migration") != origin.timeline:
            return False
        status = await target.execute(
            _LET_GO,
            relation.oid,
            home.chunk.schema if home else relation.name.schema,
            name,
            lane,
            "chunk" if home else "table",
            root.schema,
            root.name,
            origin.snapshot,
            origin.horizon,
            origin.timeline,
        )
    log.info("a relation that is gone from the source is passed over", relation=str(relation.name))
    return bool(status == "INSERT 0 1")
