"""A TCP proxy before a PostgreSQL server that loses the answers to some COMMITs: the server commits, the client never hears of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

_COMMITS = (b"commit\0", b"COMMIT;\0")


class AnswerDropper:
    """`uri` leads to the server behind the proxy; each answer to a COMMIT is lost with this chance. `lost`: how many were."""

    def __init__(self, uri: str, seed: int, chance: float) -> None:
        self._parts = urlsplit(uri)
        self._random = random.Random(seed)
        self._chance = chance
        self.lost = 0
        self.uri = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self._parts.hostname or "", self._parts.port or 5432
        there_reader, there_writer = await asyncio.open_connection(host, port)
        is_losing = asyncio.Event()

        async def forward() -> None:
            while data := await reader.read(65536):
                if data.endswith(_COMMITS) and self._random.random() < self._chance:
                    is_losing.set()
                there_writer.write(data)
                await there_writer.drain()

        async def answer() -> None:
            while data := await there_reader.read(65536):
                if is_losing.is_set():  # the server has answered, so it has committed
                    self.lost += 1
                    return
                writer.write(data)
                await writer.drain()

        tasks = [asyncio.ensure_future(forward()), asyncio.ensure_future(answer())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for each in (writer, there_writer):
                each.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[AnswerDropper]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        user = self._parts.netloc.rpartition("@")[0]
        self.uri = urlunsplit(self._parts._replace(netloc=f"{user}@127.0.0.1:{port}" if user else f"127.0.0.1:{port}"))
        try:
            yield self
        finally:
            server.close()
