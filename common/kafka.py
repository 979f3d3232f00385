"""The broker: our topics as they must be, the control topic's newest values, errors turned into ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.admin import NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.protocol.admin import DeleteGroupsRequest

from live_migration.common.errors import RECOPY, KafkaAway, KafkaError, LiveMigrationError, LogGap
from live_migration.common.kafka_clients import AdminClient, LogProducer, client_options, log_consumer
from live_migration.common.settings import Settings

_SILENCE_SECONDS = 30.0

CHANGES_CONFIG = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    "retention.bytes": "-1",
    "message.timestamp.type": "LogAppendTime",  # else a producer whose clock is an hour ahead is refused
    "unclean.leader.election.enable": "false",
    "max.message.bytes": str(2 * 1024 * 1024),
}
"""What the change topic must say, or buffered changes could vanish; the dead letter topic too, for its letters are all that is left of a row."""

CHANGES_FILES = {"segment.bytes": str(64 * 1024 * 1024)}
"""How the change topic is made beside that. The broker deletes whole files only, and by its own default each would be 1 GiB."""

CONTROL_CONFIG = {
    "cleanup.policy": "compact",
    "message.timestamp.type": "LogAppendTime",
    "unclean.leader.election.enable": "false",
    "segment.bytes": str(4 * 1024 * 1024),
    "segment.ms": "600000",
    "min.cleanable.dirty.ratio": "0.1",
    "delete.retention.ms": "600000",
}
"""The control topic is read from its start by whoever starts, and gets a record at each flush: by Kafka's own defaults it
would first be compacted at 1 GiB or after a week, and to read it would take minutes."""


def translate(error: kafka_errors.KafkaError, doing: str) -> LiveMigrationError:
    """Turn a client's error into ours: retriable ones and lost connections into KafkaAway."""
    reason = f"Kafka: {doing}: {error or type(error).__name__}"
    if isinstance(error, kafka_errors.KafkaConnectionError | kafka_errors.KafkaTimeoutError) or getattr(
        error, "retriable", False
    ):
        return KafkaAway(reason, hint="Check the broker's address, and that it runs.")
    return KafkaError(reason)


@asynccontextmanager
async def admin(settings: Settings) -> AsyncIterator[AdminClient]:
    """Give an admin client. Raises KafkaAway when no broker answers."""
    client = AdminClient(**client_options(settings))
    try:
        await client.start()
    except kafka_errors.KafkaError as error:
        await client.close()
        raise KafkaAway(
            f"cannot reach Kafka at {settings.kafka_servers()}: {error}",
            hint="Check --kafka, and that the broker runs.",
        ) from error
    try:
        yield client
    finally:
        await client.close()


async def topic_exists(client: AdminClient, topic: str) -> bool:
    """Tell whether a topic exists, without creating it."""
    return topic in await client.list_topics()


async def create_topics(settings: Settings) -> None:
    """Create the change, control and dead letter topics. A dead letter topic that an earlier migration left is kept.

    Raises:
        KafkaError: the change topic or the control topic exists.
    """
    async with admin(settings) as client:
        brokers = len((await client.describe_cluster())["brokers"])
        factor = settings.replication_factor or min(3, brokers)
        in_sync = {"min.insync.replicas": "2" if factor >= 3 else "1"}
        changes = CHANGES_CONFIG | CHANGES_FILES
        await _require_absent(client, settings)
        topics = [
            NewTopic(
                settings.changes_topic, settings.lane_map.lane_count, factor, topic_configs={**changes, **in_sync}
            ),
            NewTopic(settings.control_topic, 1, factor, topic_configs={**CONTROL_CONFIG, **in_sync}),
        ]
        if await topic_exists(client, settings.dead_letter_topic):
            await _check_config(client, settings.dead_letter_topic)
        else:
            config = {**CHANGES_CONFIG, **in_sync}
            topics.append(NewTopic(settings.dead_letter_topic, 1, factor, topic_configs=config))
        response = await client.create_topics(topics)
        for topic, code, *reason in response.topic_errors:  # the client raises none of them
            if code:
                failure = kafka_errors.for_code(code)
                raise KafkaError(
                    f"Kafka: creating topic {topic}: {failure.__name__} {' '.join(str(each or '') for each in reason)}".rstrip(),
                    hint="Check our rights at the broker, and --replication-factor.",
                )
        await _await_leaders(client, settings)


async def require_no_topics(settings: Settings) -> None:
    """Raise KafkaError when a change topic or a control topic of our name exists."""
    async with admin(settings) as client:
        await _require_absent(client, settings)


async def _require_absent(client: AdminClient, settings: Settings) -> None:
    for topic in (settings.changes_topic, settings.control_topic):
        if await topic_exists(client, topic):
            raise KafkaError(
                f"topic {topic} exists already",
                hint="It may hold another migration's changes. Choose another --name, or delete the topic if nobody needs it.",
            )


async def delete_topics(settings: Settings, *, with_letters: bool = False) -> list[str]:
    """Delete the change and control topics where they exist, `with_letters` the dead letter topic too; give the names of those that did."""
    ours = [settings.changes_topic, settings.control_topic, *[settings.dead_letter_topic] * with_letters]
    async with admin(settings) as client:
        present = [topic for topic in ours if await topic_exists(client, topic)]
        if present:
            await client.delete_topics(present)
        return present


async def delete_group(settings: Settings, group: str) -> bool:
    """Delete a consumer group where it exists and has no members any more; tell whether it did."""
    async with admin(settings) as client:
        try:
            if all(name != group for name, *_ in await client.list_consumer_groups()):
                return False
            coordinator = await client.find_coordinator(group)
            response = await client._send_request(DeleteGroupsRequest([group]), coordinator)  # no public way in 0.14
        except kafka_errors.KafkaError as error:
            raise translate(error, f"deleting consumer group {group}") from error
    return all(code == kafka_errors.NoError.errno for _, code in response.results)


