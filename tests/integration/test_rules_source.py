"""Rules of looking at the source: what is visible may not last, and a snapshot protects only what is under our lock."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import asyncpg
import pytest

from live_migration.common.catalog import list_tables
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.postgres import connect, session
from live_migration.common.relation import QualifiedName
from live_migration.consumer import table_snapshot
from live_migration.consumer.claims import PartClaim, TableClaim
from live_migration.consumer.copy_errors import AttemptOver, CopyDeferred
from live_migration.consumer.copy_stream import CopyPlan
from live_migration.consumer.parts import BlockRange
from live_migration.consumer.table_snapshot import import_snapshot, lock_table
from live_migration.coordinator.planning import has_identity
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.schema import restore_schema
from live_migration.producer.publication import (
    ALL_OPERATIONS,
    INSERT_ONLY,
    PublishedTable,
    add_tables,
    create_publication,
    drop_publication,
    set_identity_full,
)
from tests.fixtures.fix_postgres import SETTINGS, DatabaseFactory, PostgresFactory
from tests.integration.test_conductor import MakeSettings, bench, make_settings  # noqa: F401
from tests.support.copying import consumers, contents, plan, run_sql, settings_for, until_ready

pytestmark = pytest.mark.integration


# what is visible and not on disk


async def test_no_row_is_copied_whose_commit_a_crash_undoes(target_database: str) -> None:
    """An asynchronous commit is visible before it is flushed; after a crash its xid comes again, with another row."""
    async with LocalPostgres(settings={**SETTINGS, "fsync": "on", "autovacuum": "off"}) as server:
        for uri in (server.uri(), target_database):
            await run_sql(uri, "create table public.t (id int not null)")
        await plan(server.uri(), target_database)
        writer = await asyncpg.connect(server.uri())
        crashed = asyncio.Event()
        writer.add_termination_listener(lambda _: crashed.set())
        await writer.execute("checkpoint; set synchronous_commit = off")
        walwriter = await writer.fetchval("select pid from pg_stat_activity where backend_type = 'walwriter'")
        os.kill(walwriter, signal.SIGSTOP)
        try:
            await writer.execute("insert into public.t values (1)")
            is_flushed = "select pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn()"
            assert not await writer.fetchval(is_flushed), "the case that this is about did not come up"
            async with consumers(settings_for(server.uri(), target_database)):
                await until_ready(target_database)
        finally:
            os.kill(walwriter, signal.SIGKILL)  # the server takes it for a crash: whatever it has not flushed is gone
        async with asyncio.timeout(60):
            await crashed.wait()  # until the server has noticed it takes connections as before
        await until_recovered(server.uri())
        assert await contents(target_database) == await contents(server.uri())


async def until_recovered(uri: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                connection = await asyncpg.connect(uri)
                if await connection.fetchval(
                    "select pg_postmaster_start_time() is not null and not pg_is_in_recovery()"
                ):
                    await connection.close()
                    return
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await asyncio.sleep(0.1)


# a snapshot without the lock


async def shared_snapshot(source: str, holder: asyncpg.Connection) -> PartClaim:
    """Make a table, take its lock and a snapshot by `holder`, and give a part to be copied with it."""
    await run_sql(
        source,
        "create table public.t (id int, v int); insert into public.t select i, i from generate_series(1, 1000) i",
    )
    name = QualifiedName("public", "t")
    async with session(source, "source") as connection:
        oid = await connection.fetchval("select 'public.t'::regclass::oid")
    locked = await lock_table(holder, TableClaim(oid, name, 1, False), 5)
    snapshot_id = await holder.fetchval("select pg_export_snapshot()")
    plan = CopyPlan(name, ("id", "v"), True)
    return PartClaim(oid, name, 1, 0, BlockRange(0, None, 8192), snapshot_id, plan, locked.timeline, locked.snapshot)


REWRITE = "alter table public.t alter v type bigint"


async def test_who_imports_a_snapshot_holds_the_lock_too(source_database: str) -> None:
    """The holder dies while a part is copied: a rewrite must still wait, or the part would find an empty table."""
    holder = await connect(source_database, "source")
    async with session(source_database, "source") as importer, session(source_database, "source") as other:
        claim = await shared_snapshot(source_database, holder)
        await import_snapshot(importer, claim, 5)
        holder.terminate()
        with pytest.raises(asyncpg.LockNotAvailableError):
            await other.execute(f"set lock_timeout = '1s'; {REWRITE}")
        assert await importer.fetchval("select count(*) from public.t") == 1000
        await importer.execute("rollback")


async def test_who_gets_the_lock_after_a_rewrite_gets_no_snapshot_of_before(source_database: str) -> None:
    """The lock comes first: that the snapshot can still be imported then shows that nobody rewrote the table meanwhile."""
    holder = await connect(source_database, "source")
    async with session(source_database, "source") as importer, session(source_database, "source") as other:
        claim = await shared_snapshot(source_database, holder)
        rewriting = asyncio.ensure_future(other.execute(REWRITE))
        await until_waiting(source_database, other.get_server_pid())
        importing = asyncio.ensure_future(import_snapshot(importer, claim, 30))
        await until_waiting(source_database, importer.get_server_pid())
        holder.terminate()
        await rewriting
        with pytest.raises(AttemptOver, match="cannot be had any more"):
            await importing


async def test_a_lock_on_another_table_does_not_count(source_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas change their names while we wait for the lock, and back: the name is right before and after, the locked table is not."""
    swap = "alter schema a rename to c; alter schema b rename to a; alter schema c rename to b"
    async with session(source_database, "source") as ours, session(source_database, "source") as other:
        await other.execute("create schema a; create schema b; create table a.t (id int); create table b.t (id int)")
        oid = await other.fetchval("select 'a.t'::regclass::oid")
        await other.execute(f"begin; lock table a.t in access exclusive mode; {swap}")
        begin_locked = table_snapshot.begin_locked
        committed = asyncio.Event()

        async def lock_and_swap(*arguments: Any) -> None:
            await begin_locked(*arguments)
            await committed.wait()  # the lock may be ours before the commit's answer has come
            await other.execute(swap)

        monkeypatch.setattr(table_snapshot, "begin_locked", lock_and_swap)
        locking = asyncio.ensure_future(lock_table(ours, TableClaim(oid, QualifiedName("a", "t"), 1, False), 30))
        await until_waiting(source_database, ours.get_server_pid())
        await other.execute("commit")
        committed.set()
        with pytest.raises(CopyDeferred, match="changed places"):
            await locking
        await ours.execute("rollback")


