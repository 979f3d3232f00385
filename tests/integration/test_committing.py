"""Before a chunk is copied anew: commits that stand in the WAL, and so perhaps in the target, and are in no snapshot yet, are waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from live_migration.common.local_postgres import LocalPostgres
from live_migration.consumer import committing
from live_migration.consumer.committing import await_committing
from tests.fixtures.fix_postgres import HAS_STANDBY, NO_STANDBY, execute
from tests.integration.test_chunk_rules import OLD_XID, chunk_in_lane
from tests.support.segments import insert

pytestmark = pytest.mark.integration

_WORLD = (
    "create database db",
    "create role viewer login",
    "create table t (id int)",
)
_WAITS = "select wait_event = 'SyncRep' from pg_stat_activity where pid = $1"


@pytest.fixture
async def server() -> AsyncIterator[LocalPostgres]:
    async with LocalPostgres(settings=HAS_STANDBY) as server:
        await execute(server.uri(), *_WORLD[:2])
        await execute(server.uri("db"), _WORLD[2], "grant select on t to viewer")
        yield server


@pytest.fixture(params=["superuser", "viewer"])
async def looker(request: pytest.FixtureRequest, server: LocalPostgres) -> AsyncIterator[asyncpg.Connection]:
    """A session of one who sees what others are at, then of one who does not."""
    uri = server.uri("db")
    connection = await asyncpg.connect(uri.replace("postgres@", "viewer@") if request.param == "viewer" else uri)
    yield connection
    await connection.close()


@asynccontextmanager
async def _hanging(server: LocalPostgres, database: str, *statements: str) -> AsyncIterator[int]:
    """The last of the statements waits for a standby inside; gives its session's pid."""
    async with asyncio.timeout(60):
        superuser = await asyncpg.connect(server.uri(database))
        session = await asyncpg.connect(server.uri(database))
        for statement in statements[:-1]:
            await session.execute(statement)
        await session.execute("set synchronous_commit = on")
        ending = asyncio.ensure_future(session.execute(statements[-1]))
        while not await superuser.fetchval(_WAITS, session.get_server_pid()):
            await asyncio.sleep(0.02)
        try:
            yield session.get_server_pid()
        finally:
            for statement in NO_STANDBY:
                await superuser.execute(statement)
            await ending
            await session.close()
            await superuser.close()


async def _waited_for(looker: asyncpg.Connection) -> tuple[asyncio.Task[None], str]:
    """Begin to wait; give what is told of it, which is nothing where there is nobody to wait for."""
    told: asyncio.Queue[str] = asyncio.Queue()
    waiting = asyncio.ensure_future(await_committing(looker, told.put))
    telling = asyncio.ensure_future(told.get())
    await asyncio.wait([waiting, telling], timeout=30, return_when=asyncio.FIRST_COMPLETED)
    message = telling.result() if telling.done() else ""
    telling.cancel()
    return waiting, message


_PREPARED = ("begin", "insert into t values (1)", "prepare transaction 'one'", "commit prepared 'one'")