async def check_topics(settings: Settings, lane_count: int) -> None:
    """Raise KafkaError unless both topics are there with the settings and partition count that we gave them.

    Raises:
        LogGap: a topic is gone, or has another number of partitions.
        KafkaError: a setting would lose changes.
    """
    async with admin(settings) as client:
        for topic in (settings.changes_topic, settings.control_topic):
            if not await topic_exists(client, topic):
                raise LogGap(
                    f"topic {topic} does not exist any more: somebody deleted it, or KAFKA names another broker",
                    hint=f"Check KAFKA. {RECOPY}",
                )
        (description,) = await client.describe_topics([settings.changes_topic])
        if len(description["partitions"]) != lane_count:
            raise LogGap(
                f"topic {settings.changes_topic} has {len(description['partitions'])} partitions, the migration has {lane_count} lanes",
                hint=f"Partitions must never be added to this topic. {RECOPY}",
            )
        await _check_config(client, settings.changes_topic)
        await _check_dead_letters(client, settings.dead_letter_topic)


async def check_dead_letter_topic(settings: Settings) -> None:
    """Raise KafkaError unless the topic is there and keeps what is in it."""
    async with admin(settings) as client:
        await _check_dead_letters(client, settings.dead_letter_topic)


async def _check_dead_letters(client: AdminClient, topic: str) -> None:
    if not await topic_exists(client, topic):
        config = ", ".join(f"{key}={value}" for key, value in CHANGES_CONFIG.items())
        raise KafkaError(
            f"topic {topic} does not exist any more",
            hint=f"Somebody deleted it, and the letters in it are lost. Create it with one partition and {config}.",
        )
    await _check_config(client, topic)


async def _check_config(client: AdminClient, topic: str) -> None:
    found = await _topic_config(client, topic)
    for key, value in CHANGES_CONFIG.items():
        if found.get(key) != value:
            raise KafkaError(
                f"topic {topic} has {key}={found.get(key)}, it must be {value}",
                hint="With this setting what it holds may be deleted. Set it back before going on.",
            )


async def _topic_config(client: AdminClient, topic: str) -> dict[str, str]:
    (response,) = await client.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    (resource,) = response.resources
    return {entry[0]: entry[1] for entry in resource[-1]}


async def _await_leaders(client: AdminClient, settings: Settings) -> None:
    """Wait until each partition of both topics has a leader, so that a client's first request finds them."""
    async with asyncio.timeout(30):
        while True:
            descriptions = await client.describe_topics([settings.changes_topic, settings.control_topic])
            partitions = [p for d in descriptions for p in d["partitions"]]
            if len(partitions) == settings.lane_map.lane_count + 1 and all(p["leader"] >= 0 for p in partitions):
                return
            await asyncio.sleep(0.1)


@asynccontextmanager
async def sending(settings: Settings, topic: str) -> AsyncIterator[LogProducer]:
    """Give a client for a few records, each of which is there, on all replicas in sync, once `send_and_wait` returns.

    Raises:
        KafkaAway | KafkaError: the broker cannot be reached, or refuses; `topic` is named in it.
    """
    try:
        producer = LogProducer(**client_options(settings), acks="all", enable_idempotence=True)
        await producer.start()
        try:
            yield producer
        finally:
            await producer.stop()
    except kafka_errors.KafkaError as error:
        raise translate(error, f"writing {topic}") from error


async def read_control(settings: Settings) -> dict[bytes, bytes]:
    """Give the newest committed value of each key of the control topic, read from its start to its end."""
    async with ControlReader(settings) as reader:
        return await reader.read()


class ControlReader:
    """Keeps the control topic's newest values at hand: each `read` fetches only what came since the last one."""

    def __init__(self, settings: Settings) -> None:
        self._topic = settings.control_topic
        self._partition = TopicPartition(settings.control_topic, 0)
        self._consumer = log_consumer(settings)
        self._newest: dict[bytes, bytes] = {}

    async def __aenter__(self) -> Self:
        try:
            await self._consumer.start()
            self._consumer.assign([self._partition])
            first = (await self._consumer.beginning_offsets([self._partition]))[self._partition]
        except kafka_errors.KafkaError as error:
            await self._consumer.stop()
            raise translate(error, f"reading {self._topic}") from error
        except BaseException:
            await self._consumer.stop()
            raise
        self._consumer.seek(self._partition, first)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._consumer.stop()

    async def read(self) -> dict[bytes, bytes]:
        """Give the newest committed value of each key, up to the topic's present end.

        Raises:
            KafkaAway: the broker is lost, or nothing has come from it for a while: the client itself would wait for ever.
            KafkaError: it refuses.
        """
        try:
            end = (await self._consumer.end_offsets([self._partition]))[self._partition]
            seen, deadline = -1, time.monotonic() + _SILENCE_SECONDS
            while (position := await self._consumer.position(self._partition)) < end:
                if position != seen:
                    seen, deadline = position, time.monotonic() + _SILENCE_SECONDS
                elif time.monotonic() > deadline:
                    raise KafkaAway(f"Kafka: reading {self._topic}: nothing has come for {_SILENCE_SECONDS:g} s")
                records = await self._consumer.getmany(self._partition, timeout_ms=500)
                for record in records.get(self._partition, []):
                    if record.key is not None:
                        self._newest[record.key] = record.value
        except kafka_errors.KafkaError as error:
            raise translate(error, f"reading {self._topic}") from error
        return dict(self._newest)
