"""The services as commands of their own, as containers run them, and what the target shows of them from outside."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter, defaultdict
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

import asyncpg

from tests.e2e.processes import COMMAND, Cli, Migrate

K = TypeVar("K", int, str)


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


class Watch(Generic[K]):
    """Looks at what moves on the target all the time: how long each of it stood still while it had work."""

    query: ClassVar[str]
    """Gives who or what moves, then what of it changes."""

    def __init__(self, target: str) -> None:
        self._uri = target
        self._moved: dict[K, float] = {}
        self._positions: dict[K, object] = {}
        self._longest: dict[K, float] = defaultdict(float)
        self.moves: Counter[K] = Counter()
        """How often each was seen to have moved since the last `forget`."""
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

    def longest_pauses(self) -> dict[K, float]:
        """Give for each the longest time in seconds between two moves, the time since the last one too."""
        now = time.monotonic()
        return {key: max(self._longest[key], now - moved) for key, moved in self._moved.items()}

    async def _watch(self) -> None:
        connection = await asyncpg.connect(self._uri)
        try:
            while True:
                rows = []
                with suppress(asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):  # there is no state yet
                    rows = await connection.fetch(self.query)
                now = time.monotonic()
                for key, *position in rows:
                    if self._positions.get(key) != position:
                        self.moves[key] += 1
                        self._longest[key] = max(self._longest[key], now - self._moved.get(key, now))
                        self._positions[key], self._moved[key] = position, now
                await asyncio.sleep(0.05)
        finally:
            await connection.close()


class LaneWatch(Watch[int]):
    """Looks at the checkpoints, while a writer keeps all lanes busy."""

    query = "select lane, commit_lsn, ordinal from _live_migration.checkpoints"


class CopyWatch(Watch[str]):
    """Looks at the parts that each consumer copies, which tell their rows once a second, while there are enough parts for all."""

    query = """
        select owner, array_agg(format('%s %s %s %s', oid, part, attempt, row_count) order by oid, part)
        from _live_migration.parts where state = 'copying' group by owner
    """

    def longest_pause(self, service: Service) -> float:
        """Give the longest pause of a consumer that has copied a part."""
        (pause,) = [pause for owner, pause in self.longest_pauses().items() if f"-{service.pid}-" in owner]
        return pause
