"""PostgreSQL connections: session settings that make values travel unchanged, and server errors turned into ours."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import asyncpg

from live_migration.common.errors import ConnectionLost, LiveMigrationError, SourceError, TargetError, UsageError

Side = Literal["source", "target"]
_Chunk = TypeVar("_Chunk")

USER_TIMEOUT_MS = 30_000
"""How long a server may leave what we have sent without an answer."""

SESSION_SETTINGS: dict[str, str] = {
    "search_path": "",
    "row_security": "off",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "standard_conforming_strings": "on",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "synchronize_seqscans": "off",
    "xmloption": "content",
    "default_transaction_isolation": "read committed",
}
"""Settings of each of our sessions, the walsender's included: values leave and enter by the same text form."""

_SOURCE_SETTINGS = {"default_transaction_read_only": "off"}
"""Read-only by default is how some stop their writers, which we are not: publications, identities and settings are changed, and given back."""

_NOT_EVERYWHERE = """
    select set_config(name, case when name like 'tcp%' then '15' else '0' end, false) from pg_settings
    where name in ('transaction_timeout', 'idle_session_timeout', 'tcp_keepalives_idle', 'tcp_keepalives_interval')
"""
"""Time-outs that not every version knows; and keepalives of the server's own: when our host dies, it lets go of our locks."""
_CHECK_CLIENT = "set client_connection_check_interval = '5s'"
"""A server that is at work, or waits, for a client that is gone leaves off; not every platform can tell."""

_READ_ONLY = "25006"

CONNECTION_ERRORS = (
    ConnectionError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.exceptions.ConnectionFailureError,
    asyncpg.exceptions._base.InternalClientError,
)
"""What a connection that broke, or a server that is (re)starting, looks like. A full disk of ours, an OSError too, does not."""


_REPLICA_ROLE = "set local session_replication_role = replica"


async def replica_role(connection: asyncpg.Connection) -> str:
    """Give the statement that keeps triggers and rules from firing until the transaction ends; nothing where the role may not use it."""
    return _REPLICA_ROLE if await may_run(connection, _REPLICA_ROLE) else ""


async def may_run(connection: asyncpg.Connection, statement: str) -> bool:
    """Tell whether our role may run a statement, which is undone."""
    attempt = connection.transaction()
    await attempt.start()
    try:
        await connection.execute(statement)
    except asyncpg.InsufficientPrivilegeError:
        return False
    finally:
        await attempt.rollback()
    return True


async def enter_replica_role(connection: asyncpg.Connection) -> None:
    """Keep triggers and rules from firing until the transaction ends, where the role may."""
    if statement := await replica_role(connection):
        await connection.execute(statement)


async def connect(
    uri: str,
    side: Side,
    *,
    application: str = "live-migration",
    timeout: float = 20.0,
    replication: bool = False,
    sends_bulk: bool = False,
) -> asyncpg.Connection:
    """Open a session with our settings and TCP keepalives; with `replication`, one of a walsender.

    Args:
        sends_bulk: for COPY to the server. One that takes nothing for long may be slow, and is not given up for it.

    Raises:
        UsageError: the URI cannot be read.
        SourceError | TargetError: the server refuses (password, database, no such role).
        ConnectionLost: the server cannot be reached.
    """
    check_uri(uri, side)
    try:
        connection = await asyncpg.connect(
            uri,
            timeout=timeout,
            statement_cache_size=0,
            server_settings={
                **SESSION_SETTINGS,
                **(_SOURCE_SETTINGS if side == "source" else {}),
                "application_name": application,
                **({"replication": "database"} if replication else {}),
            },
        )
    except (OSError, *CONNECTION_ERRORS) as error:  # of the net: no route, no such host
        raise ConnectionLost(
            f"cannot reach the {side} at {describe(uri)}: {_reason(error)}",
            hint=f"Check the {side}'s address, and that it runs.",
        ) from error
    except asyncpg.PostgresError as error:
        raise server_error(error, side, f"connecting to {describe(uri)}") from error
    except (ValueError, ssl.SSLError, asyncpg.InterfaceError) as error:
        raise UsageError(f"the {side}'s URI cannot be used: {_reason(error)}") from error
    try:
        _keep_alive(connection, 0 if sends_bulk else USER_TIMEOUT_MS)
        _wake_writers(connection)
        with asking(side, "setting up a session"):
            await _set_up(connection, timeout)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _set_up(connection: asyncpg.Connection, timeout: float) -> None:
    try:
        await connection.execute(f"{_NOT_EVERYWHERE}; {_CHECK_CLIENT}", timeout=timeout)
    except (asyncpg.InvalidParameterValueError, asyncpg.UndefinedObjectError):
        await connection.execute(_NOT_EVERYWHERE, timeout=timeout)


@asynccontextmanager
async def session(uri: str, side: Side, *, application: str = "live-migration") -> AsyncIterator[asyncpg.Connection]:
    """Open a session as `connect` does and end it, at once if the work was cancelled or failed."""
    connection = await connect(uri, side, application=application)
    try:
        yield connection
    except BaseException:
        connection.terminate()
        raise
    else:
        await connection.close(timeout=10)


def check_uri(uri: str, side: Side) -> None:
    """Raise UsageError unless `uri` looks like a libpq URI; never repeats it, for it may hold a password."""
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError:
        parts = None
    if parts is None or parts.scheme not in ("postgresql", "postgres"):
        raise UsageError(
            f"the {side}'s URI is not of the form postgresql://user:password@host:port/database",
            hint="Special characters in user and password are percent-encoded.",
        )


def describe(uri: str) -> str:
    """Give host, port and database of a URI for people: no user, no password, no parameters."""
    parts = urlsplit(uri)
    host = parts.hostname or "localhost"
    return f"{host}:{parts.port or 5432}{parts.path}"


