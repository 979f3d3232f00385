"""How long the stream is left to gather before it is read again.

A walsender sends each row's message by itself. Read as it comes, each is a packet of its own, with its acknowledgement, through the whole
stack: on one machine that costs the walsender as much as decoding does. Left alone for some milliseconds, the kernel lets it append to its own send
buffer, and what has gathered comes in large packets. The receive buffer is the system's own: one smaller than a packet can stall.
Measured: docs/performance.md, "Where the time goes".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from live_migration.common.settings import KIB, MIB

SHORT_SECONDS = 0.001
"""Pause of a stream that is not behind: waking up for each message costs a walsender twice the processor time."""
LONG_SECONDS = 0.025
"""The longest pause in a backlog, far below what a flush waits."""
GULP_BYTES = 512 * KIB
"""What a pause in a backlog shall bring at most: half of the receive buffer, and less than a sender's kernel holds for it."""
BACKLOG_RATE = 1 * MIB
"""Bytes a second from which on a stream is one that is behind, or as good as one."""
WINDOW_SECONDS = 0.02
"""Time over which a stream is seen to be behind: in a single millisecond each transaction is a backlog."""
TRIAL_SECONDS = 0.2
KEPT_SECONDS = 4.0
_BETTER = 1.25


class Pace:
    """Long pauses in a backlog, short ones else.

    A sender whose buffers are small stands still for the rest of a long pause, and nothing tells us. So both pauses are tried in turn from time to
    time, the long one first, which is kept unless the short one brings more.
    """

    def __init__(self, *, may_be_long: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._may_be_long = may_be_long
        self._clock = clock
        self._last = self._since = clock()
        self._last_bytes = self._since_bytes = 0
        self._is_fresh = True
        self._is_trial = True
        self._has_long = True
        self._long_rate = 0.0
        self._is_behind = self._was_behind = False  # now, and at any time in this stretch
        self._flows = False  # in the last window
        self._window, self._window_bytes = self._last, 0
        self._behind_at = -math.inf

    @property
    def is_long(self) -> bool:
        """Whether there is a backlog that is read with long pauses."""
        return self._may_be_long and self._has_long and self._is_behind

    def next_pause(self, received_bytes: int, *, may_be_more: bool = False) -> float:
        """Give the seconds for which not to read.

        Args:
            received_bytes: of the whole stream so far.
            may_be_more: there was more than could be taken at once, so that it is to be read on at once.
        """
        if not self._may_be_long:
            return SHORT_SECONDS
        if may_be_more:
            return 0.0
        now = self._clock()
        self._look(now, received_bytes)
        if self._is_fresh:  # what has gathered in a pause of the other length says nothing
            self._is_fresh, self._since, self._since_bytes = False, now, received_bytes
        self._judge(now - self._since, received_bytes - self._since_bytes)
        return (
            self._long_pause(now - self._since, received_bytes - self._since_bytes) if self.is_long else SHORT_SECONDS
        )

    def _look(self, now: float, received_bytes: int) -> None:
        """See whether the stream is behind. Where it was not for a while, a backlog begins: what was learnt before counted quiet times, too."""
        if now - self._window >= WINDOW_SECONDS:
            self._flows = received_bytes - self._window_bytes >= BACKLOG_RATE * (now - self._window)
            self._window, self._window_bytes = now, received_bytes
        self._is_behind = self._flows and received_bytes - self._last_bytes >= BACKLOG_RATE * (now - self._last)
        self._last, self._last_bytes = now, received_bytes
        if self._is_behind:
            if now - self._behind_at > TRIAL_SECONDS:
                self._begin(has_long=True, is_trial=True)
                self._is_fresh = True
            self._behind_at = now
        self._was_behind |= self._is_behind

    def _judge(self, elapsed: float, byte_count: int) -> None:
        """At the end of a stretch choose the pause for the next one."""
        if elapsed < (TRIAL_SECONDS if self._is_trial else KEPT_SECONDS):
            return
        rate = byte_count / elapsed
        if self._has_long and self._was_behind:  # however little came: that may be for the pauses
            self._long_rate = rate
            self._begin(has_long=False, is_trial=True)
        elif self._is_trial and rate >= BACKLOG_RATE:
            self._begin(has_long=self._long_rate * _BETTER > rate, is_trial=False)
        else:
            self._begin(has_long=True, is_trial=True)

    def _begin(self, *, has_long: bool, is_trial: bool) -> None:
        self._is_fresh = self._is_fresh or has_long != self._has_long
        self._has_long, self._is_trial = has_long, is_trial
        self._was_behind = self._is_behind
        self._since, self._since_bytes = self._last, self._last_bytes

    def _long_pause(self, elapsed: float, byte_count: int) -> float:
        """Give what brings about `GULP_BYTES` at the rate so far."""
        rate = byte_count / elapsed if byte_count and elapsed else self._long_rate
        return min(LONG_SECONDS, max(SHORT_SECONDS, GULP_BYTES / rate)) if rate else SHORT_SECONDS
