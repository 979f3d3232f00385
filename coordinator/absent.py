"""With `--no-workers` somebody else starts producer and consumers: it is said where nobody has for a while, for nothing else would tell."""

from __future__ import annotations

import asyncio
import time

from live_migration.common.postgres import asking
from live_migration.coordinator import steps
from live_migration.coordinator.run import Run
from live_migration.producer.slot import read_slot

INTERVAL_SECONDS = 5.0
PATIENCE_SECONDS = 60.0

_ALIVE = "select exists (select from _live_migration.workers where kind = 'consumer' and seen_at > clock_timestamp() - make_interval(secs => $1))"
_WHY = {
    "consumer": "nothing is copied or applied. Start `live-migration consumer`",
    "producer": "the source keeps its WAL for the slot, which nobody reads. Start `live-migration producer`",
}


async def watch_absent(run: Run) -> None:
    """Warn of a kind of worker that nobody runs, once, and again after it was there; returns where they are ours, and behind the last barrier."""
    if run.settings.workers:
        return
    seen = dict.fromkeys(_WHY, time.monotonic())
    async with run.source_session("workers") as source, run.target_session("workers") as target:
        while not await steps.has_passed_barrier(target):
            with asking("target", "looking for consumers"):
                is_alive = {"consumer": await target.fetchval(_ALIVE, PATIENCE_SECONDS)}
            with asking("source", "looking who reads the slot"):
                slot = await read_slot(source, run.settings.slot)
            is_alive["producer"] = slot is None or slot.active_pid is not None
            for kind, why in _WHY.items():
                seen[kind] = time.monotonic() if is_alive[kind] else seen[kind]
                is_absent = time.monotonic() - seen[kind] >= PATIENCE_SECONDS
                run.reporter.warn_on_change(f"no {kind}", f"no {kind} has run for a while: {why}" if is_absent else "")
            await asyncio.sleep(INTERVAL_SECONDS)
