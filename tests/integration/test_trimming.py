"""Applied segments are deleted from a real broker: only below flushed checkpoints, and whoever reads the log copes with it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import orjson
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete

from live_migration.common import kafka, state
from live_migration.common.errors import Fenced
from live_migration.common.kafka_clients import LogConsumer, log_consumer
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.settings import Settings
from live_migration.coordinator import trimming
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.run import Run
from live_migration.coordinator.tail import tail
from live_migration.coordinator.trimming import Mark, read_flushed, watch_trimming
from tests.e2e.migration import RecordingObserver
from tests.fixtures.change_log import wait_for
from tests.fixtures.fix_postgres import SETTINGS
from tests.support.lanes import Replay, grow, replay

pytestmark = pytest.mark.integration

APPLY_TO = "update _live_migration.checkpoints set next_offset = $1, byte_count = $2 where lane = 1"


@asynccontextmanager
async def leading(it: Replay, *, beats: bool = True) -> AsyncIterator[Run]:
    """Be the coordinator of a migration made by hand; `beats`: renew its lease, by a commit that is waited for."""
    target = await asyncpg.connect(it.settings.target_uri())
    epoch = await state.acquire_coordinator_lease(target, "test", 60)

    async def beat() -> None:
        while True:
            await target.execute("update _live_migration.migration set lease_until = lease_until")
            await asyncio.sleep(0.1)

    task = asyncio.ensure_future(beat() if beats else asyncio.Event().wait())
    try:
        yield Run(it.settings, Reporter(RecordingObserver()), target, epoch, await state.require_migration(it.target))
    finally:
        task.cancel()
        target.terminate()


@asynccontextmanager
async def trimming_quickly(run: Run, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Delete all that is applied, all the time."""
    for name, value in (("INTERVAL_SECONDS", 0.05), ("MARGIN_BYTES", 0), ("STEP_BYTES", 1)):
        monkeypatch.setattr(trimming, name, value)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(watch_trimming(run))
        try:
            yield
        finally:
            task.cancel()


async def starts(settings: Settings) -> dict[int, int]:
    """Give the first offset of each lane."""
    partitions = [TopicPartition(settings.changes_topic, lane) for lane in range(settings.partitions)]
    async with log_consumer(settings) as client:
        return {p.partition: offset for p, offset in (await client.beginning_offsets(partitions)).items()}


async def delete_below(settings: Settings, lane: int, offset: int) -> None:
    async with kafka.admin(settings) as client:
        await client.delete_records({TopicPartition(settings.changes_topic, lane): RecordsToDelete(offset)})


def told(run: Run) -> list[str]:
    observer = run.reporter._observer
    assert isinstance(observer, RecordingObserver)
    return observer.warnings


# what may be deleted


