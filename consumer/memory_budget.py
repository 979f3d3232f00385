"""How many bytes of the change log a consumer may hold at once, over all its lanes."""

from __future__ import annotations

import asyncio
from collections import deque


class MemoryBudget:
    """A semaphore counted in bytes, first come, first served.

    A request above the whole budget is met when nothing else is held: a single huge message passes, alone. Nothing that
    is held may depend on a further `acquire` before it is released, or lanes could wait for one another forever.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def held_bytes(self) -> int:
        return self._held

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for bytes that others hold."""
        return bool(self._waiting)

    async def acquire(self, byte_count: int) -> None:
        """Wait until `byte_count` fits, and take it."""
        if not byte_count or (not self._waiting and self._fits(byte_count)):
            self._held += byte_count
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        request = (byte_count, granted)
        self._waiting.append(request)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.release(byte_count)  # granted and cancelled in the same turn of the loop
            else:
                self._waiting.remove(request)
                self._grant()
            raise

    def take_to_spare(self, byte_count: int) -> bool:
        """Take `byte_count` for what could be done without, if that leaves half of all to others and nobody waits; tell whether it did."""
        is_there = not self._waiting and 2 * (self._held + byte_count) <= self._capacity
        if is_there:
            self._held += byte_count
        return is_there

    def release(self, byte_count: int) -> None:
        """Give back what `acquire` took."""
        self._held -= byte_count
        self._grant()

    def _fits(self, byte_count: int) -> bool:
        return self._held == 0 or self._held + byte_count <= self._capacity

    def _grant(self) -> None:
        while self._waiting and (self._waiting[0][1].cancelled() or self._fits(self._waiting[0][0])):
            byte_count, granted = self._waiting[0]
            if granted.cancelled():
                break  # its owner wakes up next, and takes it out
            self._waiting.popleft()
            self._held += byte_count
            granted.set_result(None)
