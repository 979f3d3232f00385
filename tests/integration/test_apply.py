"""Replay against a real broker and a real target, from segments made by hand: exact after whatever happens."""

from __future__ import annotations

import asyncio
import random

import asyncpg
import orjson
import pytest

from live_migration.consumer.service import run_consumer
from tests.support.lanes import Replay, grow, replay
from tests.support.segments import INT4, TEXT, delete, insert, logical_message, relation, update

pytestmark = pytest.mark.integration


async def test_changes_arrive(target_database: str, kafka_bootstrap: str, unique_name: str) -> None:
    """Inserts, updates, a changed key, deletes, text and binary; Kafka's offsets of transaction markers do no harm."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=3) as it, it.consumer():
        lane = it.lanes[1]
        lane.transaction([insert("t1", 1, b"one"), insert("t1", 2, b"two"), insert("t1", 3, None)])
        lane.cut()
        await it.send()
        await it.until_applied()
        lane.transaction(
            [update("t1", "1", "uno"), update("t1", "20", "two", key=("2", None)), delete("t1", "3", None)]
        )
        lane.cut()
        await it.send()
        await it.until_applied()
        assert await it.rows(1) == {1: "uno", 20: "two"}
        assert await it.rows(0) == {}
        checkpoint = await it.checkpoint(1)
        assert checkpoint["change_count"] == 6
        assert checkpoint["next_offset"] == 3  # two segments, and the marker between them
        assert checkpoint["error"] is None


async def test_gap_stops_the_lane(target_database: str, kafka_bootstrap: str, unique_name: str) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it, it.consumer():
        expected: dict[int, str] = {}
        grow(it.lanes[0], expected, range(3))
        grow(it.lanes[0], {}, range(3, 6))
        grow(it.lanes[0], {}, range(6, 9))
        del it.lanes[0].records[1]
        grow(it.lanes[1], {}, range(3))
        await it.send()

        async def has_error() -> bool:
            return (await it.checkpoint(0))["error"] is not None

        await it.until(has_error)
        checkpoint = await it.checkpoint(0)
        assert f"{it.settings.changes_topic}-0-1" in checkpoint["error"]
        assert "the changes between them are missing" in checkpoint["error"]
        assert checkpoint["hint"]
        assert await it.rows(0) == expected  # what stands before the gap, and nothing after it
        await it.until(lambda: _has_rows(it, 1, 3))


@pytest.mark.parametrize("alter", ["rename column v to w", "drop column v"])
async def test_what_stands_before_a_change_of_shape_is_applied_although_the_lane_stops_there(
    target_database: str, kafka_bootstrap: str, unique_name: str, alter: str
) -> None:
    """Else nothing could mend the target: altered, it no longer takes the old shape, unaltered never the new one."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        lane = it.lanes[0]
        await it.target.execute("alter table t0 alter v set not null")
        lane.transaction([insert("t0", "1", "one")])
        lane.cut()
        is_renamed = alter.startswith("rename")
        lane.describe("t0", relation("t0", [("id", INT4, True)] + [("w", TEXT, False)] * is_renamed))
        lane.transaction([insert("t0", *["2", "two"][: 1 + is_renamed])])
        lane.cut()
        await it.send()
        async with it.consumer():
            await it.until(lambda: _has_rows(it, 0, 1))
            await it.target.execute(f"alter table t0 {alter}")
            await it.until_applied()
        rows = [tuple(row) for row in await it.target.fetch("select * from t0 order by id")]
        assert rows == ([(1, "one"), (2, "two")] if is_renamed else [(1,), (2,)])


async def _has_rows(it: Replay, lane: int, count: int) -> bool:
    return len(await it.rows(lane)) == count


