"""The indexes of partitioned roots, put together at the end of phase `copy`: as planned, or as the source has them by then."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from live_migration.consumer.current_index import is_as_planned, read_now
from live_migration.coordinator.dump_script import Entry
from live_migration.coordinator.entries import run_entries
from live_migration.coordinator.run import Run
from live_migration.coordinator.schema import read_post_data


async def build_partitioned_indexes(run: Run) -> None:
    """Make the indexes of partitioned roots and attach those of their partitions; what the source has no more is named and left out."""
    post_data = await read_post_data(run)
    await run_entries(
        run, "partitioned indexes", post_data.partitioned, renew=lambda entry, error: _renew(run, entry, error)
    )


async def _renew(run: Run, entry: Entry, error: asyncpg.PostgresError) -> Sequence[str] | None:
    if entry.type == "INDEX ATTACH":
        # One of the two was left out before, for it is gone; all others are there by now.
        return () if isinstance(error, asyncpg.UndefinedTableError | asyncpg.UndefinedObjectError) else None
    if not entry.oid:
        return None
    name = entry.name.split(" ", 1)[1] if entry.type == "CONSTRAINT" else entry.name  # "table constraint"
    async with run.source_session("indexes") as source:
        now = await run.patiently(
            f"looking at {entry.label}", lambda: read_now(source, entry.oid, entry.schema, name, [entry.statements])
        )
    if now is None:
        return ()
    return None if is_as_planned(now, [entry.statements]) else now
