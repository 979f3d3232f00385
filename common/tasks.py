"""Tasks that never lose a cancellation: what asyncio before 3.13, and the Kafka client, leave to their callers. And events that are waited for so long."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

_LEAVES_PARENT_CANCELLED = sys.version_info < (3, 13)


@contextmanager
def kept_cancellation() -> Iterator[None]:
    """Raise CancelledError at the end of code that was cancelled inside and did not say so, or failed instead.

    And not where the code raises one of its own, of a task that it has cancelled and awaits: that ends the block as if it were done.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        yield
    except Exception as error:
        if task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    except asyncio.CancelledError:
        if task.cancelling() > before:
            raise
    if task.cancelling() > before:
        raise asyncio.CancelledError


def is_cancelled() -> bool:
    """Tell whether somebody has cancelled the running task: else a CancelledError is that of another, which it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, but not longer than this; tell whether it came."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


class TaskGroup(asyncio.TaskGroup):
    """A task group in which the parent's cancellation wins over an error of a child.

    asyncio's own raises the children's errors when both happen at once: a parent that mends errors and goes on would then
    never end. And before Python 3.13 one whose child fails once the body is left counts its parent as cancelled for good.
    """

    _cancels_at_entry = 0

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        task = asyncio.current_task()
        assert task is not None
        self._cancels_at_entry = task.cancelling()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        is_taken_back = self._has_cancelled_parent()  # asyncio does it for a child that failed before now
        try:
            await super().__aexit__(kind, error, trace)
        except BaseExceptionGroup as errors:
            if not is_taken_back and self._has_cancelled_parent():
                task.uncancel()
            if task.cancelling() > self._cancels_at_entry:
                raise asyncio.CancelledError from errors
            raise

    def _has_cancelled_parent(self) -> bool:
        return _LEAVES_PARENT_CANCELLED and bool(getattr(self, "_parent_cancel_requested", False))
