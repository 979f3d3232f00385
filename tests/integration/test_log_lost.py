"""What was published and is gone, or was read by somebody else, is noticed at the start, and never taken for a normal one."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self
from uuid import uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import NewTopic, RecordsToDelete

from live_migration.common.control import CONFIG, ProducerConfig
from live_migration.common.errors import LiveMigrationError, LogGap, SlotLost
from live_migration.common.kafka import CHANGES_CONFIG, admin, read_control, topic_exists
from live_migration.common.kafka_clients import client_options
from live_migration.common.local_kafka import LocalKafka
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.settings import Settings
from live_migration.coordinator.control_topic import write_config
from live_migration.producer.service import run_producer
from tests.e2e.migration import Migration
from tests.fixtures.change_log import (
    prepare,
    read_status,
    run_sql,
    running_producer,
    source_lsn,
    wait_until_published,
)
from tests.fixtures.fix_postgres import SETTINGS, execute, run_apart
from tests.integration.test_producer import NAMES, TABLES, make_settings
from tests.support.workload import differences, read_rows

pytestmark = pytest.mark.integration


async def make_changes_topic_again(settings: Settings) -> None:
    """Delete the change topic, and make one with the same name and settings."""
    async with admin(settings) as client:
        await client.delete_topics([settings.changes_topic])
        while await topic_exists(client, settings.changes_topic):
            await asyncio.sleep(0.1)
        topic = NewTopic(settings.changes_topic, settings.partitions, 1, topic_configs=CHANGES_CONFIG)
        async with asyncio.timeout(30):
            while (await client.create_topics([topic])).topic_errors[0][1]:  # the old one's files are still there
                await asyncio.sleep(0.2)


async def read_slot_elsewhere(uri: str, slot: str) -> int:
    """Read the slot to its end as another program would; give how many messages it took."""
    connection = await asyncpg.connect(uri)
    try:
        rows = await connection.fetch(
            """select data from pg_logical_slot_get_binary_changes($1::name, null, null,
                   'proto_version', '1', 'publication_names', $1::text)""",
            slot,
        )
        return len(rows)
    finally:
        await connection.close()


async def keep_producing(migration: Migration) -> None:
    """Run producers one after the other, as a container engine does: each refuses what is lost, until it is made anew."""
    while True:
        with suppress(LiveMigrationError):
            await run_producer(migration.settings, asyncio.Event())
        await asyncio.sleep(0.05)


async def publish(settings: Settings, *statements: str) -> None:
    async with running_producer(settings):
        await run_sql(settings, *statements)
        await wait_until_published(settings, await source_lsn(settings))


def insert(number: int) -> list[str]:
    return [f"insert into {name} values ({number}, 'row')" for name in NAMES]


@pytest.fixture
async def settings(source_database: str, kafka_bootstrap: str, unique_name: str) -> Settings:
    given = make_settings(source_database, kafka_bootstrap, unique_name)
    await run_sql(given, TABLES)
    return given


def says_what_to_do(error: LogGap | SlotLost) -> None:
    assert "3 tables" in error.message
    assert "public.items" in error.message
    assert "migrate --recopy" in error.hint


async def test_a_producer_refuses_a_change_topic_that_was_made_again(settings: Settings) -> None:
    await prepare(settings, NAMES)
    await publish(settings, *insert(1))
    await make_changes_topic_again(settings)
    with pytest.raises(LogGap, match="made again") as raised:
        await run_producer(settings, asyncio.Event())
    says_what_to_do(raised.value)
    status = await read_status(settings)
    assert status is not None
    assert "made again" in status.error


async def test_a_producer_refuses_a_slot_that_somebody_else_has_read(settings: Settings) -> None:
    await prepare(settings, NAMES)
    await publish(settings, *insert(1))
    await run_sql(settings, *insert(2))
    assert await read_slot_elsewhere(settings.source_uri(), settings.slot)
    with pytest.raises(SlotLost, match="ahead of the log") as raised:
        await run_producer(settings, asyncio.Event())
    says_what_to_do(raised.value)


async def test_an_aborted_transaction_at_the_end_hides_no_segment(settings: Settings) -> None:
    """The last record that counts may stand far before the end of a partition."""
    await prepare(settings, NAMES)
    await publish(settings, *insert(1))
    async with AIOKafkaProducer(**client_options(settings), transactional_id=f"{settings.name}.test") as other:
        await other.begin_transaction()
        for lane in range(settings.partitions):
            for _ in range(100):
                await other.send(settings.changes_topic, b"x" * 1000, partition=lane)
        await other.abort_transaction()
    await publish(settings, *insert(2))


async def test_a_producer_refuses_a_broker_that_lost_its_tail(
    source_database: str, unique_name: str, tmp_path: Path
) -> None:
    """An older copy of the broker's files takes their place: first of the change topic alone, then of everything."""
    async with LocalKafka(tmp_path / "kafka") as broker:
        settings = make_settings(source_database, broker.bootstrap, unique_name)
        await run_sql(settings, TABLES)
        await prepare(settings, NAMES)
        await publish(settings, *insert(1))
        folder, older = broker.folder / "data", tmp_path / "older"
        await broker.kill()
        shutil.copytree(folder, older)
        await broker.start()
        await publish(settings, *insert(2))
        await broker.kill()
        for path in folder.glob(f"{settings.changes_topic}-*"):
            shutil.rmtree(path)
            shutil.copytree(older / path.name, path)
        await broker.start()
        with pytest.raises(LogGap, match="lost the log's tail") as raised:
            await run_producer(settings, asyncio.Event())
        says_what_to_do(raised.value)
        await broker.kill()
        shutil.rmtree(folder)
        shutil.copytree(older, folder)
        await broker.start()
        with pytest.raises(SlotLost, match="lost the log's tail"):
            await run_producer(settings, asyncio.Event())


