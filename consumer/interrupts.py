"""Ending a piece of work from outside, with a reason; bells to wake those who wait for work."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from live_migration.common.errors import LiveMigrationError
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
        if self._reason.done():
            work.close()
            raise self._reason.result()
        task = asyncio.current_task()
        cancels_before = task.cancelling() if task else 0
        try:
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(self._raise_reason())
                result = await work
                waiting.cancel()
        except BaseExceptionGroup as errors:
            if task and task.cancelling() > cancels_before:
                raise asyncio.CancelledError from errors
            if self._reason.done():
                raise self._reason.result() from None
            raise leading_error(errors) from None
        return result

    async def _raise_reason(self) -> None:
        raise await asyncio.shield(self._reason)


class Bell:
    """Wakes everybody who waits at this moment."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout: float) -> None:
        """Return at the next ring, or after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._event.wait()
        except TimeoutError:
            pass
