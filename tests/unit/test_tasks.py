"""A cancellation is never lost: not to an error that comes at the same time, not to code that suppresses it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress

import pytest

from live_migration.common.tasks import TaskGroup, is_set_within, kept_cancellation


async def _fail_when(event: asyncio.Event) -> None:
    await event.wait()
    raise ValueError("a child's error")


async def _run_child(fail: asyncio.Event, body: Awaitable[object]) -> None:
    async with TaskGroup() as group:
        group.create_task(_fail_when(fail))
        await body


async def test_a_cancellation_wins_over_an_error_of_a_child_at_the_same_time() -> None:
    fail = asyncio.Event()

    async def parent() -> None:
        async with TaskGroup() as group:
            group.create_task(_fail_when(fail))
            await asyncio.Event().wait()

    for steps in range(4):  # the error comes before, with and after the cancellation
        fail.clear()
        task = asyncio.ensure_future(parent())
        await asyncio.sleep(0.001)
        fail.set()
        for _ in range(steps):
            await asyncio.sleep(0)
        was_done = task.done()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or (was_done and isinstance(task.exception(), ExceptionGroup)), steps


async def test_a_child_that_fails_after_the_body_leaves_no_cancellation_behind() -> None:
    fail = asyncio.Event()
    asyncio.get_running_loop().call_later(0.001, fail.set)
    with pytest.raises(ExceptionGroup):
        await _run_child(fail, asyncio.sleep(0))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_a_child_that_fails_within_the_body_leaves_no_cancellation_behind() -> None:
    fail = asyncio.Event()
    fail.set()
    with pytest.raises(ExceptionGroup):
        await _run_child(fail, asyncio.Event().wait())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_time_limit_around_a_group_stays_a_timeout() -> None:
    async def fail_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("at the end")

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001), TaskGroup() as group:
            group.create_task(fail_when_cancelled())


@pytest.mark.parametrize("failure", [None, ValueError("failed instead")])
async def test_a_suppressed_cancellation_is_raised_after_all(failure: Exception | None) -> None:
    async def swallow() -> None:
        with kept_cancellation():
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            if failure:
                raise failure
        pytest.fail("the cancellation was lost")

    task = asyncio.ensure_future(swallow())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_nothing_is_raised_where_nobody_cancelled() -> None:
    with kept_cancellation():
        await asyncio.sleep(0)
    with pytest.raises(ValueError, match="its own"), kept_cancellation():
        raise ValueError("its own")


async def test_the_cancellation_of_another_task_is_not_taken_for_one_s_own() -> None:
    other = asyncio.ensure_future(asyncio.Event().wait())
    with kept_cancellation():
        await asyncio.sleep(0)
        other.cancel()
        await other
    assert other.cancelled()


async def test_an_event_that_does_not_come_is_said_not_to() -> None:
    event = asyncio.Event()
    assert not await is_set_within(event, 0.002)
    event.set()
    assert await is_set_within(event, 3600)
