"""The producer and the consumers as processes of this machine: started, watched, restarted, stopped.

They are children of a guard (`common.supervisor`), which ends them when this process ends, even by `kill -9`.
Secrets go to them by environment alone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from live_migration.common.errors import LiveMigrationError
from live_migration.common.settings import Settings
from live_migration.common.supervisor import ChildGuard, StopOrder, log_tail
from live_migration.coordinator.observer import Reporter

Kind = Literal["producer", "consumer"]
_STOP = StopOrder((signal.SIGTERM,), 20.0)
_QUICK_SECONDS = 30.0
_FIRST_PAUSE_SECONDS = 0.5
_MOST_QUICK_DEATHS = 5
_LOG_BYTES = 64 << 20


class WorkerFailed(LiveMigrationError):
    """A worker dies again and again."""


@dataclass(slots=True)
class _Worker:
    kind: Kind
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    next_start: float = 0.0
    quick_ends: int = 0
    quick_deaths: int = 0
    """Those of `quick_ends` in a row that came with an error."""


class WorkerPool:
    """One producer and the consumers that the settings ask for; `async with` stops them all at the end."""

    def __init__(self, settings: Settings, reporter: Reporter) -> None:
        self._settings = settings
        self._reporter = reporter
        self._guard: ChildGuard | None = None
        self._workers: list[_Worker] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start them; when they run already, do nothing."""
        if self._guard is not None or not self._settings.workers:
            return
        folder = self._settings.dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self._guard = await ChildGuard.open()
        self._workers = [_Worker("producer", folder / "producer.log")]
        self._workers += [
            _Worker("consumer", folder / f"consumer-{number}.log") for number in range(1, self._settings.consumers + 1)
        ]
        for worker in self._workers:
            self._spawn(worker)
        self._reporter.note(f"started a producer and {self._settings.consumers} consumers, their logs are in {folder}")

    async def watch(self, are_needed: Callable[[], Awaitable[bool]]) -> None:
        """Restart those that end, later each time; never returns.

        `are_needed`: whether the migration cannot do without them, asked before one that dies again and again ends it.

        Raises:
            WorkerFailed: one that is needed died quickly too often in a row; the end of its log is in the message.
        """
        while True:
            for worker in tuple(self._workers):
                try:
                    self._look_after(worker)
                except WorkerFailed as error:
                    if await are_needed():
                        raise
                    self._workers.remove(worker)
                    self._reporter.warning(
                        f"{error.message}\nThe {worker.kind} is given up, for nothing needs it any more"
                    )
            await asyncio.sleep(0.25)

    async def stop(self) -> None:
        """Let them drain and end; whoever does not is killed."""
        guard, self._guard = self._guard, None
        workers, self._workers = self._workers, []
        if guard is None:
            return
        try:
            await _drain([worker.process for worker in workers if worker.process is not None])
        finally:
            await guard.close()

    def _look_after(self, worker: _Worker) -> None:
        now = time.monotonic()
        if worker.process is None:
            if now >= worker.next_start:
                self._spawn(worker)
            return
        code = worker.process.poll()
        if code is None:
            if now - worker.started_at > _QUICK_SECONDS:
                worker.quick_ends = worker.quick_deaths = 0
            return
        worker.process = None
        is_quick = now - worker.started_at < _QUICK_SECONDS
        # Without an error they end when the migration is done, which we may not have noticed yet.
        worker.quick_ends = worker.quick_ends + 1 if is_quick else 0
        worker.quick_deaths = worker.quick_deaths + 1 if is_quick and code else 0
        if worker.quick_deaths >= _MOST_QUICK_DEATHS:
            raise WorkerFailed(
                f"the {worker.kind} ended {worker.quick_deaths} times in a row, exit code {code}; "
                f"the end of {worker.log}:\n{log_tail(worker.log)}",
                hint="Mend what its log complains of, then run `live-migration migrate` again.",
            )
        pause = min(_FIRST_PAUSE_SECONDS * 2**worker.quick_ends, 10.0)
        worker.next_start = now + pause
        if code:
            self._reporter.warning(f"a {worker.kind} ended with code {code}; it is started again in {pause:g} s")

    def _spawn(self, worker: _Worker) -> None:
        if self._guard is None:
            return
        if worker.log.exists() and worker.log.stat().st_size > _LOG_BYTES:
            worker.log.replace(worker.log.with_suffix(".log.1"))
        worker.started_at = time.monotonic()
        worker.process = self._guard.spawn(
            worker_command(worker.kind),
            stop=_STOP,
            log=worker.log,
            cwd=Path.cwd(),
            environment={**os.environ, **self._settings.environment()},
        )


def worker_command(kind: Kind) -> list[str]:
    """Give the command that runs a worker; it takes its settings from the environment."""
    return [sys.executable, "-P", "-m", "live_migration.coordinator.cli", kind]


async def _drain(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask all to end at once and give them their time; the guard, which asks one after another, kills the rest."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP.grace_seconds
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.kill()
            return
        await asyncio.sleep(0.02)
