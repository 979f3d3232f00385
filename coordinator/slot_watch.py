"""The slot's health: how much WAL the source keeps for it, whether it is about to be lost, whether it is."""

from __future__ import annotations

import asyncio

import asyncpg

from live_migration.common.errors import SlotLost
from live_migration.common.postgres import asking
from live_migration.common.progress import format_bytes
from live_migration.coordinator import steps
from live_migration.coordinator.losses import require_primary, slot_loss, tables_to_copy
from live_migration.coordinator.run import Run
from live_migration.coordinator.slot_warnings import SlotWarnings
from live_migration.producer.slot import SlotState, drop_slot, read_slot

INTERVAL_SECONDS = 10.0


async def watch_slot(run: Run) -> None:
    """Warn as the slot keeps more and more WAL, and drop it at `max_slot_lag`; returns once nothing needs the slot.

    Raises:
        SlotLost: the slot is gone, dropped by us included, or the source removed WAL that it needs.
        ConnectionLost: the source is lost, or a standby.
    """
    name = run.settings.slot
    warnings = SlotWarnings(name, run.settings.max_slot_lag)
    async with run.source_session("slot watch") as source:
        while True:
            with asking("source", "looking at the slot"):
                await require_primary(run.settings, source)
                slot = await read_slot(source, name)
            loss = slot_loss(name, slot)
            if loss is None and slot is not None:
                for warning in warnings.look(slot):
                    run.reporter.warning(warning)
                loss = await _drop_above_limit(run, source, slot)
            if loss is not None:
                await _stop_if_needed(run, loss)
                return
            await asyncio.sleep(INTERVAL_SECONDS)


async def _drop_above_limit(run: Run, source: asyncpg.Connection, slot: SlotState) -> str | None:
    """Drop a slot that keeps more than the user allowed; the source goes before the migration."""
    limit = run.settings.max_slot_lag
    if not limit or slot.retained_bytes <= limit:
        return None
    # Who was stopped for a while may have a successor by now, with a slot, or a limit, of its own.
    async with run.target_session("slot watch") as target:
        with asking("target", "looking whether we still lead the migration"):
            await steps.require_role(target, run.epoch)
    await drop_slot(source, run.settings.slot)
    return (
        f"replication slot {run.settings.slot} was dropped, for it kept {format_bytes(slot.retained_bytes)} of WAL on the "
        f"source, more than --max-slot-lag ({format_bytes(limit)})"
    )


async def _stop_if_needed(run: Run, loss: str) -> None:
    """Raise SlotLost, but not after the last barrier: the target holds everything then."""
    async with run.target_session("slot watch") as target:
        if await steps.has_passed_barrier(target):
            run.reporter.warning(f"{loss}; nothing is lost, for the target has passed the last barrier")
            return
        raise SlotLost(f"{loss}; {await tables_to_copy(target)}")
