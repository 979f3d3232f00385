"""The replay of one consumer: the lanes that its Kafka group gives it, applied until the migration is done."""

from __future__ import annotations

import asyncio

from live_migration.common import state
from live_migration.common.errors import ConnectionLost
from live_migration.common.kafka import check_topics
from live_migration.common.postgres import asking, session
from live_migration.common.settings import Settings
from live_migration.common.state import Migration, Phase
from live_migration.common.tasks import TaskGroup
from live_migration.common.telemetry import get_logger
from live_migration.consumer.assignment import GroupMember, LaneTasks
from live_migration.consumer.copy_errors import leading_error
from live_migration.consumer.memory_budget import MemoryBudget
from live_migration.consumer.partition_task import PartitionTask
from live_migration.consumer.phase_watch import wait_for_migration

TOPIC_CHECK_SECONDS = 30.0

log = get_logger(__name__)


async def run_apply_phase(settings: Settings, worker: str, stop: asyncio.Event) -> None:
    """Apply the lanes that fall to this process, until the migration leaves phases replay and cutover, or `stop` is set.

    Any number of consumers may run this at once. A lane that cannot go on says so in its checkpoint and is tried again.

    Raises:
        ConnectionLost: target or broker cannot be reached at the start.
        LiveMigrationError: what no retry mends, such as a topic that is not as we made it.
    """
    async with session(settings.target_uri(), "target") as connection:
        with asking("target", "reading the migration's state"):
            migration = await state.require_migration(connection)
    await check_topics(settings, migration.lane_count)
    try:
        await _run(settings, worker, stop, migration)
    except BaseExceptionGroup as errors:
        raise leading_error(errors) from errors


async def _run(settings: Settings, worker: str, stop: asyncio.Event, migration: Migration) -> None:
    budget = MemoryBudget(settings.memory)
    async with TaskGroup() as group:

        def make_lane(lane: int) -> PartitionTask:
            return PartitionTask(settings, worker, migration, lane, budget, member.note_progress)

        def is_over(now: Migration | None) -> bool:
            is_same = now is not None and (now.id, now.topic_id) == (migration.id, migration.topic_id)
            return now is None or not is_same or now.phase not in (Phase.REPLAY, Phase.CUTOVER)

        lanes = LaneTasks(group, make_lane)
        member = GroupMember(settings, lanes)
        background = [
            group.create_task(member.run()),
            group.create_task(_watch_topics(settings, migration.lane_count)),
        ]
        await wait_for_migration(settings, stop, is_over)
        await lanes.close()
        for task in background:
            task.cancel()


async def _watch_topics(settings: Settings, lane_count: int) -> None:
    """Raise KafkaError once somebody deletes or changes a topic: the clients themselves would wait in silence."""
    while True:
        await asyncio.sleep(TOPIC_CHECK_SECONDS)
        try:
            await check_topics(settings, lane_count)
        except ConnectionLost as error:
            log.warning("topics not checked", reason=error.message)
