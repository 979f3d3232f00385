"""The services as commands of their own, as containers run them, and what the target shows of them from outside."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter, defaultdict
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import asyncpg

from tests.e2e.processes import COMMAND, Cli, Migrate


class Service:
    """A running `live-migration producer` or `live-migration consumer`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def owner(self) -> str:
        """Pattern (SQL LIKE) of the name that it claims by."""
        return f"consumer-%-{self.pid}-%"

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def terminate(self) -> int:
        """SIGTERM; give the exit code."""
        self.send(signal.SIGTERM)
        async with asyncio.timeout(40):
            return await self.process.wait()


class Services:
    """`migrate --no-workers`, a producer, and consumers that come and go; leaving the context ends them all."""

    def __init__(self, cli: Cli, name: str, folder: Path, **settings: object) -> None:
        self._cli = cli
        self._folder = folder
        self._settings = {f"LIVE_MIGRATION_{key.upper()}": str(value) for key, value in settings.items()}
        self._environment = {**cli.environment, "LIVE_MIGRATION_NAME": name, **self._settings}
        self._running: list[Service] = []
        self._stack = AsyncExitStack()
        self.migrate: Migrate
        self.target: asyncpg.Connection

    async def __aenter__(self) -> Self:
        self.target = await asyncpg.connect(self._cli.target)
        self._stack.push_async_callback(self.target.close)
        options = [
            f"--{key.removeprefix('LIVE_MIGRATION_').lower().replace('_', '-')}={value}"
            for key, value in self._settings.items()
        ]
        self.migrate = await self._cli.migrate("--no-workers", *options)
        self._stack.push_async_callback(self.migrate.close)
        await self.start("producer")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for service in self._running:
            with suppress(ProcessLookupError):
                service.process.kill()
            await service.process.wait()
        await self._stack.aclose()

    async def start(self, kind: str) -> Service:
        log = self._folder / f"{kind}-{len(self._running)}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *COMMAND, kind, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment
            )
        self._running.append(Service(process, log))
        return self._running[-1]

    async def consumers(self, count: int) -> list[Service]:
        return [await self.start("consumer") for _ in range(count)]

    async def until(self, query: str, *arguments: object, timeout: float = 90) -> Any:
        """Wait until `query` gives something true on the target, and give it."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    with suppress(asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
                        if value := await self.target.fetchval(query, *arguments):
                            return value
                    assert self.migrate.process.returncode is None, self.migrate.log()
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(
                f"not within {timeout} s: {query} {arguments}\n{self.migrate.log()}\n{self.logs()}"
            ) from None

    async def seconds_until(self, query: str, *arguments: object) -> float:
        began = time.monotonic()
        await self.until(query, *arguments)
        return time.monotonic() - began

    def logs(self) -> str:
        return "\n".join(f"{s.log.name} (pid {s.pid}):\n{s.log.read_text()[-2500:]}" for s in self._running)


class LaneWatch:
    """Looks at the checkpoints all the time: how long each lane stood still while a writer keeps all of them busy."""

    def __init__(self, target: str) -> None:
        self._uri = target
        self._moved: dict[int, float] = {}
        self._positions: dict[int, object] = {}
        self._longest: dict[int, float] = defaultdict(float)
        self.moves: Counter[int] = Counter()
        """How often each lane was seen to have moved since the last `forget`."""
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def forget(self) -> None:
        """Begin to measure anew."""
        self._longest.clear()
        self.moves.clear()
        now = time.monotonic()
        self._moved = dict.fromkeys(self._moved, now)

    def longest_pauses(self) -> dict[int, float]:
        """Give for each lane the longest time in seconds between two moves, the time since the last one too."""
        now = time.monotonic()
        return {lane: max(self._longest[lane], now - moved) for lane, moved in self._moved.items()}

    async def _watch(self) -> None:
        connection = await asyncpg.connect(self._uri)
        try:
            while True:
                rows = await connection.fetch("select lane, commit_lsn, ordinal from _live_migration.checkpoints")
                now = time.monotonic()
                for lane, *position in rows:
                    if self._positions.get(lane) != position:
                        self.moves[lane] += 1
                        self._longest[lane] = max(self._longest[lane], now - self._moved.get(lane, now))
                        self._positions[lane], self._moved[lane] = position, now
                await asyncio.sleep(0.05)
        finally:
            await connection.close()
