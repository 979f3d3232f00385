"""Ending a piece of work from outside, with a reason; bells to wake those who wait for work."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from live_migration.common.errors import ConnectionLost, LiveMigrationError
from live_migration.common.tasks import TaskGroup, is_set_within
from live_migration.consumer.copy_errors import leading_error

T = TypeVar("T")


class Interrupt:
    """Lets others end the work that `guard` runs; the first reason counts, and holds for later work too."""

    def __init__(self) -> None:
        self._reason: asyncio.Future[LiveMigrationError] = asyncio.get_running_loop().create_future()

    def trigger(self, reason: LiveMigrationError) -> None:
        """End the work: `guard` raises `reason`."""
        if not self._reason.done():
            self._reason.set_result(reason)

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` to its end and give its result, unless the interrupt is triggered first: then it is cancelled.

        Raises:
            the reason given to `trigger`; else what `work` raises.
        """
        try:
            async with TaskGroup() as group:
                working = group.create_task(work)
                either: list[asyncio.Future[Any]] = [working, self._reason]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not working.done():
                    working.cancel()
                    await asyncio.wait({working})
        except BaseExceptionGroup as errors:
            if not self._reason.done():
                raise leading_error(errors) from None
        if working.cancelled() or working.exception():
            if not self._reason.done():
                raise ConnectionLost("the work was cancelled from within")  # by a driver: nobody else does
            raise self._reason.result()
        return working.result()


class Bell:
    """Wakes everybody who waits at this moment."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout: float) -> None:
        """Return at the next ring, or after `timeout` seconds."""
        await is_set_within(self._event, timeout)
