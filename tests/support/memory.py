"""Resident memory of a migration's processes while a test goes on, and what its options allow them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import psutil

from live_migration.common.settings import load_settings
from tests.e2e.processes import Migrate

MIB = 1024 * 1024
KINDS = ("coordinator", "producer", "consumer")
PROCESS_BYTES = 65 * MIB
"""A process before it holds any data (docs/configuration.md)."""
SLACK_BYTES = 32 * MIB
"""For all that no option bounds: libraries of other versions, what allocators keep in hand, 4 MiB for each part that is copied, names of tables."""
LANE_BYTES = 4 * MIB
"""What a lane at work holds beside the budget: a record that waits for room, what Kafka's client has read behind it, what is on its way to the target."""
VALUE_COPIES = 3
"""How often a large value may be there at once (docs/limits.md)."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What processes may hold by their options, small enough for five times as much to show where a broker or target is slow; what each may take then."""

    memory: int = 32 * MIB
    batch_bytes: int = 4 * MIB
    flush_bytes: int = load_settings({}).flush_bytes
    lanes: int = 1
    """That one consumer may have work for at once."""

    @property
    def options(self) -> tuple[str, ...]:
        """For `migrate`."""
        given = {"--memory": self.memory, "--batch-bytes": self.batch_bytes, "--flush-bytes": self.flush_bytes}
        return tuple(f"{option}={value}" for option, value in given.items())

    def most(self, value_bytes: int = 0) -> dict[str, int]:
        """Give the most resident memory of each kind of process, with values of so many bytes as they travel."""
        held = {
            "coordinator": 0,
            "producer": 2 * self.flush_bytes + VALUE_COPIES * value_bytes,
            "consumer": self.memory + 2 * self.batch_bytes + self.lanes * LANE_BYTES + VALUE_COPIES * value_bytes,
        }
        return {kind: PROCESS_BYTES + SLACK_BYTES + size for kind, size in held.items()}

    def require(self, peaks: Mapping[str, int], value_bytes: int = 0) -> None:
        """Fail where a process took more."""
        most = self.most(value_bytes)
        above = {
            kind: f"{peaks[kind] / MIB:.0f} of {most[kind] / MIB:.0f} MiB" for kind in KINDS if peaks[kind] > most[kind]
        }
        assert not above, above


@asynccontextmanager
async def watched_memory(migrate: Migrate) -> AsyncIterator[dict[str, int]]:
    """Give a dictionary that keeps the highest resident memory, in bytes, of each kind of process."""
    peaks = dict.fromkeys(KINDS, 0)

    async def watch() -> None:
        while True:
            for kind in KINDS:
                for process in _processes(migrate, kind):
                    with suppress(psutil.NoSuchProcess):
                        peaks[kind] = max(peaks[kind], process.memory_info().rss)
            await asyncio.sleep(0.2)

    task = asyncio.ensure_future(watch())
    try:
        yield peaks
    finally:
        task.cancel()
        print({kind: f"{peak / MIB:.0f} MiB" for kind, peak in peaks.items()})


def _processes(migrate: Migrate, kind: str) -> list[psutil.Process]:
    if kind != "coordinator":
        return migrate.children(kind)
    return [psutil.Process(migrate.process.pid)] if migrate.process.returncode is None else []
