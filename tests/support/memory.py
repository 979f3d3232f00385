"""Resident memory of a migration's processes while a test goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import psutil

from tests.e2e.processes import Migrate

MIB = 1024 * 1024
KINDS = ("coordinator", "producer", "consumer")


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
