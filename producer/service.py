"""The producer: Kafka first, then the source, and again from what the control topic says whenever something breaks."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from uuid import UUID

from aiokafka import errors as kafka_errors

from live_migration.common.control import ProducerConfig
from live_migration.common.errors import ConnectionLost, LiveMigrationError, LogGap, Retry, SlotLost
from live_migration.common.kafka import check_topics
from live_migration.common.relation import QualifiedName
from live_migration.common.settings import Settings
from live_migration.common.tasks import TaskGroup, is_set_within
from live_migration.common.telemetry import get_logger
from live_migration.producer.control_reader import BrokerLost, translate_broker_error
from live_migration.producer.homes import StaleHomes, read_homes
from live_migration.producer.losses import name_tables, something_remains
from live_migration.producer.publisher import Publisher, topics_exist
from live_migration.producer.replication import ReplicationConnection, StreamFailed
from live_migration.producer.resume import check_slot, check_system, explain_repeated_failure
from live_migration.producer.session import Session, lane_positions
from live_migration.producer.status import StatusReport
from live_migration.producer.tail_check import check_tails, read_tails

log = get_logger(__name__)

_FIRST_DELAY_SECONDS = 0.25
_LONGEST_DELAY_SECONDS = 10.0
_DRAIN_SECONDS = 20.0
_FAREWELL_SECONDS = 10.0
_REPORT_SECONDS = 2.0
_MOST_FAILURES = 5
"""Of the stream at one LSN, by errors of the server's own: some seconds in all."""


async def run_producer(settings: Settings, stop: asyncio.Event) -> None:
    """Produce until `stop` is set, then publish what was received and leave; or until `clean` takes the migration away.

    Lost connections are retried for ever.

    Raises:
        LiveMigrationError: what retrying does not mend.
    """
    async with TaskGroup() as tasks:
        work = tasks.create_task(_outcome(settings, stop))
        limit = tasks.create_task(_limit_drain(stop, work))
        await asyncio.wait([work])
        limit.cancel()
    if not work.cancelled() and (error := work.result()) is not None:
        raise error


async def _outcome(settings: Settings, stop: asyncio.Event) -> LiveMigrationError | None:
    """Run and give the error instead of raising it, which a task group would wrap."""
    try:
        await _Service(settings, stop).run()
    except LiveMigrationError as error:
        return error
    return None


async def _limit_drain(stop: asyncio.Event, work: asyncio.Task[LiveMigrationError | None]) -> None:
    """Give up a drain that a server or broker that is away keeps from ending; the next start goes on from the log."""
    await stop.wait()
    await asyncio.sleep(_DRAIN_SECONDS)
    log.warning("leaving without having published all that was received; the next start reads it again")
    work.cancel()


