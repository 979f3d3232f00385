"""What a fault is, and those that end processes and servers or break connections."""

from __future__ import annotations

import asyncio
import random
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import psutil

from tests.chaos.fleet import Fleet, Kind
from tests.chaos.world import Endpoint, Side, World
from tests.support.proxy import is_commit, is_end_of_transaction


@dataclass(slots=True)
class Scene:
    """What a fault may touch."""

    world: World
    fleet: Fleet
    database: str
    lease: float
    source_restarts: int = 0


class Fault(ABC):
    """One thing that goes wrong and heals itself within a bounded time; its choices come from the seed alone."""

    name: ClassVar[str]
    weight: ClassVar[int] = 2

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    @abstractmethod
    async def inject(self, scene: Scene) -> str:
        """Do it and undo it; say to whom and for how long, or `nobody …` when there was no victim."""


class _Kill(Fault):
    kind: ClassVar[Kind]

    async def inject(self, scene: Scene) -> str:
        victim = scene.fleet.choose(self.kind, self.rng)
        if victim is None:
            return "nobody there"
        scene.fleet.kill(victim)
        return f"pid {victim.pid}"


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await what must not be left half done when the round ends: a server is to run again."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


class KillProducer(_Kill):
    name = "kill producer"
    kind = "producer"


class KillConsumer(_Kill):
    name = "kill consumer"
    kind = "consumer"
    weight = 4


class KillCoordinator(_Kill):
    name = "kill coordinator"
    kind = "migrate"


class KillBroker(Fault):
    name = "kill broker"

    async def inject(self, scene: Scene) -> str:
        away = self.rng.uniform(0, 6)
        async with scene.world.busy["broker"]:
            await scene.world.broker.kill()
            try:
                await asyncio.sleep(away)
            finally:
                await to_its_end(scene.world.broker.start())
        return f"away for {away:.1f} s and its start"


class _Restart(Fault):
    side: ClassVar[Side]

    async def inject(self, scene: Scene) -> str:
        is_immediate = self.rng.random() < 0.8
        async with scene.world.busy[self.side]:
            await to_its_end(scene.world.servers[self.side].restart(immediate=is_immediate))
        if self.side == "source":
            scene.source_restarts += 1
        return "immediate" if is_immediate else "fast"


class RestartSource(_Restart):
    name = "restart source"
    side = "source"


class RestartTarget(_Restart):
    name = "restart target"
    side = "target"


@asynccontextmanager
async def stopped(victim: psutil.Process) -> AsyncIterator[None]:
    """Keep a process stopped."""
    victim.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if victim.is_running():
            victim.send_signal(signal.SIGCONT)


class _Stop(Fault):
    """SIGSTOP for longer than the lease and the session in Kafka, so that somebody takes over, then SIGCONT."""

    kind: ClassVar[Kind]

    async def inject(self, scene: Scene) -> str:
        victim = scene.fleet.choose(self.kind, self.rng)
        seconds = scene.lease * self.rng.uniform(0.3, 3)
        if victim is None:
            return "nobody there"
        try:
            async with stopped(victim):
                await asyncio.sleep(seconds)
        except psutil.NoSuchProcess:
            return "nobody there any more"
        return f"pid {victim.pid} for {seconds:.1f} s, the lease is {scene.lease:g} s"


class StopConsumer(_Stop):
    name = "stop consumer"
    kind = "consumer"
    weight = 4


class StopProducer(_Stop):
    name = "stop producer"
    kind = "producer"


class StopCoordinator(_Stop):
    name = "stop coordinator"
    kind = "migrate"
    weight = 1


class SecondProducer(Fault):
    """A stopped producer's successor works when the old one wakes up."""

    name = "stop producer, start another"

    async def inject(self, scene: Scene) -> str:
        victim = scene.fleet.choose("producer", self.rng)
        seconds = self.rng.uniform(3, 10)
        if victim is None:
            return "nobody there"
        try:
            async with stopped(victim), scene.fleet.extra("producer"):
                await asyncio.sleep(seconds)
        except psutil.NoSuchProcess:
            return "nobody there any more"
        return f"pid {victim.pid} for {seconds:.1f} s"


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
        proxy.stall(*directions)
        try:
            await asyncio.sleep(seconds)
            if is_cut:
                proxy.cut()
        finally:
            proxy.heal()
        return f"{self.endpoint} {'+'.join(directions)} for {seconds:.1f} s{', then cut' if is_cut else ''}"


class SlowDown(_Net):
    name = "slow down"

    async def inject(self, scene: Scene) -> str:
        proxy = scene.world.proxies[self.endpoint]
        speed = round(10 ** self.rng.uniform(4, 5.5))
        seconds = self.rng.uniform(2, 8)
        proxy.slow_down(speed)
        try:
            await asyncio.sleep(seconds)
        finally:
            proxy.heal()
        return f"{self.endpoint} to {speed} bytes/s for {seconds:.1f} s"


class LoseCommitAnswer(_Net):
    """The server has committed, the client cannot know."""

    name = "lose answer to commit"
    weight = 4
    endpoints = ("target", "broker")

    async def inject(self, scene: Scene) -> str:
        proxy = scene.world.proxies[self.endpoint]
        before, times = proxy.losses, self.rng.randrange(1, 8)
        for _ in range(times):
            proxy.lose_answer(is_end_of_transaction if self.endpoint == "broker" else is_commit)
            for _ in range(30):
                await asyncio.sleep(0.1)
                if not proxy.is_pending:
                    break
        proxy.heal()
        return f"{self.endpoint}: {proxy.losses - before} of {times}"


FAULTS: tuple[type[Fault], ...] = (
    KillProducer,
    KillConsumer,
    KillCoordinator,
    KillBroker,
    RestartSource,
    RestartTarget,
    StopConsumer,
    StopProducer,
    StopCoordinator,
    SecondProducer,
    Cut,
    CutAfterBytes,
    Refuse,
    Stall,
    SlowDown,
    LoseCommitAnswer,
)
