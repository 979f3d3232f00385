"""Rules of the coordinator: one at a time, and no table snapshot before everything older than the slot is visible."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from live_migration.common import state
from live_migration.common.control import CONFIG, ProducerConfig
from live_migration.common.errors import Fenced, TargetError
from live_migration.common.kafka import read_control
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.settings import load_settings
from live_migration.common.state import Phase
from live_migration.coordinator import steps
from live_migration.coordinator.prepare import prepare
from tests.fixtures.change_log import wait_for
from tests.fixtures.fix_postgres import SETTINGS
from tests.integration.test_conductor import bench, fetch

pytestmark = pytest.mark.integration


async def test_the_first_snapshot_waits_for_a_commit_that_the_slot_has_not_and_nobody_sees(
    target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """A commit stands in the WAL before it is visible, for long when it waits for a standby.

    One that stands there before the slot's first LSN is not in the stream; a snapshot taken now would not have it either.
    """
    async with LocalPostgres(settings=SETTINGS) as server:
        settings = load_settings(
            {
                "source": server.uri(), "target": target_database, "kafka": kafka_bootstrap, "name": unique_name,
                "dir": tmp_path, "workers": False, "partitions": 1, "slot_timeout": 60.0, "lock_timeout": 0.5,
            }
        )  # fmt: skip
        watcher, first, second, hanging = [await asyncpg.connect(server.uri()) for _ in range(4)]
        for connection in (watcher, first, second):
            await connection.execute("set synchronous_commit = local")
        await watcher.execute("create table t (id int primary key)")

        async def slot_waits_for(xid: str) -> bool:
            return bool(
                await watcher.fetchval(
                    """select exists (select from pg_locks l join pg_stat_activity a using (pid)
                                      where a.application_name = 'live-migration slot' and not l.granted
                                        and l.transactionid::text = $1)""",
                    xid,
                )
            )

        async with bench(settings) as b:
            await first.execute("begin; insert into t values (1)")
            first_xid = await first.fetchval("select pg_current_xact_id()::text")
            preparing = asyncio.ensure_future(prepare(b.run))
            try:
                await wait_for(lambda: slot_waits_for(first_xid))
                await second.execute("begin; insert into t values (2)")
                second_xid = await second.fetchval("select pg_current_xact_id()::text")
                await first.execute("commit")
                await wait_for(lambda: slot_waits_for(second_xid))
                await watcher.execute("alter system set synchronous_standby_names = 'nobody'")
                await watcher.execute("select pg_reload_conf()")

                async def waits_for_standby() -> bool:
                    query = "select wait_event = 'SyncRep' from pg_stat_activity where pid = $1"
                    return bool(await watcher.fetchval(query, hanging.get_server_pid()))

                async def has_setting() -> bool:
                    return bool(await hanging.fetchval("show synchronous_standby_names"))

                await wait_for(has_setting)
                inserting = asyncio.ensure_future(hanging.execute("insert into t values (3)"))
                await wait_for(waits_for_standby)
                await second.execute("commit")

                async def is_slot_made() -> bool:
                    query = "select confirmed_flush_lsn is not null from pg_replication_slots where slot_name = $1"
                    return bool(await watcher.fetchval(query, unique_name))

                await wait_for(is_slot_made)

                async def is_told() -> bool:
                    assert not preparing.done(), "a table could be copied now"
                    return any("the first table snapshot waits" in note for note in b.observer.notes)

                await wait_for(is_told)
                assert await watcher.fetch("select id from t order by 1") == [(1,), (2,)]
                assert not inserting.done()
            finally:
                await watcher.execute("alter system reset synchronous_standby_names")
                await watcher.execute("select pg_reload_conf()")
            await inserting
            await preparing
            assert await watcher.fetch("select id from t order by 1") == [(1,), (2,), (3,)]
            streamed = await watcher.fetch(
                """select data from pg_logical_slot_peek_binary_changes($1::text::name, null, null, 'proto_version', '1',
                                                                      'publication_names', $1::text)""",
                unique_name,
            )
            assert not [row for row in streamed if row["data"][:1] == b"I"], (
                "the case that this is about did not come up"
            )
        for connection in (watcher, first, second, hanging):
            await connection.close()


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