class _Service:
    def __init__(self, settings: Settings, stop: asyncio.Event) -> None:
        self._settings = settings
        self._stop = stop
        self._report = StatusReport()
        self._broker_backoff = _Backoff(stop)
        self._source_backoff = _Backoff(stop)
        self._failed_at: int | None = None
        self._failures = 0
        self._was_configured = False
        self._is_over = False
        self._asked_for: set[QualifiedName] = set()  # relations that made a session begin anew

    async def run(self) -> None:
        while not self._stop.is_set() and not self._is_over:
            try:
                if await self._await_topics():
                    async with Publisher.open(self._settings) as publisher:
                        await self._produce(publisher)
            except ConnectionLost as error:
                await self._broker_backoff.pause(error)
            except kafka_errors.KafkaError as error:  # of an admin client, while it looked at the topics
                lost = translate_broker_error(error, "looking at the topics")
                if not isinstance(lost, ConnectionLost):
                    raise lost from error
                await self._broker_backoff.pause(lost)

    async def _await_topics(self) -> bool:
        """Wait until the coordinator has made the topics; give False when told to stop."""
        is_told = False
        while not await topics_exist(self._settings):
            if not is_told:
                log.info("waiting for the coordinator to make the topics", topic=self._settings.control_topic)
                is_told = True
            if await is_set_within(self._stop, 1.0):
                return False
        return True

    async def _produce(self, publisher: Publisher) -> None:
        """Run sessions with one publisher, until `stop` or an error of Kafka's."""
        try:
            config = await self._next_config(publisher)
            if config:
                await self._check_log(publisher, config)
            while config and not self._stop.is_set():
                try:
                    await self._stream(publisher, config)
                    self._source_backoff.reset()
                except BrokerLost:
                    raise
                except ConnectionLost as error:
                    self._check_repetition(error, publisher, config)
                    await self._pause(publisher, error)
                config = await self._next_config(publisher)
        except LiveMigrationError as error:
            await self._check_end(publisher, error)
            if self._is_over:
                return
            if error.retry is not Retry.STOP:
                raise
            named = await name_tables(error, self._settings.source_uri(), publisher.config)
            await self._say_farewell(publisher, named)
            raise named from error

    async def _check_log(self, publisher: Publisher, config: ProducerConfig) -> None:
        """Look that the log ends where its last position record says: nobody but us writes it from here on."""
        lane_positions(publisher.position, config.lane_count)
        tails = await read_tails(self._settings, config.lane_count)
        check_tails(self._settings.changes_topic, tails, UUID(config.topic_id), publisher.position)

    async def _next_config(self, publisher: Publisher) -> ProducerConfig | None:
        """Give the coordinator's word once the topics are found as they must be, None when told to stop."""
        config = await self._await_config(publisher)
        if config:
            await check_topics(self._settings, config.lane_count)
        return config

    async def _await_config(self, publisher: Publisher) -> ProducerConfig | None:
        """Give the coordinator's word as soon as there is one that holds, None when told to stop, or the migration is over.

        Who begins when it has been ended waits: what comes next under the name may be on its way.
        """
        is_told = False
        while not self._stop.is_set():
            config = publisher.config
            if config and not config.is_ended:
                self._was_configured = True
                return config
            if config and self._was_configured:
                self._end()
                return None
            if not is_told:
                log.info("waiting for the coordinator's configuration", topic=self._settings.control_topic)
                is_told = True
            await publisher.watch()
            if config and not await topics_exist(self._settings):
                raise BrokerLost("the topics of the migration that was ended are gone")
        return None

    def _end(self) -> None:
        log.info("the migration was ended by `live-migration clean`: nothing is left to do", slot=self._settings.slot)
        self._is_over = True

    async def _check_end(self, publisher: Publisher, error: LiveMigrationError) -> None:
        """See whether an error comes of the migration's end; `clean` says so before it takes slot and topics away.

        Raises:
            BrokerLost: what is missing is all that a migration has. Then it was cleaned, or is made anew, whose topics come.
        """
        if isinstance(error, SlotLost | LogGap) and self._was_configured and not publisher.is_superseded:
            if await topics_exist(self._settings):
                await publisher.catch_up()
            elif publisher.config and not await something_remains(self._settings.source_uri(), publisher.config):
                raise BrokerLost("neither topics nor slot and publications are there any more") from error
        if self._was_configured and publisher.config and publisher.config.is_ended:
            self._end()

    async def _stream(self, publisher: Publisher, config: ProducerConfig) -> None:
        uri = self._settings.source_uri()
        async with await ReplicationConnection.open(uri) as stream:
            timeline = await check_system(stream, config, publisher.position)
            await check_slot(uri, config, publisher.position)
            before = publisher.position
            try:
                homes = await read_homes(uri, publisher.homes, config.publications, self._asked_for)
                if len(homes.learnt) > len(publisher.homes):  # before any of it can leave the catalogs
                    await publisher.publish(deque(), None, None, homes.learnt)
                session = Session(self._settings, config, publisher, stream, timeline, self._report, homes)
                await session.run(self._stop)
            except BaseExceptionGroup as group:
                raise worst_of(group) from group
            except StaleHomes as error:
                self._asked_for.add(error.name)
                raise
            finally:
                if publisher.position is not before:
                    self._source_backoff.reset()
                    self._broker_backoff.reset()

    def _check_repetition(self, error: ConnectionLost, publisher: Publisher, config: ProducerConfig) -> None:
        """Raise SourceError when the server ended the stream by errors of its own again and again at one LSN.

        Not at the second time: decoding that had failed was seen to pass at a later attempt.
        """
        if not isinstance(error, StreamFailed):
            return
        lsn = publisher.position.confirm_lsn if publisher.position else config.start_lsn
        self._failures = self._failures + 1 if self._failed_at == lsn else 1
        self._failed_at = lsn
        if self._failures >= _MOST_FAILURES:
            raise explain_repeated_failure(lsn, self._failures, error.message) from error

    async def _pause(self, publisher: Publisher, error: ConnectionLost) -> None:
        """Wait before the source is tried again, and let everybody see why."""
        if publisher.config and publisher.config.is_ended:
            return
        await publisher.publish(deque(), None, self._report.make(error.message))
        await self._source_backoff.pause(error)
        await publisher.watch()  # the coordinator may have spoken meanwhile

    async def _say_farewell(self, publisher: Publisher, error: LiveMigrationError) -> None:
        if publisher.is_superseded:
            return
        with suppress(LiveMigrationError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await publisher.publish(deque(), None, self._report.make(str(error)))


class _Backoff:
    """Ever longer pauses, until something went well."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._seconds = _FIRST_DELAY_SECONDS

    def reset(self) -> None:
        self._seconds = _FIRST_DELAY_SECONDS

    async def pause(self, error: ConnectionLost) -> None:
        log.warning("connection lost, trying again", error=error.message, seconds=self._seconds)
        await is_set_within(self._stop, self._seconds)
        self._seconds = min(self._seconds * 2, _LONGEST_DELAY_SECONDS)


def worst_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Give the error of a group that decides: a bug before what stops us, that before a lost broker, then the source."""
    leaves = list(_leaves(group))

    def rank(error: BaseException) -> int:
        if not isinstance(error, LiveMigrationError):
            return 0
        if error.retry is Retry.STOP:
            return 1
        return 2 if isinstance(error, BrokerLost) else 3

    return min(leaves, key=rank)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]
