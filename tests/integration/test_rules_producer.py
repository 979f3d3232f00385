"""Rules of the producer: one writer of the log, and a slot that never leads it."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from os import kill
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from aiokafka.errors import KafkaError as ClientError
from pydantic import SecretStr

from live_migration.common.control import POSITION, LogPosition
from live_migration.common.errors import KafkaError, LiveMigrationError, SourceError
from live_migration.common.kafka_clients import LogProducer
from live_migration.common.local_kafka import LocalKafka
from live_migration.common.settings import KIB, Settings
from live_migration.producer import publisher as publisher_module
from live_migration.producer.batcher import Record
from live_migration.producer.control_reader import BrokerLost
from live_migration.producer.publisher import Publisher
from live_migration.producer.service import run_producer
from tests.fixtures.change_log import (
    prepare,
    read_position,
    read_records,
    run_sql,
    running_producer,
    source_lsn,
    wait_for,
    wait_until_published,
    write_config,
)

pytestmark = pytest.mark.integration


def make_settings(source: str, kafka: str, name: str) -> Settings:
    return Settings(
        source=SecretStr(source), kafka=kafka, name=name, partitions=1, segment_bytes=16 * KIB, status_interval=1.0,
        heartbeat_interval=1.0,
    )  # fmt: skip


def put_position(lsn: int) -> LogPosition:
    return LogPosition(confirm_lsn=lsn, lanes=((lsn, 1),), system_identifier="1", timeline=1, sent_at=0.0)


def put_records(value: bytes) -> deque[Record]:
    return deque([Record(0, None, len(value), iter([value]))])


async def test_the_broker_refuses_whoever_wrote_before_the_newest_producer(
    source_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """A producer that slept through its succession has not read of it: Kafka itself must stop its next transaction."""
    settings = make_settings(source_database, kafka_bootstrap, unique_name)
    await run_sql(settings, "create table public.t (id int primary key)")
    await prepare(settings, ["public.t"])
    async with Publisher.open(settings) as first:
        await first.publish(put_records(b"first"), put_position(100), None)
        async with Publisher.open(settings) as second:
            assert second.position == put_position(100)
            await second.publish(put_records(b"second"), put_position(200), None)
            with pytest.raises(LiveMigrationError):
                await first.publish(put_records(b"first again"), put_position(150), None)
            assert first.position == put_position(100)
            await second.publish(put_records(b"third"), put_position(300), None)
    assert await read_records(settings) == {0: [b"first", b"second", b"third"]}
    assert await read_position(settings) == put_position(300)


async def test_a_producer_that_is_fenced_before_it_could_speak_begins_again(
    source_database: str, kafka_bootstrap: str, unique_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--recopy` fences whoever comes back between two words; nobody took over then, and nobody else would bring the producer back."""
    settings = make_settings(source_database, kafka_bootstrap, unique_name)
    await run_sql(settings, "create table public.t (id int primary key)")
    await prepare(settings, ["public.t"])
    greet, fenced = publisher_module._greet, 0

    async def fence_first(*arguments: Any) -> None:
        nonlocal fenced
        fenced += 1
        if fenced == 1:
            await publisher_module.fence_producers(settings)
        await greet(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(publisher_module, "_greet", fence_first)
        async with running_producer(settings):
            await run_sql(settings, "insert into public.t values (1)")
            await wait_until_published(settings, await source_lsn(settings))
    assert fenced > 1
    async with Publisher.open(settings) as publisher:
        await publisher_module.fence_producers(settings)
        with pytest.raises(BrokerLost):
            await publisher.catch_up()
        assert not publisher.is_superseded
    async with Publisher.open(settings) as first, Publisher.open(settings):
        with pytest.raises(KafkaError, match="took over"):
            await first.catch_up()
        assert first.is_superseded


async def test_records_count_only_with_the_record_of_their_position(
    source_database: str, kafka_bootstrap: str, unique_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a producer that ends between the two would find changes in the log that nobody remembers, and send them again."""
    settings = make_settings(source_database, kafka_bootstrap, unique_name)
    await run_sql(settings, "create table public.t (id int primary key)")
    await prepare(settings, ["public.t"])
    send = LogProducer.send

    async def send_no_position(self: LogProducer, topic: str, value: bytes, **options: Any) -> asyncio.Future[object]:
        if options["key"] == POSITION:
            raise ClientError
        sent: asyncio.Future[object] = await send(self, topic, value, **options)
        await sent
        return sent

    async with Publisher.open(settings) as first:
        await first.publish(put_records(b"first"), put_position(100), None)
        with monkeypatch.context() as broken:
            broken.setattr(LogProducer, "send", send_no_position)
            with pytest.raises(LiveMigrationError):
                await first.publish(put_records(b"half"), put_position(200), None)
    async with Publisher.open(settings) as second:
        assert second.position == put_position(100)
        await second.publish(put_records(b"whole"), put_position(200), None)
    assert await read_records(settings) == {0: [b"first", b"whole"]}


async def test_a_producer_refuses_another_server(source_database: str, kafka_bootstrap: str, unique_name: str) -> None:
    settings = make_settings(source_database, kafka_bootstrap, unique_name)
    await run_sql(settings, "create table public.t (id int primary key)")
    config = await prepare(settings, ["public.t"])
    await write_config(settings, config.model_copy(update={"system_identifier": "1"}))
    with pytest.raises(SourceError, match="another server"):
        await asyncio.wait_for(run_producer(settings, asyncio.Event()), 60)


async def test_the_slot_stays_where_the_log_is_while_the_broker_hangs(source_database: str, unique_name: str) -> None:
    """What was received and is not committed in Kafka is never confirmed to the source, however often it asks."""
    async with LocalKafka() as kafka:
        settings = make_settings(source_database, kafka.bootstrap, unique_name)
        await run_sql(settings, "create table public.t (id int primary key)")
        await prepare(settings, ["public.t"])
        source = await asyncpg.connect(source_database)
        async with running_producer(settings):
            await source.execute("insert into public.t values (1)")
            await wait_until_published(settings, await source_lsn(settings))
            kill(kafka.pid, signal.SIGSTOP)
            try:
                # one change after another: a transaction that was under way may be one that holds the first
                before = await source.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
                await source.execute("insert into public.t values (2)")
                lsn = await source.fetchval("select pg_current_wal_lsn() - '0/0'::pg_lsn")
                now = await source.fetchval("select clock_timestamp()")

                async def has_replied() -> bool:
                    """Whether the producer has received the change, and has sent status for a while since."""
                    return bool(
                        await source.fetchval(
                            """select r.sent_lsn - '0/0'::pg_lsn >= $2 and r.write_lsn - '0/0'::pg_lsn >= $2
                                      and r.reply_time > $3::timestamptz + interval '3 seconds'
                               from pg_replication_slots s join pg_stat_replication r on r.pid = s.active_pid
                               where s.slot_name = $1""",
                            settings.slot,
                            lsn,
                            now,
                        )
                    )

                await wait_for(has_replied)
                confirmed = await source.fetchval(
                    "select confirmed_flush_lsn - '0/0'::pg_lsn from pg_replication_slots where slot_name = $1",
                    settings.slot,
                )
                assert confirmed <= before
            finally:
                kill(kafka.pid, signal.SIGCONT)
            await wait_until_published(settings, int(lsn))
        await source.close()


async def test_a_stream_that_the_server_ends_again_and_again_at_one_place_says_so(
    source_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """Bytes that are no text in the stream's encoding, which a database without an encoding takes: it can never send them."""
    admin = await asyncpg.connect(source_database)
    name = f"ascii_{unique_name}"
    await admin.execute(f"create database {name} encoding 'SQL_ASCII' locale 'C' template template0")
    settings = make_settings(f"{source_database.rpartition('/')[0]}/{name}", kafka_bootstrap, unique_name)
    try:
        await run_sql(settings, "create table public.t (id int primary key, v text)")
        await prepare(settings, ["public.t"])
        await run_sql(settings, r"insert into public.t values (1, convert_from('\xff', 'SQL_ASCII'))")
        with pytest.raises(SourceError, match="failed 5 times") as failed:
            await asyncio.wait_for(run_producer(settings, asyncio.Event()), 60)
        assert "invalid byte sequence" in failed.value.message
        assert failed.value.hint
    finally:
        for slot in (settings.slot, f"{settings.slot}_ref"):
            await admin.execute(
                "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = $1", slot
            )
        await admin.execute(f"drop database {name} with (force)")
        await admin.close()


async def test_a_word_on_another_change_log_is_passed_over(
    source_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """A coordinator that slept through `--recopy` writes what it knows into the control topic that was made since."""
    settings = make_settings(source_database, kafka_bootstrap, unique_name)
    await run_sql(settings, "create table public.t (id int primary key)")
    config = await prepare(settings, ["public.t"])
    late = config.model_copy(update={"topic_id": str(uuid4()), "publication_change": 7})
    newer = config.model_copy(update={"publication_change": 1})
    async with Publisher.open(settings) as publisher:
        assert publisher.config == config
        for word, holds in (
            (late, config),
            (newer, newer),
            (late.model_copy(update={"is_ended": True}), newer),
            (newer.model_copy(update={"is_ended": True}), newer.model_copy(update={"is_ended": True})),
        ):
            await write_config(settings, word)
            await publisher.catch_up()
            assert publisher.config == holds
