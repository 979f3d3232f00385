"""Whether a walsender lives on: the source ends it where it hears nothing for `wal_sender_timeout`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

PATIENCE = 4
"""Seconds of `wal_sender_timeout` on a source of a test's own."""
STATUS_SECONDS = 0.5
"""How often the producer is to answer then, instead of each 5 s for the default of 60."""
TIMEOUT_MESSAGE = "due to replication timeout"
_PID = "select active_pid from pg_replication_slots where slot_name = $1"


async def walsender_pid(source: str, slot: str) -> int | None:
    """Give who reads a slot."""
    connection = await asyncpg.connect(source)
    try:
        pid: int | None = await connection.fetchval(_PID, slot)
        return pid
    finally:
        await connection.close()


@asynccontextmanager
async def watched_walsender(source: str, slot: str) -> AsyncIterator[set[int | None]]:
    """Give a set of whoever reads a slot meanwhile, from the first one on: a single one, if it was never ended."""
    connection = await asyncpg.connect(source)
    pids: set[int | None] = set()
    async with asyncio.timeout(60):
        while (first := await connection.fetchval(_PID, slot)) is None:
            await asyncio.sleep(0.05)
    pids.add(first)

    async def watch() -> None:
        while True:
            pids.add(await connection.fetchval(_PID, slot))
            await asyncio.sleep(0.1)

    task = asyncio.ensure_future(watch())
    try:
        yield pids
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.wait([task])
        connection.terminate()
