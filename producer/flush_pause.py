"""How long changes are gathered before they are sent to Kafka: each transaction costs the broker some milliseconds of processor time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from live_migration.common.settings import KIB
from live_migration.common.tasks import is_set_within

BACKLOG_BYTES = 512 * KIB
"""A flush of so much tells that there is a backlog, or as good as one."""
MOST_INTERVALS = 4
INTERVAL_BYTES = BACKLOG_BYTES // MOST_INTERVALS
"""What comes at least in an interval of a backlog; with less it is at its end."""


class FlushPause:
    """One interval of a quiet stream; in a backlog two, then four, while as much comes in each."""

    def __init__(self, interval: float, most_bytes: int, received_bytes: Callable[[], int]) -> None:
        """Begin.

        Args:
            interval: seconds.
            most_bytes: that are sent at once.
            received_bytes: gives how much the stream has brought so far.
        """
        self._interval = interval
        self._most_bytes = most_bytes
        self._received_bytes = received_bytes
        self._intervals = 1

    @property
    def enough_bytes(self) -> int:
        """With how much gathered no more is waited for: the first of a backlog goes at once, for consumers have nothing to do yet."""
        return min(BACKLOG_BYTES, self._most_bytes) if self._intervals == 1 else self._most_bytes

    async def wait(self, is_full: asyncio.Event, flushed_bytes: int) -> int:
        """Wait, but not longer than until `is_full` is set; give how many whole intervals it took. `flushed_bytes`: of the last flush."""
        is_backlog = flushed_bytes >= BACKLOG_BYTES
        self._intervals = min(2 * self._intervals, MOST_INTERVALS) if is_backlog else 1
        for number in range(self._intervals):
            before = self._received_bytes()
            if await is_set_within(is_full, self._interval):
                return number
            if self._received_bytes() - before < INTERVAL_BYTES:
                return number + 1
        return self._intervals
