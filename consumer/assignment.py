"""Which lanes this process applies: what the Kafka group assigns to it, through every rebalance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Protocol

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor

from live_migration.common.errors import LiveMigrationError, Retry
from live_migration.common.kafka import translate
from live_migration.common.kafka_clients import log_consumer
from live_migration.common.settings import Settings
from live_migration.common.tasks import TaskGroup
from live_migration.common.telemetry import get_logger

COMMIT_SECONDS = 5.0
POLL_SECONDS = 1.0
SESSION_SECONDS = 10.0

log = get_logger(__name__)


class Lane(Protocol):
    """One lane in this process."""

    async def run(self) -> None:
        """Apply the lane until cancelled."""

    def assigned_again(self) -> None:
        """Take note that the group gave us the lane once more."""


@ConsumerRebalanceListener.register
class LaneTasks:
    """Runs a task for each assigned lane; as the group's listener, it starts and ends them.

    Lanes go on through a rebalance, which may wait for a dead member as long as its session lasts: only the next assignment tells
    which are another's now. That one need not wait for us: it takes a lane by its checkpoint.
    """

    def __init__(self, group: TaskGroup, make_lane: Callable[[int], Lane]) -> None:
        self._group = group
        self._make_lane = make_lane
        self._lanes: dict[int, Lane] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._is_closed = False
        self.member: AIOKafkaConsumer | None = None

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Do nothing: a rebalance begins."""

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Start the lanes' tasks and end the others. The member itself reads nothing: each lane has a client of its own.

        Nothing is waited for: the member sends no heartbeat in here.
        """
        lanes = sorted(partition.partition for partition in assigned)
        log.info("lanes assigned", lanes=lanes)
        self._cancel([lane for lane in self._tasks if lane not in lanes])
        for lane in lanes:
            if lane in self._tasks:
                self._lanes[lane].assigned_again()
            elif not self._is_closed:
                self._lanes[lane] = self._make_lane(lane)
                self._tasks[lane] = self._group.create_task(self._lanes[lane].run(), name=f"lane {lane}")
        if self.member is not None:
            for partition in assigned:
                self.member.seek(partition, 0)  # a partition without a position would look for a committed one
            self.member.pause(*assigned)

    def _cancel(self, lanes: Collection[int]) -> list[asyncio.Task[None]]:
        tasks = [self._tasks.pop(lane) for lane in lanes]
        for task in tasks:
            task.cancel()
        return tasks

    async def stop_all(self) -> None:
        """End all tasks and wait for them; errors of theirs are the task group's."""
        if tasks := self._cancel(list(self._tasks)):
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """End all tasks and start no more."""
        self._is_closed = True
        await self.stop_all()


class GroupMember:
    """Our membership in the Kafka group: heartbeats, assignment, and offsets committed now and then for lag charts."""

    def __init__(self, settings: Settings, lanes: LaneTasks) -> None:
        self._settings = settings
        self._lanes = lanes
        self._offsets: dict[int, int] = {}
        self._committed: dict[int, int] = {}

    def note_progress(self, lane: int, next_offset: int) -> None:
        """Remember how far a lane is, for the next lazy commit. What counts is the checkpoint on the target."""
        self._offsets[lane] = next_offset

    async def run(self) -> None:
        """Be a member until cancelled; after a lost connection, become one again.

        Raises:
            LiveMigrationError: the broker refuses what no retry mends.
        """
        while True:
            try:
                await self._run_once()
            except LiveMigrationError as error:
                if error.retry is Retry.STOP:
                    raise
                log.warning("group membership lost", reason=error.message)
                await asyncio.sleep(POLL_SECONDS)

    async def _run_once(self) -> None:
        client = self._client()
        self._lanes.member = client
        client.subscribe([self._settings.changes_topic], listener=self._lanes)
        try:
            await client.start()
            while True:
                for _ in range(int(COMMIT_SECONDS / POLL_SECONDS)):
                    await self._look_for_errors(client)
                    await asyncio.sleep(POLL_SECONDS)
                await self._commit(client)
        except kafka_errors.KafkaError as error:
            raise translate(error, f"being a member of group {self._settings.name}") from error
        finally:
            self._lanes.member = None
            with suppress(kafka_errors.KafkaError):
                await client.stop()  # leaves the group, so that the others need not wait for our session to end
            await self._lanes.stop_all()

    def _client(self) -> AIOKafkaConsumer:
        return log_consumer(
            self._settings,
            group_id=self._settings.name,
            partition_assignment_strategy=(StickyPartitionAssignor,),
            session_timeout_ms=int(SESSION_SECONDS * 1000),
            heartbeat_interval_ms=3000,
            rebalance_timeout_ms=30_000,
            max_poll_interval_ms=3_600_000,
            max_partition_fetch_bytes=1,
        )

    async def _look_for_errors(self, client: AIOKafkaConsumer) -> None:
        """Raise what the coordination ran into; `getmany` is also what shows the group that we are alive."""
        with suppress(kafka_errors.NoOffsetForPartitionError, kafka_errors.OffsetOutOfRangeError):
            await client.getmany(timeout_ms=0)  # the member's own positions mean nothing

    async def _commit(self, client: AIOKafkaConsumer) -> None:
        assigned = {partition.partition for partition in client.assignment()}
        news = {
            TopicPartition(self._settings.changes_topic, lane): offset
            for lane, offset in self._offsets.items()
            if lane in assigned and self._committed.get(lane) != offset
        }
        if not news:
            return
        with suppress(kafka_errors.CommitFailedError, kafka_errors.IllegalStateError):  # a rebalance came between
            await client.commit(news)
            self._committed.update({partition.partition: offset for partition, offset in news.items()})