async def until_waiting(uri: str, pid: int) -> None:
    async with session(uri, "source") as watcher, asyncio.timeout(30):
        while not await watcher.fetchval("select exists (select from pg_locks where pid = $1 and not granted)", pid):
            await asyncio.sleep(0.02)


async def test_a_look_at_the_catalogs_that_others_deadlock_ends_is_taken_again(
    make_settings: MakeSettings,  # noqa: F811
) -> None:
    """Others' sessions that deadlock over a table which we wait to look at: the server may choose us to be ended (seen)."""
    settings = make_settings()
    async with (
        bench(settings) as b,
        session(settings.source_uri(), "source") as ours,
        session(settings.source_uri(), "source") as other,
    ):
        await b.source("create table public.t (id int primary key); create table public.u (id int primary key)")
        await ours.execute("set deadlock_timeout = '50ms'; begin; lock table public.u in access share mode")
        await other.execute("set deadlock_timeout = '60s'; begin; lock table public.t in access exclusive mode")
        queueing = asyncio.ensure_future(other.execute("lock table public.u in access exclusive mode"))
        await until_waiting(settings.source_uri(), other.get_server_pid())
        states = []

        async def look() -> int:
            states.append("looks")
            if ours.is_in_transaction():
                try:
                    await ours.execute("lock table public.t in access share mode")
                finally:
                    await ours.execute("rollback")
                    await queueing
                    await other.execute("rollback")
            return len(await list_tables(ours))

        assert await b.run.patiently("looking", look) == 2
        assert states == ["looks", "looks"]


async def test_a_look_at_the_catalogs_that_meets_what_was_dropped_meanwhile_is_taken_again(
    make_settings: MakeSettings,  # noqa: F811
) -> None:
    """The rows of a snapshot name functions and types that are gone by the time at which an expression is printed."""
    settings = make_settings()
    async with bench(settings) as b, session(settings.source_uri(), "source") as ours:
        await b.source(
            """create function public.is_fine(int) returns boolean language sql immutable as 'select true';
               create table public.t (id int constraint fine check (public.is_fine(id)))"""
        )
        looks = 0

        async def look() -> list[str]:
            nonlocal looks
            looks += 1
            async with ours.transaction(isolation="repeatable_read", readonly=True):
                await ours.execute("select")
                if looks == 1:
                    await b.source("alter table public.t drop constraint fine; drop function public.is_fine(int)")
                query = "select pg_get_expr(conbin, conrelid) from pg_constraint where conname = 'fine'"
                return [row[0] for row in await ours.fetch(query)]

        assert await b.run.patiently("looking", look) == []
        assert looks == 2


