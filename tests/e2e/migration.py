"""A whole migration inside the test's event loop: coordinator, producer and consumers as tasks over real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import asyncpg

from live_migration.common.settings import Settings, load_settings
from live_migration.consumer.service import run_consumer
from live_migration.coordinator.conductor import conduct
from live_migration.coordinator.phases import Phase
from live_migration.producer.service import run_producer


class RecordingObserver:
    """Keeps what the coordinator says."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.phases: list[Phase] = []

    def phase_changed(self, phase: Phase) -> None:
        self.phases.append(phase)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warning(self, message: str) -> None:
        self.warnings.append(message)


class Service:
    """A restartable task of ours."""

    def __init__(self, run: Callable[[Settings, asyncio.Event], Awaitable[None]], settings: Settings) -> None:
        self._run = run
        self._settings = settings
        self._stop = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._stop = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(self._settings, self._stop))

    async def drain(self) -> None:
        """Stop as SIGTERM does."""
        self._stop.set()
        if self.task:
            await asyncio.wait_for(self.task, 60)

    async def crash(self) -> None:
        """Stop in the middle of whatever it does."""
        if self.task:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task


class Migration:
    """Coordinator, producer and `consumers` consumers; `async with` starts them all, leaving ends them all."""

    def __init__(
        self, source: str, target: str, kafka: str, name: str, folder: Path, *, consumers: int = 2, **options: Any
    ) -> None:
        self.source, self.target = source, target
        self.settings = load_settings(
            {
                "source": source,
                "target": target,
                "kafka": kafka,
                "name": name,
                "dir": folder,
                "workers": False,
                **options,
            }
        )
        self.observer = RecordingObserver()
        self.stop_coordinator = asyncio.Event()
        self.ask_cutover = asyncio.Event()
        self.producer = Service(run_producer, self.settings)
        self.consumers = [Service(run_consumer, self.settings) for _ in range(consumers)]
        self.coordinator: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.start_coordinator()
        self.producer.start()
        for consumer in self.consumers:
            consumer.start()
        return self

    def start_coordinator(self, *, recopy: bool = False) -> None:
        self.stop_coordinator = asyncio.Event()
        self.coordinator = asyncio.ensure_future(
            conduct(
                self.settings,
                stop=self.stop_coordinator,
                ask_cutover=self.ask_cutover,
                observer=self.observer,
                recopy=recopy,
            )
        )

    async def stop(self) -> None:
        """Stop the coordinator as ctrl-C does."""
        self.stop_coordinator.set()
        assert self.coordinator is not None
        await asyncio.wait_for(self.coordinator, 60)

    @asynccontextmanager
    async def closing(self) -> AsyncIterator[Self]:
        """Start nothing; end all on leaving."""
        try:
            yield self
        finally:
            await self.__aexit__()

    async def __aexit__(self, *_: object) -> None:
        tasks = [t for t in (self.coordinator, self.producer.task, *(c.task for c in self.consumers)) if t]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def until(
        self, what: str, query: str, *arguments: object, where: str = "target", timeout: float = 120
    ) -> Any:
        """Wait until `query` gives something true on source or target; fail at once when a part of the migration has failed."""
        connection = await asyncpg.connect(getattr(self, where))
        try:
            async with asyncio.timeout(timeout):
                while True:
                    self.raise_failures()
                    with suppress(asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
                        if result := await connection.fetchval(query, *arguments):
                            return result
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(
                f"{what}: not within {timeout} s; notes {self.observer.notes[-5:]}, {self.observer.warnings[-5:]}"
            ) from None
        finally:
            await connection.close()

    async def until_phase(self, *phases: str, timeout: float = 120) -> None:
        query = "select phase = any($1::text[]) from _live_migration.migration"
        await self.until(f"phase {phases}", query, list(phases), timeout=timeout)

    async def until_copied(self) -> None:
        await self.until(
            "every table copied", "select bool_and(state in ('copied', 'ready')) from _live_migration.tables"
        )

    async def finish(self, timeout: float = 180) -> None:
        """Ask for the cutover and wait until the coordinator is done."""
        self.ask_cutover.set()
        assert self.coordinator is not None
        try:
            async with asyncio.timeout(timeout):
                while not self.coordinator.done():
                    self.raise_failures()
                    await asyncio.wait([self.coordinator], timeout=0.2)
        except TimeoutError:
            raise AssertionError(
                f"not done within {timeout} s; notes {self.observer.notes[-5:]}, {self.observer.warnings[-5:]}"
            ) from None
        await self.coordinator

    def raise_failures(self) -> None:
        for task in (self.coordinator, self.producer.task, *(c.task for c in self.consumers)):
            if task and task.done() and not task.cancelled() and task.exception():
                raise task.exception()  # type: ignore[misc]
