"""Faults of processes that live: consumers that come and go, workers asked to end, clocks that jump."""

from __future__ import annotations

import asyncio
import random
import signal

from tests.chaos.clock import CACHE_SECONDS
from tests.chaos.fault import Fault, Missed, Scene


class ComeAndGo(Fault):
    """Consumers join and leave all the time, in order or by kill -9: each time the group rebalances."""

    name = "consumers come and go"
    weight = 5

    async def inject(self, scene: Scene) -> str:
        times = self.rng.randrange(2, 5)
        said = []
        for _ in range(times):
            name = scene.fleet.join()
            await asyncio.sleep(self.rng.uniform(0.5, 5))
            if self.rng.random() < 0.3:
                scene.fleet.discharge(name)
                said.append("killed")
            else:
                said.append(await scene.fleet.dismiss(name))
        return ", ".join(said)


class Terminate(Fault):
    """A worker is asked to end, and started again."""

    name = "SIGTERM"

    async def inject(self, scene: Scene) -> str:
        kind = self.rng.choice(("producer", "consumer", "migrate"))
        victim = scene.fleet.choose(kind, self.rng)
        if victim is None:
            raise Missed(f"nobody there ({kind})")
        scene.fleet.kill(victim, signal.SIGTERM)
        return f"{kind} pid {victim.pid}"


class ClockJump(Fault):
    """The clock of one of our processes jumps, to and fro, and stays wrong until the round's end.

    It hits when one process with the library in it lives on for the second within which the library sees a jump. Whether that process
    asked for the time meanwhile cannot be seen from outside.
    """

    name = "clock jump"
    weight = 12  # in few rounds only

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.offsets = [round(rng.choice((-1, 1)) * 10 ** rng.uniform(0, 4)) for _ in range(rng.randrange(1, 4))]

    async def inject(self, scene: Scene) -> str:
        clocks = scene.fleet.clocks()
        if not clocks:
            raise Missed(f"skipped: {scene.fleet.no_clocks or 'no command of its own runs'}")
        clock = self.rng.choice(sorted(clocks))
        seen = 0
        for offset in self.offsets:
            before = scene.fleet.wearer(clock)
            clocks[clock].set(offset)
            seconds = self.rng.uniform(0.5, 2.5)
            await asyncio.sleep(seconds)
            seen += seconds >= CACHE_SECONDS and before is not None and scene.fleet.wearer(clock) == before
        if not seen:
            raise Missed(f"{clock} did not live through a jump")
        return f"{clock} by {', then '.join(f'{offset:+} s' for offset in self.offsets)}, lived through {seen}"


FLEET_FAULTS: tuple[type[Fault], ...] = (ComeAndGo, Terminate, ClockJump)