# who was published while it was being written to


@pytest.mark.parametrize("dies", [False, True])
async def test_a_newcomer_is_planned_only_when_nobody_who_missed_its_publication_is_left(
    dies: bool,
    make_settings: MakeSettings,  # noqa: F811
) -> None:
    """A transaction that was open while the table was published may miss it for good: the stream has none of its rows.

    A coordinator that dies while it waits leaves a successor who finds the table published.
    """
    settings = make_settings()
    async with bench(settings) as b:
        await prepare(b.run)
        await b.source("create table public.late (id int primary key)")
        writer = await asyncpg.connect(settings.source_uri())
        await writer.execute("begin; insert into public.late values (1)")
        restoring = asyncio.ensure_future(restore_schema(b.run))
        await b.observer.until_note("publishing new tables waits for open transactions")
        if dies:
            restoring.cancel()
            with pytest.raises(asyncio.CancelledError):
                await restoring
            b.observer.notes.clear()
            restoring = asyncio.ensure_future(restore_schema(b.run))
            await b.observer.until_note("publishing new tables waits for open transactions")
        assert not restoring.done()
        assert await b.target("select from _live_migration.tables") == []
        await writer.execute("insert into public.late values (2); commit")
        await restoring
        assert await b.target("select table_name from _live_migration.tables") == [("late",)]
        await writer.close()


# who was looking our publications up while they were dropped


@pytest.mark.parametrize("membership", ["table public.t", "tables in schema public"])
async def test_no_statement_of_the_source_fails_because_a_publication_goes(
    source_database: str, membership: str
) -> None:
    """A writer lists its table's publications, then looks each one up: one that is gone in between fails the statement.

    The writer is stopped between the two: it waits there for whoever has locked the catalog of publications.
    """
    async with (
        session(source_database, "source") as ours,
        session(source_database, "source") as watcher,
        session(source_database, "source") as other,
    ):
        await other.execute("create table public.t (id int primary key, n int); insert into public.t values (1, 1)")
        await create_publication(ours, "going", ALL_OPERATIONS)
        await other.execute(f"alter publication going add {membership}")
        writer = await asyncpg.connect(source_database)
        pid = writer.get_server_pid()
        await other.execute("begin; lock table pg_publication in access exclusive mode")
        writing = asyncio.ensure_future(writer.execute("update public.t set n = 2"))
        await until_waiting(source_database, pid)
        os.kill(pid, signal.SIGSTOP)
        try:
            await other.execute("rollback")
            dropping = asyncio.ensure_future(drop_publication(ours, "going", lock_timeout=1))
            members = "select count(*) from pg_publication_tables where pubname = 'going'"
            async with asyncio.timeout(30):
                while await watcher.fetchval(members):
                    await asyncio.sleep(0.01)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert await writing == "UPDATE 1"
        assert await dropping
        await writer.close()


async def test_a_publication_is_dropped_beside_a_transaction_that_stays_open(source_database: str) -> None:
    async with session(source_database, "source") as ours, session(source_database, "source") as other:
        await other.execute(
            'create schema "S"; create table "S"."T" (id int primary key); create table public.t (id int)'
        )
        await create_publication(ours, "going", ALL_OPERATIONS)
        tables = [QualifiedName("S", "T"), QualifiedName("public", "t")]
        published = [PublishedTable(await ours.fetchval("select $1::text::regclass::oid", t.sql), t) for t in tables]
        await add_tables(ours, "going", published, lock_timeout=1)
        await other.execute('begin; insert into "S"."T" values (1)')
        assert await drop_publication(ours, "going", lock_timeout=1)
        assert not await drop_publication(ours, "going", lock_timeout=1)
        await other.execute('insert into "S"."T" values (2); commit')


# locks


