"""Behind the last barrier neither slot nor log are needed: whatever becomes of them, the migration comes to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.local_kafka import LocalKafka
from live_migration.coordinator import cutover
from tests.e2e.migration import Migration
from tests.e2e.processes import Cli

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

# The refresh of the view, which comes behind the barrier, waits for whoever has the lock.
SCHEMA = """
    create table t (id int primary key);
    insert into t values (1);
    create function held() returns text language sql as 'select pg_catalog.pg_advisory_lock_shared(7)::text';
    create materialized view m as select held() as n
"""
IS_HELD = "select exists (select from pg_locks where locktype = 'advisory' and not granted)"


@asynccontextmanager
async def holding_up(target: str) -> AsyncIterator[asyncpg.Connection]:
    """Hold up the hand-over behind the last barrier until the session that is given lets go."""
    connection = await asyncpg.connect(target)
    try:
        await connection.execute("select pg_advisory_lock(7)")
        yield connection
    finally:
        await connection.close()


async def test_a_slot_that_is_lost_behind_the_last_barrier_does_not_end_the_hand_over(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The producer, which dies of it again and again, is given up; the coordinator's successor goes on without it, too."""
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    cli = Cli(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "data")
    async with holding_up(target_database) as holder:
        migrate = await cli.migrate("--cutover", "auto", "--consumers", "1")
        try:
            async with asyncio.timeout(120):
                while not await holder.fetchval(IS_HELD):
                    assert migrate.process.returncode is None, migrate.log()
                    await asyncio.sleep(0.05)
                await drop_slot(source, unique_name)
                while "is given up" not in migrate.log():
                    assert migrate.process.returncode is None, migrate.log()
                    await asyncio.sleep(0.05)
            await migrate.kill()
            migrate = await cli.migrate("--cutover", "auto", "--consumers", "1")
            async with asyncio.timeout(60):
                while not await holder.fetchval(IS_HELD):
                    await asyncio.sleep(0.05)
            await holder.execute("select pg_advisory_unlock(7)")
            assert await migrate.wait() == 0, migrate.log()
            assert "could not be asked whether it has changes" in migrate.log()
        finally:
            await migrate.close()
    assert await cli.phase() == "done"
    await source.close()


async def drop_slot(source: asyncpg.Connection, name: str) -> None:
    while await source.fetchval("select count(*) from pg_replication_slots where slot_name = $1", name):
        await source.execute("select pg_terminate_backend(active_pid, 5000) from pg_replication_slots where slot_name = $1", name)  # fmt: skip
        with suppress(asyncpg.ObjectInUseError):
            await source.execute(f"select pg_drop_replication_slot('{name}')")


async def test_a_broker_that_is_gone_for_good_behind_the_last_barrier_does_not_keep_the_migration_from_its_end(
    source_database: str, target_database: str, unique_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutover, "_LOG_SECONDS", 3.0)
    source = await asyncpg.connect(source_database)
    await source.execute(SCHEMA)
    async with LocalKafka() as broker, holding_up(target_database) as holder:
        migration = Migration(source_database, target_database, broker.bootstrap, unique_name, tmp_path, cutover="auto")
        async with migration:
            await migration.until("the hand-over", IS_HELD)
            await broker.kill()
            await migration.stop()
            migration.start_coordinator()
            await migration.until("the hand-over again", IS_HELD)
            await holder.execute("select pg_advisory_unlock(7)")
            await migration.finish()
    assert [line for line in migration.observer.warnings if "could not be asked whether it has changes" in line]
    await source.close()