@pytest.mark.parametrize("statements", [_PREPARED, ("insert into t values (1)",)], ids=["prepared", "plain"])
async def test_a_commit_that_waits_for_a_standby_is_waited_for(
    server: LocalPostgres,
    looker: asyncpg.Connection,
    statements: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who commits a prepared transaction is seen as a session without xid, and the transaction as one that is prepared still."""
    monkeypatch.setattr(committing, "TELL_SECONDS", 0.0)
    async with _hanging(server, "db", *statements) as pid:
        waiting, message = await _waited_for(looker)
        assert f"pid {pid} (" in message
    await asyncio.wait_for(waiting, 30)
    assert await looker.fetchval("select count(*) from t") == 1


_STREAMED = ("insert into t select generate_series(1, 1000)",)
_WORKER = """
    select pid from pg_stat_activity
    where wait_event = 'SyncRep' and backend_type like 'logical replication%' and state like 'idle%' and datname = 'db'
"""


@asynccontextmanager
async def _subscribed(server: LocalPostgres) -> AsyncIterator[asyncpg.Connection]:
    """The table is replicated from another database, streamed at once and applied by workers beside one another; gives a session there."""
    await execute(server.uri(), "create database publisher")
    await execute(
        server.uri("publisher"), "alter database publisher set debug_logical_replication_streaming = immediate"
    )
    publisher = await asyncpg.connect(server.uri("publisher"))
    await publisher.execute("create table t (id int); create publication p for table t")
    await publisher.execute("select pg_create_logical_replication_slot('s', 'pgoutput')")
    await execute(
        server.uri("db"),
        f"""create subscription s connection '{server.uri("publisher")}' publication p
            with (create_slot = false, copy_data = false, streaming = parallel, two_phase = true)""",
    )
    superuser = await asyncpg.connect(server.uri("db"))
    while not await superuser.fetchval("select subtwophasestate = 'e' from pg_subscription"):
        await asyncio.sleep(0.02)
    await superuser.close()
    yield publisher
    await publisher.close()


@pytest.mark.parametrize("statements", [_STREAMED, _PREPARED], ids=["streamed", "prepared"])
async def test_a_worker_of_a_subscription_that_calls_itself_idle_while_it_commits_is_waited_for(
    server: LocalPostgres, looker: asyncpg.Connection, statements: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committing, "TELL_SECONDS", 0.0)
    superuser = await asyncpg.connect(server.uri("db"))
    async with asyncio.timeout(60), _subscribed(server) as publisher:
        for statement in statements[:-1]:
            await publisher.execute(statement)
        while len(statements) > 1 and not await superuser.fetchval("select count(*) = 2 from pg_prepared_xacts"):
            await asyncio.sleep(0.02)
        await superuser.execute("alter subscription s set (synchronous_commit = on)")  # not before: PREPARE waits, too
        await publisher.execute(statements[-1])
        while (pid := await superuser.fetchval(_WORKER)) is None:
            await asyncio.sleep(0.02)
        waiting, message = await _waited_for(looker)
        assert f"pid {pid} (" in message
        for statement in NO_STANDBY:
            await superuser.execute(statement)
        await waiting
        assert await looker.fetchval("select count(*) from t") == await publisher.fetchval("select count(*) from t")
    await superuser.close()


async def test_rows_of_a_commit_prepared_that_is_applied_and_not_visible_yet_outlive_the_copy_of_their_chunk(
    server: LocalPostgres,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lane applies them, then empties the chunk's range and copies what a snapshot without them shows."""
    monkeypatch.setattr(committing, "TELL_SECONDS", 0.0)
    is_told = "select count(*) > 0 from _live_migration.events where message ~ 'copy of store.chunk_1 waits for .*pid'"
    async with chunk_in_lane(server.uri("db"), target_database, kafka_bootstrap, unique_name) as it:
        row = ("begin", "insert into store.chunk_1 values (8, 'prepared')", *_PREPARED[2:])
        async with _hanging(server, "db", *row):
            lane = it.lanes[0]
            lane.xid = await _xid_prepared(server)
            lane.transaction([insert("chunk_1", "8", "prepared")])
            lane.cut()
            lane.xid = OLD_XID
            lane.transaction([insert("packed", "1")])
            lane.cut()
            await it.send()
            async with it.consumer():
                await it.until(lambda: it.target.fetchval(is_told))
                await execute(server.uri("db"), *NO_STANDBY)
                await it.until_applied()
        assert await it.rows(0) == {7: "unseen", 8: "prepared"}


async def _xid_prepared(server: LocalPostgres) -> int:
    connection = await asyncpg.connect(server.uri())
    xid = int(await connection.fetchval("select transaction::text from pg_prepared_xacts"))
    await connection.close()
    return xid


async def test_what_stays_prepared_and_what_idles_is_waited_for_by_nobody(
    server: LocalPostgres, looker: asyncpg.Connection
) -> None:
    idle, reader = await asyncpg.connect(server.uri("db")), await asyncpg.connect(server.uri("db"))
    await idle.execute("begin; insert into t values (1); prepare transaction 'stays'")
    await reader.execute("begin; select count(*) from t")
    await asyncio.wait_for(await_committing(looker, _unexpected), 30)
    await reader.close()
    await idle.execute("rollback prepared 'stays'")
    await idle.close()


async def test_a_commit_in_another_database_is_not_waited_for(
    server: LocalPostgres, looker: asyncpg.Connection
) -> None:
    async with _hanging(server, "postgres", "create table other (id int)", "insert into other values (1)"):
        await asyncio.wait_for(await_committing(looker, _unexpected), 30)


async def _unexpected(message: str) -> None:
    raise AssertionError(message)