class Storage:
    """Where a server keeps its data: taken as a snapshot, and put back, each while the server is down."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="live-migration-storage-"))  # pytest's are for their owner alone
        self.folder.chmod(0o755)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)

    def server(self) -> LocalPostgres:
        return LocalPostgres(self.folder / "server", settings=SETTINGS)

    def keep(self) -> None:
        self._copy("server", "snapshot")

    def put_back(self) -> None:
        shutil.rmtree(self.folder / "server/data")
        self._copy("snapshot", "server")

    def _copy(self, before: str, after: str) -> None:
        (self.folder / after).mkdir(exist_ok=True)
        subprocess.run(["cp", "-a", self.folder / before / "data", self.folder / after], check=True)


async def test_a_producer_refuses_a_source_whose_storage_went_back(kafka_bootstrap: str, unique_name: str) -> None:
    """System, timeline and slot are as they were: what is written then, up to where the log ends, would never be sent."""
    with Storage() as storage:
        async with storage.server() as server:
            settings = make_settings(server.uri(), kafka_bootstrap, unique_name)
            await run_sql(settings, TABLES)
            await prepare(settings, NAMES)
            await publish(settings, *insert(1))
        storage.keep()
        async with storage.server():
            await publish(settings, *insert(2))
            await run_sql(settings, *[line for number in range(3, 500) for line in insert(number)])
            await publish(settings)
        async with storage.server():  # stopped and started alone, it goes on
            await publish(settings)
        storage.put_back()
        async with storage.server():
            await run_sql(settings, *insert(1000))
            with pytest.raises(SlotLost, match="went back to an older state") as raised:
                await asyncio.wait_for(run_producer(settings, asyncio.Event()), 60)
            says_what_to_do(raised.value)


@pytest.mark.parametrize("what", ["published", "copied"])
async def test_a_source_whose_storage_went_back_is_copied_again(
    what: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Found by the coordinator, too: by what was published, or by what was copied where nothing is published."""
    with Storage() as storage:
        async with storage.server() as server:
            source = server.uri()
            await execute(source, "create table t (id int primary key); create table u (line text)")
            migration = Migration(source, target_database, kafka_bootstrap, unique_name, tmp_path, partitions=2)
            migration.start_coordinator()
            await migration.until_phase("copy")
            await migration.stop()
        storage.keep()
        async with storage.server():
            await execute(source, "insert into t select generate_series(1, 20000); insert into u values ('a')")
            migration.start_coordinator()
            services = [*migration.consumers, migration.producer] if what == "published" else migration.consumers
            for service in services:
                service.start()
            await migration.until_phase("replay")
            if what == "published":
                await execute(source, "insert into t values (0)")
                await migration.until("applied", "select count(*) = 20001 from t")
            for service in services:
                await service.drain()
            await migration.stop()
        async with storage.server():  # stopped and started alone, it goes on
            change = await migration.until("change", "select publication_change + 1 from _live_migration.migration")
            migration.start_coordinator()
            query = "select publication_change >= $1 from _live_migration.migration"
            await migration.until("found whole", query, change)
            await migration.stop()
        storage.put_back()
        async with storage.server():
            await execute(source, "insert into t select generate_series(7, 9)")
            migration.start_coordinator()
            assert migration.coordinator is not None
            with pytest.raises(SlotLost, match="went back to an older state") as raised:
                await asyncio.wait_for(migration.coordinator, 60)
            assert "2 tables" in raised.value.message
            for service in (*migration.consumers, migration.producer):
                service.task = None
            producing = asyncio.ensure_future(keep_producing(migration))
            migration.start_coordinator(recopy=True)
            await migration.until("voided", "select bool_and(attempt >= 2) from _live_migration.tables")
            for consumer in migration.consumers:
                consumer.start()
            try:
                await migration.until_phase("replay")
                await execute(source, "insert into t values (10)")
                await migration.finish()
            finally:
                producing.cancel()
                await migration.__aexit__()
            both = ("public.t", "public.u")
            found = differences(await read_rows(source, both), await read_rows(target_database, both))
            assert not found, found


