"""What a fault is, and what it may touch."""

from __future__ import annotations

import asyncio
import random
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import asyncpg

from tests.chaos.fleet import Fleet
from tests.chaos.world import GONE, Side, World


class Missed(Exception):
    """A fault found nothing that it could hit: it is none of the round's faults, and another is drawn for it."""


@dataclass(slots=True)
class Scene:
    """What a fault may touch."""

    world: World
    fleet: Fleet
    database: str
    lease: float
    phase: str = "start"
    source_restarts: int = 0
    stopped: set[int] = field(default_factory=set)
    """Processes that a fault keeps stopped: another one would wake them too early."""


class Fault(ABC):
    """One thing that goes wrong and heals itself within a bounded time; its choices come from the seed alone."""

    name: ClassVar[str]
    weight: ClassVar[int] = 2

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    @abstractmethod
    async def inject(self, scene: Scene) -> str:
        """Do it and undo it; say to whom and for how long.

        Raises:
            Missed: there was no victim.
        """


class LogEnd:
    """A server's log from now on: what it says of a fault is the fault's effect."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = self._length()

    def tells(self, pattern: re.Pattern[str]) -> bool:
        """Tell whether anything that came since matches; a log that was begun anew counts from its beginning."""
        if not self._path.exists():
            return False
        with self._path.open("rb") as file:
            file.seek(self._size if self._length() >= self._size else 0)
            return pattern.search(file.read().decode(errors="replace")) is not None

    def _length(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await what must not be left half done when the round ends: a server is to run again."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


@asynccontextmanager
async def direct(scene: Scene, side: Side, database: str | None = None) -> AsyncIterator[asyncpg.Connection]:
    """Open a session past the proxy, to the round's database by default; waits for a server that just starts."""
    async with asyncio.timeout(60):
        while True:
            try:
                connection = await asyncpg.connect(scene.world.uri(side, database or scene.database), timeout=5)
                break
            except GONE:
                await asyncio.sleep(0.1)
    try:
        yield connection
    finally:
        connection.terminate()
