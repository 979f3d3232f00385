"""A TCP forwarder that makes a server answer later: each statement costs so much more, whoever sends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_CHUNK = 1 << 20


@asynccontextmanager
async def delaying(port: int, seconds: float) -> AsyncIterator[int]:
    """Give a port of 127.0.0.1 that leads to `port`, whose first answer to whatever a client sends comes later."""
    connections: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            with suppress(OSError):
                await _Connection(reader, writer, seconds).run(port)
        finally:
            connections.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
        self._reader = reader
        self._writer = writer
        self._seconds = seconds
        self._has_asked = False

    async def run(self, port: int) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        answers = asyncio.ensure_future(self._answers(server_reader))
        try:
            while data := await self._reader.read(_CHUNK):
                self._has_asked = True
                server_writer.write(data)
                await server_writer.drain()
        finally:
            server_writer.close()
            answers.cancel()
            await asyncio.wait([answers])

    async def _answers(self, server_reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while data := await server_reader.read(_CHUNK):
                if self._has_asked:
                    self._has_asked = False
                    await asyncio.sleep(self._seconds)
                self._writer.write(data)
                await self._writer.drain()
            self._writer.close()
