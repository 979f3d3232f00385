"""The bytes of a replication connection: asyncio's reads into one buffer, whole messages out of it.

asyncpg opens the connection (TLS, authentication, multi-host URIs) and then hands its transport over, for it has no replication
protocol. libpq gives the stream one message at a time, at 1 µs each; here a turn takes all that has arrived.

Source: PostgreSQL manual, "Message Formats" and "Streaming Replication Protocol".
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from live_migration.common.errors import FormatError

_HEAD = struct.Struct(">BI")
_CAPACITY = 1 << 20
_LEAST_ROOM = 1 << 16
_LITTLE_BYTES = 1 << 12
"""A read that brings less has found all that there was."""
BIG_BYTES = 1 << 20
"""A message from this size on is given as a view of a buffer of its own."""
_MOST_BYTES = 1 << 30
"""No message of a server is larger."""

COPY_DATA = ord("d")


class ServerMessage(NamedTuple):
    """A message that is not CopyData: its type byte and body."""

    kind: int
    body: bytes


class ReceiveBuffer(asyncio.BufferedProtocol):
    """Receives into a buffer and stops the transport when it is full; whoever takes from it lets it go on.

    Memory: 1 MiB, and a message above that as a whole.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._buffer = bytearray(_CAPACITY)
        self._start = self._end = 0
        self.received_bytes = 0
        self._is_paused = False
        self._held_since: float | None = None
        self._news = asyncio.Event()
        self.is_lost = False
        self.reason: Exception | None = None
        """Why the connection was lost, if asyncio knows."""

    # asyncio's side

    def get_buffer(self, sizehint: int) -> memoryview:
        if len(self._buffer) - self._end < _LEAST_ROOM:
            self._make_room()
        return memoryview(self._buffer)[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        self._end += nbytes
        self.received_bytes += nbytes
        self._news.set()
        if self._is_full():
            self._pause()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.reason = exc
        self._news.set()

    def _is_full(self) -> bool:
        """Tell whether reading on would move much for little: more than half of the buffer is held, up to its end."""
        is_at_end = len(self._buffer) - self._end < _LEAST_ROOM
        return is_at_end and 2 * (self._end - self._start) > len(self._buffer) and self._has_message()

    def _make_room(self) -> None:
        """Move what is left to the front, of a larger buffer where a message needs one."""
        held = self._end - self._start
        needed = held
        if held >= _HEAD.size:
            _, length = _HEAD.unpack_from(self._buffer, self._start)
            needed = min(length, _MOST_BYTES) + 1
        old = self._buffer
        if needed + _LEAST_ROOM > len(old):
            self._buffer = bytearray(needed + _LEAST_ROOM)  # never resized: a view of the old one may be about
        with memoryview(self._buffer) as to, memoryview(old) as content:
            to[:held] = content[self._start : self._end]
        self._start, self._end = 0, held

    def _pause(self) -> None:
        if not self._is_paused and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._is_paused and self._held_since is None:
            self._is_paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    # our side

    async def received(self) -> None:
        """Wait until there is a whole message, or the connection was lost."""
        while not (self._has_message() or self.is_lost):
            self._news.clear()
            await self._news.wait()

    def send(self, data: bytes) -> bool:
        """Send; False when the connection is lost. A transport that is closed already may say so by an error of its own."""
        if self.is_lost or self._transport.is_closing():
            return False
        self._transport.write(data)
        return True

    async def gulp(self) -> bool:
        """Read on while much is there at once, then not any more until `gather` has ended; tell whether there may be more.

        Whoever takes meanwhile does so while the sender gathers.
        """
        may_be_more = True
        while may_be_more and not (self._is_full() or self.is_lost):
            before = self.received_bytes
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # asyncio's own loop finds in one turn what it reads in the next
            may_be_more = self.received_bytes - before >= _LITTLE_BYTES
        self._hold()
        return may_be_more

    async def gather(self, seconds: float) -> None:
        """Let the kernel gather what comes for so long since reading was stopped: reading each message of a walsender by itself costs it all its time."""
        since = self._hold()
        try:
            if (rest := since + seconds - time.monotonic()) > 0:
                await asyncio.sleep(rest)
        finally:
            self._held_since = None
            self._resume()

    def _hold(self) -> float:
        """Stop reading, however much is taken; give since when."""
        if self._held_since is None:
            self._held_since = time.monotonic()
            self._pause()
        return self._held_since

    def _has_message(self) -> bool:
        """Tell whether the first message is whole."""
        held = self._end - self._start
        if held < _HEAD.size:
            return False
        _, length = _HEAD.unpack_from(self._buffer, self._start)
        if not 4 <= length <= _MOST_BYTES:
            raise FormatError(f"a message of {length} bytes on the replication connection")
        return held > int(length)

    def take_copy_data(self, consume: Callable[[bytes | memoryview], int], limit: int) -> int:
        """Let `consume` see what has come, from a whole CopyData message on and about `limit` bytes of it; it gives how much it took.

        It is given a copy, or a view of a single message that is big. Gives 0 when there is no whole CopyData message.
        """
        if not self._has_message() or self._buffer[self._start] != COPY_DATA:
            return 0
        _, length = _HEAD.unpack_from(self._buffer, self._start)
        if length >= BIG_BYTES:
            return self._take_big(consume, int(length) + 1)
        end = min(self._end, self._start + max(limit, length + 1))
        with memoryview(self._buffer) as view:
            data = bytes(view[self._start : end])
        taken = consume(data)
        self._advance(taken)
        return taken

    def _take_big(self, consume: Callable[[bytes | memoryview], int], size: int) -> int:
        """Give a big message with its buffer away, and go on with a new one."""
        buffer, start, end = self._buffer, self._start, self._end
        rest = bytes(memoryview(buffer)[start + size : end])
        self._buffer = bytearray(max(_CAPACITY, len(rest) + 2 * _LEAST_ROOM))
        self._buffer[: len(rest)] = rest
        self._start, self._end = 0, len(rest)
        consume(memoryview(buffer)[start : start + size])
        self._resume()
        return size

    def take_message(self) -> ServerMessage | None:
        """Take the first message, None while it is not whole."""
        if not self._has_message():
            return None
        kind, length = _HEAD.unpack_from(self._buffer, self._start)
        body = bytes(memoryview(self._buffer)[self._start + _HEAD.size : self._start + 1 + length])
        self._advance(1 + length)
        return ServerMessage(kind, body)

    def next_kind(self) -> int | None:
        """Give the first message's type byte, None while it is not whole."""
        return self._buffer[self._start] if self._has_message() else None

    def _advance(self, byte_count: int) -> None:
        self._start += byte_count
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._buffer) > 2 * _CAPACITY:
                self._buffer = bytearray(_CAPACITY)
        if not self._is_full():
            self._resume()


def error_fields(body: bytes) -> dict[str, str]:
    """Read the fields of an ErrorResponse: by their type letter, 'C' the SQLSTATE, 'M' the message, 'D' detail, 'H' hint."""
    fields = {}
    for field in body.split(b"\0"):
        if field:
            fields[chr(field[0])] = field[1:].decode(errors="replace")
    return fields


def data_row(body: bytes) -> tuple[bytes | None, ...]:
    """Read a DataRow."""
    (count,) = struct.unpack_from(">H", body)
    at, values = 2, []
    for _ in range(count):
        (size,) = struct.unpack_from(">i", body, at)
        at += 4
        values.append(None if size < 0 else body[at : at + size])
        at += max(size, 0)
    return tuple(values)


def frame(kind: bytes, body: bytes) -> bytes:
    """Give a message to the server."""
    return kind + (len(body) + 4).to_bytes(4, "big") + body
