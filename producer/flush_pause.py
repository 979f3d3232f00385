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

    def __init__(
        self,
        interval: float,
        most_bytes: int,
        received_bytes: Callable[[], int],
        is_caught_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begin.

        Args:
            interval: seconds.
            most_bytes: that are sent at once.
            received_bytes: gives how much the stream has brought so far.
            is_caught_up: tells whether the walsender has said that it sent all that there is.
        """
        self._interval = interval
        self._most_bytes = most_bytes
        self._received_bytes = received_bytes
        self._is_caught_up = is_caught_up
        self._intervals = 1
        self.is_long = False
        """Whether more than an interval has been waited now: with all that there is received, no more is."""

    @property
    def enough_bytes(self) -> int:
        """With how much gathered no more is waited for: little at the beginning of a backlog, when consumers have nothing to do yet."""
        begun = min(BACKLOG_BYTES * self._intervals**2, self._most_bytes)
        return begun if self._intervals < MOST_INTERVALS else self._most_bytes

    async def wait(self, is_full: asyncio.Event, flushed_bytes: int) -> int:
        """Wait, but not longer than until `is_full` is set; give how many whole intervals it took. `flushed_bytes`: of the last flush."""
        is_backlog = flushed_bytes >= BACKLOG_BYTES
        self._intervals = min(2 * self._intervals, MOST_INTERVALS) if is_backlog else 1
        try:
            for number in range(self._intervals):
                before = self._received_bytes()
                if await is_set_within(is_full, self._interval):
                    return number
                self.is_long = True
                if self._received_bytes() - before < INTERVAL_BYTES or self._is_caught_up():
                    return number + 1
            return self._intervals
        finally:
            self.is_long = False
