"""This program's copy, without changes to replay: the time of its copy phase, and of the whole from its start on."""

from __future__ import annotations

import time
from importlib.metadata import version

from benchmarks.contestants.processes import program
from benchmarks.results import Round
from benchmarks.sampling import Sampler
from benchmarks.servers import Servers

_CLEAN_SECONDS = 300


class OursCopy:
    """One coordinator, one producer, `consumers` consumers; counted from the start of phase copy to that of phase replay."""

    copies_rows = True

    def __init__(self, *, consumers: int = 1, options: dict[str, str] | None = None) -> None:
        self._consumers = consumers
        self._options = options or {}
        self.name = "ours" if consumers == 1 else f"ours, {consumers} consumers"

    def version(self, server: str) -> str:
        return f"live-migration {version('live-migration')} on PostgreSQL {server}"

    async def copy(self, servers: Servers, rows: int) -> Round:
        seen: dict[str, float] = {}
        async with program(servers, self._options) as running:
            sampler = Sampler(lambda process: running.kind_of(process) or servers.kind_of(process))
            async with sampler:
                began = time.monotonic()
                running.start("coordinator")
                running.start("producer")
                for _ in range(self._consumers):
                    running.start("consumer")
                await running.until_phase("replay", seen.setdefault)
            for kind in ("coordinator", "consumer", "producer"):
                await running.stop(kind)
        figures = {
            "whole_seconds": seen["replay"] - began,
            "until_schema_seconds": seen["schema"] - began,
            "until_copy_seconds": seen["copy"] - began,
        }
        return Round(seen["replay"] - seen["copy"], rows, sampler.usage, figures)

    async def clean(self, servers: Servers) -> None:
        async with program(servers, self._options) as running:
            await running.run("clean", timeout_seconds=_CLEAN_SECONDS)