async def test_restart_goes_on_from_the_checkpoint(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        expected: dict[int, str] = {}
        for start in (0, 100, 200):
            grow(it.lanes[0], expected, range(start, start + 50))
            await it.send()
            async with it.consumer(f"worker-{start}"):
                await it.until_applied()
        assert await it.rows(0) == expected
        assert (await it.checkpoint(0))["change_count"] == 300


async def test_fragments_and_barrier(target_database: str, kafka_bootstrap: str, unique_name: str) -> None:
    """A message far above the whole memory budget passes, in fragments; a barrier's id is kept."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2, memory=8 * 1024 * 1024) as it:
        async with it.consumer():
            for lane in it.lanes:
                lane.transaction([insert(f"t{lane.lane}", "1", "x" * 10_000_000)])
                lane.cut(fragment_bytes=500_000)
            await it.send()
            content = orjson.dumps({"kind": "barrier", "migration_id": it.migration_id, "id": "b1"})
            for lane in it.lanes:
                lane.transaction([logical_message("live_migration", content)])
                lane.cut()
            await it.send()
            await it.until_applied()
            for lane in it.lanes:
                assert (await it.rows(lane.lane)) == {1: "x" * 10_000_000}
                assert (await it.checkpoint(lane.lane))["barrier"] == "b1"


@pytest.mark.parametrize("seed", [7, 8])
async def test_killed_backends(target_database: str, kafka_bootstrap: str, unique_name: str, seed: int) -> None:
    """Backends of the lanes are ended at random while they work, 25 times: nothing is lost, nothing comes twice."""
    chance = random.Random(seed)
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=3, batch_rows=300) as it:
        expected: list[dict[int, str]] = [{} for _ in it.lanes]
        async with it.consumer(), asyncio.TaskGroup() as group:
            await it.until(lambda: _has_owners(it, {"worker-1"}))
            load = group.create_task(_load(it, expected, rounds=60))
            for _ in range(25):
                await asyncio.sleep(chance.uniform(0.02, 0.25))
                backends = await it.target.fetch(
                    """select pid from pg_stat_activity
                       where datname = current_database() and application_name like 'live-migration lane%' order by 1"""
                )
                if backends:
                    pid = chance.choice(backends)["pid"]
                    await it.target.execute("select pg_terminate_backend($1)", pid)
            await load
            await it.until_applied()
        for lane, rows in enumerate(expected):
            assert await it.rows(lane) == rows
            assert (await it.checkpoint(lane))["change_count"] == 2 * len(rows)
        taken = await it.target.fetchval("select sum(epoch) from _live_migration.checkpoints")
        assert taken >= 10  # the lanes were hit while they worked


async def _load(it: Replay, expected: list[dict[int, str]], *, rounds: int) -> None:
    for number in range(rounds):
        for lane, rows in zip(it.lanes, expected, strict=True):
            grow(lane, rows, range(number * 50, number * 50 + 50), cut_after=17)
        await it.send()
        await asyncio.sleep(0.05)


async def test_workers_join_and_leave(target_database: str, kafka_bootstrap: str, unique_name: str) -> None:
    """Lanes move between workers under load, and each is applied exactly once."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=4, batch_rows=300) as it:
        expected: list[dict[int, str]] = [{} for _ in it.lanes]
        async with it.consumer("worker-1"), asyncio.TaskGroup() as group:
            load = group.create_task(_load(it, expected, rounds=120))
            for number in range(2):
                async with it.consumer(f"guest-{number}"):
                    await it.until(lambda: _has_owners(it, {"worker-1", f"guest-{number}"}))  # noqa: B023
                    await asyncio.sleep(0.5)
                await it.until(lambda: _has_owners(it, {"worker-1"}))
            await load
            await it.until_applied()
        for lane, rows in enumerate(expected):
            assert await it.rows(lane) == rows
            assert (await it.checkpoint(lane))["change_count"] == 2 * len(rows)


async def _has_owners(it: Replay, owners: set[str]) -> bool:
    found = await it.target.fetch("select distinct owner from _live_migration.checkpoints")
    return {row["owner"] for row in found} == owners


async def test_refused_row_stops_its_lane_only(target_database: str, kafka_bootstrap: str, unique_name: str) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it, it.consumer():
        await it.target.execute("insert into public.t0 values (5, 'in the way')")
        expected: list[dict[int, str]] = [{}, {}]
        grow(it.lanes[0], expected[0], range(3, 8))
        grow(it.lanes[1], expected[1], range(3))
        await it.send()

        async def has_error() -> bool:
            return (await it.checkpoint(0))["error"] is not None

        await it.until(has_error)
        error = (await it.checkpoint(0))["error"]
        assert "public.t0" in error
        assert "SQLSTATE 23505" in error
        assert f"{it.settings.changes_topic}-0-0" in error
        grow(it.lanes[1], expected[1], range(3, 6))
        await it.send()
        await it.until(lambda: _has_rows(it, 1, 6))
        await it.target.execute("delete from public.t0")
        await it.until_applied()
        assert await it.rows(0) == expected[0]
        assert (await it.checkpoint(0))["error"] is None


async def test_one_lane_shows_whole_transactions(target_database: str, kafka_bootstrap: str, unique_name: str) -> None:
    """With one lane a watcher never sees half a source transaction, though segments and flushes end inside, and sessions in the midst of it."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=1, batch_rows=20) as it, it.consumer():
        await it.until(lambda: _has_owners(it, {"worker-1"}))
        watcher = await asyncpg.connect(target_database)
        rows: dict[int, str] = {}
        seen: set[int] = set()
        try:
            for number in range(30):
                grow(it.lanes[0], rows, range(number * 100, number * 100 + 100), cut_after=13)
                records = it.lanes[0].records
                it.lanes[0].records, rest = records[:7], records[7:]
                await it.send()  # half a source transaction in Kafka, for a while
                count, new = await watcher.fetchrow("select count(*), count(*) filter (where v = 'new') from public.t0")
                assert (count % 100, new) == (0, 0)
                seen.add(count)
                if number % 10 == 5:
                    await it.target.execute("select pg_terminate_backend(backend_pid) from _live_migration.checkpoints")
                it.lanes[0].records = rest
                await it.send()
                await asyncio.sleep(0.03)
            await it.until_applied()
        finally:
            await watcher.close()
        assert await it.rows(0) == rows
        assert len(seen) > 3


async def test_a_deferrable_constraint_holds_at_every_commit(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    """Two rows change their values, which both have in the midst of the source's transaction: nobody may see that on the target."""
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2, batch_rows=1) as it, it.consumer():
        await it.target.execute("alter table public.t0 add unique (v) deferrable initially deferred")
        lane = it.lanes[0]
        lane.transaction([insert("t0", "1", "a"), insert("t0", "2", "b")])
        lane.cut()
        await it.send()
        await it.until_applied()
        before = await it.checkpoint(0)
        lane.transaction([update("t0", "1", "b"), update("t0", "2", "a")], cut_after=1)
        lane.cut()
        records = lane.records
        lane.records = records[:1]
        await it.send()

        async def is_applied_or_open() -> bool:
            """Whether the first half is committed, or its transaction waits for the second."""
            query = """select c.next_offset > $1 or a.state = 'idle in transaction'
                              and a.state_change < clock_timestamp() - interval '0.3 s'
                       from _live_migration.checkpoints c join pg_stat_activity a on a.pid = c.backend_pid where c.lane = 0"""
            return bool(await it.target.fetchval(query, before["next_offset"]))

        await it.until(is_applied_or_open)
        assert await it.rows(0) == {1: "a", 2: "b"}
        lane.records = records[1:]
        await it.send()
        await it.until_applied()
        assert await it.rows(0) == {1: "b", 2: "a"}


async def test_consumer_follows_the_phase(target_database: str, kafka_bootstrap: str, unique_name: str) -> None:
    async with replay(target_database, kafka_bootstrap, unique_name, lane_count=2) as it:
        await it.target.execute("update _live_migration.migration set phase = 'schema'")
        expected: dict[int, str] = {}
        grow(it.lanes[0], expected, range(10))
        await it.send()
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(run_consumer(it.settings, asyncio.Event()))
            await it.until(lambda: _is_alive(it))
            assert await it.rows(0) == {}
            await it.target.execute("update _live_migration.migration set phase = 'replay'; notify _live_migration")
            await it.until_applied()
            await it.target.execute("update _live_migration.migration set phase = 'done'; notify _live_migration")
        assert await it.rows(0) == expected


async def _is_alive(it: Replay) -> bool:
    return bool(await it.target.fetchval("select count(*) from _live_migration.workers where kind = 'consumer'"))
