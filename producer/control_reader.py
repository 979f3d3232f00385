"""Reads the control topic: to its definitive end at the start, then on, for what changes while we run."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self, TypeVar

import orjson
from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors
from pydantic import ValidationError

from live_migration.common.control import (
    CONFIG,
    HELLO,
    HOMES,
    POSITION,
    Homes,
    LogPosition,
    ProducerConfig,
    unpack_homes,
)
from live_migration.common.errors import ConnectionLost, KafkaError
from live_migration.common.kafka_clients import log_consumer
from live_migration.common.settings import Settings

_START_SECONDS = 60.0
_POLL_MS = 1_000
_Record = TypeVar("_Record", ProducerConfig, LogPosition)


_PERMANENT = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.ClusterAuthorizationFailedError,
    kafka_errors.TransactionalIdAuthorizationFailed,
    kafka_errors.MessageSizeTooLargeError,
    kafka_errors.InvalidTopicError,
    kafka_errors.IncompatibleBrokerVersion,
    kafka_errors.UnsupportedVersionError,
    kafka_errors.AuthenticationFailedError,
    kafka_errors.IllegalSaslStateError,
    kafka_errors.UnsupportedSaslMechanismError,
)
"""What does not go away by trying again. Every other error ends the attempt, and the next one reads how far the log reaches."""


class BrokerLost(ConnectionLost):
    """The attempt to write or read is over, its outcome unknown: begin anew from what the control topic says."""


def translate_broker_error(error: kafka_errors.KafkaError, doing: str) -> BrokerLost | KafkaError:
    """Turn a client's error into ours."""
    reason = f"Kafka: {doing}: {error or type(error).__name__}"
    if isinstance(error, _PERMANENT):
        return KafkaError(reason, hint="Check the broker's log, and what our user may do there.")
    return BrokerLost(reason, hint="Check the broker's address, and that it runs.")


class ControlReader:
    """The newest committed values of the control topic."""

    def __init__(self, settings: Settings) -> None:
        self._topic = settings.control_topic
        self._partition = TopicPartition(self._topic, 0)
        self._consumer = log_consumer(settings)
        self._newest: dict[bytes, bytes] = {}
        self._homes: Homes | None = None  # as long as no record of them comes: they may be many
        self.hello_tokens: list[str] = []
        """Tokens of the producers that started, in their order; compaction may have taken away all but the newest."""

    async def __aenter__(self) -> Self:
        try:
            await self._consumer.start()
            self._consumer.assign([self._partition])
            first = (await self._consumer.beginning_offsets([self._partition]))[self._partition]
            self._consumer.seek(self._partition, first)
        except kafka_errors.KafkaError as error:
            await self._consumer.stop()
            raise translate_broker_error(error, f"reading {self._topic}") from error
        except BaseException:
            await self._consumer.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._consumer.stop()

    async def read(self) -> None:
        """Wait up to a second for new records and take them in.

        Raises:
            BrokerLost | KafkaError: the broker cannot be reached, or the topic is gone.
        """
        try:
            records = await self._consumer.getmany(self._partition, timeout_ms=_POLL_MS)
        except kafka_errors.KafkaError as error:
            raise translate_broker_error(error, f"reading {self._topic}") from error
        for record in records.get(self._partition, []):
            if record.key is not None and record.value is not None:
                self._newest[record.key] = record.value
                if record.key.startswith(HOMES):
                    self._homes = None
                if record.key == HELLO:
                    self.hello_tokens.append(self._read_token(record.value))

    async def read_until(self, token: str) -> None:
        """Read until the HELLO record with this token: whatever was committed before it is then known."""
        try:
            async with asyncio.timeout(_START_SECONDS):
                while token not in self.hello_tokens:
                    await self.read()
        except TimeoutError as error:
            raise BrokerLost(f"the end of {self._topic} was not found within {_START_SECONDS:.0f} s") from error

    def _read_token(self, value: bytes) -> str:
        try:
            return str(orjson.loads(value)["token"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._unreadable("hello") from error

    def config(self) -> ProducerConfig | None:
        """Give the coordinator's newest word."""
        return self._parse(CONFIG, ProducerConfig)

    def position(self) -> LogPosition | None:
        """Give the newest position record."""
        return self._parse(POSITION, LogPosition)

    def homes(self) -> Homes:
        """Give the homes of chunks that are kept; to be read only."""
        if self._homes is None:
            try:
                self._homes = unpack_homes(self._newest)
            except ValueError as error:
                raise self._unreadable(HOMES.decode()) from error
        return self._homes

    def _parse(self, key: bytes, model: type[_Record]) -> _Record | None:
        value = self._newest.get(key)
        if value is None:
            return None
        try:
            return model.model_validate_json(value)
        except ValidationError as error:
            raise self._unreadable(key.decode()) from error

    def _unreadable(self, key: str) -> KafkaError:
        return KafkaError(
            f"topic {self._topic} holds a record `{key}` that this program cannot read",
            hint="Somebody else writes into the topic, or a newer program did: use that one.",
        )