async def make_slot_anew(uri: str, slot: str, *between: str) -> None:
    """Drop a slot, its reader ended first, and make it again under its name, with statements between."""
    connection = await asyncpg.connect(uri)
    query = "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = $1 and active"
    while await connection.fetchval(query, slot):
        await asyncio.sleep(0.01)
    await connection.execute(f"select pg_drop_replication_slot('{slot}')")
    for statement in between:
        await connection.execute(statement)
    await connection.execute(f"select pg_create_logical_replication_slot('{slot}', 'pgoutput')")
    await connection.close()


async def test_a_slot_that_somebody_makes_anew_during_replay_is_lost(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """To the producer, under which it happens, a restart of the source would look the same but for the slot's position."""
    await execute(source_database, "create table t (id int primary key); create table u (line text)")
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path, partitions=2)
    settings = migration.settings
    async with migration:
        await migration.until_phase("replay")
        await execute(source_database, "insert into t values (1)")
        await migration.until("applied", "select count(*) = 1 from t")
        assert migration.producer.task is not None
        assert not migration.producer.task.done()
        # The event loop stands still meanwhile, so that the producer never meets a source without the slot.
        run_apart(make_slot_anew(source_database, settings.slot, "insert into t values (2)"))
        with pytest.raises(SlotLost, match="ahead of the log") as raised:
            await asyncio.wait_for(migration.producer.task, 60)
        assert "2 tables" in raised.value.message
        assert "migrate --recopy" in raised.value.hint
        migration.producer.task = None
        status = await read_status(settings)
        assert status is not None
        assert "ahead of the log" in status.error
        await migration.stop()
        migration.start_coordinator()
        assert migration.coordinator is not None
        with pytest.raises(SlotLost, match="ahead of the log"):
            await asyncio.wait_for(migration.coordinator, 60)
        migration.coordinator = None
        await execute(target_database, "select 1 / (count(*) = 1)::int from t")


async def test_a_coordinator_and_a_consumer_refuse_what_lost_changes(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """One damage after the other, each of which is looked for before the ones that came before it."""
    await execute(source_database, "create table t (id int primary key); create table u (line text)")
    await execute(source_database, "insert into t select generate_series(1, 100); insert into u values ('a')")
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path, partitions=2)
    settings = migration.settings

    async def refused(error: type[LogGap | SlotLost], match: str) -> None:
        migration.start_coordinator()
        assert migration.coordinator is not None
        with pytest.raises(error, match=match) as raised:
            await asyncio.wait_for(migration.coordinator, 60)
        assert "2 tables" in raised.value.message
        assert "public.u" in raised.value.message
        assert "migrate --recopy" in raised.value.hint
        migration.coordinator = None

    async with migration:
        await migration.until_phase("replay")
        await execute(source_database, "insert into t values (101); insert into u values ('b')")
        await migration.until("applied", "select count(*) = 101 from t")
        await migration.until("applied", "select count(*) = 2 from u")
        for consumer in migration.consumers:
            await consumer.drain()
        await execute(source_database, "insert into t values (102)")
        await wait_until_published(settings, await source_lsn(settings))
        migration.stop_coordinator.set()
        await migration.producer.drain()
        assert migration.coordinator is not None
        await migration.coordinator

        async with admin(settings) as client:
            both = [TopicPartition(settings.changes_topic, lane) for lane in range(2)]
            await client.delete_records({partition: RecordsToDelete(before_offset=-1) for partition in both})
        await refused(LogGap, "deleted before they were applied")

        await make_changes_topic_again(settings)
        await refused(LogGap, "made again")
        migration.consumers[0].start()
        query = "select count(*) = 2 from _live_migration.checkpoints where error like '%ends at offset 0%'"
        await migration.until("lanes stopped", query)

        await execute(source_database, "insert into t values (103)")
        assert await read_slot_elsewhere(source_database, settings.slot)
        await refused(SlotLost, "ahead of the log")

        await execute(source_database, f"select pg_drop_replication_slot('{settings.slot}')")
        await refused(SlotLost, "does not exist")


async def test_the_late_word_of_a_coordinator_that_slept_through_a_recopy_is_no_loss(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """It stands in the control topic behind ours, and says that the change log is the one of before: every producer that starts refuses ours."""
    await execute(source_database, "create table t (id int primary key)", "insert into t values (1)")
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path, partitions=1)
    settings = migration.settings
    async with migration:
        await migration.until_phase("replay")
        await execute(source_database, "insert into t values (2)")
        await migration.until("applied", "select count(*) = 2 from t")
        await migration.stop()
        await migration.producer.drain()
        config = ProducerConfig.model_validate_json((await read_control(settings))[CONFIG])
        await write_config(settings, config.model_copy(update={"topic_id": str(uuid4())}))
        await execute(source_database, "insert into t values (3)")
        migration.producer.task = None
        producing = asyncio.ensure_future(keep_producing(migration))
        migration.start_coordinator()
        await migration.finish()
        producing.cancel()
        await asyncio.wait([producing])
    await execute(target_database, "select 1 / (count(*) = 3)::int from t")
