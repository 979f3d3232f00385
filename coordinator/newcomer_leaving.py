"""Newcomers that leave the target again: those that are gone from the source, and those that became another kind of table while they were brought."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import asyncpg

from live_migration.common.catalog import TableInfo
from live_migration.common.errors import ConnectionLost, Fenced, LiveMigrationError, Retry
from live_migration.common.postgres import asking
from live_migration.common.relation import QualifiedName
from live_migration.common.timescale import read_layout
from live_migration.coordinator import steps
from live_migration.coordinator.planning import Moment
from live_migration.coordinator.run import Run
from live_migration.coordinator.schema import MOMENT
from live_migration.producer.publication import remove_tables

KNOWN = "select oid, schema_name, table_name, kind, newcomer from _live_migration.tables"

_LET_GO = """
    update _live_migration.tables
    set newcomer = 'gone', rebuild = null, rebuild_lsn = null, copy_again = false, error = null, hint = null, snapshot = $2, horizon = $3,
        timeline = $4, table_name = table_name || ' (dropped, oid ' || oid || ')'
    where oid = $1
"""

# Another hypertable may bear the name by now: rows of these would go to it.
_LET_CHUNKS_GO = """
    update _live_migration.tables
    set newcomer = 'gone', rebuild = null, rebuild_lsn = null, unseen_lsn = null, copy_again = false, snapshot = $2, horizon = $3, timeline = $4
    where hypertable_oid = $1 and kind = 'chunk'
"""

_MADE = """
    select coalesce(root_schema, schema_name) as schema, coalesce(root_name, table_name) as name, kind, made_oid
    from _live_migration.tables where oid = $1 {} for update
"""


async def let_go(run: Run, source: asyncpg.Connection, target: asyncpg.Connection, tables: Sequence[TableInfo]) -> None:
    """Drop newcomers on the target that are gone from the source; what the stream still holds of them is passed over."""
    present = {table.oid for table in tables}
    with asking("target", "reading the plan"):
        known = await target.fetch(KNOWN)
    gone = [row for row in known if row["newcomer"] in ("made", "followed") and row["oid"] not in present]
    if not gone:
        return
    with asking("source", "reading the moment"):
        moment = Moment(**dict(await source.fetchrow(MOMENT)))
    for row in sorted(gone, key=lambda row: row["oid"], reverse=True):  # what stands on another was made after it
        name = QualifiedName(row["schema_name"], row["table_name"])
        try:
            with asking("target", f"dropping {name}"):
                async with target.transaction():
                    # The row first: a lane that copies it just now has it locked.
                    await _let_one_go(target, row["oid"], moment)
                    await steps.require_role(target, run.epoch)
        except LiveMigrationError as error:
            if error.retry is Retry.RECONNECT or isinstance(error, ConnectionLost):
                raise
            run.reporter.warn_on_change(f"newcomer {name}", f"{name} was dropped on the source and cannot be: {error}")
            continue
        run.reporter.note(f"{name} was dropped on the source again, and so it was on the target")


async def _let_one_go(target: asyncpg.Connection, oid: int, moment: Moment) -> None:
    await _drop(target, oid)
    for statement in (_LET_GO, _LET_CHUNKS_GO):
        await target.execute(statement, oid, moment.snapshot, moment.horizon, moment.timeline)


def changed_kinds(known: Collection[asyncpg.Record], tables: Sequence[TableInfo]) -> list[TableInfo]:
    """Give those of the source's tables that are not followed yet and are of another kind than when they were made on the target. Pure."""
    kinds = {row["oid"]: row["kind"] for row in known if row["newcomer"] == "made"}
    return [table for table in tables if kinds.get(table.oid, table.part) != table.part]


async def unmake(
    run: Run,
    source: asyncpg.Connection,
    target: asyncpg.Connection,
    changed: Collection[TableInfo],
    tables: Sequence[TableInfo],
    *,
    patience: float | None = None,
) -> None:
    """Forget newcomers that became another kind of table, a hypertable say, before they were followed; the next look finds them as they are.

    None of their rows is on the target yet, and no lane has passed over a change of theirs. `tables`: the source's, for their chunks.

    Raises:
        LockTimeout: one is locked on the source for longer than `patience` seconds.
    """
    oids = {table.oid for table in changed}
    parts = oids | {table.oid for table in tables if table.hypertable in oids}
    # Out of the publications first: were one that cannot be made again left there, its changes would stop its lane.
    for publication in (run.settings.publication, run.settings.insert_publication):
        with asking("source", "taking tables out of the publications"):
            lock_timeout = run.settings.lock_timeout
            await remove_tables(source, publication, parts, lock_timeout=lock_timeout, patience=patience)
    for table in changed:
        try:
            with asking("target", f"dropping {table.name}"):
                async with target.transaction():
                    await _drop(target, table.oid, "and newcomer = 'made'")
                    await target.execute(
                        "delete from _live_migration.tables where oid = $1 and newcomer = 'made'", table.oid
                    )
                    await steps.require_role(target, run.epoch)
        except LiveMigrationError as error:
            if error.retry is Retry.RECONNECT or isinstance(error, ConnectionLost | Fenced):
                raise
            run.reporter.warn_on_change(
                f"newcomer {table.name}",
                f"{table.name} became a {table.part} on the source and cannot be made anew on the target yet: {error}",
            )
            continue
        run.reporter.note(
            f"{table.name} became a {table.part} on the source while it was brought; it is made anew on the target"
        )


async def _drop(target: asyncpg.Connection, oid: int, condition: str = "") -> None:
    """Drop what was made for a source's table, with what waits for the hand-over; never what somebody else made there since."""
    await target.execute("set local lock_timeout = '30s'")
    row = await target.fetchrow(_MADE.format(condition), oid)
    if row is None:
        return
    name = QualifiedName(row["schema"], row["name"])
    view = None
    if row["kind"] == "hypertable" and (layout := await read_layout(target)) is not None:
        view = next((each.view for each in layout.hypertables.values() if each.name == name), None)
    is_ours = "select coalesce(to_regclass($1)::oid = $2, true)"
    if row["made_oid"] is None or await target.fetchval(is_ours, name.sql, row["made_oid"]):
        what = f"materialized view if exists {view.sql}" if view else f"table if exists {name.sql}"
        await target.execute(f"drop {what}")
    await target.execute("delete from _live_migration.late_statements where table_oid = $1", oid)
    await target.execute(
        "delete from _live_migration.foreign_keys where (schema_name, table_name) = ($1, $2)", name.schema, name.name
    )
