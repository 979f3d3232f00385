"""The replication connection: libpq, by psycopg's `pq` layer, on asyncio's loop.

asyncpg has no replication protocol. libpq brings TLS, SCRAM, service files and multi-host URIs along.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from psycopg import OperationalError, ProgrammingError, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from live_migration.common.errors import ConnectionLost, LiveMigrationError, SourceError, UsageError
from live_migration.common.lsn import Lsn
from live_migration.common.postgres import SESSION_SETTINGS, check_uri, describe
from live_migration.common.relation import quote_identifier

ConnectionParameters = dict[str, str]

_STATUS = struct.Struct(">BQQQqB")
_POSTGRES_EPOCH_SECONDS = 946_684_800
_CONNECT_SECONDS = 20.0
_KEEPALIVES = {
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
_GONE = ("08", "57P", "53300")
"""SQLSTATEs of a server that goes away, restarts or is full: it will be back."""


class StreamFailed(ConnectionLost):
    """The server ended the stream with an error of its own. Once may be chance; twice at one LSN is not."""


class SlotInUse(ConnectionLost):
    """Another walsender reads the slot."""


class ReplicationConnection:
    """A connection in replication mode: first a few commands, then the stream."""

    def __init__(self, connection: pq.abc.PGconn, address: str) -> None:
        self._connection = connection
        self._may_hold_input = False
        self._address = address
        self.get_copy_data = connection.get_copy_data

    @classmethod
    async def open(cls, uri: str) -> Self:
        """Connect without blocking the loop.

        Raises:
            ConnectionLost: the server cannot be reached.
            SourceError: it refuses us.
        """
        address = describe(uri)
        failure = ""
        for parameters in await _attempts(connection_parameters(uri), address):
            connection = pq.PGconn.connect_start(make_conninfo(**parameters).encode())
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    if await _is_connected(connection):
                        connection.nonblocking = 1
                        return cls(connection, address)
                failure = _text(connection.get_error_message())
            except TimeoutError:
                failure = f"no answer within {_CONNECT_SECONDS:.0f} s"
            except BaseException:
                connection.finish()
                raise
            connection.finish()
        raise _connect_error(failure, address)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.finish()

    @property
    def server_version(self) -> int:
        return self._connection.server_version

    async def query(self, command: str) -> list[tuple[bytes | None, ...]]:
        """Run a command and give its rows.

        Raises:
            ConnectionLost | SourceError: as the server says.
        """
        result = await self._execute(command)
        if result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
            raise _result_error(result, command.split(" ")[0], self._address)
        rows, columns = range(result.ntuples), range(result.nfields)
        return [tuple(result.get_value(row, column) for column in columns) for row in rows]

    async def start(self, slot: str, lsn: int, options: Mapping[str, str]) -> None:
        """Begin to stream from `lsn`; `get_copy_data` then gives the stream's messages.

        Raises:
            SlotInUse: another walsender reads the slot.
            StreamFailed | ConnectionLost: as the server says.
        """
        listed = ", ".join(f"{name} {_literal(value)}" for name, value in options.items())
        command = f"START_REPLICATION SLOT {quote_identifier(slot)} LOGICAL {Lsn(lsn)} ({listed})"
        result = await self._execute(command)
        if result.status != pq.ExecStatus.COPY_BOTH:
            raise _result_error(
                result, f"START_REPLICATION of slot {slot} at {Lsn(lsn)}", self._address, streaming=True
            )
        self._may_hold_input = True

    async def readable(self) -> None:
        """Wait until the server has sent something.

        Not right after the start: what came together with the answer is in libpq's buffer, and be it the stream's end, nothing
        would ever follow it.
        """
        if self._may_hold_input:
            self._may_hold_input = False
            return
        await _ready(self._connection.socket)

    def receive(self) -> None:
        """Take what the server has sent into libpq's buffer. Raises ConnectionLost."""
        try:
            self._connection.consume_input()
        except OperationalError as error:
            raise self._broken(error) from error

    async def end_error(self, lsn: int) -> LiveMigrationError:
        """Give the reason why the stream, started at `lsn`, has ended."""
        try:
            result = await self._last_result()
        except OperationalError as error:
            return self._broken(error)
        if result.status == pq.ExecStatus.FATAL_ERROR:
            return _result_error(result, f"streaming from {Lsn(lsn)}", self._address, streaming=True)
        return ConnectionLost(f"the server at {self._address} ended the stream")

    async def send_status(self, received_lsn: int, flushed_lsn: int) -> None:
        """Tell the walsender what was received and what the slot need not keep any more. Raises ConnectionLost."""
        clock = int((time.time() - _POSTGRES_EPOCH_SECONDS) * 1_000_000)
        message = _STATUS.pack(ord("r"), max(received_lsn, flushed_lsn), flushed_lsn, flushed_lsn, clock, 0)
        try:
            self._connection.put_copy_data(message)
            await self._flush()
        except OperationalError as error:
            raise self._broken(error) from error

    async def _execute(self, command: str) -> pq.abc.PGresult:
        try:
            self._connection.send_query(command.encode())
            await self._flush()
            return await self._last_result()
        except OperationalError as error:
            raise self._broken(error) from error

    async def _flush(self) -> None:
        while self._connection.flush():
            await _ready(self._connection.socket, write=True)

    async def _last_result(self) -> pq.abc.PGresult:
        """Give a command's last result; one that begins a stream is the last."""
        last: pq.abc.PGresult | None = None
        while True:
            while self._connection.is_busy():
                await _ready(self._connection.socket)
                self._connection.consume_input()
            result = self._connection.get_result()
            if result is None:
                break
            last = result
            if result.status == pq.ExecStatus.COPY_BOTH:
                break
        if last is None:
            raise OperationalError("the server gave no result")
        return last

    def _broken(self, error: BaseException) -> ConnectionLost:
        return ConnectionLost(f"the replication connection to {self._address} broke: {_text(str(error))}")


