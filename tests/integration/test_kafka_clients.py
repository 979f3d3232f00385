"""Work on Kafka that is cancelled at any step ends: a client that is being closed must not swallow it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from live_migration.common.kafka import check_topics, create_topics
from live_migration.common.kafka_clients import LogProducer, client_options, log_consumer
from live_migration.common.settings import Settings, load_settings

pytestmark = pytest.mark.integration

_STEPS = 400


async def _use_consumer(settings: Settings) -> None:
    consumer = log_consumer(settings)
    await consumer.start()
    await consumer.stop()


async def _use_producer(settings: Settings) -> None:
    producer = LogProducer(**client_options(settings))
    await producer.start()
    await producer.stop()


async def _check(settings: Settings) -> None:
    await check_topics(settings, settings.partitions)


@pytest.mark.parametrize("use", [_check, _use_consumer, _use_producer])
async def test_a_cancellation_at_any_step_of_a_client_s_life_ends_the_work(
    use: Callable[[Settings], Awaitable[None]], kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    settings = load_settings({"kafka": kafka_bootstrap, "name": unique_name, "dir": tmp_path, "partitions": 1})
    await create_topics(settings)

    async def work() -> None:
        await use(settings)
        await asyncio.Event().wait()

    swallowed = []
    for step in range(_STEPS):
        task = asyncio.ensure_future(work())
        for _ in range(step):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=20)
        if not done:
            swallowed.append(step)
            task.cancel()
            await asyncio.wait([task])
    assert not swallowed


async def test_a_client_whose_task_loses_its_cancellation_ends_all_the_same(kafka_bootstrap: str) -> None:
    consumer = log_consumer(load_settings({"kafka": kafka_bootstrap, "name": "stubborn"}))
    await consumer.start()
    routine = consumer._fetcher._fetch_task

    async def stubborn() -> None:
        try:
            await routine
        except asyncio.CancelledError:
            await (
                asyncio.Event().wait()
            )  # the first is lost, as where the routine awaits a task that it has cancelled itself

    consumer._fetcher._fetch_task = asyncio.ensure_future(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await consumer.stop()
    assert routine.done()


async def test_a_client_whose_own_work_ends_as_cancelled_does_not_cancel_who_stops_it(kafka_bootstrap: str) -> None:
    """A lane whose target went while a fetch was on its way ended without a word: its client's `stop` raised CancelledError."""
    consumer = log_consumer(load_settings({"kafka": kafka_bootstrap, "name": "pending"}))
    await consumer.start()
    routine = consumer._fetcher._fetch_task
    pending = asyncio.ensure_future(asyncio.Event().wait())

    async def leaves_a_fetch() -> None:
        try:
            await routine
        finally:
            consumer._fetcher._pending_tasks.add(pending)

    consumer._fetcher._fetch_task = asyncio.ensure_future(leaves_a_fetch())
    await asyncio.sleep(0)
    await consumer.topics()
    connections = list(consumer._client._conns.values())
    assert connections
    async with asyncio.timeout(30):
        await consumer.stop()
    assert pending.cancelled()
    assert not [connection for connection in connections if connection.connected()]
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
