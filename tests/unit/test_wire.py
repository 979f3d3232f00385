"""Bytes off a socket, however they are cut, come out as the messages that went in; reading stops when there is enough."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Callable

import pytest
import uvloop

from live_migration.common.errors import FormatError
from live_migration.producer import wire
from live_migration.producer.wire import ReceiveBuffer, data_row, error_fields


class FakeTransport:
    """One that refuses everything once it is closed, as uvloop's does, before the protocol hears of it."""

    def __init__(self) -> None:
        self.is_reading = True
        self.is_closed = False

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        self._check()
        assert self.is_reading
        self.is_reading = False

    def resume_reading(self) -> None:
        self._check()
        assert not self.is_reading
        self.is_reading = True

    def write(self, data: bytes) -> None:
        self._check()

    def _check(self) -> None:
        if self.is_closed:
            raise RuntimeError("the handler is closed")


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack(">I", len(body) + 4) + body


def receive(buffer: ReceiveBuffer, data: bytes | memoryview, most: int) -> int:
    """Do what asyncio does at one turn; give how many bytes were read."""
    view = buffer.get_buffer(-1)
    assert len(view) > 0
    count = min(len(view), len(data), most)
    view[:count] = data[:count]
    view.release()
    buffer.buffer_updated(count)
    return count


def whole_messages(data: bytes | memoryview) -> int:
    at = 0
    while at + 5 <= len(data):
        _, length = struct.unpack_from(">BI", data, at)
        if data[at] != ord("d") or at + 1 + length > len(data):
            break
        at += 1 + length
    return at


