"""Rules of sharing the lanes: they go on through a rebalance, and whoever the group chose last has them."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from aiokafka import TopicPartition

from live_migration.common import state
from live_migration.common.tasks import TaskGroup
from live_migration.consumer import checkpoint as checkpoints
from live_migration.consumer.assignment import LaneTasks
from live_migration.consumer.memory_budget import MemoryBudget
from live_migration.consumer.partition_task import PartitionTask
from tests.support.lanes import grow, replay

pytestmark = pytest.mark.integration


class FakeLane:
    def __init__(self, lane: int, told: list[str]) -> None:
        self._lane = lane
        self._told = told

    async def run(self) -> None:
        self._told.append(f"begin {self._lane}")
        try:
            await asyncio.Event().wait()
        finally:
            self._told.append(f"end {self._lane}")

    def assigned_again(self) -> None:
        self._told.append(f"again {self._lane}")


async def test_a_rebalance_ends_only_what_it_gives_to_others() -> None:
    told: list[str] = []
    async with TaskGroup() as group:
        lanes = LaneTasks(group, lambda lane: FakeLane(lane, told))

        async def news_of(*numbers: int, is_revoked: bool = False) -> list[str]:
            partitions = {TopicPartition("log", number) for number in numbers}
            await (lanes.on_partitions_revoked if is_revoked else lanes.on_partitions_assigned)(partitions)
            await asyncio.sleep(0.01)
            news, told[:] = sorted(told), []
            return news

        assert await news_of(1, 2, 3) == ["begin 1", "begin 2", "begin 3"]
        assert await news_of(1, 2, 3, is_revoked=True) == []
        assert await news_of(2, 4) == ["again 2", "begin 4", "end 1", "end 3"]
        assert await news_of(1, 2) == ["again 2", "begin 1", "end 4"]
        await lanes.close()
        assert sorted(told) == ["end 1", "end 2"]
        assert await news_of(1) == ["end 1", "end 2"]


async def test_a_lane_that_comes_back_is_taken_from_an_owner_that_hangs(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """In between it was another's, who took it and was stopped: the group gives it back without having ended our task."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=1) as it:
        migration = await state.require_migration(it.target)
        lane = PartitionTask(it.settings, "me", migration, 0, MemoryBudget(it.settings.memory))
        running = asyncio.ensure_future(lane.run())
        frozen = await asyncpg.connect(target_database)
        expected: dict[int, str] = {}
        try:

            async def is_mine() -> bool:
                return bool((await it.checkpoint(0))["owner"] == "me")

            async def is_another_s() -> bool:
                return await checkpoints.is_taken_over(it.target, 0, "me")

            await it.until(is_mine)
            await checkpoints.acquire(frozen, 0, "frozen", migration.topic_id)
            lane.assigned_again()
            grow(it.lanes[0], expected, range(5))
            await it.send()
            await it.until_applied()
            assert await is_mine()

            # without the group's word it stays with the other
            other = await asyncpg.connect(target_database)
            await checkpoints.acquire(other, 0, "other", migration.topic_id)
            grow(it.lanes[0], {}, range(5, 10))
            await it.send()
            with pytest.raises(TimeoutError):
                await it.until(is_mine, seconds=3)
            assert await is_another_s()
            other.terminate()
            assert await it.rows(0) == expected
        finally:
            frozen.terminate()
            running.cancel()
            await asyncio.wait([running])
