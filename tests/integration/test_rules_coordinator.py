"""Rules of the coordinator: one at a time, and no table snapshot before everything older than the slot is visible."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import asyncpg
import pytest

from live_migration.common import state
from live_migration.common.control import CONFIG, ProducerConfig
from live_migration.common.errors import Fenced, SourceError, TargetError
from live_migration.common.kafka import read_control
from live_migration.common.local_postgres import LocalPostgres, wheel_binaries
from live_migration.common.pgoutput import decode_relation
from live_migration.common.postgres import session
from live_migration.common.relation import QualifiedName, quote_identifier
from live_migration.common.settings import load_settings
from live_migration.common.state import Phase
from live_migration.coordinator import schema, steps
from live_migration.coordinator.conductor import conduct
from live_migration.coordinator.control_topic import producer_config
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.opening import open_migration
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.run import Run, target_session
from live_migration.producer.publication import PublishedTable, execute_politely, set_identity_full
from live_migration.producer.replication import ReplicationConnection
from live_migration.producer.resume import stream_options
from live_migration.producer.slot import await_older_transactions
from tests.fixtures.change_log import wait_for
from tests.fixtures.fix_postgres import HAS_STANDBY, NO_STANDBY, SETTINGS, DatabaseFactory, PostgresFactory
from tests.integration.test_conductor import RecordingObserver, bench, fetch

pytestmark = pytest.mark.integration


async def test_the_first_snapshot_waits_for_a_commit_that_the_log_has_not_and_nobody_sees(
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A commit stands in the WAL before it is visible, for long when it waits for a standby.

    One that stands there before the log's first LSN is not in the log; a snapshot taken now would not have it either.
    """
    async with LocalPostgres(settings=HAS_STANDBY) as server:
        settings = load_settings(
            {
                "source": server.uri(), "target": target_database, "kafka": kafka_bootstrap, "name": unique_name,
                "dir": tmp_path, "workers": False, "partitions": 1, "slot_timeout": 60.0, "lock_timeout": 0.5,
            }
        )  # fmt: skip
        watcher, hanging = [await asyncpg.connect(server.uri()) for _ in range(2)]
        await watcher.execute("create table t (id int primary key)")
        await hanging.execute("set synchronous_commit = on")
        inserting: list[asyncio.Future[str]] = []

        async def waits_for_standby() -> bool:
            query = "select wait_event = 'SyncRep' from pg_stat_activity where pid = $1"
            return bool(await watcher.fetchval(query, hanging.get_server_pid()))

        async def wait_and_hang(*arguments: Any, **options: Any) -> None:
            """Before the log's first LSN is read, put a commit below it that nobody sees."""
            await await_older_transactions(*arguments, **options)
            if not inserting:
                inserting.append(asyncio.ensure_future(hanging.execute("insert into t values (3)")))
                await wait_for(waits_for_standby)

        monkeypatch.setattr("live_migration.coordinator.prepare.await_older_transactions", wait_and_hang)
        async with bench(settings) as b:
            preparing = asyncio.ensure_future(prepare(b.run))
            try:

                async def is_told() -> bool:
                    assert not preparing.done(), "a table could be copied now"
                    return any("the first table snapshot waits" in note for note in b.observer.notes)

                await wait_for(
                    is_told, seconds=90
                )  # a slot on an idle server takes up to 15 s, and more on a busy machine
                assert await watcher.fetch("select id from t") == []
            finally:
                for statement in NO_STANDBY:
                    await watcher.execute(statement)
            await inserting[0]
            await preparing
            assert await watcher.fetch("select id from t") == [(3,)]
            config = producer_config(settings, b.run.migration)
            before = await watcher.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
            await watcher.execute("insert into t values (4)")
            streamed = await stream_until(server.uri(), config, int(before))
            inserts = [message for message in streamed if message[:1] == b"I"]
            assert len(inserts) == 1, "the case that this is about did not come up"
        for connection in (watcher, hanging):
            await connection.close()


