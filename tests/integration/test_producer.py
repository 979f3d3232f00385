"""The producer against a real source and a real broker."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from pathlib import Path

import pytest
from pydantic import SecretStr

from live_migration.common.control import LogPosition, WalMessage
from live_migration.common.errors import KafkaError, SlotError
from live_migration.common.local_kafka import LocalKafka
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.pgoutput import MESSAGE, TRUNCATE, decode_truncate
from live_migration.common.postgres import session
from live_migration.common.segment import COMMIT_ORDINAL
from live_migration.common.settings import KIB, MIB, Settings
from live_migration.producer.service import run_producer
from tests.fixtures.change_log import (
    active_walsender,
    prepare,
    producer_process,
    read_log,
    read_position,
    read_records,
    read_reference,
    read_status,
    run_sql,
    running_producer,
    source_lsn,
    wait_for,
    wait_until_published,
    write_config,
)
from tests.fixtures.fix_postgres import SETTINGS

pytestmark = pytest.mark.integration

TABLES = """
    create table public.orders (id bigint primary key, note text);
    create table public.items (id bigint primary key, note text);
    create table public."odd, Näme" (id bigint primary key, note text);
"""
NAMES = ["public.orders", "public.items", 'public."odd, Näme"']


@pytest.fixture
async def settings(source_database: str, kafka_bootstrap: str, unique_name: str) -> Settings:
    given = make_settings(source_database, kafka_bootstrap, unique_name)
    await run_sql(given, TABLES)
    return given


def make_settings(source: str, kafka: str, name: str, **others: object) -> Settings:
    values: dict[str, object] = {
        "source": SecretStr(source),
        "kafka": kafka,
        "name": name,
        "partitions": 3,
        "segment_bytes": 16 * KIB,
        "flush_bytes": 256 * KIB,
        "heartbeat_interval": 1.0,
        "status_interval": 1.0,
    }
    return Settings(**(values | others))


async def write_randomly(settings: Settings, seed: int, count: int) -> None:
    """Transactions over all tables: inserts, updates, deletes, changed keys, savepoints, some rolled back."""
    chance = random.Random(seed)
    async with session(settings.source_uri(), "source") as connection:
        for number in range(count):
            transaction = connection.transaction()
            await transaction.start()
            for _ in range(chance.randint(1, 6)):
                name = chance.choice(NAMES)
                first = seed * 1_000_000_000 + chance.randint(1, 5000)
                size = chance.choice([1, 3, 40])
                note = f"repeat('x', {chance.randint(0, 400)})"
                ids = f"between {first} and {first + size}"
                moved = f"(select from {name} where id = {first + 100_000})"
                statement = chance.choice(
                    [
                        f"insert into {name} select g, {note} from generate_series({first}, {first + size}) g on conflict do nothing",
                        f"update {name} set note = note || '{number}' where id {ids}",
                        f"delete from {name} where id {ids}",
                        f"update {name} set id = id + 100000 where id = {first} and not exists {moved}",
                    ]
                )
                savepoint = connection.transaction()
                await savepoint.start()
                await connection.execute(statement)
                await (savepoint.rollback() if chance.random() < 0.1 else savepoint.commit())
            await (transaction.rollback() if chance.random() < 0.1 else transaction.commit())


async def assert_log_is_exact(settings: Settings, config: object) -> None:
    await wait_until_published(settings, await source_lsn(settings))
    log = await read_log(settings)
    reference = await read_reference(settings, config)  # type: ignore[arg-type]
    for lane, expected in reference.items():
        assert len(log[lane]) == len(expected)
        assert log[lane] == expected


@pytest.mark.parametrize("binary", [False, True])
async def test_every_change_is_in_the_log_once(settings: Settings, binary: bool) -> None:
    config = await prepare(settings, NAMES, binary=binary)
    async with running_producer(settings), asyncio.TaskGroup() as tasks:
        for seed in range(1, 5):
            tasks.create_task(write_randomly(settings, seed, 60))
        tasks.create_task(
            run_sql(settings, "insert into public.orders select g, 'big' from generate_series(9000000, 9050000) g")
        )
    async with running_producer(settings):
        await assert_log_is_exact(settings, config)


@pytest.mark.parametrize("seed", [1, 2])
async def test_killed_producers_leave_every_change_in_the_log_once(settings: Settings, seed: int) -> None:
    config = await prepare(settings, NAMES)
    chance = random.Random(seed)
    enough = asyncio.Event()

    async def write() -> None:
        # until all have been killed: one that has nothing to publish is waited for in vain
        for turn in itertools.count():
            await write_randomly(settings, seed * 1000 + turn, 30)
            if turn < 2:
                await run_sql(
                    settings,
                    f"""with a as (insert into public.orders select g, 'o'
                                   from generate_series({-200_000 + turn * 100_000}, {-100_001 + turn * 100_000}) g
                                   returning id)
                        insert into public.items select id, 'i' from a""",
                )
            if enough.is_set():
                return

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        for _ in range(5):
            before = await read_position(settings)
            async with producer_process(settings):
                await wait_for(lambda before=before: _has_moved(settings, before))
                await asyncio.sleep(chance.uniform(0.0, 0.8))
        enough.set()
    async with running_producer(settings):
        await assert_log_is_exact(settings, config)


async def _has_moved(settings: Settings, before: LogPosition | None) -> bool:
    position = await read_position(settings)
    return position is not None and (before is None or position.lanes != before.lanes)


async def test_a_cancelled_producer_goes_on_where_it_was(settings: Settings) -> None:
    config = await prepare(settings, NAMES)
    await run_sql(settings, "insert into public.orders select g, 'o' from generate_series(1, 200000) g")
    for _ in range(3):
        before = await read_position(settings)
        async with running_producer(settings) as task:
            await wait_for(lambda before=before: _has_moved(settings, before))
            task.cancel()
            await asyncio.wait([task])
    async with running_producer(settings):
        await assert_log_is_exact(settings, config)


async def test_a_second_producer_fences_the_first(settings: Settings) -> None:
    config = await prepare(settings, NAMES)
    async with producer_process(settings) as first:
        await run_sql(settings, "insert into public.orders values (1, 'one')")
        await wait_until_published(settings, await source_lsn(settings))
        async with running_producer(settings):
            await run_sql(settings, "insert into public.orders values (2, 'two')")
            async with asyncio.timeout(30):
                assert await first.wait() != 0
            await assert_log_is_exact(settings, config)
            async with asyncio.timeout(30):  # its first one may come a moment after the changes
                while (status := await read_status(settings)) is None or status.pid != os.getpid():
                    pass
            assert status.error == ""


async def test_the_fenced_producer_says_so(settings: Settings) -> None:
    await prepare(settings, NAMES)
    stop = asyncio.Event()
    first = asyncio.ensure_future(run_producer(settings, stop))
    await run_sql(settings, "insert into public.orders values (1, 'one')")
    await wait_until_published(settings, await source_lsn(settings))
    async with producer_process(settings):
        with pytest.raises(KafkaError, match="took over"):
            await first


async def test_a_large_row_goes_in_fragments(settings: Settings) -> None:
    config = await prepare(settings, NAMES)
    async with running_producer(settings):
        await run_sql(
            settings,
            f"""begin; insert into public.orders values (1, 'before'), (2, repeat('x', {20 * MIB})), (3, 'after');
                insert into public.items values (1, 'beside'); commit""",
        )
        await assert_log_is_exact(settings, config)
    largest = max(len(record) for records in (await read_records(settings)).values() for record in records)
    assert largest < settings.segment_bytes + 100


async def test_a_huge_row_takes_at_most_three_times_its_size(settings: Settings) -> None:
    await prepare(settings, NAMES)
    size = 150 * MIB
    async with producer_process(settings) as process:
        await run_sql(settings, "insert into public.orders values (1, 'warm')")
        await wait_until_published(settings, await source_lsn(settings))
        before = resident_peak(process.pid)
        await run_sql(settings, f"insert into public.orders values (2, repeat('x', {size}))")
        await wait_until_published(settings, await source_lsn(settings), seconds=180)
        grown = resident_peak(process.pid) - before
    assert size < grown < 3 * size


def resident_peak(pid: int) -> int:
    """Give the most memory that a process has had resident, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith("VmHWM"))


