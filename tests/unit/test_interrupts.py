"""Work that is ended from outside."""

from __future__ import annotations

import asyncio

import pytest

from live_migration.common.errors import ConnectionLost
from live_migration.consumer.copy_errors import CopyDeferred, CopyEnded, TableStopped, leading_error
from live_migration.consumer.interrupts import Bell, Interrupt


async def work_until(event: asyncio.Event, *, then: Exception | None = None) -> str:
    try:
        await event.wait()
    finally:
        if then:
            raise then
    return "done"


async def test_work_that_ends_gives_its_result() -> None:
    event = asyncio.Event()
    event.set()
    assert await Interrupt().guard(work_until(event)) == "done"


async def test_an_interrupt_cancels_the_work_and_raises_its_first_reason() -> None:
    interrupt = Interrupt()
    asyncio.get_running_loop().call_soon(interrupt.trigger, CopyDeferred("first"))
    asyncio.get_running_loop().call_soon(interrupt.trigger, CopyEnded("second"))
    with pytest.raises(CopyDeferred, match="first"):
        await interrupt.guard(work_until(asyncio.Event()))
    with pytest.raises(CopyDeferred, match="first"):  # it holds for later work too
        await interrupt.guard(work_until(asyncio.Event()))


async def test_the_reason_counts_more_than_what_the_cancelled_work_raises() -> None:
    interrupt = Interrupt()
    asyncio.get_running_loop().call_soon(interrupt.trigger, CopyEnded("reason"))
    with pytest.raises(CopyEnded, match="reason"):
        await interrupt.guard(work_until(asyncio.Event(), then=TableStopped("fallout")))


async def test_the_work_s_own_error_comes_out_bare_and_leaves_no_cancellation_behind() -> None:
    event = asyncio.Event()
    event.set()
    with pytest.raises(TableStopped, match="own"):
        await Interrupt().guard(work_until(event, then=TableStopped("own")))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancellation_from_outside_leaves() -> None:
    task = asyncio.ensure_future(Interrupt().guard(work_until(asyncio.Event())))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_that_is_cancelled_from_within_is_a_lost_connection() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(ConnectionLost):
        await Interrupt().guard(work())


async def test_a_bell_wakes_all_and_only_those_who_wait() -> None:
    bell = Bell()
    waiting = [asyncio.ensure_future(bell.wait(10)) for _ in range(2)]
    await asyncio.sleep(0)
    bell.ring()
    await asyncio.wait_for(asyncio.gather(*waiting), 1)
    late = asyncio.ensure_future(bell.wait(10))
    await asyncio.sleep(0.01)
    assert not late.done()
    late.cancel()


def test_a_refusal_tells_more_than_the_broken_connection_that_follows_it() -> None:
    refusal = TableStopped("refused")
    group = BaseExceptionGroup("", [ConnectionLost("broke"), BaseExceptionGroup("", [refusal])])
    assert leading_error(group) is refusal
