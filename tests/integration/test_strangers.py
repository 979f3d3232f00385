"""Relations of the stream that nobody planned, and what makes one of them gone: that a snapshot with its transaction does not show it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from live_migration.common.home import Home
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.relation import QualifiedName, Relation, ReplicaIdentity
from live_migration.consumer import committing, strangers
from live_migration.consumer.decoder import Decoded
from live_migration.consumer.strangers import let_go_if_gone, meet_chunk
from live_migration.consumer.target_tables import NotPlanned
from tests.fixtures.fix_postgres import HAS_STANDBY, NO_STANDBY, execute
from tests.integration.test_chunk_rules import SOURCE
from tests.support.begun import begun

pytestmark = pytest.mark.integration

CHUNK, PACKED = QualifiedName("public", "chunk_1"), QualifiedName("public", "packed")
HOME = Home(QualifiedName("public", "late"), CHUNK)


@asynccontextmanager
async def _made_unseen(server: LocalPostgres) -> AsyncIterator[tuple[int, Decoded]]:
    """A table whose commit waits for a standby inside; gives its oid and the transaction."""
    async with asyncio.timeout(60):
        superuser, session = [await asyncpg.connect(server.uri()) for _ in range(2)]
        await session.execute("set synchronous_commit = on; begin; create table chunk_1 (id int)")
        made = await session.fetchrow("select 'chunk_1'::regclass::oid, pg_current_xact_id()::text::bigint")
        ending = asyncio.ensure_future(session.execute("commit"))
        is_waiting = "select wait_event = 'SyncRep' from pg_stat_activity where pid = $1"
        while not await superuser.fetchval(is_waiting, session.get_server_pid()):
            await asyncio.sleep(0.02)
        try:
            yield made[0], Decoded(1, made[1])
        finally:
            for statement in NO_STANDBY:
                await superuser.execute(statement)
            await ending
            await session.close()
            await superuser.close()


def _stranger(oid: int, name: QualifiedName, home: Home) -> NotPlanned:
    return NotPlanned("met", Relation(oid, name, ReplicaIdentity.DEFAULT, ()), home)


@pytest.fixture
async def server() -> AsyncIterator[LocalPostgres]:
    async with LocalPostgres(settings=HAS_STANDBY) as server:
        yield server


@pytest.fixture
async def target(server: LocalPostgres, target_database: str) -> AsyncIterator[asyncpg.Connection]:
    """A session on the target of a migration that has begun."""
    async with begun(server.uri(), target_database) as (run, _):
        yield run.target


_ROWS = "select count(*) from _live_migration.tables"


async def test_a_commit_that_is_not_visible_yet_is_waited_for(
    server: LocalPostgres, target: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committing, "TELL_SECONDS", 0.0)
    told: asyncio.Queue[str] = asyncio.Queue()
    source = await asyncpg.connect(server.uri())
    async with _made_unseen(server) as (oid, decoded):
        stranger = _stranger(oid, CHUNK, HOME)
        looking = asyncio.ensure_future(let_go_if_gone(source, target, 0, stranger, decoded, told.put))
        assert "public.chunk_1" in await told.get()
        assert not looking.done()
    assert await asyncio.wait_for(looking, 30) is False
    assert await target.fetchval(_ROWS) == 0
    await source.close()


async def test_what_a_snapshot_without_its_transaction_does_not_show_is_not_gone(
    server: LocalPostgres, target: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second line, should the transaction be one that nobody sees committing."""

    async def wait_for_nobody(*_: object) -> None: ...

    monkeypatch.setattr(strangers, "await_committing", wait_for_nobody)
    source = await asyncpg.connect(server.uri())
    async with _made_unseen(server) as (oid, decoded):
        assert not await let_go_if_gone(source, target, 0, _stranger(oid, CHUNK, HOME), decoded, _unexpected)
    assert await target.fetchval(_ROWS) == 0
    await source.close()


_HYPERTABLE = """
    insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind, snapshot, horizon, timeline)
    values (1, 'public', 'late', 0, 'all', '[]', true, 'ready', 'hypertable', '3:3:', '0/3', 1)
"""
_MET = "select newcomer, snapshot, seen_range from _live_migration.tables where kind = 'chunk'"


@pytest.mark.parametrize("is_gone", [False, True])
async def test_a_chunk_that_its_lane_meets_before_anybody_sees_it_is_met_as_one_that_is_there(
    is_gone: bool, server: LocalPostgres, target: asyncpg.Connection
) -> None:
    """Not as one all of whose changes are passed over, of which no rows are on the target."""
    await target.execute(_HYPERTABLE)
    await execute(server.uri(), SOURCE, "create table late (id int)")
    source = await asyncpg.connect(server.uri())
    async with _made_unseen(server) as (oid, decoded):
        await meet_chunk(source, target, 2 if is_gone else oid, HOME, Decoded(1, 3) if is_gone else decoded, 1.0)
    assert tuple(await target.fetchrow(_MET))[::2] == ("met", "false" if is_gone else None)
    assert ((await target.fetchrow(_MET))["snapshot"] != "3:3:") is is_gone
    await source.close()


@pytest.mark.parametrize("is_chunk_there", [True, False])
async def test_a_table_of_compressed_rows_is_gone_with_its_chunk_alone(
    is_chunk_there: bool, server: LocalPostgres, target: asyncpg.Connection
) -> None:
    if is_chunk_there:
        await execute(server.uri(), "create table chunk_1 (id int)")
    source = await asyncpg.connect(server.uri())
    decoded = Decoded(1, await source.fetchval("select pg_current_xact_id()::text::bigint"))
    stranger = _stranger(1, PACKED, Home(HOME.hypertable, CHUNK, is_compressed=True))
    is_let_go = await let_go_if_gone(source, target, 0, stranger, decoded, _unexpected)
    assert is_let_go is not is_chunk_there
    assert await target.fetchval(_ROWS) == is_let_go
    await source.close()


async def _unexpected(message: str) -> None:
    raise AssertionError(message)
