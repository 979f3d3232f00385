"""A lane's task ends when it is cancelled, and by nothing else."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest

from live_migration.common.settings import load_settings
from live_migration.consumer import partition_task
from live_migration.consumer.memory_budget import MemoryBudget
from live_migration.consumer.partition_task import PartitionTask


async def test_a_lane_goes_on_after_a_cancellation_that_was_not_meant_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition_task, "STANDBY_SECONDS", 0)
    migration = cast(Any, SimpleNamespace(id=uuid4(), topic_id=uuid4(), lane_count=1))
    lane = PartitionTask(load_settings({"name": "lane"}), "worker", migration, 0, MemoryBudget(1))
    runs, works_again = 0, asyncio.Event()

    async def run_once() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            other = asyncio.ensure_future(asyncio.Event().wait())
            other.cancel()
            await other
        works_again.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(lane, "_run_once", run_once)
    task = asyncio.ensure_future(lane.run())
    async with asyncio.timeout(10):
        await works_again.wait()
    task.cancel()
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()
