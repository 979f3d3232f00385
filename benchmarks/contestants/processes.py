"""This program as its users run it: coordinator, producer and consumers, each a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import psutil

from benchmarks.servers import Servers
from live_migration.common.supervisor import ChildGuard, StopOrder, log_tail, wait_for_exit

NAME = "bench"
_COMMAND = (sys.executable, "-P", "-m", "live_migration.coordinator.cli")
_STOP = StopOrder((signal.SIGTERM,), 20.0)
_LONGEST_SECONDS = 3600.0


class Program:
    """Starts and stops the processes of one migration; they end when the benchmark ends."""

    def __init__(self, servers: Servers, guard: ChildGuard, folder: Path, options: dict[str, str]) -> None:
        assert servers.kafka is not None
        self.servers = servers
        self.target_uri = options.pop("target", servers.target_uri)
        self._guard = guard
        self._folder = folder
        self._environment = {
            **os.environ,
            "SOURCE": servers.source_uri,
            "TARGET": self.target_uri,
            "KAFKA": servers.kafka.bootstrap,
            "LIVE_MIGRATION_NAME": NAME,
            "LIVE_MIGRATION_DIR": str(folder),
            **{f"LIVE_MIGRATION_{name.upper()}": value for name, value in options.items()},
        }
        self._running: list[tuple[str, subprocess.Popen[bytes], Path]] = []

    def start(self, kind: str, *arguments: str) -> None:
        """Start a `coordinator` (migrate --no-workers), `producer` or `consumer`."""
        command = ("migrate", "--no-workers") if kind == "coordinator" else (kind,)
        log = self._folder / f"{kind}-{len(self._running)}.log"
        process = self._guard.spawn(
            [*_COMMAND, *command, *arguments],
            stop=_STOP,
            log=log,
            cwd=self._folder,
            environment=self._environment,
        )
        self._running.append((kind, process, log))

    def signal(self, kind: str, number: signal.Signals) -> None:
        for each, process, _ in self._running:
            if each == kind:
                process.send_signal(number)

    async def stop(self, kind: str) -> None:
        """Let the processes of a kind drain and end."""
        ending = [each for each in self._running if each[0] == kind]
        self._running = [each for each in self._running if each[0] != kind]
        for _, process, _ in ending:
            process.send_signal(signal.SIGTERM)
        for _, process, _ in ending:
            await wait_for_exit(process, timeout_seconds=60)

    async def run(self, command: str, *, timeout_seconds: float) -> None:
        """Run a command of ours to its end; raises RuntimeError with the end of its log when it fails."""
        self.start(command)
        _, process, log = self._running.pop()
        code = await wait_for_exit(process, timeout_seconds=timeout_seconds)
        if code != 0:
            raise RuntimeError(f"our {command} ended with code {code}:\n{log_tail(log)}")

    def check(self) -> None:
        """Raise RuntimeError with the end of its log when a process has ended."""
        for kind, process, log in self._running:
            if process.poll() is not None:
                raise RuntimeError(f"our {kind} ended with code {process.returncode}:\n{log_tail(log)}")

    def kind_of(self, process: psutil.Process) -> str | None:
        assert self.servers.kafka is not None
        if process.pid == self.servers.kafka.pid:
            return "broker"
        return next((f"our {kind}" for kind, each, _ in self._running if each.pid == process.pid), None)

    async def until_phase(self, phase: str, note: Callable[[str, float], None] = lambda phase, at: None) -> None:
        """Wait for a phase; `note` is told each new phase and when it was seen."""
        connection = await asyncpg.connect(self.servers.target_uri)
        seen = None
        try:
            async with asyncio.timeout(_LONGEST_SECONDS):
                while seen != phase:
                    self.check()
                    with suppress(asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
                        now = await connection.fetchval("select phase from _live_migration.migration")
                        if now != seen:
                            note(now, time.monotonic())
                        seen = now
                    await asyncio.sleep(0.02)
        finally:
            await connection.close()


@asynccontextmanager
async def program(servers: Servers, options: dict[str, str]) -> AsyncIterator[Program]:
    """Give the program, nothing of it started yet."""
    guard = await ChildGuard.open()
    try:
        yield Program(servers, guard, _made(guard.make_folder("live-migration-bench")), dict(options))
    finally:
        await guard.close()


def _made(folder: Path) -> Path:
    (folder / "logs").mkdir()
    return folder