async def test_a_checkpoint_counts_once_it_is_flushed(
    kafka_bootstrap: str, unique_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = {"autovacuum": "off", "bgwriter_lru_maxpages": "0", "checkpoint_timeout": "1h"}
    async with LocalPostgres(settings=SETTINGS | quiet) as server:
        async with replay(server.uri(), kafka_bootstrap, unique_name, lane_count=2) as it:
            async with leading(it, beats=False) as run:
                writer, reader = await asyncpg.connect(server.uri()), await asyncpg.connect(server.uri())
                await writer.execute("set synchronous_commit = off")
                wal_writer = await writer.fetchval("select pid from pg_stat_activity where backend_type = 'walwriter'")
                os.kill(wal_writer, signal.SIGSTOP)
                try:
                    await writer.execute(APPLY_TO, 7, 70)
                    reading = asyncio.ensure_future(read_flushed(run, reader))

                    async def waits() -> bool:
                        query = "select query like '%flush_lsn%' from pg_stat_activity where pid = $1"
                        return bool(await writer.fetchval(query, reader.get_server_pid()))

                    await wait_for(waits)
                    assert not reading.done()
                    await writer.execute("set synchronous_commit = local")
                    await writer.execute("create table public.waited_for ()")
                    assert await reading == {0: Mark(0, 0), 1: Mark(7, 70)}
                    await writer.execute("set synchronous_commit = off")
                    await writer.execute(APPLY_TO, 9, 90)
                    monkeypatch.setattr(trimming, "_FLUSH_SECONDS", 0.2)
                    assert await read_flushed(run, reader) == {}
                finally:
                    os.kill(wal_writer, signal.SIGCONT)
                    await writer.close()
                    await reader.close()


async def test_nothing_is_deleted_by_who_lost_the_role_or_outside_replay(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=1) as it, leading(it) as run:
        assert await read_flushed(run, it.target) == {0: Mark(0, 0)}
        for phase in ("copy", "cutover"):
            await it.target.execute("update _live_migration.migration set phase = $1", phase)
            assert await read_flushed(run, it.target) == {}
        await it.target.execute("update _live_migration.migration set phase = 'replay', topic_id = gen_random_uuid()")
        with pytest.raises(Fenced):
            await read_flushed(run, it.target)
        await it.target.execute(
            "update _live_migration.migration set topic_id = $1, epoch = epoch + 1", run.migration.topic_id
        )
        with pytest.raises(Fenced):
            await read_flushed(run, it.target)


async def test_one_that_was_stopped_for_longer_than_its_lease_deletes_nothing(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=1) as it, leading(it) as run:
        grow(it.lanes[0], {}, range(5))
        await it.send()
        loop = asyncio.get_running_loop()
        assert not await trimming._delete(run, {0: 1}, loop.time() - 1)
        assert await starts(it.settings) == {0: 0}
        assert await trimming._delete(run, {0: 1}, loop.time() + 10)
        assert await starts(it.settings) == {0: 1}
        assert told(run) == []


async def test_a_broker_that_refuses_is_named_once_and_the_migration_goes_on(
    target_database: str, kafka_bootstrap: str, unique_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=1) as it, leading(it) as run:
        await it.target.execute("update _live_migration.checkpoints set next_offset = 5")  # the topic is empty
        async with trimming_quickly(run, monkeypatch):

            async def is_told() -> bool:
                return bool(told(run))

            await wait_for(is_told)
            await asyncio.sleep(0.5)  # several looks more
            assert len(told(run)) == 1
            assert f"of topic {it.settings.changes_topic}" in told(run)[0]
            assert "OffsetOutOfRange" in told(run)[0]
            grow(it.lanes[0], {}, range(5))
            grow(it.lanes[0], {}, range(5, 9))
            await it.send()
            await it.send()
            await it.target.execute("update _live_migration.checkpoints set next_offset = 2, byte_count = 9")

            async def is_deleted() -> bool:
                return await starts(it.settings) == {0: 2}

            await wait_for(is_deleted)


# the consumer


async def test_lanes_go_on_where_the_log_was_deleted_up_to_their_checkpoint(
    target_database: str, kafka_bootstrap: str, unique_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted up to the very checkpoint, behind which stands a transaction's end marker or nothing at all."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it, leading(it) as run:
        expected: list[dict[int, str]] = [{}, {}]
        async with trimming_quickly(run, monkeypatch):
            for number in range(6):
                for lane in (0, 1) if number % 2 else (0,):
                    grow(it.lanes[lane], expected[lane], range(number * 10, number * 10 + 10), cut_after=4)
                await it.send()
                async with it.consumer(f"worker-{number}"):
                    await it.until_applied()

                async def is_deleted() -> bool:
                    rows = await it.target.fetch("select lane, next_offset from _live_migration.checkpoints")
                    return await starts(it.settings) == {row["lane"]: row["next_offset"] for row in rows}

                await wait_for(is_deleted)
        for lane in (0, 1):
            assert await it.rows(lane) == expected[lane]
            assert (await it.checkpoint(lane))["error"] is None
        assert told(run) == []


async def test_a_lane_whose_offset_is_deleted_stops_with_what_to_do(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        expected: dict[int, str] = {}
        async with it.consumer():
            for lane in it.lanes:
                grow(lane, expected, range(5))
            await it.send()
            await it.until_applied()
        next_offset = (await it.checkpoint(0))["next_offset"]
        for number in (10, 20, 30):
            grow(it.lanes[0], {}, range(number, number + 5))
            grow(it.lanes[1], expected, range(number, number + 5))
            await it.send()
        await delete_below(it.settings, 0, next_offset + 3)
        async with it.consumer("worker-2"):

            async def has_stopped() -> bool:
                return (await it.checkpoint(0))["error"] is not None

            await it.until(has_stopped)

            async def other_goes_on() -> bool:
                return await it.rows(1) == expected

            await it.until(other_goes_on)
        stopped = await it.checkpoint(0)
        place = f"{it.settings.changes_topic}-0-{next_offset}"
        assert f"lane 0 stands at {place}" in stopped["error"]
        assert (
            f"the broker does not have this offset, which the lane needs next: it begins at {next_offset + 3}"
            in stopped["error"]
        )
        assert "restored or failed over" in stopped["hint"]
        assert "--keep-changes" in stopped["hint"]
        assert set(await it.rows(0)) == set(range(5))


# people


async def test_tail_begins_with_what_is_kept_and_passes_over_what_goes_meanwhile(
    target_database: str, kafka_bootstrap: str, unique_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        for number in range(4):
            for lane in it.lanes:
                grow(lane, {}, [number])
            await it.send()  # at offset 2 * number, and its marker behind it
        await delete_below(it.settings, 0, 2)
        find_start = LogConsumer.beginning_offsets

        async def deleted_right_after(self: LogConsumer, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
            monkeypatch.setattr(LogConsumer, "beginning_offsets", find_start)
            found = await find_start(self, partitions)
            await delete_below(it.settings, 0, 4)
            await delete_below(it.settings, 1, 3)
            return dict(found)

        monkeypatch.setattr(LogConsumer, "beginning_offsets", deleted_right_after)
        shown: set[tuple[int, int]] = set()
        async with asyncio.timeout(30):
            async for line in tail(it.settings, from_beginning=True, limit=8):
                change = orjson.loads(line)
                shown.add((change["lane"], int(change["new"]["id"])))
        assert shown == {(0, 2), (0, 3), (1, 2), (1, 3)}
