"""This program, with a target that answers each statement late."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.backlog import Backlog, Receiver
from benchmarks.contestants.ours import Ours
from benchmarks.forwarder import delaying
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
            options = {"target": f"postgresql://postgres@127.0.0.1:{port}/{DATABASE}", **self._options}
            async with Ours(consumers=self._consumers, options=options).replicate(servers, backlog) as receiver:
                yield receiver
