"""This program, with a target that answers each statement late."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.backlog import Backlog, Receiver
from benchmarks.contestants.ours import Ours
from benchmarks.contestants.ours_copy import OursCopy
from benchmarks.forwarder import delaying
from benchmarks.results import Round
from benchmarks.servers import DATABASE, Servers


class Slowed:
    """A contestant of ours that reaches the target by a forwarder; `options`: settings by name."""

    needs_kafka = True

    def __init__(self, consumers: int, delay_seconds: float, options: dict[str, str], *, what: str = "") -> None:
        self._consumers = consumers
        self._delay_seconds = delay_seconds
        self._options = options
        self.name = f"ours, {what}{consumers} consumer{'s' if consumers > 1 else ''}"

    def version(self, server: str) -> str:
        return Ours().version(server)

    @asynccontextmanager
    async def replicate(self, servers: Servers, backlog: Backlog) -> AsyncIterator[Receiver]:
        async with delaying(servers.target.port, self._delay_seconds) as port:
            options = {"target": _by(port), **self._options}
            async with Ours(consumers=self._consumers, options=options).replicate(servers, backlog) as receiver:
                yield receiver


class SlowedCopy(OursCopy):
    """The same for a copy."""

    def __init__(self, consumers: int, delay_seconds: float, options: dict[str, str]) -> None:
        super().__init__(consumers=consumers, options=options)
        self._delay_seconds = delay_seconds

    async def copy(self, servers: Servers, rows: int) -> Round:
        async with delaying(servers.target.port, self._delay_seconds) as port:
            late = OursCopy(consumers=self._consumers, options={**self._options, "target": _by(port)})
            return await late.copy(servers, rows)


def _by(port: int) -> str:
    return f"postgresql://postgres@127.0.0.1:{port}/{DATABASE}"
