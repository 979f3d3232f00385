"""A copy that gives way: what becomes of a cancellation that comes as it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from live_migration.consumer import source_watch
from live_migration.consumer.source_watch import giving_way


async def test_a_cancellation_while_the_watcher_ends_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ending, goes_on = asyncio.Event(), False

    @asynccontextmanager
    async def no_session(*_: object, **__: object) -> AsyncIterator[None]:
        yield

    async def watch(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await asyncio.sleep(0.05)

    monkeypatch.setattr(source_watch, "session", no_session)
    monkeypatch.setattr(source_watch, "_end_when_waited_for", watch)

    async def copy() -> None:
        nonlocal goes_on
        async with giving_way("", 1, 1.0, "t"):
            await asyncio.sleep(0)
        goes_on = True

    copying = asyncio.create_task(copy())
    async with asyncio.timeout(10):
        await ending.wait()
        copying.cancel()
        await asyncio.wait([copying])
    assert copying.cancelled()
    assert not goes_on