@pytest.mark.parametrize("change", ["truncate t", "alter table t add column v text default 'd'"])
async def test_what_ran_while_the_slot_was_made_is_copied_and_not_streamed(
    target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path, change: str
) -> None:
    """A transaction that begins once a slot is nearly made, and commits after, is decoded by a catalog that may be too old.

    It lacks what a transaction did that began a little earlier and committed in between: PostgreSQL 18.6 ends the stream for a
    truncated table (could not map filenumber, for ever), and says nothing of an added column, whose values are then lost.
    """
    async with LocalPostgres(settings=SETTINGS) as server:
        settings = load_settings(
            {
                "source": server.uri(), "target": target_database, "kafka": kafka_bootstrap, "name": unique_name,
                "dir": tmp_path, "workers": False, "partitions": 1, "slot_timeout": 60.0, "lock_timeout": 0.5,
            }
        )  # fmt: skip
        watcher, old, changing, late = [await asyncpg.connect(server.uri()) for _ in range(4)]
        await watcher.execute("create table t (id int primary key); create table other (id int primary key)")

        async def slot_waits_for(connection: asyncpg.Connection) -> None:
            xid = await connection.fetchval("select pg_current_xact_id()::text")
            query = """select exists (select from pg_locks l join pg_stat_activity a using (pid)
                                      where a.application_name = 'live-migration slot' and not l.granted
                                        and l.transactionid::text = $1)"""

            async def waits() -> bool:
                return bool(await watcher.fetchval(query, xid))

            await wait_for(waits)

        async def is_slot_made() -> bool:
            query = "select confirmed_flush_lsn is not null from pg_replication_slots where slot_name = $1"
            return bool(await watcher.fetchval(query, unique_name))

        async with bench(settings) as b:
            await old.execute("begin; insert into other values (1)")
            preparing = asyncio.ensure_future(prepare(b.run))
            await slot_waits_for(old)
            await changing.execute(f"begin; {change}")
            await old.execute("commit")
            await slot_waits_for(changing)
            await late.execute("begin; insert into other values (2)")
            await changing.execute("commit")
            await late.execute("insert into t values (7, 'late')" if "column" in change else "insert into t values (7)")
            await wait_for(is_slot_made)
            assert not preparing.done()
            await late.execute("commit")
            await preparing
            config = producer_config(settings, b.run.migration)
            before = await watcher.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
            await watcher.execute("insert into t values (8)")
            streamed = await stream_until(server.uri(), config, int(before))
        assert not await watcher.fetchval(
            "select count(*) from pg_description where classoid = 'pg_publication'::regclass"
        )
        inserts = [message for message in streamed if message[:1] == b"I"]
        (relation,) = [decode_relation(message) for message in streamed if message[:1] == b"R"]
        assert len(inserts) == 1
        assert [column.name for column in relation.columns] == (["id", "v"] if "column" in change else ["id"])
        assert await watcher.fetch("select id from t order by 1") == [(7,), (8,)]
        for connection in (watcher, old, changing, late):
            await connection.close()


async def stream_until(uri: str, config: ProducerConfig, lsn: int) -> list[bytes]:
    """Give the messages that a producer which begins now gets, up to a commit above `lsn`."""
    messages: list[bytes] = []

    def take(data: bytes | memoryview) -> int:
        at = 0
        while data[at : at + 1] == b"d" and at + 1 + (length := int.from_bytes(data[at + 1 : at + 5], "big")) <= len(
            data
        ):
            if data[at + 5] == ord("w"):
                messages.append(bytes(data[at + 30 : at + 1 + length]))
            at += 1 + length
        return at

    async with await ReplicationConnection.open(uri) as stream, asyncio.timeout(30):
        options = stream_options(config, [quote_identifier(name) for name in config.publications])
        await stream.start(config.slot, config.start_lsn, options)
        while not any(each[:1] == b"C" and int.from_bytes(each[10:18], "big") > lsn for each in messages):
            await stream.received()
            stream.take(take, 1 << 20)
    return messages


