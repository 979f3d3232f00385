"""The log between two barriers while the broker is silent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from live_migration.common.errors import KafkaAway
from live_migration.common.settings import Settings
from live_migration.coordinator import barrier
from live_migration.coordinator.barrier import Barrier, changes_between


class SilentConsumer:
    """A client to which nothing comes: aiokafka says nothing of a broker that is away."""

    is_stopped = False

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.is_stopped = True

    def assign(self, partitions: list[Any]) -> None: ...

    def seek(self, partition: object, offset: int) -> None: ...

    async def getmany(self, *, timeout_ms: int) -> dict[Any, list[Any]]:
        await asyncio.sleep(0)
        return {}


async def test_a_broker_that_is_silent_between_the_barriers_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The barrier is in the log, for every lane has passed it: whoever leads the migration begins the cutover anew."""
    consumer = SilentConsumer()
    monkeypatch.setattr(barrier, "log_consumer", lambda *_, **__: consumer)
    settings = cast(Settings, SimpleNamespace(changes_topic="m.changes"))
    async with asyncio.timeout(10):
        with pytest.raises(KafkaAway, match=r"lanes \[0, 2\]"):
            await changes_between(settings, {0: 1, 2: 5}, Barrier("b", 1, 2), silence=0.05)
    assert consumer.is_stopped
