"""The fault of transactions that straddle a publication: the stream breaks in the midst of one."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

from tests.chaos.fault import Fault, Missed, Scene, direct
from tests.chaos.world import GONE, Endpoint

SHARE = 0.8
"""Of the straddling transactions, that are broken."""
_ROW_BYTES = 270
"""About what the stream has for a row of one."""
_COMMIT_SECONDS = 10.0
_READER_SECONDS = 10.0


class BreakWithin(Fault):
    """The source's connections become slow, the transaction commits, and before all of it was sent somebody or something dies."""

    name = "break within a straddling transaction"

    def __init__(self, rng: random.Random, rows: int) -> None:
        super().__init__(rng)
        self.armed = asyncio.Event()
        """Whether the transaction may commit."""
        self.committed = asyncio.Event()
        self.is_drawn = rng.random() < SHARE
        self.speed = round(10 ** rng.uniform(4.9, 5.7))
        self.seconds = rng.uniform(0.05, 1.0) * rows * _ROW_BYTES / self.speed
        self.how = rng.choices(("cut source", "kill producer", "end walsender", "cut broker"), weights=(3, 3, 2, 1))[0]

    async def inject(self, scene: Scene) -> str:
        proxy = scene.world.proxies["source"]
        try:
            await _until_read(scene)
            proxy.slow_down(self.speed)
            self.armed.set()
            async with asyncio.timeout(_COMMIT_SECONDS):
                await self.committed.wait()
            await asyncio.sleep(self.seconds)
            what = await self._break(scene)
        except TimeoutError as error:
            raise Missed("the transaction did not commit") from error
        finally:
            self.armed.set()
            proxy.heal()
        return f"{self.how}, {what}, {self.seconds:.1f} s behind the commit, at {self.speed} bytes/s"

    async def _break(self, scene: Scene) -> str:
        if self.how == "kill producer":
            victim = scene.fleet.choose("producer", self.rng)
            if victim is None:
                raise Missed("no producer there")
            scene.fleet.kill(victim)
            return f"pid {victim.pid}"
        if self.how == "end walsender":
            return await _end_walsender(scene)
        endpoint: Endpoint = "source" if self.how == "cut source" else "broker"
        proxy = scene.world.proxies[endpoint]
        count = proxy.connection_count
        if not count:
            raise Missed(f"{endpoint}: 0 connections")
        proxy.cut()
        return f"{count} connections"


async def _until_read(scene: Scene) -> None:
    """Wait for a while until somebody reads the slot: else nothing of the transaction is sent in time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_READER_SECONDS):
            while not await _readers(scene, "count(active_pid)"):
                await asyncio.sleep(0.1)


async def _end_walsender(scene: Scene) -> str:
    if not await _readers(scene, "count(pg_terminate_backend(active_pid))"):
        raise Missed("nobody read the slot")
    return "terminated"


async def _readers(scene: Scene, count: str) -> int:
    with suppress(*GONE):
        async with direct(scene, "source") as connection:
            query = f"select {count} from pg_replication_slots where slot_name = $1"
            return int(await connection.fetchval(query, scene.database))
    return 0
