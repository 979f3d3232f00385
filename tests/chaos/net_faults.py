"""Faults of connections: cut, refused, stalled, slow, an answer lost."""

from __future__ import annotations

import asyncio
import random
from typing import ClassVar

from tests.chaos.fault import Fault, Missed, Scene
from tests.chaos.world import Endpoint
from tests.support.proxy import Matcher, is_commit, is_end_of_transaction, is_source_commit


class _Net(Fault):
    endpoints: ClassVar[tuple[Endpoint, ...]] = ("source", "target", "broker")

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.endpoint = rng.choice(self.endpoints)


class Cut(_Net):
    name = "cut"
    weight = 3

    async def inject(self, scene: Scene) -> str:
        proxy = scene.world.proxies[self.endpoint]
        count = proxy.connection_count
        if not count:
            raise Missed(f"{self.endpoint}: 0 connections")
        proxy.cut()
        return f"{self.endpoint}: {count} connections"


class CutAfterBytes(_Net):
    """Falls into the midst of a COPY, a batch, a Kafka request."""

    name = "cut after bytes"
    weight = 4

    async def inject(self, scene: Scene) -> str:
        proxy = scene.world.proxies[self.endpoint]
        times = self.rng.randrange(1, 6)
        done = 0
        for _ in range(times):
            size = round(10 ** self.rng.uniform(1, 6))
            proxy.cut_after(size)
            for _ in range(30):
                await asyncio.sleep(0.1)
                if not proxy.is_pending:
                    done += 1
                    break
        proxy.heal()
        if not done:
            raise Missed(f"{self.endpoint}: 0 of {times}")
        return f"{self.endpoint}: {done} of {times}"


class Refuse(_Net):
    name = "refuse"

    async def inject(self, scene: Scene) -> str:
        proxy = scene.world.proxies[self.endpoint]
        seconds = self.rng.uniform(0.5, 6)
        async with scene.world.busy[self.endpoint]:
            await proxy.stop()
            try:
                await asyncio.sleep(seconds)
            finally:
                await proxy.start()
        return f"{self.endpoint} for {seconds:.1f} s"


class Stall(_Net):
    name = "stall"
    weight = 3

    async def inject(self, scene: Scene) -> str:
        proxy = scene.world.proxies[self.endpoint]
        directions = self.rng.choice((("up",), ("down",), ("up", "down")))
        seconds = self.rng.choice((self.rng.uniform(1, 4), scene.lease * 2))
        is_cut = self.rng.random() < 0.5
        before = proxy.chunks
        proxy.stall(*directions)
        try:
            await asyncio.sleep(seconds)
            if is_cut:
                proxy.cut()
        finally:
            proxy.heal()
        if proxy.chunks == before:
            raise Missed(f"{self.endpoint}: nothing was sent meanwhile")
        return f"{self.endpoint} {'+'.join(directions)} for {seconds:.1f} s{', then cut' if is_cut else ''}"


class SlowDown(_Net):
    name = "slow down"

    async def inject(self, scene: Scene) -> str:
        proxy = scene.world.proxies[self.endpoint]
        speed = round(10 ** self.rng.uniform(4, 5.5))
        seconds = self.rng.uniform(2, 8)
        before = proxy.chunks
        proxy.slow_down(speed)
        try:
            await asyncio.sleep(seconds)
        finally:
            proxy.heal()
        if proxy.chunks == before:
            raise Missed(f"{self.endpoint}: nothing was sent meanwhile")
        return f"{self.endpoint} to {speed} bytes/s for {seconds:.1f} s"


_COMMITS: dict[Endpoint, Matcher] = {
    "source": is_source_commit,
    "target": is_commit,
    "broker": is_end_of_transaction,
}
_PHASES_THAT_COMMIT_ON_SOURCE = ("start", "prepare", "cutover")
"""Publications, what renews the catalog, barriers: nothing of ours is written there in the others."""
_MOST_ON_SOURCE = 3
_PATIENCE_SECONDS: dict[Endpoint, float] = {"source": 8.0, "target": 3.0, "broker": 3.0}


class LoseCommitAnswer(_Net):
    """The server has committed, the client cannot know."""

    name = "lose answer to commit"
    weight = 4
    endpoints = ("target", "broker")

    async def inject(self, scene: Scene) -> str:
        times = self.rng.randrange(1, 8)
        endpoint = self.endpoint
        if scene.phase in _PHASES_THAT_COMMIT_ON_SOURCE and self.rng.random() < 0.5:
            endpoint, times = "source", min(times, _MOST_ON_SOURCE)
        proxy = scene.world.proxies[endpoint]
        before = proxy.losses
        for _ in range(times):
            proxy.lose_answer(_COMMITS[endpoint])
            for _ in range(round(_PATIENCE_SECONDS[endpoint] * 10)):
                await asyncio.sleep(0.1)
                if not proxy.is_pending:
                    break
        proxy.heal()
        if proxy.losses == before:
            raise Missed(f"{endpoint}: 0 of {times}")
        return f"{endpoint}: {proxy.losses - before} of {times}"
