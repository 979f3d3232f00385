"""The control topic on a real broker."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from live_migration.common.control import POSITION
from live_migration.common.kafka import create_topics, delete_topics
from live_migration.common.settings import Settings

pytestmark = pytest.mark.integration


async def test_it_stays_small_however_often_a_position_is_recorded(kafka_bootstrap: str, unique_name: str) -> None:
    """Else a producer that has run for days could not start again: it reads the topic from its start."""
    settings = Settings.model_validate({"kafka": kafka_bootstrap, "name": unique_name, "partitions": 1})
    await create_topics(settings)
    try:
        async with AIOKafkaProducer(
            bootstrap_servers=kafka_bootstrap, transactional_id=unique_name, max_request_size=1 << 20
        ) as producer:
            for number in range(30):
                async with producer.transaction():
                    value = str(number).encode() + bytes(500_000)
                    await producer.send(settings.control_topic, value, key=POSITION, partition=0)
        async with asyncio.timeout(90):
            # it is compacted more than once, the first time perhaps while it is still written
            while await records(settings) >= 16:
                await asyncio.sleep(1)
    finally:
        await delete_topics(settings)


async def test_a_producer_whose_clock_is_ahead_can_write(kafka_bootstrap: str, unique_name: str) -> None:
    """By its default a broker refuses what is more than an hour ahead of its own clock, for as long as it is."""
    settings = Settings.model_validate({"kafka": kafka_bootstrap, "name": unique_name, "partitions": 1})
    await create_topics(settings)
    try:
        async with AIOKafkaProducer(bootstrap_servers=kafka_bootstrap) as producer:
            for topic in (settings.changes_topic, settings.control_topic):
                ahead = round((time.time() + 2 * 3600) * 1000)
                await producer.send_and_wait(topic, b"value", key=b"key", partition=0, timestamp_ms=ahead)
    finally:
        await delete_topics(settings)


async def records(settings: Settings) -> int:
    partition = TopicPartition(settings.control_topic, 0)
    async with AIOKafkaConsumer(
        bootstrap_servers=settings.kafka, group_id=None, isolation_level="read_committed"
    ) as reader:
        reader.assign([partition])
        await reader.seek_to_beginning(partition)
        (end,) = (await reader.end_offsets([partition])).values()
        count, last = 0, b""
        while await reader.position(partition) < end:
            for record in (await reader.getmany(partition, timeout_ms=500)).get(partition, []):
                count, last = count + 1, record.value
    assert last.startswith(b"29")  # the newest is always there
    return count
