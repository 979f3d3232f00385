"""A TCP proxy that misbehaves on command: cuts, refuses, stalls, slows down, loses an answer."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, Self
from urllib.parse import urlsplit, urlunsplit

Direction = Literal["up", "down"]
"""`up`: from our processes to the server; `down`: what the server answers."""
Matcher = Callable[[bytes], bool]

_COMMIT = re.compile(rb"Q....commit;?\0", re.IGNORECASE | re.DOTALL)  # a query of this word alone, as drivers send it
_SOURCE_COMMIT = re.compile(rb"Q....(commit;?|create publication [^\0]*)\0", re.IGNORECASE | re.DOTALL)
_READ_ONLY = re.compile(rb"Q....begin[^\0]* read only;?\0", re.IGNORECASE | re.DOTALL)
_ROLLBACK = re.compile(rb"Q....rollback;?\0", re.IGNORECASE | re.DOTALL)
_CHUNK = 65_536
_SLOW_CHUNK = 2_048


def is_commit(chunk: bytes) -> bool:
    """Tell whether a PostgreSQL client sends COMMIT in this chunk."""
    return _COMMIT.search(chunk) is not None


def is_source_commit(chunk: bytes) -> bool:
    """Tell whether COMMIT is sent in this chunk, or what we let commit by itself on the source."""
    return _SOURCE_COMMIT.search(chunk) is not None


def is_end_of_transaction(chunk: bytes) -> bool:
    """Tell whether a Kafka client's request in this chunk is EndTxn (API key 26)."""
    return chunk[4:6] == b"\x00\x1a"


class _Connection:
    """One client's connection and the one to the server behind it."""

    def __init__(self, proxy: Proxy, client: tuple[asyncio.StreamReader, asyncio.StreamWriter], port: int) -> None:
        self._proxy = proxy
        self._client = client
        self._port = port
        self._writers = [client[1]]
        self._is_answer_lost = False
        self._is_read_only = False
        """Whether the client's transaction writes nothing, so that it does not matter who hears of its commit."""
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        try:
            server = await asyncio.open_connection("127.0.0.1", self._port)
            self._writers.append(server[1])
            pumps = [
                asyncio.create_task(self._pump("up", self._client[0], server[1])),
                asyncio.create_task(self._pump("down", server[0], self._client[1])),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # the server is down: the client sees its connection end
        finally:
            self.abort()

    def abort(self) -> None:
        """Reset both ends at once."""
        for writer in self._writers:
            writer.transport.abort()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()

    async def _pump(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy = self._proxy
        with suppress(OSError):
            while chunk := await reader.read(_SLOW_CHUNK if proxy.bytes_per_second else _CHUNK):
                pause = proxy.latency + (len(chunk) / proxy.bytes_per_second if proxy.bytes_per_second else 0)
                if pause:
                    await asyncio.sleep(pause)
                proxy.chunks += 1
                if direction == "down":
                    proxy.note_answer(chunk)
                await proxy.flowing[direction].wait()
                if direction == "down" and self._is_answer_lost:
                    proxy.losses += 1
                    return
                allowed = proxy.count(len(chunk))
                writer.write(chunk[:allowed])
                await writer.drain()
                if allowed < len(chunk):
                    return
                if direction == "up" and self._may_be_lost(chunk) and proxy.takes_as_lost(chunk):
                    self._is_answer_lost = True

    def _may_be_lost(self, chunk: bytes) -> bool:
        was_read_only = self._is_read_only
        if _READ_ONLY.match(chunk):
            self._is_read_only = True
        elif _COMMIT.match(chunk) or _ROLLBACK.match(chunk):
            self._is_read_only = False
        return not was_read_only


class Proxy:
    """Listens on `port` of 127.0.0.1 and forwards to the port that `upstream` gives; all faults are off at first."""

    def __init__(self, upstream: Callable[[], int]) -> None:
        self.upstream = upstream
        self.port = 0
        self.bytes_per_second: float | None = None
        self.latency = 0.0
        """Seconds that each piece of data is held up; not a fault, `heal` leaves it."""
        self.flowing = {"up": asyncio.Event(), "down": asyncio.Event()}
        self.chunks = 0
        """Pieces of data that came from either side."""
        self.losses = 0
        self.cuts = 0
        self._listeners: list[tuple[bytes, Counter[bytes]]] = []
        self._budget: int | None = None
        self._lose: Matcher | None = None
        self._loses_once = True
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self.heal()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    def uri(self, uri: str) -> str:
        """Give a server's URI with the proxy's address in it."""
        parts = urlsplit(uri)
        user = parts.netloc.rpartition("@")[0]
        here = f"127.0.0.1:{self.port}"
        return urlunsplit(parts._replace(netloc=f"{user}@{here}" if user else here))

    async def start(self) -> None:
        """Listen, after a stop on the same port as before."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse new connections and cut those there are, until `start`."""
        server, self._server = self._server, None
        if server:
            server.close()
        self.cut()
        await asyncio.sleep(0)

    def heal(self) -> None:
        """End stalls, slowness and what was ordered and has not happened yet; what was cut stays cut."""
        self.bytes_per_second = None
        self._budget = None
        self._lose = None
        for event in self.flowing.values():
            event.set()

    def cut(self) -> None:
        """Reset all connections."""
        self.cuts += len(self._connections)
        for connection in list(self._connections):
            connection.abort()

    def cut_after(self, byte_count: int) -> None:
        """Reset the connection over which the next `byte_count`-th byte goes, that byte not included."""
        self._budget = byte_count

    def stall(self, *directions: Direction) -> None:
        """Forward nothing any more in these directions, and say nothing."""
        for direction in directions:
            self.flowing[direction].clear()

    def slow_down(self, bytes_per_second: float) -> None:
        """Let each connection have so much in each direction."""
        self.bytes_per_second = bytes_per_second

    def lose_answer(self, matcher: Matcher, *, once: bool = True) -> None:
        """Cut the next connection over which `matcher` sees its request, or every one, as soon as the server has answered it."""
        self._lose = matcher
        self._loses_once = once

    @contextmanager
    def counting_errors(self, sqlstate: str) -> Iterator[Counter[bytes]]:
        """Count the pieces of data in which a PostgreSQL server tells a client this error; the counter's total says how many."""
        listener = (b"\0C" + sqlstate.encode() + b"\0", Counter[bytes]())
        self._listeners.append(listener)
        try:
            yield listener[1]
        finally:
            self._listeners.remove(listener)

    def note_answer(self, chunk: bytes) -> None:
        for field, found in self._listeners:
            if field in chunk:
                found[field] += 1

    @property
    def is_pending(self) -> bool:
        """Whether a cut or a loss was ordered and has not happened yet."""
        return self._budget is not None or self._lose is not None

    def count(self, size: int) -> int:
        """Say how many of `size` bytes may pass; fewer: the connection is to be cut then."""
        if self._budget is None:
            return size
        if size <= self._budget:
            self._budget -= size
            return size
        allowed, self._budget = self._budget, None
        self.cuts += 1
        return allowed

    def takes_as_lost(self, chunk: bytes) -> bool:
        """Tell whether the answer to this chunk is the one to be lost."""
        if self._lose is None or not self._lose(chunk):
            return False
        if self._loses_once:
            self._lose = None
        return True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            writer.transport.abort()
            return
        connection = _Connection(self, (reader, writer), self.upstream())
        connection.task = asyncio.current_task()
        self._connections.add(connection)
        try:
            await connection.run()
        except asyncio.CancelledError:
            pass  # by `cut`: the task is this connection's own
        finally:
            self._connections.discard(connection)