def connection_parameters(uri: str) -> ConnectionParameters:
    """Give libpq's parameters for a replication connection with our session settings.

    Raises:
        UsageError: the URI cannot be read.
    """
    check_uri(uri, "source")
    try:
        given = conninfo_to_dict(uri)
    except ProgrammingError as error:
        raise UsageError("the source's URI cannot be used by libpq") from error
    parameters = {name: str(value) for name, value in given.items() if value is not None}
    ours = session_options(SESSION_SETTINGS)
    options = f"{parameters['options']} {ours}" if parameters.get("options") else ours
    return {
        **_KEEPALIVES,
        **parameters,
        "options": options,
        "replication": "database",
        "application_name": "live-migration producer",
    }


def session_options(settings: Mapping[str, str]) -> str:
    """Give settings in the form of libpq's `options`, where a backslash escapes a space or a backslash."""
    escaped = {name: value.replace("\\", "\\\\").replace(" ", "\\ ") for name, value in settings.items()}
    return " ".join(f"-c {name}={value}" for name, value in escaped.items())


async def _attempts(parameters: ConnectionParameters, address: str) -> list[ConnectionParameters]:
    """Resolve the host names on the loop's threads, for libpq would block on that: one attempt an address."""
    hosts = parameters.get("host", "").split(",")
    ports = parameters.get("port", "5432").split(",")
    if "hostaddr" in parameters or not any(hosts) or any(host.startswith(("/", "@")) for host in hosts):
        return [parameters]
    attempts = []
    failure: OSError | None = None
    for index, host in enumerate(hosts):
        port = ports[index] if len(ports) > 1 else ports[0]
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host or "localhost", port or 5432, proto=6)
        except OSError as error:
            failure = error
        else:
            attempts += [{**parameters, "host": host, "hostaddr": str(each[4][0]), "port": port} for each in found]
    if not attempts:
        raise ConnectionLost(f"cannot resolve the source's host at {address}: {failure}") from failure
    return attempts


async def _is_connected(connection: pq.abc.PGconn) -> bool:
    """Carry a connection attempt to its end; libpq may change the socket on the way."""
    while connection.status != pq.ConnStatus.BAD:
        match connection.connect_poll():
            case pq.PollingStatus.OK:
                return True
            case pq.PollingStatus.READING:
                await _ready(connection.socket)
            case pq.PollingStatus.WRITING:
                await _ready(connection.socket, write=True)
            case _:
                return False
    return False


async def _ready(socket: int, *, write: bool = False) -> None:
    """Wait until a socket can be read or written."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    (loop.add_writer if write else loop.add_reader)(socket, _resolve, ready)
    try:
        await ready
    finally:
        (loop.remove_writer if write else loop.remove_reader)(socket)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _text(message: str) -> str:
    return " ".join(message.split())


def _connect_error(text: str, address: str) -> LiveMigrationError:
    """Tell a refusal, which will not change by itself, from a server that cannot be reached."""
    refusals = (
        "authentication failed",
        "no password supplied",
        "does not exist",
        "permission denied",
        "no pg_hba.conf",
    )
    if any(refusal in text for refusal in refusals):
        return SourceError(
            f"source: the replication connection to {address} is refused: {text}",
            hint="The role needs LOGIN and REPLICATION, and pg_hba.conf must let it in.",
        )
    return ConnectionLost(
        f"cannot open a replication connection to {address}: {text}",
        hint="Check the source's address, that it runs, and that max_wal_senders leaves room.",
    )


def _result_error(result: pq.abc.PGresult, doing: str, address: str, *, streaming: bool = False) -> LiveMigrationError:
    def field(code: pq.DiagnosticField) -> str:
        return (result.error_field(code) or b"").decode(errors="replace")

    state = field(pq.DiagnosticField.SQLSTATE)
    text = field(pq.DiagnosticField.MESSAGE_PRIMARY) or result.get_error_message() or pq.ExecStatus(result.status).name
    detail = field(pq.DiagnosticField.MESSAGE_DETAIL)
    message = f"source at {address}: {doing}: {text}{f' ({detail})' if detail else ''} [SQLSTATE {state or 'none'}]"
    hint = field(pq.DiagnosticField.MESSAGE_HINT)
    if state.startswith(_GONE):
        return ConnectionLost(message, hint=hint)
    if state == "55006":
        return SlotInUse(message)
    return StreamFailed(message, hint=hint) if streaming else SourceError(message, hint=hint)
