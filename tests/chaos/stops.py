"""SIGSTOP: processes that stand still for a while and wake up beside whoever took their work."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import ClassVar

import asyncpg
import psutil

from live_migration.consumer.assignment import SESSION_SECONDS
from tests.chaos.fault import Fault, Missed, Scene
from tests.chaos.fleet import Kind
from tests.chaos.world import GONE, Side

_LONG_SHARE = 1 / 3
_BESIDE_SECONDS = 3.0
"""How long whoever has taken over is kept beside the one that wakes up."""
_TAKE_OVER_SECONDS = 20.0
_HELD = """
    select (select count(*) from _live_migration.checkpoints where owner like $1)
         + (select count(*) from _live_migration.parts where state = 'copying' and owner like $1)
         + (select count(*) from _live_migration.tables where state = 'copying' and owner like $1)
"""
_READER = "select active_pid from pg_replication_slots where slot_name = $1"


@asynccontextmanager
async def stopped(scene: Scene, victim: psutil.Process) -> AsyncIterator[None]:
    """Keep a process stopped.

    Raises:
        Missed: it has just ended.
    """
    scene.stopped.add(victim.pid)
    try:
        victim.send_signal(signal.SIGSTOP)
        yield
    except psutil.NoSuchProcess as error:
        raise Missed("nobody there any more") from error
    finally:
        scene.stopped.discard(victim.pid)
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGCONT)


class _Stop(Fault):
    """SIGSTOP for 0.3 to 3 times the lease, then SIGCONT."""

    kind: ClassVar[Kind]

    async def inject(self, scene: Scene) -> str:
        victim = scene.fleet.choose(self.kind, self.rng, but=scene.stopped)
        seconds = scene.lease * self.rng.uniform(0.3, 3)
        if victim is None:
            raise Missed("nobody there")
        return await self.stop(scene, victim, seconds)

    async def stop(self, scene: Scene, victim: psutil.Process, seconds: float) -> str:
        """Stop it for so long; say so."""
        async with stopped(scene, victim):
            await asyncio.sleep(seconds)
        return f"pid {victim.pid} for {seconds:.1f} s, the lease is {scene.lease:g} s"


class StopConsumer(_Stop):
    """As the others, but one time in three for longer than lease and session in Kafka.

    Then another consumer is there to take over, one more where it is the only one, and is still there when the stopped one wakes up. It
    misses where the stopped one held nothing to take over; where the target could not be asked that (`?`), it counts.
    """

    name = "stop consumer"
    kind = "consumer"
    weight = 4

    async def stop(self, scene: Scene, victim: psutil.Process, seconds: float) -> str:
        if self.rng.random() >= _LONG_SHARE:
            return await super().stop(scene, victim, seconds)
        seconds = max(SESSION_SECONDS, scene.lease) * self.rng.uniform(1.2, 2)
        async with AsyncExitStack() as beside:
            async with stopped(scene, victim):
                before = await _held_by(scene, victim)
                if before == 0:
                    raise Missed("it held no claim")
                if not _others(scene, victim):
                    await beside.enter_async_context(scene.fleet.extra("consumer"))
                await asyncio.sleep(seconds)
                after = await _held_by(scene, victim)
                if not _others(scene, victim):
                    raise Missed("nobody is there to take over")
            await asyncio.sleep(_BESIDE_SECONDS)
        return f"pid {victim.pid} for {seconds:.1f} s beside another, held {before} and then {after} claims"


def _others(scene: Scene, victim: psutil.Process) -> list[psutil.Process]:
    return [each for each in scene.fleet.processes("consumer") if each.pid not in scene.stopped | {victim.pid}]


async def _held_by(scene: Scene, victim: psutil.Process) -> object:
    """Give how many lanes, tables and parts a consumer claims on the target; `?` where that cannot be asked."""
    return await _ask(scene, "target", _HELD, f"consumer-%-{victim.pid}-%")


async def _ask(scene: Scene, side: Side, query: str, argument: str) -> object:
    try:
        connection = await asyncpg.connect(scene.world.uri(side, scene.database), timeout=5)
        try:
            return await connection.fetchval(query, argument, timeout=5)
        finally:
            connection.terminate()
    except GONE:
        return "?"


class StopProducer(_Stop):
    name = "stop producer"
    kind = "producer"


class StopCoordinator(_Stop):
    name = "stop coordinator"
    kind = "migrate"
    weight = 1


class SecondProducer(Fault):
    """A stopped producer wakes up beside its successor, which has taken the slot by then where there is one.

    It misses where nobody read the slot before or after; where the source could not be asked (`?`), it counts.
    """

    name = "stop producer, start another"

    async def inject(self, scene: Scene) -> str:
        victim = scene.fleet.choose("producer", self.rng, but=scene.stopped)
        seconds = self.rng.uniform(3, 10)
        if victim is None:
            raise Missed("nobody there")
        async with AsyncExitStack() as successor:
            async with stopped(scene, victim):
                before = await _ask(scene, "source", _READER, scene.database)
                other = await successor.enter_async_context(scene.fleet.extra("producer"))
                await asyncio.sleep(seconds)
                after = await _other_reader(scene, before)
                if not other.is_running:
                    raise Missed("the successor does not run")
                if before is None and after is None:
                    raise Missed("nobody read the slot")
            await asyncio.sleep(_BESIDE_SECONDS)
        return (
            f"pid {victim.pid} for {seconds:.1f} s at the least; the slot was read by pid {before}, then by pid {after}"
        )


async def _other_reader(scene: Scene, before: object) -> object:
    """Wait for a while until another session reads the slot, if one did before; give who reads it."""
    try:
        async with asyncio.timeout(_TAKE_OVER_SECONDS):
            while isinstance(before, int):
                after = await _ask(scene, "source", _READER, scene.database)
                if isinstance(after, int) and after != before:
                    return after
                await asyncio.sleep(0.1)
    except TimeoutError:
        pass
    return await _ask(scene, "source", _READER, scene.database)
