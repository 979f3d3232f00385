"""CPU seconds and memory by kind of process, sampled while something is measured."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import psutil

INTERVAL_SECONDS = 0.2
_SETTLED_SECONDS = 2.0
MIB = 1024 * 1024

KindOf = Callable[[psutil.Process], str | None]


@dataclass
class Usage:
    """What the processes used, by kind. Memory is the highest sum over a kind's processes, in MiB, without shared pages."""

    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    other_cpu_seconds: float = 0.0
    """Of everything else on the machine, the benchmark itself included: it tells how far the times are to be trusted."""


@dataclass
class _Followed:
    process: psutil.Process
    started_at: float
    kind: str | None
    first: float = 0.0
    last: float = 0.0


class Sampler:
    """Follows the processes that `kind_of` names and their descendants; the body of `async with` is what is measured."""

    def __init__(self, kind_of: KindOf) -> None:
        self._kind_of = kind_of
        self._followed: dict[int, _Followed] = {}
        self._gone: list[_Followed] = []
        self._peak: dict[str, float] = defaultdict(float)
        self._busy = 0.0
        self.usage = Usage()

    async def __aenter__(self) -> Self:
        self._sample()
        for each in self._followed.values():
            each.first = each.last
        self._busy = _machine_busy_seconds()
        self._task = asyncio.ensure_future(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        busy = _machine_busy_seconds() - self._busy
        self._sample()
        cpu: dict[str, float] = defaultdict(float)
        for each in [*self._gone, *self._followed.values()]:
            if each.kind is not None:
                cpu[each.kind] += each.last - each.first
        self.usage = Usage(dict(cpu), dict(self._peak), max(0.0, busy - sum(cpu.values())))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            self._sample()

    def _sample(self) -> None:
        pids = set(psutil.pids())
        for pid in self._followed.keys() - pids:
            self._gone.append(self._followed.pop(pid))
        memory: dict[str, float] = defaultdict(float)
        for pid in sorted(pids):
            with suppress(psutil.Error):
                self._look_at(pid, memory)
        for kind, mib in memory.items():
            self._peak[kind] = max(self._peak[kind], mib)

    def _look_at(self, pid: int, memory: dict[str, float]) -> None:
        followed = self._followed.get(pid)
        if followed is None:
            process = psutil.Process(pid)
            followed = self._followed[pid] = _Followed(process, process.create_time(), None)
        if followed.kind is None or time.time() - followed.started_at < _SETTLED_SECONDS:
            if time.time() - followed.started_at > _SETTLED_SECONDS and followed.last:
                return  # nobody's, and too old to become somebody's by exec or a new title
            followed.kind = self._kind(followed.process)
        times = followed.process.cpu_times()
        followed.last = times.user + times.system
        if followed.kind is not None:
            sizes = followed.process.memory_info()
            memory[followed.kind] += (sizes.rss - sizes.shared) / MIB

    def _kind(self, process: psutil.Process) -> str | None:
        kind = self._kind_of(process)
        if kind is None and (parent := self._followed.get(process.ppid())):
            return parent.kind
        return kind


def _machine_busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice + times.irq + times.softirq)