async def test_nobody_queues_for_long_behind_a_lock_that_we_wait_for(source_database: str) -> None:
    """A reader holds the table, we want it for ourselves, and all who come after us would wait for both."""
    reader, other = await asyncpg.connect(source_database), await asyncpg.connect(source_database)
    await reader.execute("create table public.t (id int)")
    await reader.execute("begin; select from public.t")
    async with session(source_database, "source") as ours:
        oid = await ours.fetchval("select 'public.t'::regclass::oid")
        table = PublishedTable(oid, QualifiedName("public", "t"))
        altering = asyncio.ensure_future(set_identity_full(ours, table, lock_timeout=0.5))
        await until_waiting(source_database, ours.get_server_pid())
        await other.execute("set lock_timeout = '20s'; insert into public.t values (1)")
        assert not altering.done()
        await reader.execute("commit")
        await altering
        assert await ours.fetchval("select relreplident = 'f' from pg_class where oid = $1", oid)
    await reader.close()
    await other.close()


# on which tables UPDATE and DELETE would fail

IDENTITIES = {
    "primary key": ("create table t (id int primary key, v int)", True),
    "no key": ("create table t (id int, v int)", False),
    "deferrable primary key": ("create table t (id int primary key deferrable, v int)", False),
    "unique index alone": ("create table t (id int not null unique, v int)", False),
    "identity index": (
        "create table t (id int not null unique, v int); alter table t replica identity using index t_id_key",
        True,
    ),
    "dropped identity index": (
        "create table t (id int not null, v int); create unique index i on t (id); alter table t replica identity using index i; drop index i",
        False,
    ),
    "nothing": ("create table t (id int primary key, v int); alter table t replica identity nothing", False),
    "full": ("create table t (id int, v int); alter table t replica identity full", True),
    "full, generated": (
        "create table t (id int, v int, g int generated always as (v * 2) stored); alter table t replica identity full",
        None,
    ),
    "full, virtual": (
        "create table t (id int, v int, g int generated always as (v * 2) virtual); alter table t replica identity full",
        None,
    ),
    "partition of a root that is full": (
        """create table r (id int, v int) partition by list (id); alter table r replica identity full;
           create table t partition of r for values in (1)""",
        False,
    ),
    "attached to a root that is full": (
        """create table r (id int, v int) partition by list (id); alter table r replica identity full;
           create table t (id int, v int); alter table r attach partition t for values in (1)""",
        False,
    ),
}
"""What makes table `t`, and whether it may be published with all operations; None: as the version has it."""


@pytest.mark.parametrize("version", [14, 18])
@pytest.mark.parametrize("kind", IDENTITIES)
async def test_an_identity_is_what_the_server_takes_for_one(
    kind: str, version: int, postgres_server: PostgresFactory, fresh_database: DatabaseFactory
) -> None:
    """A published table without identity refuses UPDATE and DELETE, on the source, to its users: none may be published so."""
    if kind == "full, virtual" and version < 18:
        pytest.skip("there are no virtual columns before 18")
    uri = await fresh_database(postgres_server(version))
    script, expected = IDENTITIES[kind]
    async with session(uri, "source") as connection:
        await connection.execute(f"set search_path = public; {script}; insert into t (id, v) values (1, 1)")
        (table,) = [each for each in await list_tables(connection) if each.name.name == "t"]
        found = has_identity(table, version * 10_000)
        await connection.execute("create publication p for table only t")
        try:
            await connection.execute("update t set v = 2")
            is_taken = True
        except asyncpg.PostgresError:
            is_taken = False
        assert found == is_taken
        assert expected in (None, found)


@pytest.mark.parametrize("version", [14, 15, 16, 17, 18])
async def test_a_published_table_cannot_be_made_unlogged(
    version: int, postgres_server: PostgresFactory, fresh_database: DatabaseFactory
) -> None:
    """A statement of the source's that fails because of us, in either publication, for as long as the table is in it: said in docs/delivery.md."""
    async with session(await fresh_database(postgres_server(version)), "source") as connection:
        await connection.execute("create table public.t (id int primary key)")
        table = PublishedTable(
            await connection.fetchval("select 'public.t'::regclass::oid"), QualifiedName("public", "t")
        )
        for operations in (ALL_OPERATIONS, INSERT_ONLY):
            await create_publication(connection, "ours", operations)
            await add_tables(connection, "ours", [table], lock_timeout=1.0)
            with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="part of a publication"):
                await connection.execute("alter table public.t set unlogged")
            await drop_publication(connection, "ours", lock_timeout=1.0)
        await connection.execute("alter table public.t set unlogged")