@pytest.mark.parametrize("seed", range(20))
def test_messages_come_out_as_they_went_in(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    sizes = (0, 1, 20, 80, 5_000, wire.BIG_BYTES - 5, wire.BIG_BYTES, 3_000_000)
    sent = [
        message(rng.choice((b"d", b"d", b"d", b"S")), rng.randbytes(rng.choice(sizes[: rng.choice((4, 5, 8))])))
        for _ in range(rng.choice((20, 400)))
    ]
    stream = b"".join(sent)
    transport = FakeTransport()
    buffer = ReceiveBuffer(transport)  # type: ignore[arg-type]
    got: list[bytes] = []
    at = 0
    largest = 0

    def consume(data: bytes | memoryview) -> int:
        taken = whole_messages(data)
        assert taken
        got.append(bytes(data[:taken]))
        return taken

    while sum(map(len, got)) < len(stream):
        if transport.is_reading and at < len(stream) and rng.random() < 0.7:
            at += receive(buffer, memoryview(stream)[at:], rng.choice((7, 1000, 1 << 18, 1 << 22)))
        while rng.random() < 0.7 and (kind := buffer.next_kind()) is not None:
            if kind == ord("d"):
                assert buffer.take_copy_data(consume, rng.choice((1, 1000, 1 << 18)))
            else:
                taken = buffer.take_message()
                assert taken is not None
                got.append(message(bytes([taken.kind]), taken.body))
        largest = max(largest, len(buffer._buffer))
    assert b"".join(got) == stream
    assert transport.is_reading
    assert buffer.next_kind() is None
    assert largest <= max(len(each) for each in sent) + 3 * wire._LEAST_ROOM + wire._CAPACITY


def test_reading_stops_while_nobody_takes() -> None:
    transport = FakeTransport()
    buffer = ReceiveBuffer(transport)  # type: ignore[arg-type]
    stream = message(b"d", bytes(100)) * 100_000
    at = 0
    while transport.is_reading:
        at += receive(buffer, memoryview(stream)[at:], 1 << 20)
    assert at <= wire._CAPACITY
    taken = 0
    while not transport.is_reading:  # what is held is moved to the front then, so there must not be much of it
        taken += buffer.take_copy_data(whole_messages, 1 << 18)
    assert wire._CAPACITY / 2 <= taken < at


def test_a_view_of_a_big_message_stays_as_it_was() -> None:
    buffer = ReceiveBuffer(FakeTransport())  # type: ignore[arg-type]
    big = message(b"d", b"x" * wire.BIG_BYTES)
    stream = big + message(b"d", b"y" * 50)
    at = 0
    while at < len(stream):
        at += receive(buffer, stream[at:], 1 << 20)
    kept: list[bytes | memoryview] = []

    def keep(data: bytes | memoryview) -> int:
        kept.append(data)
        return whole_messages(data)

    buffer.take_copy_data(keep, 1000)
    buffer.take_copy_data(keep, 1000)
    for _ in range(40):
        receive(buffer, message(b"d", b"z" * 50_000), 1 << 20)
        buffer.take_copy_data(whole_messages, 1 << 20)
    assert kept[0] == big
    assert kept[1] == message(b"d", b"y" * 50)


def test_a_length_that_cannot_be_is_refused() -> None:
    buffer = ReceiveBuffer(FakeTransport())  # type: ignore[arg-type]
    receive(buffer, b"d\xff\xff\xff\xff" + bytes(20), 100)
    with pytest.raises(FormatError, match="4294967295 bytes"):
        buffer.next_kind()


async def test_a_lost_connection_wakes_who_waits() -> None:
    buffer = ReceiveBuffer(FakeTransport())  # type: ignore[arg-type]
    buffer.connection_lost(ConnectionResetError("reset"))
    await buffer.received()
    assert buffer.is_lost
    assert isinstance(buffer.reason, ConnectionResetError)


async def test_a_transport_that_closes_under_our_hands_is_a_lost_connection() -> None:
    transport = FakeTransport()
    buffer = ReceiveBuffer(transport)  # type: ignore[arg-type]
    stream = message(b"d", bytes(100)) * 20_000
    at = 0
    while transport.is_reading:
        at += receive(buffer, memoryview(stream)[at:], 1 << 20)
    transport.is_closed = True
    assert not buffer.send(b"x")
    assert buffer.take_copy_data(whole_messages, 1 << 18)
    await buffer.gather(0)
    buffer.connection_lost(None)
    while buffer.take_copy_data(whole_messages, 1 << 18):
        pass
    await buffer.received()
    assert buffer.is_lost


async def test_what_came_before_the_wait_is_not_waited_for() -> None:
    buffer = ReceiveBuffer(FakeTransport())  # type: ignore[arg-type]
    receive(buffer, message(b"W", b"") + message(b"c", b""), 100)
    await buffer.received()
    assert buffer.take_message() is not None
    await asyncio.wait_for(buffer.received(), 5)  # the second came with the first
    assert buffer.next_kind() == ord("c")


def test_rows_and_errors_are_read() -> None:
    assert data_row(struct.pack(">Hi2sii", 3, 2, b"ab", -1, 0)) == (b"ab", None, b"")
    assert error_fields(b"SERROR\0C55006\0Mslot is active\0\0") == {"S": "ERROR", "C": "55006", "M": "slot is active"}


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_connection_that_breaks_while_it_gathers_is_a_lost_connection(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """A write finds it broken: its transport is closed at once, but says so to its protocol only a turn later."""

    async def work() -> None:
        writers: list[asyncio.StreamWriter] = []
        server = await asyncio.start_server(lambda _reader, writer: writers.append(writer), "127.0.0.1", 0)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(asyncio.Protocol, *server.sockets[0].getsockname())
        buffer = ReceiveBuffer(transport)
        transport.set_protocol(buffer)
        gathering = asyncio.create_task(buffer.gather(60))
        await asyncio.sleep(0)
        transport.abort()
        gathering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gathering
        await buffer.received()
        assert buffer.is_lost
        for writer in writers:
            writer.close()
        server.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_gulp_is_all_that_is_there_and_then_nothing_is_read(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def work() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        buffer = ReceiveBuffer(transport)
        transport.set_protocol(buffer)
        burst = message(b"d", bytes(1000)) * 100
        assert theirs.send(burst) == len(burst)
        assert not await buffer.gulp()
        assert buffer.received_bytes == len(burst)
        assert theirs.send(burst) == len(burst)
        assert buffer.take_copy_data(whole_messages, 1 << 20) == len(burst)
        await asyncio.sleep(0.01)  # many turns
        assert buffer.received_bytes == len(burst)  # taking does not make it read
        await buffer.gather(0)
        await buffer.received()
        await buffer.gulp()
        assert buffer.received_bytes == 2 * len(burst)
        transport.close()
        theirs.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work())


async def test_a_gulp_ends_when_the_buffer_is_full() -> None:
    transport = FakeTransport()
    buffer = ReceiveBuffer(transport)  # type: ignore[arg-type]
    arriving = asyncio.create_task(arrive_for_ever(transport, buffer))
    assert await buffer.gulp()
    assert not transport.is_reading
    assert wire._CAPACITY - wire._LEAST_ROOM <= buffer.received_bytes <= wire._CAPACITY
    while buffer.take_copy_data(whole_messages, 1 << 18):
        assert not transport.is_reading
    await buffer.gather(0)
    assert transport.is_reading
    arriving.cancel()


async def test_a_gulp_of_less_than_a_message_waits_for_no_room() -> None:
    """A message that is larger than the buffer is read on, however small the pieces are that it comes in."""
    transport = FakeTransport()
    buffer = ReceiveBuffer(transport)  # type: ignore[arg-type]
    big = message(b"d", bytes(5 * wire._CAPACITY))
    at = receive(buffer, big, 1000)
    got = 0
    while not got:
        await buffer.gulp()
        got = buffer.take_copy_data(whole_messages, 1)
        await buffer.gather(0)
        assert transport.is_reading
        if not got:
            at += receive(buffer, memoryview(big)[at:], 100_000)
    assert got == len(big) == at


async def test_a_lost_connection_ends_a_gulp() -> None:
    buffer = ReceiveBuffer(FakeTransport())  # type: ignore[arg-type]
    receive(buffer, message(b"d", bytes(10)), 100)
    buffer.connection_lost(None)
    await buffer.gulp()
    assert buffer.is_lost


async def arrive_for_ever(transport: FakeTransport, buffer: ReceiveBuffer) -> None:
    stream = message(b"d", bytes(20_000))
    while True:
        if transport.is_reading:
            receive(buffer, stream, len(stream))
        await asyncio.sleep(0)
