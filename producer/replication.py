"""The replication connection: a few commands, then the stream.

asyncpg has no replication protocol. It connects, with TLS, passwords and all that a URI may say, as on every other connection; its
transport is then ours (`wire.py`).
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import NoReturn, Self

import asyncpg

from live_migration.common.errors import ConnectionLost, LiveMigrationError, SourceError
from live_migration.common.lsn import Lsn
from live_migration.common.postgres import connect, describe
from live_migration.common.relation import quote_identifier
from live_migration.common.settings import KIB
from live_migration.common.telemetry import get_logger
from live_migration.producer.wire import COPY_DATA, ReceiveBuffer, ServerMessage, data_row, error_fields, frame

log = get_logger(__name__)

_STATUS = struct.Struct(">BQQQqB")
_POSTGRES_EPOCH_SECONDS = 946_684_800
_COMMAND_SECONDS = 60.0
_GONE = ("08", "57P", "53300")
"""SQLSTATEs of a server that goes away, restarts or is full: it will be back."""

WINDOW_BYTES = 128 * KIB
"""Receive buffer of a connection within this machine: what does not fit is left to gather. Twice the largest packet, else reading it would stall."""
COUNTS_ALL_MEMORY = """number % 10000 >= case number / 10000 when 13 then 17 when 14 then 14 when 15 then 9 when 16 then 5
                                           when 17 then 1 else 0 end"""
"""Whether a server of this version number keeps decoded tuples in small blocks: in large ones a few tuples of a long transaction held many times
what was counted, and walsenders were killed for it."""
_ALLOW_MEMORY = f"""select set_config(name, greatest(setting::bigint, {{kibibytes}})::text, false)
                    from pg_settings, (select current_setting('server_version_num')::int as number) version
                    where name = 'logical_decoding_work_mem' and {COUNTS_ALL_MEMORY}"""
_COPY_BOTH, _COPY_DONE = ord("W"), ord("c")
_DATA_ROW, _ERROR, _READY = ord("D"), ord("E"), ord("Z")


class StreamFailed(ConnectionLost):
    """The server ended the stream with an error of its own. Once may be chance; again and again at one LSN is not."""


class SlotInUse(ConnectionLost):
    """Another walsender reads the slot."""


class ReplicationConnection:
    """A connection in replication mode: first a few commands, then the stream."""

    def __init__(self, connection: asyncpg.Connection, address: str) -> None:
        self._connection = connection
        self._address = address
        transport: asyncio.Transport = connection._transport  # asyncpg offers no other way to it
        self._input = ReceiveBuffer(transport)
        transport.set_protocol(self._input)
        self.is_local = _is_local(transport)
        """Whether it is TCP within this machine."""
        if self.is_local:
            _keep_window(transport, WINDOW_BYTES)
        self._doing = ""

    @classmethod
    async def open(cls, uri: str) -> Self:
        """Connect.

        Raises:
            ConnectionLost: the server cannot be reached.
            SourceError: it refuses us.
            UsageError: the URI cannot be used.
        """
        connection = await connect(uri, "source", application="live-migration producer", replication=True)
        return cls(connection, describe(uri))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(RuntimeError):  # asyncpg says goodbye, which uvloop refuses on a transport that is closed already
            self._connection.terminate()

    async def query(self, command: str) -> list[tuple[bytes | None, ...]]:
        """Run a command and give its rows.

        Raises:
            ConnectionLost | SourceError: as the server says.
        """
        rows: list[tuple[bytes | None, ...]] = []
        failure: LiveMigrationError | None = None
        self._send_query(command)
        while (message := await self._next_message(command)).kind != _READY:
            if message.kind == _DATA_ROW:
                rows.append(data_row(message.body))
            elif message.kind == _ERROR:
                failure = _server_error(message.body, command.split(" ")[0], self._address)
        if failure:
            raise failure
        return rows

    async def allow_memory(self, byte_count: int) -> None:
        """Let the walsender hold so much of what it decodes before it writes to its disk, where the server does not let it hold more.

        For this session alone, and not on minor versions that hold far more than they count. A server that refuses is warned of: it decodes
        all the same.

        Raises:
            ConnectionLost: the connection broke.
        """
        try:
            await self.query(_ALLOW_MEMORY.format(kibibytes=byte_count // KIB))
        except SourceError as error:
            log.warning("the walsender keeps the server's logical_decoding_work_mem", reason=error.message)

    async def start(self, slot: str, lsn: int, options: Mapping[str, str]) -> None:
        """Begin to stream from `lsn`; `take` then gives what the stream brings.

        Raises:
            SlotInUse: another walsender reads the slot.
            StreamFailed | ConnectionLost: as the server says.
        """
        listed = ", ".join(f"{name} {_literal(value)}" for name, value in options.items())
        command = f"START_REPLICATION SLOT {quote_identifier(slot)} LOGICAL {Lsn(lsn)} ({listed})"
        doing = f"START_REPLICATION of slot {slot} at {Lsn(lsn)}"
        self._send_query(command)
        while (message := await self._next_message(doing)).kind != _COPY_BOTH:
            if message.kind == _ERROR:
                raise _server_error(message.body, doing, self._address, streaming=True)
        self._doing = f"streaming from {Lsn(lsn)}"

    async def received(self) -> None:
        """Wait until the stream has brought something, or has ended."""
        await self._input.received()

    @property
    def received_bytes(self) -> int:
        """How much the connection has brought so far."""
        return self._input.received_bytes

    async def gulp(self) -> bool:
        """Read on while much is there at once, then not before `gather` has ended; tell whether there may be more."""
        return await self._input.gulp()

    async def gather(self, seconds: float) -> None:
        """Let the stream gather for so long since it was read last."""
        await self._input.gather(seconds)

    def take(self, consume: Callable[[bytes | memoryview], int], limit: int) -> int:
        """Let `consume` see about `limit` bytes of CopyData messages, the first one whole; give how many it took, 0 for nothing there.

        Raises:
            ConnectionLost | StreamFailed | SourceError: the stream has ended, and why.
            FormatError: what came is not the protocol.
        """
        while (kind := self._input.next_kind()) is not None:
            if kind == COPY_DATA:
                return self._input.take_copy_data(consume, limit)
            message = self._input.take_message()
            assert message is not None
            if message.kind == _ERROR:
                raise _server_error(message.body, self._doing, self._address, streaming=True)
            if message.kind == _COPY_DONE:
                raise ConnectionLost(f"the server at {self._address} ended the stream")
        if self._input.is_lost:
            self._raise_lost(self._doing)
        return 0

    async def send_status(self, received_lsn: int, flushed_lsn: int) -> None:
        """Tell the walsender what was received and what the slot need not keep any more. Raises ConnectionLost."""
        clock = int((time.time() - _POSTGRES_EPOCH_SECONDS) * 1_000_000)
        message = _STATUS.pack(ord("r"), max(received_lsn, flushed_lsn), flushed_lsn, flushed_lsn, clock, 0)
        if not self._input.send(frame(b"d", message)):
            self._raise_lost("sending a status reply")

    def _send_query(self, command: str) -> None:
        if not self._input.send(frame(b"Q", command.encode() + b"\0")):
            self._raise_lost(command.split(" ")[0])

    async def _next_message(self, doing: str) -> ServerMessage:
        try:
            async with asyncio.timeout(_COMMAND_SECONDS):
                while (message := self._input.take_message()) is None:
                    if self._input.is_lost:
                        self._raise_lost(doing)
                    await self._input.received()
        except TimeoutError as error:
            raise ConnectionLost(
                f"the source at {self._address}: {doing}: no answer within {_COMMAND_SECONDS:.0f} s"
            ) from error
        return message

    def _raise_lost(self, doing: str) -> NoReturn:
        reason = self._input.reason
        if isinstance(reason, LiveMigrationError):
            raise reason
        told = f": {reason}" if reason else ""
        raise ConnectionLost(f"the replication connection to {self._address} broke, {doing}{told}") from reason


def _is_local(transport: asyncio.BaseTransport) -> bool:
    """Tell whether both ends of a TCP connection are this machine."""
    connection = transport.get_extra_info("socket")
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        return bool(connection.getpeername()[0] == connection.getsockname()[0])
    except OSError:  # gone already, which whoever uses it finds out
        return False


def _keep_window(transport: asyncio.BaseTransport, byte_count: int) -> None:
    """Keep the kernel from letting the receive buffer grow until it takes a whole pause's rows, each as a packet of its own."""
    with suppress(OSError):  # gone already
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, byte_count)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _server_error(body: bytes, doing: str, address: str, *, streaming: bool = False) -> LiveMigrationError:
    fields = error_fields(body)
    state = fields.get("C", "")
    detail = f" ({fields['D']})" if fields.get("D") else ""
    message = f"source at {address}: {doing}: {fields.get('M', 'an error without a message')}{detail} [SQLSTATE {state or 'none'}]"
    hint = fields.get("H", "")
    if state.startswith(_GONE):
        return ConnectionLost(message, hint=hint)
    if state == "55006":
        return SlotInUse(message)
    return StreamFailed(message, hint=hint) if streaming else SourceError(message, hint=hint)
