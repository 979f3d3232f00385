"""What is lost with a slot, and what must be copied again for it."""

from __future__ import annotations

import asyncpg

from live_migration.common.postgres import asking
from live_migration.coordinator.findings import name_list
from live_migration.producer.slot import SlotState


def slot_loss(name: str, slot: SlotState | None) -> str | None:
    """Say what became of a slot that cannot be read any more; None when nothing did."""
    if slot is None:
        return f"replication slot {name} does not exist on the source any more: somebody dropped it, or a failover left it behind"
    if slot.wal_status == "lost" or slot.reason:
        why = f" ({slot.reason})" if slot.reason else ""
        return f"replication slot {name} is lost{why}: the source has removed WAL that it needed"
    return None


async def tables_to_copy(target: asyncpg.Connection) -> str:
    """Name the migration's tables, for a message that says that they must be copied again."""
    with asking("target", "reading the plan"):
        rows = await target.fetch(
            """select schema_name || '.' || table_name as name from _live_migration.tables
               order by size_bytes desc, 1"""
        )
    if not rows:
        return "no table was copied yet"
    return f"to be copied again: {len(rows)} tables, {name_list(row['name'] for row in rows)}"
