"""Records into Kafka, in transactions that also say how far the log then reaches."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from uuid import uuid4

import orjson
from aiokafka import errors as kafka_errors

from live_migration.common.control import (
    HELLO,
    POSITION,
    STATUS,
    Homes,
    LogPosition,
    ProducerConfig,
    ProducerStatus,
    pack_homes,
)
from live_migration.common.errors import KafkaError
from live_migration.common.kafka import admin, topic_exists
from live_migration.common.kafka_clients import LogProducer, client_options
from live_migration.common.settings import MIB, Settings
from live_migration.common.telemetry import get_logger
from live_migration.producer.batcher import Record
from live_migration.producer.control_reader import BrokerLost, ControlReader, translate_broker_error

log = get_logger(__name__)

_BATCH_BYTES = MIB
"""Of one partition in one request: with a record above it still below the topic's max.message.bytes."""
_TRANSACTION_SECONDS = 300
"""A transaction open longer is aborted by the broker; a value of 1 GB must get through within this time."""
_START_SECONDS = 60.0
_CLOSE_SECONDS = 5.0
_SUCCESSOR_SECONDS = 5.0


class Publisher:
    """The one that may write the change log; whoever opens it anew fences it.

    `position` is how far the log reaches: read from the control topic, then what our last committed transaction said.
    """

    def __init__(self, settings: Settings, producer: LogProducer, control: ControlReader, token: str) -> None:
        self._settings = settings
        self._producer = producer
        self._control = control
        self._token = token
        self._is_usable = True
        self._config: ProducerConfig | None = None
        self._late: ProducerConfig | None = None
        self.is_superseded = False
        """Whether somebody took over: nothing of ours may be written any more."""
        self.position: LogPosition | None = control.position()
        self.homes = control.homes()
        """Homes of chunks that are in the control topic."""

    @property
    def config(self) -> ProducerConfig | None:
        """The coordinator's newest word on the change log that we write, as far as it was read.

        A word on another log is a late one, of a coordinator that slept through a recopy: segments that bear that log's id would be refused by
        every lane. Who makes a log anew fences us, and begins with a publisher of its own.
        """
        newest, known = self._control.config(), self._config
        if newest is None or newest == known:
            return newest
        if known is not None and newest.topic_id != known.topic_id:
            if newest != self._late:
                log.warning("a configuration of another change log is passed over", topic=self._settings.control_topic)
            self._late = newest
            return known
        # The word of an end says nothing of what comes next under the name.
        self._config = known if newest.is_ended else newest
        return newest

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[Publisher]:
        """Fence whoever writes the log, and read how far it reaches. The topics must exist.

        Raises:
            BrokerLost: no broker answers, or it fails half way, or somebody fenced us before we could speak: a coordinator that makes the
                log anew, or another producer, who then leaves at our next word.
            KafkaError: it refuses us.
        """
        producer = _client(settings)
        try:
            await _start(producer, settings)
            token = uuid4().hex
            await _greet(producer, settings, token)
            async with ControlReader(settings) as control:
                await control.read_until(token)
                yield cls(settings, producer, control, token)
        finally:
            await _close(producer)

    async def watch(self) -> None:
        """Read on for up to a second.

        Raises:
            KafkaError: another producer took over.
        """
        await self._control.read()
        if len(homes := self._control.homes()) > len(self.homes):
            self.homes = homes
        if self._control.hello_tokens[-1] != self._token:
            self._is_usable, self.is_superseded = False, True
            raise _superseded(self._settings)

    async def catch_up(self) -> None:
        """Read on to the topic's end: whatever was written before the call is then known.

        Raises:
            KafkaError: another producer took over.
            BrokerLost: the broker cannot be reached.
        """
        if not self._is_usable:
            raise BrokerLost("Kafka: our last transaction was not completed")
        token = uuid4().hex
        try:
            await _greet(self._producer, self._settings, token)
        except BrokerLost:
            self._is_usable = False
            await self._check_successor()
            raise
        self._token = token
        await self._control.read_until(token)

    async def publish(
        self,
        records: deque[Record],
        position: LogPosition | None,
        status: ProducerStatus | None,
        homes: Homes | None = None,
    ) -> None:
        """Write all in one transaction, taking the records off the queue one by one. On return it is committed.

        `homes` are written where there are more than the control topic has.

        Raises:
            KafkaError: another producer took over, or the broker refuses for good.
            BrokerLost: whether it is committed is not known.
        """
        values: list[tuple[bytes, bytes]] = []
        if position:
            values.append((POSITION, position.model_dump_json().encode()))
        if status:
            values.append((STATUS, status.model_dump_json().encode()))
        if homes is not None and len(homes) > len(self.homes):
            homes = dict(homes)
            values += pack_homes(homes, len(self.homes))
        if not self._is_usable:
            raise BrokerLost("Kafka: our last transaction was not completed")
        self._is_usable = False
        try:
            await _transact(self._producer, self._settings, records, values)
        except kafka_errors.ProducerFenced as error:
            await self._check_successor()
            raise BrokerLost("Kafka: the broker has timed our transaction out") from error
        self._is_usable = True
        if position:
            self.position = position
        if homes is not None and len(homes) > len(self.homes):
            self.homes = homes

    async def _check_successor(self) -> None:
        """Raise KafkaError if somebody took over; the broker also fences one whose transaction lasted too long."""
        async with ControlReader(self._settings) as control:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SUCCESSOR_SECONDS):
                    while not (self._token in control.hello_tokens and control.hello_tokens[-1] != self._token):
                        await control.read()
            if control.hello_tokens and control.hello_tokens[-1] != self._token:
                self.is_superseded = True
                raise _superseded(self._settings)


