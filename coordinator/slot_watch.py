"""The slot's health: how much WAL the source keeps for it, and whether it is about to be lost."""

from __future__ import annotations

import asyncio

from live_migration.common.errors import SlotError
from live_migration.common.postgres import asking
from live_migration.common.progress import format_bytes
from live_migration.coordinator.run import Run
from live_migration.producer.slot import SlotState, read_slot

_INTERVAL_SECONDS = 10.0
_FIRST_WARNING_BYTES = 8 << 30


async def watch_slot(run: Run) -> None:
    """Warn as the slot retains more WAL, at each doubling, and when the source threatens to remove it; never returns.

    Raises:
        SlotError: the slot is gone, or the source removed WAL that it needs.
    """
    async with run.source_session("slot watch") as source:
        while True:
            with asking("source", "looking at the slot"):
                slot = await read_slot(source, run.settings.slot)
            if slot is None:
                raise SlotError(f"slot {run.settings.slot} does not exist on the source any more")
            if slot.wal_status == "lost":
                raise SlotError(
                    f"the source has removed WAL that slot {run.settings.slot} needed",
                    hint="Raise max_slot_wal_keep_size on the source, run `live-migration clean` and start again.",
                )
            about = f"slot {run.settings.slot}"
            run.reporter.warn_on_change(f"{about} status", _status_warning(about, slot))
            run.reporter.warn_on_change(f"{about} size", size_warning(about, slot.retained_bytes))
            await asyncio.sleep(_INTERVAL_SECONDS)


def _status_warning(about: str, slot: SlotState) -> str:
    if slot.wal_status in ("reserved", "extended", ""):
        return ""
    left = f", {format_bytes(slot.safe_wal_bytes)} are left" if slot.safe_wal_bytes is not None else ""
    return f"{about}: wal_status is {slot.wal_status}{left}; the source will remove WAL that is still needed"


def size_warning(about: str, retained_bytes: int) -> str:
    """Give a warning that changes at 8, 16, 32 … GiB, empty below."""
    if retained_bytes < _FIRST_WARNING_BYTES:
        return ""
    threshold = _FIRST_WARNING_BYTES
    while threshold * 2 <= retained_bytes:
        threshold *= 2
    return f"{about} keeps more than {format_bytes(threshold)} of WAL on the source's disk"
