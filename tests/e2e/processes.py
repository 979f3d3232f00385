"""The program as its users run it: `live-migration …` in processes of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import asyncpg
import psutil

COMMAND = (sys.executable, "-P", "-m", "live_migration.coordinator.cli")


class Cli:
    """Runs commands of one migration; `close` ends whatever is left of them."""

    def __init__(self, source: str, target: str, kafka: str, name: str, folder: Path) -> None:
        self.target = target
        self.environment = {**os.environ, "SOURCE": source, "TARGET": target, "KAFKA": kafka}
        self._options = ("--name", name, "--dir", str(folder))
        self._folder = folder
        self._started: list[psutil.Process] = []
        self._log_number = 0

    async def run(self, *arguments: str, timeout: float = 120) -> tuple[int, str, str]:
        """Run a command to its end; give exit code, standard output and standard error."""
        process = await asyncio.create_subprocess_exec(
            *COMMAND, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=self.environment
        )
        async with asyncio.timeout(timeout):
            out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    async def migrate(self, *options: str) -> Migrate:
        """Start `migrate` in the background."""
        self._log_number += 1
        log = self._folder.parent / f"migrate-{self._log_number}.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                "migrate",
                *self._options,
                *options,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=self.environment,
            )
        return Migrate(process, log, self)

    async def phase(self) -> str | None:
        """Give the migration's phase, None before there is one."""
        connection = await asyncpg.connect(self.target)
        try:
            phase: str | None = await connection.fetchval("select phase from _live_migration.migration")
            return phase
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            return None
        finally:
            await connection.close()


class Migrate:
    """A running `migrate` and the workers it started."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, cli: Cli) -> None:
        self.process = process
        self._log = log
        self._cli = cli

    def children(self, kind: str) -> list[psutil.Process]:
        """Give its live workers of a kind, `producer` or `consumer`."""
        if self.process.returncode is not None:
            return []
        return [c for c in psutil.Process(self.process.pid).children(recursive=True) if kind in c.cmdline()]

    async def until_phase(self, *phases: str, timeout: float = 120) -> None:
        """Wait until the migration is in one of `phases`."""
        async with asyncio.timeout(timeout):
            while await self._cli.phase() not in phases:
                assert self.process.returncode is None, self.log()
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        """kill -9, and wait until its workers have noticed."""
        workers = self.children("producer") + self.children("consumer")
        self.process.kill()
        await self.process.wait()
        async with asyncio.timeout(30):
            while any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers):
                await asyncio.sleep(0.05)

    async def interrupt(self) -> int:
        """ctrl-C, once it has begun to speak; give the exit code."""
        async with asyncio.timeout(60):
            while not self.log() and self.process.returncode is None:
                await asyncio.sleep(0.05)
        self.process.send_signal(signal.SIGINT)
        return await self.wait()

    async def wait(self, timeout: float = 180) -> int:
        """Wait for its end; give the exit code."""
        try:
            async with asyncio.timeout(timeout):
                return await self.process.wait()
        except TimeoutError:
            raise AssertionError(f"migrate did not end; its log:\n{self.log()}") from None

    async def close(self) -> None:
        """End it, if it still runs."""
        if self.process.returncode is None:
            await self.kill()

    def log(self) -> str:
        """Give what it printed."""
        return self._log.read_text()[-6000:]