def _superseded(settings: Settings) -> KafkaError:
    return KafkaError(
        f"another producer of {settings.name} took over",
        hint="One producer per migration is enough; this one leaves.",
    )


async def fence_producers(settings: Settings) -> None:
    """Make every publisher that is open now unable to commit anything more, and end the transaction it may be in.

    Raises:
        BrokerLost | KafkaError: the broker cannot be reached, or refuses us.
    """
    producer = _client(settings)
    try:
        await _start(producer, settings)
    finally:
        await _close(producer)


def _client(settings: Settings) -> LogProducer:
    return LogProducer(
        **client_options(settings),
        transactional_id=f"{settings.name}.producer",
        transaction_timeout_ms=_TRANSACTION_SECONDS * 1000,
        acks="all",
        enable_idempotence=True,
        max_batch_size=_BATCH_BYTES,
        max_request_size=2 * MIB,
    )


async def topics_exist(settings: Settings) -> bool:
    """Tell whether both topics are there; a client that asks for one that is not may create it, so look first."""
    async with admin(settings) as client:
        return await topic_exists(client, settings.control_topic) and await topic_exists(client, settings.changes_topic)


async def _start(producer: LogProducer, settings: Settings) -> None:
    try:
        async with asyncio.timeout(_START_SECONDS):
            await producer.start()
    except TimeoutError as error:
        raise BrokerLost(
            f"Kafka at {settings.kafka_servers()} gives no transactional producer within {_START_SECONDS:.0f} s",
            hint="A single broker needs transaction.state.log.replication.factor=1 and .min.isr=1.",
        ) from error
    except kafka_errors.KafkaError as error:
        raise translate_broker_error(error, f"starting the producer at {settings.kafka_servers()}") from error


async def _greet(producer: LogProducer, settings: Settings, token: str) -> None:
    hello = orjson.dumps({"token": token, "host": socket.gethostname(), "pid": os.getpid()})
    try:
        async with asyncio.timeout(_START_SECONDS):
            await _transact(producer, settings, deque(), [(HELLO, hello)])
    except TimeoutError as error:
        raise BrokerLost(f"Kafka takes no transaction within {_START_SECONDS:.0f} s") from error
    except kafka_errors.ProducerFenced as error:
        raise BrokerLost("Kafka: fenced while saying that we are here") from error


async def _transact(
    producer: LogProducer, settings: Settings, records: deque[Record], values: list[tuple[bytes, bytes]]
) -> None:
    """Send all and commit. Raises ProducerFenced as it is, all else translated."""
    sent: list[asyncio.Future[object]] = []
    try:
        await producer.begin_transaction()
        while records:
            record = records.popleft()
            for value in record.values:
                sent.append(await producer.send(settings.changes_topic, value, key=record.key, partition=record.lane))
            del record  # with a big value in it
        for key, value in values:
            sent.append(await producer.send(settings.control_topic, value, key=key, partition=0))
        for outcome in await asyncio.gather(*sent, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        await producer.commit_transaction()
    except kafka_errors.ProducerFenced:
        raise
    except kafka_errors.KafkaError as error:
        if isinstance(error.__cause__, kafka_errors.ProducerFenced):
            raise error.__cause__ from error
        raise translate_broker_error(error, "writing the change log") from error
    finally:
        for future in sent:
            if not future.cancel() and not future.cancelled():
                future.exception()  # else asyncio complains that nobody asked


async def _close(producer: LogProducer) -> None:
    """Close the client; what it still holds is given up, for `stop` would wait without end for a broker that is away."""
    producer._message_accumulator.fail_all(kafka_errors.ProducerClosed())
    with suppress(kafka_errors.KafkaError, TimeoutError):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await producer.stop()
    with suppress(kafka_errors.KafkaError, TimeoutError):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await producer.client.close()