async def test_a_slot_that_somebody_else_advanced_is_refused(settings: Settings) -> None:
    await prepare(settings, NAMES)
    await run_sql(
        settings,
        "insert into public.orders values (1, 'lost')",
        f"select pg_replication_slot_advance('{settings.slot}', pg_current_wal_flush_lsn())",
    )
    with pytest.raises(SlotError, match="ahead of the log"):
        await run_producer(settings, asyncio.Event())
    status = await read_status(settings)
    assert status is not None
    assert "ahead of the log" in status.error


async def test_the_slot_follows_the_log_and_never_leads(settings: Settings) -> None:
    await prepare(settings, NAMES)
    async with running_producer(settings):
        await run_sql(settings, "insert into public.orders values (1, 'one')")
        lsn = await source_lsn(settings)
        await wait_until_published(settings, lsn)
        async with session(settings.source_uri(), "source") as connection:

            async def confirmed() -> int:
                return int(
                    await connection.fetchval(
                        "select confirmed_flush_lsn - '0/0'::pg_lsn from pg_replication_slots where slot_name = $1",
                        settings.slot,
                    )
                )

            async def has_followed() -> bool:
                return await confirmed() >= lsn

            await wait_for(has_followed)
            for _ in range(10):
                slot = await confirmed()
                position = await read_position(settings)
                assert position is not None
                assert slot <= position.confirm_lsn


