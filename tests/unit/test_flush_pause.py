"""How long changes are gathered: longer in a backlog, not at its end."""

from __future__ import annotations

import asyncio

from live_migration.producer.flush_pause import BACKLOG_BYTES, INTERVAL_BYTES, FlushPause

INTERVAL = 0.002
MOST = 8 * BACKLOG_BYTES


class Flow:
    """Brings so many bytes each time that it is asked how many there are."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.sum = 0

    def received(self) -> int:
        self.sum += self.step
        return self.sum


async def test_a_quiet_stream_waits_one_interval_however_much_comes_now() -> None:
    pause = FlushPause(INTERVAL, MOST, Flow(INTERVAL_BYTES).received)
    assert [await pause.wait(asyncio.Event(), BACKLOG_BYTES - 1) for _ in range(3)] == [1, 1, 1]


async def test_a_backlog_waits_longer_and_longer() -> None:
    pause = FlushPause(INTERVAL, MOST, Flow(INTERVAL_BYTES).received)
    assert [await pause.wait(asyncio.Event(), BACKLOG_BYTES) for _ in range(4)] == [2, 4, 4, 4]
    assert await pause.wait(asyncio.Event(), 0) == 1
    assert await pause.wait(asyncio.Event(), BACKLOG_BYTES) == 2


async def test_the_end_of_a_backlog_waits_one_interval() -> None:
    flow = Flow(INTERVAL_BYTES)
    pause = FlushPause(INTERVAL, MOST, flow.received)
    for _ in range(3):
        await pause.wait(asyncio.Event(), BACKLOG_BYTES)
    flow.step = INTERVAL_BYTES - 1
    assert await pause.wait(asyncio.Event(), BACKLOG_BYTES) == 1


async def test_the_first_of_a_backlog_goes_at_once_and_later_ones_when_they_are_many() -> None:
    pause = FlushPause(INTERVAL, MOST, Flow(INTERVAL_BYTES).received)
    assert pause.enough_bytes == BACKLOG_BYTES
    await pause.wait(asyncio.Event(), 0)
    assert pause.enough_bytes == BACKLOG_BYTES
    await pause.wait(asyncio.Event(), BACKLOG_BYTES)
    assert pause.enough_bytes == 4 * BACKLOG_BYTES
    await pause.wait(asyncio.Event(), BACKLOG_BYTES)
    assert pause.enough_bytes == MOST
    await pause.wait(asyncio.Event(), 0)
    assert pause.enough_bytes == BACKLOG_BYTES
    assert FlushPause(INTERVAL, 100, Flow(0).received).enough_bytes == 100


async def test_enough_is_enough() -> None:
    pause = FlushPause(3600, MOST, Flow(INTERVAL_BYTES).received)
    full = asyncio.Event()
    waiting = asyncio.ensure_future(pause.wait(full, BACKLOG_BYTES))
    await asyncio.sleep(0)
    assert not waiting.done()
    full.set()
    assert await waiting == 0


async def test_once_all_is_received_a_backlog_waits_no_second_interval() -> None:
    is_caught_up = False
    pause = FlushPause(INTERVAL, MOST, Flow(INTERVAL_BYTES).received, lambda: is_caught_up)
    for _ in range(3):
        await pause.wait(asyncio.Event(), BACKLOG_BYTES)
    is_caught_up = True
    assert await pause.wait(asyncio.Event(), BACKLOG_BYTES) == 1


async def test_it_is_said_that_more_than_an_interval_was_waited() -> None:
    pause = FlushPause(INTERVAL, MOST, Flow(INTERVAL_BYTES).received)
    full = asyncio.Event()
    waiting = asyncio.ensure_future(pause.wait(full, BACKLOG_BYTES))
    await asyncio.sleep(0)
    assert not pause.is_long
    while not pause.is_long:
        await asyncio.sleep(0)
    full.set()
    assert await waiting == 1
    assert not pause.is_long