# the plan


async def test_the_dump_shows_the_tables_of_the_plan_and_no_others(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A table made between the look at the catalogs and pg_dump: whoever brings it later would find it on the target, and half of it."""
    settings = load_settings(
        {"source": source_database, "target": target_database, "kafka": kafka_bootstrap, "name": unique_name, "dir": tmp_path, "workers": False}
    )  # fmt: skip
    await fetch(source_database, "create table planned (id int primary key)")
    dump = schema.dump

    async def make_and_dump(*arguments: Any, **options: Any) -> None:
        await fetch(source_database, "create table late (id int primary key)")
        await dump(*arguments, **options)

    monkeypatch.setattr(schema, "dump", make_and_dump)
    async with bench(settings) as b:
        await prepare(b.run)
        await schema.restore_schema(b.run)
        tables = "select tablename::text from pg_tables where schemaname = 'public'"
        assert await b.target(tables) == [("planned",)]
        assert await b.target("select table_name from _live_migration.tables") == [("planned",)]


async def test_settings_of_the_dump_that_an_older_target_does_not_know_are_left_out(
    postgres_server: PostgresFactory,
    fresh_database: DatabaseFactory,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """The client programs of 18 set `transaction_timeout`, which came with 17."""
    source, target = await fresh_database(postgres_server(14)), await fresh_database(postgres_server(15))
    settings = load_settings(
        {"source": source, "target": target, "kafka": kafka_bootstrap, "name": unique_name, "dir": tmp_path, "workers": False, "pg_bin": wheel_binaries()}
    )  # fmt: skip
    await fetch(source, "create table t (id int primary key)")
    async with bench(settings) as b:
        await prepare(b.run)
        await schema.restore_schema(b.run)
        assert await b.target("select tablename::text from pg_tables where schemaname = 'public'") == [("t",)]


# the lease


async def begin(target: str) -> asyncpg.Connection:
    connection = await asyncpg.connect(target)
    await state.create_schema(connection)
    await connection.execute(
        """insert into _live_migration.migration (id, name, phase, settings, kafka, source_address, source_system,
               source_timeline, source_database, source_version, topic_id, lane_count)
           values (gen_random_uuid(), 'm', 'copy', '{}', '', '', '', 1, '', 180000, gen_random_uuid(), 1)"""
    )
    return connection


async def test_a_coordinator_that_lives_is_not_succeeded(target_database: str) -> None:
    first, second = await begin(target_database), await asyncpg.connect(target_database)
    epoch = await state.acquire_coordinator_lease(first, "first", 60)
    with pytest.raises(TargetError, match="already being run by first"):
        await state.acquire_coordinator_lease(second, "second", 60)
    await state.renew_coordinator_lease(first, epoch, 60)
    await state.release_coordinator_lease(first, epoch)
    assert await state.acquire_coordinator_lease(second, "second", 60) > epoch
    await first.close()
    await second.close()


class Between:
    """A session on which something happens before its first query for many rows."""

    def __init__(self, connection: asyncpg.Connection, happens: Callable[[], Awaitable[object]]) -> None:
        self._connection, self._happens = connection, happens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def fetch(self, *arguments: Any) -> list[asyncpg.Record]:
        await self._happens()
        return await self._connection.fetch(*arguments)


async def test_of_two_successors_one_becomes_the_coordinator(target_database: str) -> None:
    """Both have read that their predecessor is gone, whose lease has not run out."""
    gone, first, second = await begin(target_database), *[await asyncpg.connect(target_database) for _ in range(2)]
    await state.acquire_coordinator_lease(gone, "gone", 60)
    pid = gone.get_server_pid()
    await gone.close()

    async def is_gone() -> bool:
        return not await first.fetchval("select exists (select from pg_stat_activity where pid = $1)", pid)

    await wait_for(is_gone)
    late = Between(second, lambda: state.acquire_coordinator_lease(first, "first", 60))
    with pytest.raises(TargetError, match="another coordinator took this migration over just now"):
        await state.acquire_coordinator_lease(cast("asyncpg.Connection", late), "second", 60)
    assert await first.fetchval("select owner from _live_migration.migration") == "first"
    await first.close()
    await second.close()


@pytest.mark.parametrize("gone", ["lease ran out", "connection lost"])
async def test_one_that_is_gone_is_succeeded_and_does_nothing_more(target_database: str, gone: str) -> None:
    first, second = await begin(target_database), await asyncpg.connect(target_database)
    epoch = await state.acquire_coordinator_lease(first, "first", -1 if gone == "lease ran out" else 60)
    if gone == "connection lost":
        await first.close()

        async def is_gone() -> bool:
            query = """select exists (select from pg_stat_activity a join _live_migration.migration m
                                      on a.pid = m.backend_pid and a.backend_start = m.backend_start)"""
            return not await second.fetchval(query)

        await wait_for(is_gone)
    taken = await state.acquire_coordinator_lease(second, "second", 60)
    assert taken == epoch + 1
    first.terminate()
    # whatever it still does, it does over another connection
    zombie = await asyncpg.connect(target_database)
    before = await zombie.fetchrow("select * from _live_migration.migration")
    with pytest.raises(Fenced):
        await state.renew_coordinator_lease(zombie, epoch, 60)
    with pytest.raises(Fenced):
        await state.set_phase(zombie, epoch, Phase.REPLAY)
    with pytest.raises(Fenced):
        await steps.require_role(zombie, epoch)
    with pytest.raises(Fenced):
        await steps.finish(zombie, epoch, "barrier")
    with pytest.raises(Fenced):
        await steps.advance(zombie, epoch, "large objects", 5)
    await state.release_coordinator_lease(zombie, epoch)
    assert await zombie.fetchrow("select * from _live_migration.migration") == before
    assert await zombie.fetchval("select count(*) from _live_migration.steps") == 0
    await zombie.close()
    await second.close()


async def test_one_that_was_stopped_within_a_transaction_keeps_nobody_waiting(target_database: str) -> None:
    """Its process sleeps: none of its sessions ends by itself, and one of them has the migration's row locked."""
    first, second = await begin(target_database), await asyncpg.connect(target_database)
    owner = state.worker_id("coordinator")
    settings = load_settings({"target": target_database, "source": target_database, "kafka": "nowhere:1"})
    epoch = await state.acquire_coordinator_lease(first, owner, -1)
    async with target_session(settings, owner, "conductor") as conductor:
        await conductor.execute("begin; update _live_migration.migration set lane_count = 7")
        async with asyncio.timeout(30):
            assert await state.acquire_coordinator_lease(second, state.worker_id("coordinator"), 60) == epoch + 1
    assert await second.fetchval("select lane_count from _live_migration.migration") == 1
    await first.close()
    await second.close()


async def test_what_one_that_was_stopped_has_locked_on_the_source_is_free_for_its_users(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    settings = load_settings(
        {"source": source_database, "target": target_database, "kafka": kafka_bootstrap, "name": unique_name, "dir": tmp_path, "workers": False}
    )  # fmt: skip
    await fetch(source_database, "create table t (id int primary key)")
    reporter = Reporter(RecordingObserver())
    opened = await open_migration(settings, reporter)
    assert opened is not None
    async with session(target_database, "target") as target:
        epoch = await state.acquire_coordinator_lease(target, state.worker_id("coordinator"), -1)
        stopped = Run(opened, reporter, target, epoch, await state.require_migration(target))
        async with stopped.source_session("identities") as sleeping:
            await sleeping.execute("begin; alter table public.t replica identity full")
            user, stop = await asyncpg.connect(source_database), asyncio.Event()
            successor = asyncio.ensure_future(
                conduct(settings, stop=stop, ask_cutover=asyncio.Event(), observer=RecordingObserver())
            )
            try:
                async with asyncio.timeout(30):
                    await user.execute("select from t")
            finally:
                stop.set()
                await successor
                await user.close()
            assert sleeping.is_closed()


async def test_who_is_stopped_after_its_word_keeps_no_lock_on_the_source(source_database: str) -> None:
    """Whatever it had to say is said at once; the server ends the transaction without it."""
    await fetch(source_database, "create table t (id int)")
    source, user = await asyncpg.connect(source_database), await asyncpg.connect(source_database)
    said = asyncio.Event()

    class Sleeping:
        def __getattr__(self, name: str) -> Any:
            return getattr(source, name)

        async def execute(self, statement: str) -> None:
            await source.execute(statement)
            if "replica identity" in statement:
                said.set()
                await asyncio.Event().wait()

    table = PublishedTable(await user.fetchval("select 't'::regclass::oid"), QualifiedName("public", "t"))
    giving = asyncio.ensure_future(set_identity_full(cast("asyncpg.Connection", Sleeping()), table, lock_timeout=1.0))
    await said.wait()
    await user.execute("set lock_timeout = '10s'; select from t")
    assert await user.fetchval("select relreplident::text from pg_class where oid = 't'::regclass") == "f"
    giving.cancel()
    await asyncio.wait([giving])
    await source.close()
    await user.close()


async def test_of_statements_that_are_sent_at_once_all_are_undone_or_none(source_database: str) -> None:
    await fetch(source_database, "create table t (id int)")
    source = await asyncpg.connect(source_database)
    await source.execute("set default_transaction_read_only = on")
    both = ["alter table t replica identity full", "alter table t add check (id / 0 > 1), add primary key (nothing)"]
    with pytest.raises(SourceError, match="nothing"):
        await execute_politely(source, both, lock_timeout=1.0, doing="trying")
    identity = "select relreplident::text from pg_class where oid = 't'::regclass"
    assert await source.fetchval(identity) == "d"
    await execute_politely(source, both[:1], lock_timeout=1.0, doing="trying")
    assert await source.fetchval(identity) == "f"
    assert await source.fetchval("show lock_timeout") == "0"
    await source.close()


async def test_what_a_fenced_coordinator_was_at_is_rolled_back(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    settings = load_settings(
        {"source": source_database, "target": target_database, "kafka": kafka_bootstrap, "name": unique_name, "dir": tmp_path, "workers": False}
    )  # fmt: skip
    async with bench(settings) as b:
        async with b.run.target_transaction("working") as target:
            await target.execute("create table public.ours (id int)")
        await b.target("update _live_migration.migration set epoch = epoch + 1, owner = 'another'")
        with pytest.raises(Fenced):
            async with b.run.target_transaction("working") as target:
                await target.execute("create table public.not_ours (id int)")
        with pytest.raises(Fenced):
            await b.run.enter(Phase.SCHEMA)
    tables = await fetch(target_database, "select tablename::text from pg_tables where schemaname = 'public'")
    assert tables == [("ours",)]


@pytest.mark.parametrize(
    ("column", "is_binary"),
    [("int", True), ("text", True), ("public.mood", False), ("public.mood[]", False), ("public.positive", False)],
)
async def test_the_stream_is_binary_only_where_every_type_means_the_same_on_both_sides(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    column: str,
    is_binary: bool,
) -> None:
    """One table with a type of the user's own, whose oid is another one on the target, and all travel as text."""
    settings = load_settings(
        {"source": source_database, "target": target_database, "kafka": kafka_bootstrap, "name": unique_name, "dir": tmp_path, "workers": False}
    )  # fmt: skip
    await fetch(
        source_database,
        f"""create type public.mood as enum ('good', 'bad'); create domain public.positive as int check (value > 0);
            create table plain (id int primary key); create table other (id int primary key, v {column})""",
    )
    async with bench(settings) as b:
        await prepare(b.run)
        assert b.run.migration.binary_stream is is_binary
        config = ProducerConfig.model_validate_json((await read_control(settings))[CONFIG])
        assert config.binary is is_binary
