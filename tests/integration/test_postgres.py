"""Our sessions on a real server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager

import asyncpg
import pytest
import uvloop

from live_migration.common import postgres
from live_migration.common.errors import ConnectionLost, SourceError
from live_migration.common.postgres import Side, asking, connect, end_with, session, while_connected
from live_migration.consumer.copy_errors import server_errors
from tests.fixtures.change_log import wait_for

pytestmark = pytest.mark.integration


async def test_no_timeout_of_the_database_ends_a_session_of_ours(target_database: str) -> None:
    """A lane's transaction may last for as long as a source transaction is big, and its session be idle for hours."""
    owner = await asyncpg.connect(target_database)
    database = await owner.fetchval("select quote_ident(current_database())")
    timeouts = (
        "transaction_timeout",
        "idle_session_timeout",
        "idle_in_transaction_session_timeout",
        "statement_timeout",
    )
    for timeout in timeouts:
        await owner.execute(f"alter database {database} set {timeout} = '100ms'")
    await owner.close()
    async with session(target_database, "target") as connection:
        await connection.execute("begin")
        await connection.execute("select pg_sleep(0.3)")
        await connection.execute("commit")
        assert {await connection.fetchval("select current_setting($1)", timeout) for timeout in timeouts} == {"0"}


async def test_a_target_in_recovery_or_read_only_is_one_to_come_back_to(target_database: str) -> None:
    """A target that fails over is a standby for a moment: workers wait for it, as for one that is away."""
    owner = await asyncpg.connect(target_database)
    database = await owner.fetchval("select quote_ident(current_database())")
    await owner.execute(f"alter database {database} set default_transaction_read_only = on")
    async with session(target_database, "target") as connection:
        with pytest.raises(ConnectionLost, match="read-only transaction"), asking("target", "writing"):
            await connection.execute("create table refused (id int)")
        with pytest.raises(SourceError), asking("source", "writing"):  # there it is what the user has to mend
            await connection.execute("create table refused (id int)")
    await owner.execute(f"alter database {database} reset default_transaction_read_only")
    await owner.close()


async def test_sessions_ask_a_quiet_peer_for_signs_of_life(target_database: str) -> None:
    """Of both ends, and nobody waits for longer than half a minute until the other has taken what was sent. The options alone: no net is cut."""
    options = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3, socket.TCP_USER_TIMEOUT: 30_000}
    async with session(target_database, "target") as connection:
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert {option: sock.getsockopt(socket.IPPROTO_TCP, option) for option in options} == options
        for name in ("tcp_keepalives_idle", "tcp_keepalives_interval"):
            assert await connection.fetchval("select current_setting($1)", name) == "15"


SLOW = """
    create table public.slow (id int, v text);
    create function public.wait() returns trigger language plpgsql as
        $$begin if new.id = 0 then perform pg_sleep(%s); end if; return new; end$$;
    create trigger wait before insert on public.slow for each row execute function public.wait();
"""


async def rows(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield b"%d\t%s\n" % (number, b"x" * 65536)


async def copy_in(connection: asyncpg.Connection, count: int) -> str:
    with asking("target", "copying"):
        status: str = await connection.copy_to_table(
            "slow", schema_name="public", source=while_connected(connection, rows(count)), format="text"
        )
    return status


@pytest.mark.parametrize("sends_bulk", [True, False])
async def test_a_server_that_takes_nothing_for_long_is_not_given_up_in_a_copy(
    target_database: str, monkeypatch: pytest.MonkeyPatch, sends_bulk: bool
) -> None:
    """Linux ends a connection whose peer answers all the while and only takes nothing, once TCP_USER_TIMEOUT is over."""
    monkeypatch.setattr(postgres, "USER_TIMEOUT_MS", 1000)
    connection = await connect(target_database, "target", sends_bulk=sends_bulk)
    await connection.execute(SLOW % 8)
    if sends_bulk:
        assert await copy_in(connection, 400) == "COPY 400"
    else:
        with pytest.raises(ConnectionLost):
            await copy_in(connection, 400)
    connection.terminate()


@pytest.mark.parametrize("how", ["backend ended", "other session lost"])
async def test_a_copy_that_waits_for_the_server_ends_with_its_session(target_database: str, how: str) -> None:
    watcher = await asyncpg.connect(target_database)
    connection = await connect(target_database, "target", sends_bulk=True)
    other = await connect(target_database, "target")
    end_with(connection, other)
    await connection.execute(SLOW % 120)
    copying = asyncio.ensure_future(copy_in(connection, 400))

    async def waits() -> bool:
        query = "select wait_event = 'PgSleep' from pg_stat_activity where pid = $1"
        return bool(await watcher.fetchval(query, connection.get_server_pid()))

    await wait_for(waits)
    while connection._transport.get_write_buffer_size() == 0:
        await asyncio.sleep(0.01)
    lost = connection if how == "backend ended" else other
    await watcher.execute("select pg_terminate_backend($1)", lost.get_server_pid())
    async with asyncio.timeout(20):
        with pytest.raises(ConnectionLost):
            await copying
    await watcher.close()
    other.terminate()


@pytest.mark.parametrize("errors_of", [asking, server_errors])
async def test_a_copy_whose_session_breaks_while_it_sends_is_a_lost_connection(
    target_database: str, errors_of: Callable[[Side, str], AbstractContextManager[None]]
) -> None:
    """asyncpg then writes a CopyFail, which uvloop, that all services run on, refuses with a RuntimeError: it ended a consumer (seen in a soak)."""

    async def copy() -> None:
        async with session(target_database, "target") as connection:
            await connection.execute("create temp table taken (t text)")

            async def rows() -> AsyncIterator[bytes]:
                yield b"row\n"
                connection._transport.abort()
                await asyncio.sleep(0)
                yield b"row\n"
                await asyncio.Event().wait()

            with errors_of("target", "copying"):
                await connection.copy_to_table("taken", source=while_connected(connection, rows()))

    with pytest.raises(ConnectionLost, match="copying"):
        await asyncio.to_thread(uvloop.run, copy())
