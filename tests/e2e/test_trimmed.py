"""A long replay: the broker's disk stays bounded, whatever dies meanwhile, and every row arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest

from live_migration.common import kafka
from live_migration.common.local_kafka import LocalKafka
from live_migration.common.local_postgres import LocalPostgres
from live_migration.coordinator import trimming
from live_migration.coordinator.run import Run
from tests.e2e.migration import Migration
from tests.fixtures.change_log import wait_for
from tests.fixtures.fix_postgres import SETTINGS
from tests.integration.test_trimming import starts
from tests.support.workload import TABLES, Workload, differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

MIB = 1024 * 1024
BULK = ("public.bulk_a", "public.bulk_b")  # in two lanes of two
ROUNDS = 3


@pytest.fixture(autouse=True)
def small_files_and_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka, "CHANGES_FILES", {"segment.bytes": str(MIB), "file.delete.delay.ms": "100"})
    monkeypatch.setattr(trimming, "INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(trimming, "MARGIN_BYTES", 512 * 1024)
    monkeypatch.setattr(trimming, "STEP_BYTES", 64 * 1024)


async def create(source: str, workload: Workload) -> None:
    await workload.create(rows=300)
    connection = await asyncpg.connect(source)
    for table in BULK:
        await connection.execute(f"create table {table} (id bigserial primary key, v text, n int)")
    await connection.close()


async def write_bulk(source: str, rows: int = 4000) -> None:
    """Write into each bulk table, half a KiB a row."""
    connection = await asyncpg.connect(source)
    for table in BULK:
        await connection.execute(
            f"insert into {table} (v, n) select repeat(md5(i::text), 16), i from generate_series(1, {rows}) i"
        )
        await connection.execute(f"update {table} set n = -n where id % 50 = 0")
    await connection.close()


def disk_bytes(broker: LocalKafka, topic: str) -> int:
    """Give what the topic's records take on the broker's disk."""
    total = 0
    for file in (broker.folder / "data").glob(f"{topic}-*/*.log"):
        with suppress(FileNotFoundError):  # the broker deleted it just now
            total += file.stat().st_size
    return total


async def write_until_deleted(migration: Migration) -> None:
    """Write until the log of every lane begins later than it does now: what is applied last stays, for it is the margin."""
    before = await starts(migration.settings)

    async def is_deleted() -> bool:
        migration.raise_failures()
        await write_bulk(migration.source, rows=1000)
        return all(offset > before[lane] for lane, offset in (await starts(migration.settings)).items())

    await wait_for(is_deleted, seconds=90)


async def log_bytes(target: str) -> int:
    """Give how many bytes of the log were applied."""
    connection = await asyncpg.connect(target)
    total = await connection.fetchval("select sum(byte_count) from _live_migration.checkpoints")
    await connection.close()
    return int(total)


async def assert_equal(migration: Migration) -> None:
    tables = (*TABLES, *BULK)
    found = differences(await read_rows(migration.source, tables), await read_rows(migration.target, tables))
    assert not found, found


async def test_the_brokers_disk_shrinks_while_consumers_are_killed(
    source_database: str, target_database: str, kafka_server: LocalKafka, unique_name: str, tmp_path: Path
) -> None:
    workload = Workload(source_database, seed=4, connections=3, pause=0.2)
    await create(source_database, workload)
    async with workload:
        async with Migration(
            source_database,
            target_database,
            kafka_server.bootstrap,
            unique_name,
            tmp_path,
            partitions=2,
            batch_rows=500,
        ) as migration:
            await migration.until_phase("replay")
            for number in range(ROUNDS):
                await write_bulk(source_database)
                consumer = migration.consumers[number % 2]
                await consumer.crash()
                consumer.start()
                await write_until_deleted(migration)

            async def is_small() -> bool:
                migration.raise_failures()
                await write_bulk(source_database, rows=20)  # it is deleted while lanes go on
                left = disk_bytes(kafka_server, migration.settings.changes_topic)
                return left < await log_bytes(target_database) / 2

            await wait_for(is_small, seconds=90)
            left = disk_bytes(kafka_server, migration.settings.changes_topic)
            print(f"{await log_bytes(target_database) / MIB:.1f} MiB applied, {left / MIB:.1f} MiB on disk")
            await workload.stop()
            await migration.finish()
            assert not [w for w in migration.observer.warnings if "lane" in w or "applied segments" in w]
    await assert_equal(migration)


async def test_a_target_that_crashes_right_after_a_deletion_has_what_it_needs(
    source_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its newest checkpoints are lost with it; they must not be the ones that the log was deleted up to."""
    monkeypatch.setattr(trimming, "MARGIN_BYTES", 0)
    monkeypatch.setattr(trimming, "STEP_BYTES", 1)
    workload = Workload(source_database, seed=5, pause=0.02)
    await create(source_database, workload)
    quiet = {"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB", "bgwriter_lru_maxpages": "0"}
    deleted = asyncio.Event()
    allowed = asyncio.Event()
    allowed.set()
    delete = trimming._delete

    async def told(run: Run, offsets: Mapping[int, int], deadline: float) -> bool:
        await allowed.wait()
        done = await delete(run, offsets, deadline)
        if done:
            deleted.set()
            allowed.clear()
        return done

    monkeypatch.setattr(trimming, "_delete", told)
    async with LocalPostgres(settings=SETTINGS | quiet) as target, workload:
        async with Migration(
            source_database, target.uri(), kafka_bootstrap, unique_name, tmp_path, partitions=3
        ) as migration:
            await migration.until_phase("replay")
            for _ in range(4):
                async with asyncio.timeout(60):
                    await deleted.wait()
                await target.restart(immediate=True)
                deleted.clear()
                allowed.set()
            await workload.stop()
            await migration.finish()
            assert sum(offset > 0 for offset in (await starts(migration.settings)).values()) >= 2
            lanes = [w for w in migration.observer.warnings if "lane" in w]
            assert not [w for w in lanes if "offset" in w], lanes
            await assert_equal(migration)


async def test_keep_changes_keeps_all_of_it_also_when_it_goes_on(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    workload = Workload(source_database, seed=6)
    await create(source_database, workload)
    applied = "select sum(byte_count) > $1::bigint from _live_migration.checkpoints"
    async with Migration(
        source_database,
        target_database,
        kafka_bootstrap,
        unique_name,
        tmp_path,
        partitions=2,
        batch_rows=500,
        keep_changes=True,
    ) as migration:
        await migration.until_phase("replay")
        await write_bulk(source_database)
        await migration.until("applied", applied, 4 * MIB)
        assert await starts(migration.settings) == {0: 0, 1: 0}
        # whoever goes on without a word keeps it too
        migration.stop_coordinator.set()
        assert migration.coordinator is not None
        await migration.coordinator
        migration.settings = migration.settings.model_copy(update={"keep_changes": False})
        migration.settings.model_fields_set.discard("keep_changes")
        migration.start_coordinator()
        await write_bulk(source_database)
        await migration.until("applied", applied, 8 * MIB)
        assert await starts(migration.settings) == {0: 0, 1: 0}
        migration.stop_coordinator.set()
        await migration.coordinator
        migration.settings = migration.settings.model_copy(update={"keep_changes": False})
        migration.start_coordinator()
        # and it is deleted once somebody says so: the test could have failed

        async def is_deleted() -> bool:
            await write_bulk(source_database)
            return any((await starts(migration.settings)).values())

        await wait_for(is_deleted, seconds=60)
        await migration.finish()
    await assert_equal(migration)
