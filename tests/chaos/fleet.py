"""The processes under test, kept running as a container runtime does: what ends is started again."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import psutil

from live_migration.common.supervisor import ChildGuard, StopOrder, log_tail
from tests.chaos.clock import Clock, find_library
from tests.e2e.processes import COMMAND

Kind = Literal["migrate", "producer", "consumer"]
_STOP = StopOrder((signal.SIGTERM,), 5.0)
_DRAIN_SECONDS = 25.0
_ERROR = re.compile(r"^error: .*(?:\n  next: .*)?", re.MULTILINE)


@dataclass(slots=True)
class Managed:
    """A command that is to run until it ends with exit code 0, or is dismissed."""

    kind: Kind
    name: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    ended: float = 0.0
    quick_deaths: int = 0
    started: float = 0.0
    is_done: bool = False
    is_dismissed: bool = False
    killed: set[int] = field(default_factory=set)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Fleet:
    """`migrate`, and producer and consumers as its children or as commands of their own; `async with` runs them."""

    def __init__(
        self, environment: dict[str, str], folder: Path, *, own_workers: bool, consumers: int, has_clocks: bool = False
    ) -> None:
        """Describe the processes.

        Args:
            environment: SOURCE, TARGET, KAFKA and settings.
            folder: for their logs and for `--dir`.
            own_workers: `migrate` starts its workers; else each is a command that we start.
            has_clocks: give each process a clock that can be set wrong, where libfaketime is installed.
        """
        self.environment = {**os.environ, **environment}
        self.own_workers = own_workers
        self.spared: frozenset[Kind] = frozenset()
        """Kinds of which `choose` leaves the oldest process alone."""
        self.exits: list[str] = []
        """Ends with an exit code that no fault of ours gave, one line each."""
        self._folder = folder
        self._consumers = consumers
        self._guard: ChildGuard | None = None
        self._managed: list[Managed] = []
        self._keeper: asyncio.Task[None] | None = None
        self._number = consumers
        self._library = find_library() if has_clocks else None
        self.no_clocks = "" if self._library else "libfaketime is not installed" if has_clocks else "not in this round"
        self._clocks: dict[str, Clock] = {}

    async def __aenter__(self) -> Self:
        (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        self._guard = await ChildGuard.open()
        self._add("migrate", "migrate")
        if not self.own_workers:
            self._add("producer", "producer")
            for number in range(self._consumers):
                self._add("consumer", f"consumer-{number}")
        self._keeper = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._keeper:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        for process in self.processes("migrate") + self.processes("producer") + self.processes("consumer"):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)  # else those that a cancelled fault stopped do not hear SIGTERM
        if self._guard:
            await self._guard.close()

    def _add(self, kind: Kind, name: str) -> Managed:
        managed = Managed(kind, name, self._folder / "logs" / f"{name}.log")
        if self._library:
            self._clocks[name] = Clock(self._library, self._folder / f"{name}.clock")
        self._managed.append(managed)
        self._start(managed)
        return managed

    def _start(self, managed: Managed) -> None:
        assert self._guard is not None
        options = {"migrate": [] if self.own_workers else ["--no-workers"]}.get(managed.kind, [])
        clock = self._clocks.get(managed.name)
        managed.started = time.monotonic()
        managed.process = self._guard.spawn(
            [*(clock.command(managed.kind) if clock else (*COMMAND, managed.kind)), *options],
            stop=_STOP,
            log=managed.log,
            cwd=self._folder,
            environment=self.environment,
        )

    async def _keep(self) -> None:
        while True:
            for managed in self._managed:
                self._look_after(managed)
            await asyncio.sleep(0.1)

    def _look_after(self, managed: Managed) -> None:
        process = managed.process
        if managed.is_done or managed.is_dismissed:
            return
        if process is not None:
            code = process.poll()
            if code is None:
                return
            managed.process = None
            managed.ended = time.monotonic()
            managed.quick_deaths = managed.quick_deaths + 1 if managed.ended - managed.started < 10 else 0
            if code == 0 and process.pid not in managed.killed:
                managed.is_done = True
                return
            if process.pid not in managed.killed:
                last = log_tail(managed.log, line_count=3).replace("\n", " | ")[-300:]
                self.exits.append(f"{managed.name} ended with code {code}: {last}")
        if time.monotonic() - managed.ended > min(0.3 * 2**managed.quick_deaths, 5.0):
            self._start(managed)

    @property
    def migrate(self) -> Managed:
        return self._managed[0]

    def processes(self, kind: Kind) -> list[psutil.Process]:
        """Give the live processes of a kind, whoever started them."""
        found = []
        for managed in self._managed:
            if managed.kind == kind and managed.is_running and managed.process is not None:
                with suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(managed.process.pid))
        parent = self.migrate.process
        if kind != "migrate" and parent is not None:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(parent.pid).children():
                    with suppress(psutil.NoSuchProcess):
                        if child.cmdline()[-1:] == [kind]:
                            found.append(child)
        return found

    def choose(self, kind: Kind, rng: random.Random, *, but: Collection[int] = ()) -> psutil.Process | None:
        """Give one of the live processes of a kind but those with these pids, if there is one; the oldest of a spared kind is none."""
        found = [process for process in self.processes(kind) if process.pid not in but]
        if kind in self.spared and found:
            found.remove(min(found, key=lambda process: process.create_time()))
        return rng.choice(found) if found else None

    def kill(self, process: psutil.Process, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal that is meant to end it, so that its end counts as ours."""
        for managed in self._managed:
            if managed.process is not None and managed.process.pid == process.pid:
                managed.killed.add(process.pid)
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)

    def clocks(self) -> dict[str, Clock]:
        """Give the clocks of the running processes by the processes' names."""
        running = [each.name for each in self._managed if each.is_running]
        return {name: clock for name, clock in self._clocks.items() if name in running}

    def wearer(self, name: str) -> int | None:
        """Give the pid of the process with this name if the library of wrong clocks is loaded in it."""
        process = next((each.process for each in self._managed if each.name == name and each.is_running), None)
        if process is None or self._library is None:
            return None
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            return None
        return process.pid if self._library.name in maps else None

    def has_ended(self, kind: Kind) -> bool:
        """Tell whether the commands of a kind that are to run have all ended in order."""
        return all(each.is_done or each.is_dismissed for each in self._managed if each.kind == kind)

    def worker_errors(self) -> list[str]:
        """Give the errors that ended workers of `migrate`'s own, one line each: it starts them again, and we see no exit."""
        logs = sorted((self._folder / "data" / "logs").glob("*.log"))
        return [
            f"{log.stem}: {error.replace(chr(10), ' | ')}"
            for log in logs
            for error in _ERROR.findall(log.read_text(errors="replace"))
        ]

    def join(self) -> str:
        """Let another consumer join, a command of its own; gives its name."""
        self._number += 1
        return self._add("consumer", f"joined-{self._number}").name

    def discharge(self, name: str) -> None:
        """Let one that joined leave by kill -9."""
        managed = next(each for each in self._managed if each.name == name)
        managed.is_dismissed = True
        if managed.process is not None:
            managed.process.kill()

    async def dismiss(self, name: str) -> str:
        """Let one that joined leave by SIGTERM; says how it ended."""
        managed = next(each for each in self._managed if each.name == name)
        managed.is_dismissed = True
        process = managed.process
        if process is None:
            return "had ended"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while process.poll() is None:
                    await asyncio.sleep(0.1)
        except TimeoutError:
            process.kill()
            self.exits.append(f"{name} did not leave within {_DRAIN_SECONDS:g} s after SIGTERM")
            return "had to be killed"
        if process.returncode not in (0, -signal.SIGTERM, -signal.SIGKILL):
            self.exits.append(
                f"{name} left with code {process.returncode}: {log_tail(managed.log, line_count=3)[-300:]}"
            )
        return f"left with code {process.returncode} in {time.monotonic() - began:.1f} s"

    @asynccontextmanager
    async def extra(self, kind: Kind) -> AsyncIterator[Managed]:
        """Run one more command, which is dismissed afterwards."""
        self._number += 1
        managed = self._add(kind, f"extra-{self._number}")
        try:
            yield managed
        finally:
            await self.dismiss(managed.name)

    async def run(self, *arguments: str, timeout: float, environment: dict[str, str] | None = None) -> tuple[int, str]:
        """Run a command to its end; give exit code and what it printed."""
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**self.environment, **(environment or {})},
        )
        try:
            async with asyncio.timeout(timeout):
                out, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            out, _ = await process.communicate()
            return -1, f"`{' '.join(arguments)}` did not end within {timeout:g} s; {out.decode()[-500:]}"
        return process.returncode or 0, out.decode()
