"""The dead letter topic read back: what was skipped, each letter a JSON line."""

from __future__ import annotations

from collections.abc import AsyncIterator

import orjson
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka import errors as kafka_errors

from live_migration.common import kafka
from live_migration.common.errors import KafkaError
from live_migration.common.kafka_clients import log_consumer
from live_migration.common.settings import Settings


class LetterJoiner:
    """Puts letters together from their pieces; those of several writers may stand between one another."""

    def __init__(self) -> None:
        self._pieces: dict[bytes, list[bytes]] = {}

    def add(self, headers: dict[str, bytes], value: bytes) -> bytes | None:
        """Give the letter that a record completes; one whose writer died before its last piece is never given."""
        letter = headers.get("letter", b"")
        pieces = self._pieces.setdefault(letter, [])
        if headers.get("piece", b"0") != str(len(pieces)).encode():
            return None  # a piece that was sent twice
        pieces.append(value)
        if "last" not in headers:
            return None
        return b"".join(self._pieces.pop(letter))


async def read_letters(
    settings: Settings, *, table: str | None = None, limit: int | None = None
) -> AsyncIterator[bytes]:
    """Give the letters that are there, the oldest first.

    Args:
        table: only those of this table, `schema.name`.
        limit: at most so many.

    Raises:
        KafkaError: there is no such topic.
    """
    partition = TopicPartition(settings.dead_letter_topic, 0)
    async with kafka.admin(settings) as client:
        if not await kafka.topic_exists(client, partition.topic):
            raise KafkaError(
                f"topic {partition.topic} does not exist", hint="Check KAFKA and --name; has the migration begun?"
            )
    joiner, given = LetterJoiner(), 0
    async for record in _records(settings, partition):
        letter = joiner.add(dict(record.headers), record.value)
        if letter is None or (table is not None and table not in orjson.loads(letter)["table"].split(", ")):
            continue
        yield letter
        given += 1
        if given == limit:
            return


async def count_letters(settings: Settings) -> int:
    """Tell how many records the dead letter topic holds; none where there is no such topic."""
    partition = TopicPartition(settings.dead_letter_topic, 0)
    async with kafka.admin(settings) as client:
        if not await kafka.topic_exists(client, partition.topic):
            return 0
    consumer = log_consumer(settings)
    try:
        await consumer.start()
        first = (await consumer.beginning_offsets([partition]))[partition]
        end: int = (await consumer.end_offsets([partition]))[partition]
        return end - int(first)
    except kafka_errors.KafkaError as error:
        raise kafka.translate(error, f"reading {partition.topic}") from error
    finally:
        await consumer.stop()


async def _records(settings: Settings, partition: TopicPartition) -> AsyncIterator[ConsumerRecord]:
    consumer = log_consumer(settings)
    try:
        await consumer.start()
        consumer.assign([partition])
        consumer.seek(partition, (await consumer.beginning_offsets([partition]))[partition])
        end = (await consumer.end_offsets([partition]))[partition]
        while await consumer.position(partition) < end:
            for record in (await consumer.getmany(partition, timeout_ms=500)).get(partition, []):
                if record.offset < end:
                    yield record
    except kafka_errors.KafkaError as error:
        raise kafka.translate(error, f"reading {partition.topic}") from error
    finally:
        await consumer.stop()
