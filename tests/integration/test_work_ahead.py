"""A lane that finds out what its next batch comes to while the target is at work, and is cut off there."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import asyncpg
import pytest

from live_migration.common import state
from live_migration.common.settings import MIB
from live_migration.consumer import lane_pipeline
from live_migration.consumer.decoder import TableRun
from live_migration.consumer.memory_budget import MemoryBudget
from live_migration.consumer.net_changes import work_ahead
from live_migration.consumer.partition_task import PartitionTask
from tests.support.lanes import grow, replay

pytestmark = pytest.mark.integration


class Ahead:
    """Takes note of the runs that were worked on ahead, and of what was taken from the budget then."""

    def __init__(self, budget: MemoryBudget, monkeypatch: pytest.MonkeyPatch) -> None:
        self.budget = budget
        self.held: list[int] = []
        self.found: list[bool] = []
        monkeypatch.setattr(lane_pipeline, "work_ahead", self.work)

    def work(self, runs: list[TableRun]) -> None:
        self.held.append(self.budget.held_bytes)
        work_ahead(runs)
        self.found += [run.net is not None for run in runs]


async def test_what_was_found_ahead_is_applied_once_whatever_is_cut_off(
    target_database: str, kafka_bootstrap: str, unique_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = MemoryBudget(64 * MIB)
    ahead = Ahead(budget, monkeypatch)
    expected: dict[int, str] = {}
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=1, batch_rows=40) as it:
        migration = await state.require_migration(it.target)
        lane = PartitionTask(it.settings, "me", migration, 0, budget)
        other = await asyncpg.connect(target_database)
        try:
            for attempt in range(3):  # the target stands still, with a batch on its way and the next one ready
                await other.execute("begin; lock table public.t0 in access exclusive mode")
                known = len(ahead.found)
                running = asyncio.ensure_future(lane.run())
                for number in range(10):
                    grow(it.lanes[0], expected, range(1000 * attempt + 20 * number, 1000 * attempt + 20 * number + 20))
                await it.send()

                async def is_ahead(known: int = known) -> bool:
                    return len(ahead.found) > known

                await it.until(is_ahead)
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running
                assert budget.held_bytes == 0
                await other.execute("rollback")
            running = asyncio.ensure_future(lane.run())
            await it.until_applied()
            assert await it.rows(0) == expected
            assert all(ahead.found)
            assert max(ahead.held) > 0
        finally:
            other.terminate()
            running.cancel()
            await asyncio.wait([running])
        assert budget.held_bytes == 0
