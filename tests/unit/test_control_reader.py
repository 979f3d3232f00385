"""The reader of the control topic while the broker is silent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from live_migration.common import kafka
from live_migration.common.errors import KafkaAway
from live_migration.common.kafka import ControlReader
from live_migration.common.settings import Settings


class SilentConsumer:
    """A client that knows where the topic ends, and gets `coming` records of it and then nothing more."""

    def __init__(self, coming: int) -> None:
        self._at, self._coming = 0, coming

    async def end_offsets(self, partitions: list[Any]) -> dict[Any, int]:
        return dict.fromkeys(partitions, 5)

    async def position(self, _: object) -> int:
        return self._at

    async def getmany(self, partition: object, *, timeout_ms: int) -> dict[Any, list[Any]]:
        await asyncio.sleep(0)
        if self._at >= self._coming:
            return {}
        self._at += 1
        return {partition: [SimpleNamespace(key=b"k", value=str(self._at).encode())]}


@pytest.mark.parametrize("coming", [0, 3])
async def test_a_broker_that_goes_silent_is_given_up(monkeypatch: pytest.MonkeyPatch, coming: int) -> None:
    """aiokafka asks for ever for what it was told to be there."""
    monkeypatch.setattr(kafka, "_SILENCE_SECONDS", 0.05)
    monkeypatch.setattr(kafka, "log_consumer", lambda _: SilentConsumer(coming))
    reader = ControlReader(cast(Settings, SimpleNamespace(control_topic="m.control")))
    async with asyncio.timeout(10):
        with pytest.raises(KafkaAway, match=r"m\.control: nothing has come"):
            await reader.read()


async def test_a_topic_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka, "log_consumer", lambda _: SilentConsumer(5))
    reader = ControlReader(cast(Settings, SimpleNamespace(control_topic="m.control")))
    assert await reader.read() == {b"k": b"5"}