async def test_a_barrier_stands_in_every_lane_and_a_heartbeat_in_none(settings: Settings) -> None:
    config = await prepare(settings, NAMES)
    barrier = WalMessage(kind="barrier", migration_id=config.migration_id, id="b1").model_dump_json()
    others = WalMessage(kind="barrier", migration_id="another", id="b2").model_dump_json()
    async with running_producer(settings):
        await run_sql(
            settings,
            "insert into public.orders values (1, 'one')",
            f"select pg_logical_emit_message(true, 'live_migration', '{barrier}')",
            f"select pg_logical_emit_message(true, 'live_migration', '{others}')",
            "select pg_logical_emit_message(true, 'somebody', 'else')",
            "select pg_logical_emit_message(false, 'live_migration', 'no json')",
        )
        await wait_until_published(settings, await source_lsn(settings))
    for changes in (await read_log(settings)).values():
        found = [change for change in changes if change.message[0] == MESSAGE]
        assert len(found) == 1
        assert barrier.encode() in found[0].message
        at = changes.index(found[0])
        assert changes[at + 1].position == (found[0].position.commit_lsn, COMMIT_ORDINAL)


async def test_a_truncate_names_in_each_lane_only_its_own_tables(settings: Settings) -> None:
    await prepare(settings, NAMES)
    async with running_producer(settings):
        await run_sql(settings, f"truncate {', '.join(NAMES)}")
        await wait_until_published(settings, await source_lsn(settings))
    log = await read_log(settings)
    truncates = [change for changes in log.values() for change in changes if change.message[0] == TRUNCATE]
    oids = [oid for change in truncates for oid in decode_truncate(change.message).relation_oids]
    assert len(oids) == len(set(oids)) == len(NAMES)
    assert {change.position.ordinal for change in truncates} == {1}


async def test_a_published_table_is_followed_after_the_coordinators_word(settings: Settings) -> None:
    config = await prepare(settings, NAMES)
    async with running_producer(settings):
        await run_sql(settings, "insert into public.orders values (1, 'one')")
        await wait_until_published(settings, await source_lsn(settings))
        async with session(settings.source_uri(), "source") as connection:
            before = await active_walsender(connection, settings.slot)
            await connection.execute("create table public.late (id bigint primary key, note text)")
            await connection.execute(f"alter publication {settings.publication} add table public.late")
            await write_config(settings, config.model_copy(update={"publication_change": 1}))

            async def is_reconnected() -> bool:
                return await active_walsender(connection, settings.slot) not in (None, before)

            await wait_for(is_reconnected)
            await connection.execute("insert into public.late values (1, 'late')")
        await assert_log_is_exact(settings, config)


async def test_a_walsender_that_is_ended_comes_back(settings: Settings) -> None:
    config = await prepare(settings, NAMES)
    async with running_producer(settings), asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(write_randomly(settings, 7, 150))
        async with session(settings.source_uri(), "source") as connection:
            for _ in range(4):
                await asyncio.sleep(0.3)
                pid = await active_walsender(connection, settings.slot)
                if pid is not None:
                    await connection.execute("select pg_terminate_backend($1)", pid)
        await writing
        await assert_log_is_exact(settings, config)


async def test_a_source_that_crashes_does_not_stop_the_producer(kafka_bootstrap: str, unique_name: str) -> None:
    async with LocalPostgres(settings=SETTINGS) as server:
        settings = make_settings(server.uri(), kafka_bootstrap, unique_name)
        await run_sql(settings, TABLES)
        config = await prepare(settings, NAMES)
        async with running_producer(settings):
            for seed in (1, 2, 3):
                before = await read_position(settings)
                await write_randomly(settings, seed, 40)
                await wait_for(lambda before=before: _has_moved(settings, before), seconds=60)
                await server.restart()
            await run_sql(settings, "insert into public.orders values (-1, 'last')")
            await assert_log_is_exact(settings, config)


async def test_a_broker_that_restarts_does_not_stop_the_producer(source_database: str, unique_name: str) -> None:
    async with LocalKafka() as broker:
        settings = make_settings(source_database, broker.bootstrap, unique_name)
        await run_sql(settings, TABLES)
        config = await prepare(settings, NAMES)
        async with running_producer(settings), asyncio.TaskGroup() as tasks:
            tasks.create_task(write_randomly(settings, 3, 300))
            await wait_for(lambda: _has_moved(settings, None), seconds=60)
            await broker.restart()
            before = await read_position(settings)
            await run_sql(settings, "insert into public.orders select g, 'o' from generate_series(9000000, 9100000) g")
            await wait_for(lambda: _has_moved(settings, before), seconds=120)
            await broker.kill()
            await broker.start()
        async with running_producer(settings):
            await assert_log_is_exact(settings, config)
