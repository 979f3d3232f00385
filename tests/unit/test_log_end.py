"""The kept reader of the control topic: one for all looks, a new one after an error."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, Self, cast

import pytest

from live_migration.common.control import POSITION, LogPosition
from live_migration.common.errors import ConnectionLost
from live_migration.coordinator import waiting
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.run import Run
from live_migration.coordinator.waiting import LogEnd
from tests.e2e.migration import RecordingObserver

HERE = LogPosition(confirm_lsn=5, lanes=((5, 1),), system_identifier="1", timeline=1, sent_at=0.0)


class FakeReader:
    """A reader whose answers are set from outside: a value, an error, or None for a broker that never answers."""

    opened = closed = 0
    answer: Any = None

    def __init__(self, settings: object) -> None:
        pass

    async def __aenter__(self) -> Self:
        FakeReader.opened += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        FakeReader.closed += 1

    async def read(self) -> dict[bytes, bytes]:
        if isinstance(FakeReader.answer, Exception):
            raise FakeReader.answer
        if FakeReader.answer is None:
            await asyncio.Event().wait()
        return cast(dict[bytes, bytes], FakeReader.answer)


async def test_one_reader_for_all_looks_and_a_new_one_after_each_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "ControlReader", FakeReader)
    monkeypatch.setattr(waiting, "_READ_SECONDS", 0.05)
    FakeReader.opened = FakeReader.closed = 0
    observer = RecordingObserver()
    run = cast(Run, SimpleNamespace(settings=None, reporter=Reporter(observer)))
    async with LogEnd(run) as log_end:
        FakeReader.answer = {}
        assert await log_end.read() is None
        FakeReader.answer = {POSITION: HERE.model_dump_json().encode()}
        assert [await log_end.read() for _ in range(5)] == [HERE] * 5
        assert (FakeReader.opened, FakeReader.closed) == (1, 0)
        assert observer.warnings == []
        FakeReader.answer = ConnectionLost("no broker")
        assert [await log_end.read() for _ in range(3)] == [None] * 3
        assert (FakeReader.opened, FakeReader.closed) == (3, 3)
        assert observer.warnings == ["how far the target is behind is not known: no broker"]
        FakeReader.answer = None
        assert await log_end.read() is None
        assert observer.warnings[1:] == ["how far the target is behind is not known: Kafka does not answer"]
        FakeReader.answer = {POSITION: HERE.model_dump_json().encode()}
        assert [await log_end.read() for _ in range(2)] == [HERE] * 2
        assert (FakeReader.opened, FakeReader.closed) == (5, 4)
    assert FakeReader.closed == 5
