"""One walsender's session: the stream into the lanes, the lanes into Kafka, Kafka's acknowledgement back to the slot."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine
from uuid import UUID

from live_migration.common.control import LogPosition, ProducerConfig
from live_migration.common.errors import LiveMigrationError, LogGap
from live_migration.common.lsn import Lsn
from live_migration.common.relation import quote_identifier
from live_migration.common.segment import START, Position
from live_migration.common.settings import KIB, Settings
from live_migration.common.tasks import TaskGroup, is_set_within
from live_migration.common.telemetry import get_logger
from live_migration.producer.ack_tracker import AckTracker
from live_migration.producer.flush_pause import FlushPause
from live_migration.producer.homes import Homes
from live_migration.producer.last_change import LastChange
from live_migration.producer.pace import Pace
from live_migration.producer.probe import SourceProbe
from live_migration.producer.publisher import Publisher
from live_migration.producer.replication import ReplicationConnection
from live_migration.producer.resume import stream_options
from live_migration.producer.router import Router
from live_migration.producer.status import StatusReport
from live_migration.producer.turn import Turn

log = get_logger(__name__)

_TURNS_OF_OTHERS = 3
"""Turns of the loop for whoever sends to Kafka, after each of ours while there is a transaction on its way."""
_QUIET_BYTES = 8 * KIB
_RECORD_SECONDS = 2.0
"""Time between records of position and status while there is nothing to send."""
_REPLY_GAP_SECONDS = 0.1
_SLOW_SECONDS = 10.0


class Session:
    """Runs from where the log ends until told to end, or until something breaks."""

    def __init__(
        self,
        settings: Settings,
        config: ProducerConfig,
        publisher: Publisher,
        stream: ReplicationConnection,
        timeline: int,
        report: StatusReport,
        homes: Homes,
    ) -> None:
        self._settings = settings
        self._config = config
        self._publisher = publisher
        self._stream = stream
        self._timeline = timeline
        self._report = report
        position = publisher.position
        self._start_lsn = position.confirm_lsn if position else config.start_lsn
        self._acks = AckTracker(self._start_lsn)
        self._router = Router(
            migration_id=config.migration_id,
            topic_id=UUID(config.topic_id).bytes,
            segment_bytes=settings.segment_bytes,
            positions=lane_positions(position, config.lane_count),
            acks=self._acks,
            homes=homes,
            lane_map=config.lane_map,
            held=LastChange(*position.change) if position and position.change else None,
        )
        self._homes = homes
        self._probe = SourceProbe(
            settings.source_uri(), config.migration_id, settings.heartbeat_interval, lambda: self._acks.recorded_lsn
        )
        self._failure: LiveMigrationError | None = None
        self._in_flight_bytes = self._flushed_bytes = 0
        self._pause = FlushPause(
            settings.flush_interval,
            settings.flush_bytes,
            lambda: stream.received_bytes,
            lambda: self._router.is_caught_up,
        )
        self._published_changes = 0
        self._has_changes = asyncio.Event()
        self._is_full = asyncio.Event()
        self._has_space = asyncio.Event()
        self._reply_due = asyncio.Event()
        self._ending = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Stream until `stop` is set or the coordinator's word changes; then publish what was received, and return.

        What was received is also published when the source is lost: a transaction of Kafka's is never left half done.

        Raises:
            ConnectionLost | SourceError | FormatError: the stream broke.
            ExceptionGroup: Kafka did.
        """
        options = stream_options(self._config, [quote_identifier(name) for name in self._config.publications])
        await self._stream.allow_memory(self._settings.logical_decoding_work_mem)
        await self._stream.start(self._config.slot, self._start_lsn, options)
        log.info("streaming", slot=self._config.slot, lsn=str(Lsn(self._start_lsn)), lanes=self._config.lane_count)
        async with TaskGroup() as tasks:
            reading = tasks.create_task(self._until_broken(self._read()))
            publishing = tasks.create_task(self._publish())
            helpers = [
                tasks.create_task(self._until_broken(self._reply())),
                tasks.create_task(self._watch()),
                tasks.create_task(self._probe.run()),
                tasks.create_task(self._await_stop(stop)),
            ]
            await self._ending.wait()
            reading.cancel()
            self._has_changes.set()
            self._is_full.set()
            await publishing
            for helper in helpers:
                helper.cancel()
        if self._failure:
            raise self._failure
        await self._stream.send_status(self._acks.received_lsn, self._acks.recorded_lsn)

    async def _until_broken(self, work: Coroutine[None, None, None]) -> None:
        """End the session in order when its source breaks."""
        try:
            await work
        except LiveMigrationError as error:
            self._failure = self._failure or error
            self._ending.set()

    async def _read(self) -> None:
        """Move the stream's messages into the lanes; stops reading while too much of them waits for Kafka."""
        router, stream, settings = self._router, self._stream, self._settings
        limit = 2 * settings.flush_bytes
        pace, turn = Pace(may_be_long=stream.is_local), Turn()

        def work(byte_count: int) -> int:
            return stream.take(router.drain, byte_count)

        while True:
            await stream.received()
            may_be_more = pace.is_long and await stream.gulp()
            while taken := turn.take(work):
                if router.is_reply_requested:
                    router.is_reply_requested = False
                    self._reply_due.set()
                if router.has_changes:
                    self._has_changes.set()
                    if router.pending_bytes >= self._pause.enough_bytes or (
                        self._pause.is_long and router.is_caught_up
                    ):
                        self._is_full.set()
                while router.pending_bytes + self._in_flight_bytes >= limit:
                    self._has_space.clear()
                    await self._has_space.wait()
                if taken >= _QUIET_BYTES:
                    await self._give_way()
            await stream.gather(pace.next_pause(stream.received_bytes, may_be_more=may_be_more))

    async def _give_way(self) -> None:
        """Let the loop's others have their turn, several of them while what was read is on its way to Kafka: consumers wait for that."""
        for _ in range(_TURNS_OF_OTHERS if self._in_flight_bytes else 1):
            await asyncio.sleep(0)

    async def _publish(self) -> None:
        """Publish what was received when it is enough or old enough, position and status also when there is nothing."""
        while True:
            if await is_set_within(self._has_changes, _RECORD_SECONDS):
                await self._pause.wait(self._is_full, self._flushed_bytes)
            await self._flush()
            if self._ending.is_set() and not self._router.has_changes:
                return

    async def _flush(self) -> None:
        self._has_changes.clear()
        self._is_full.clear()
        self._in_flight_bytes = self._flushed_bytes = self._router.pending_bytes
        records = deque(self._router.take())
        position = LogPosition(
            confirm_lsn=self._acks.confirmable_lsn,
            lanes=tuple((commit_lsn, ordinal) for commit_lsn, ordinal in self._router.positions),
            change=self._router.last_change,
            system_identifier=self._config.system_identifier,
            timeline=self._timeline,
            sent_at=time.time(),
        )
        is_status_due = self._report.is_due() or self._ending.is_set()
        before = self._published_changes
        self._published_changes = self._router.change_count
        self._report.add(self._router.change_count - before, self._in_flight_bytes)
        self._report.update(self._acks.received_lsn, self._acks.recorded_lsn, self._probe.source_lsn)
        warning = asyncio.get_running_loop().call_later(_SLOW_SECONDS, _warn_of_kafka)
        try:
            status = self._report.make() if is_status_due else None
            await self._publisher.publish(records, position, status, self._homes.learnt)
        finally:
            warning.cancel()
        self._acks.record(position.confirm_lsn)
        self._in_flight_bytes = 0
        self._has_space.set()
        self._reply_due.set()

    async def _reply(self) -> None:
        """Send status replies, on a timer of their own: neither Kafka nor a full buffer may time the walsender out."""
        while True:
            await is_set_within(self._reply_due, self._settings.status_interval)
            self._reply_due.clear()
            await self._stream.send_status(self._acks.received_lsn, self._acks.recorded_lsn)
            await asyncio.sleep(_REPLY_GAP_SECONDS)

    async def _watch(self) -> None:
        """Follow the control topic; a new word of the coordinator ends the session, so that the next one begins with it."""
        while True:
            await self._publisher.watch()
            if self._publisher.config != self._config:
                log.info("the migration's configuration has changed, reconnecting")
                self._ending.set()

    async def _await_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._ending.set()


def _warn_of_kafka() -> None:
    log.warning("Kafka has not committed for a while, still trying; the source's WAL is kept", seconds=_SLOW_SECONDS)


def lane_positions(position: LogPosition | None, lane_count: int) -> list[Position]:
    """Give the last position of each lane. Raises LogGap when the log has another number of lanes."""
    if position is None:
        return [START] * lane_count
    if len(position.lanes) != lane_count:
        raise LogGap(f"the change log has {len(position.lanes)} lanes, the migration's configuration says {lane_count}")
    return [Position(*lane) for lane in position.lanes]
