"""Faults that end processes and servers, and the list of all that need neither root nor libfaketime nor an administrator."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from tests.chaos.fault import Fault, Missed, Scene, to_its_end
from tests.chaos.fleet import Kind
from tests.chaos.net_faults import Cut, CutAfterBytes, LoseCommitAnswer, Refuse, SlowDown, Stall
from tests.chaos.stops import SecondProducer, StopConsumer, StopCoordinator, StopProducer
from tests.chaos.world import Side


class _Kill(Fault):
    kind: ClassVar[Kind]

    async def inject(self, scene: Scene) -> str:
        victim = scene.fleet.choose(self.kind, self.rng)
        if victim is None:
            raise Missed("nobody there")
        scene.fleet.kill(victim)
        return f"pid {victim.pid}"


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