def server_error(error: asyncpg.PostgresError, side: Side, doing: str) -> LiveMigrationError:
    """Turn a server's error into ours, with its SQLSTATE, detail and hint."""
    kind: type[LiveMigrationError] = SourceError if side == "source" else TargetError
    if side == "target" and error.sqlstate == _READ_ONLY:
        kind = ConnectionLost  # it fails over, or is about to: whoever works there comes back to it
    if side == "target" and _is_relation_dropped(error):
        kind = ConnectionLost  # a lane has emptied a hypertable, chunks and all: the next look finds it so
    return kind(
        f"{side}: {doing}: {error.args[0]}{_detail(error)} [SQLSTATE {error.sqlstate}]",
        hint=getattr(error, "hint", None) or _next_step(side, error.sqlstate),
    )


def refusal_of(error: asyncpg.PostgresError) -> str:
    """Give what a server says against a statement; raise the error where the session ended rather than the statement failed."""
    if isinstance(error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError):
        raise error
    return f"{error.args[0]}{_detail(error)}"


def _detail(error: asyncpg.PostgresError) -> str:
    return f" ({error.detail})" if getattr(error, "detail", None) else ""


LOCKED = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)
"""Errors of who waited for a lock: whoever queues where others deadlock with one another may be the one who is ended."""


def set_lock_timeout(seconds: float, *, local: bool = True) -> str:
    """Give the statement that bounds how long each lock is waited for, in this transaction, or in the session; never without end."""
    return f"set{' local' if local else ''} lock_timeout = {max(1, round(seconds * 1000))}"


def is_dropped_meanwhile(error: BaseException | None) -> bool:
    """Tell whether a query met in the catalogs what somebody has dropped since its snapshot: a relation, or a function that an expression names."""
    return _is_relation_dropped(error) or (
        isinstance(error, asyncpg.InternalServerError) and str(error).startswith("cache lookup failed for ")
    )


def _is_relation_dropped(error: BaseException | None) -> bool:
    return isinstance(error, asyncpg.InternalServerError) and "could not open relation" in str(error)


def _next_step(side: Side, sqlstate: str | None) -> str:
    uri = side.upper()
    match sqlstate:
        case "28P01" | "28000":
            return f"Check user and password in {uri}, and the server's pg_hba.conf."
        case "3D000":
            return f"Check the database's name in {uri}."
        case "42501":
            return f"Give the role in {uri} this right; `live-migration validate` names all that it needs."
        case "25006":
            return f"The server is in recovery or read-only: let {uri} name the primary, or wait until it takes writes."
        case "55P03":
            return "Somebody holds the lock for long: see pg_locks, then try again."
        case _:
            return ""


@contextmanager
def asking(side: Side, doing: str) -> Iterator[None]:
    """Turn errors of statements inside into ours; `doing` says what was attempted. Ours pass through.

    Not for use around `asyncio.timeout`: its TimeoutError would count as a lost connection.
    """
    try:
        yield
    except CONNECTION_ERRORS as error:
        raise ConnectionLost(f"{side}: {doing}: connection lost: {_reason(error)}") from error
    except asyncpg.PostgresError as error:
        raise server_error(error, side, doing) from error
    except asyncpg.InterfaceError as error:
        if "connection" not in str(error):
            raise
        raise ConnectionLost(f"{side}: {doing}: connection lost: {_reason(error)}") from error
    except RuntimeError as error:
        if not is_of_a_closed_transport(error):
            raise
        raise ConnectionLost(f"{side}: {doing}: connection lost: {_reason(error)}") from error


def is_of_a_closed_transport(error: RuntimeError) -> bool:
    """Tell whether it is uvloop's, of a write to a transport that has broken: asyncpg says CopyFail at the end of a COPY all the same."""
    return "the handler is closed" in str(error)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _wake_writers(connection: asyncpg.Connection) -> None:
    """Let a COPY that waits until the server takes more go on, and fail, when the session ends: asyncpg lets it wait for ever."""
    protocol = connection._protocol
    connection.add_termination_listener(lambda _: protocol.resume_writing())


async def while_connected(connection: asyncpg.Connection, chunks: AsyncIterator[_Chunk]) -> AsyncIterator[_Chunk]:
    """Pass on what a COPY sends for as long as there is a server to take it."""
    async for chunk in chunks:
        if connection.is_closed():
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        yield chunk


def end_with(connection: asyncpg.Connection, other: asyncpg.Connection) -> None:
    """Cut a session when another one to the same server is lost: an idle one learns by its keepalives that the server is gone."""
    other.add_termination_listener(lambda _: None if connection.is_closed() else connection._transport.abort())


def _keep_alive(connection: asyncpg.Connection, user_timeout_ms: int) -> None:
    transport = connection._transport  # asyncpg offers no other way to its socket
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    raw = socket.socket(fileno=os.dup(sock.fileno()))
    with raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", 10),
            ("TCP_KEEPINTVL", 5),
            ("TCP_KEEPCNT", 3),
            # Linux counts it also while the peer answers, but takes nothing
            ("TCP_USER_TIMEOUT", user_timeout_ms),
        ):
            if hasattr(socket, option):
                raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


async def terminate_backend(
    connection: asyncpg.Connection, pid: int, started: object, *, timeout: float = 10.0
) -> None:
    """End the backend `pid` of the same server, if it is still the one that started at `started`, and wait until it is gone.

    Does nothing for a backend that is gone or whose pid was taken by another.
    """
    alive = "select pg_terminate_backend(pid) from pg_stat_activity where pid = $1 and backend_start = $2"
    async with asyncio.timeout(timeout):
        while await connection.fetchval(alive, pid, started) is not None:
            await asyncio.sleep(0.05)
