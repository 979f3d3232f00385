"""How much of the stream is worked through in one turn of the event loop.

A row costs 0.2 to 10 µs, so that the same bytes are a turn of one millisecond or of ten; and what sends to Kafka needs some sixty turns for each
transaction of a few megabytes, one after the other. Pure but for the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from live_migration.common.settings import KIB

TURN_SECONDS = 0.001
LEAST_BYTES = 16 * KIB
MOST_BYTES = 64 * KIB
"""Rows of one size cost next to nothing: a larger turn of them gains nothing (measured), and keeps Kafka waiting."""


class Turn:
    """As many bytes as take about `TURN_SECONDS`, by what the last ones took."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        """Begin. `clock`: seconds, of processor time: a turn in which the machine ran others is no slower one."""
        self._clock = clock
        self.byte_count = LEAST_BYTES

    def take(self, work: Callable[[int], int]) -> int:
        """Let `work` take about `byte_count` bytes, and learn from how long that took. Gives how many it took."""
        began = self._clock()
        taken = work(self.byte_count)
        if taken >= LEAST_BYTES // 2:  # whole messages: seldom all that was asked for
            seconds = max(self._clock() - began, TURN_SECONDS / 100)
            fitting = int(taken * TURN_SECONDS / seconds)
            self.byte_count = min(MOST_BYTES, max(LEAST_BYTES, (self.byte_count + fitting) // 2))
        return taken
