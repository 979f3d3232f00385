"""Ending a piece of work from outside, with a reason; bells to wake those who wait for work."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from live_migration.common.errors import ConnectionLost, LiveMigrationError
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
        task = asyncio.current_task()
        cancels_before = task.cancelling() if task else 0
        try:
            async with asyncio.TaskGroup() as group:
                working = group.create_task(work)
                either: list[asyncio.Future[Any]] = [working, self._reason]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not working.done():
                    working.cancel()
                    await asyncio.wait({working})
        except BaseExceptionGroup as errors:
            if task and task.cancelling() > cancels_before:
                raise asyncio.CancelledError from errors
            if not self._reason.done():
                raise leading_error(errors) from None
        if working.cancelled() or working.exception():
            if not self._reason.done():
                raise ConnectionLost("the work was cancelled from within")  # by a driver: nobody else does
            raise self._reason.result()
        return working.result()


async def all_done(*tasks: asyncio.Task[Any]) -> None:
    """Wait for tasks of a group inside its body.

    Before Python 3.13 a group whose task fails once the body is left cancels its parent and never takes that back:
    `cancelling()` stays raised, and a task that relies on it, as the above does, would end without a word.
    """
    await asyncio.wait(tasks)


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
