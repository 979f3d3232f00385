"""`migrate --recopy`: a lost slot or change log is mended by copying every table again; then every row is compared."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.errors import Fenced, LiveMigrationError, LogGap, SlotLost
from live_migration.common.segment import START, Position
from live_migration.consumer import checkpoint as checkpoints
from live_migration.consumer.checkpoint import Advance, Checkpoint
from tests.e2e.killed import COORDINATOR, run_killed
from tests.e2e.migration import Migration
from tests.e2e.processes import Cli
from tests.fixtures.fix_postgres import execute
from tests.integration.test_log_lost import keep_producing, make_changes_topic_again
from tests.support.workload import Workload, differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

STEPS = (
    (f"{COORDINATOR}.recopy", "end_work", 1),
    (f"{COORDINATOR}.recopy", "_void", 1),
    (f"{COORDINATOR}.recopy", "_drop", 2),
    (f"{COORDINATOR}.prepare", "drop_built_indexes", 1),
    (f"{COORDINATOR}.prepare", "drop_publication", 1),
    (f"{COORDINATOR}.prepare", "remove_from_source", 1),
    ("live_migration.common.kafka", "delete_topics", 1),
    ("live_migration.common.kafka", "create_topics", 1),
    (f"{COORDINATOR}.prepare", "publish_tables", 1),
    (f"{COORDINATOR}.prepare", "create_slot", 1),
    (f"{COORDINATOR}.prepare", "adopt_memberships", 1),
    (f"{COORDINATOR}.prepare", "_enter_schema", 1),
    (f"{COORDINATOR}.schema", "release_tables", 1),
)


async def indexes(uri: str) -> list[str]:
    connection = await asyncpg.connect(uri)
    try:
        rows = await connection.fetch("select indexdef from pg_indexes where schemaname = 'app' order by 1")
        return [row[0] for row in rows]
    finally:
        await connection.close()


async def refused(migration: Migration, error: type[LiveMigrationError], match: str, *, recopy: bool = False) -> None:
    migration.start_coordinator(recopy=recopy)
    assert migration.coordinator is not None
    with pytest.raises(error, match=match):
        await asyncio.wait_for(migration.coordinator, 60)
    migration.coordinator = None


@pytest.mark.parametrize("lost", ["slot", "topic"])
async def test_everything_is_copied_again_and_every_row_is_equal(
    lost: str, source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Changes are lost with the slot, or with the topic, under load; the consumers live through it all."""
    workload = Workload(source_database, 11)
    await workload.create(rows=2000)
    migration = Migration(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, partitions=3, part_size=65536
    )
    settings = migration.settings
    async with workload, migration:
        await migration.until_phase("replay")
        await migration.until("changes applied", "select bool_and(change_count > 0) from _live_migration.checkpoints")
        await migration.stop()
        await refused(migration, LiveMigrationError, "whole", recopy=True)
        zombie = await asyncpg.connect(target_database)
        held = await zombie.fetchrow("select epoch from _live_migration.checkpoints where lane = 0")
        topic_id = await zombie.fetchval("select topic_id from _live_migration.migration")
        await migration.producer.crash()
        commits = workload.commits
        while workload.commits < commits + 50:  # these are in the slot alone
            await asyncio.sleep(0.05)
        if lost == "slot":
            await execute(source_database, f"select pg_drop_replication_slot('{unique_name}')")
            await refused(migration, SlotLost, "11 tables, app")
        else:
            await make_changes_topic_again(settings)
            await refused(migration, LogGap, "11 tables, app")
        migration.producer.task = None
        producing = asyncio.ensure_future(keep_producing(migration))
        migration.start_coordinator(recopy=True)
        await migration.until("tables voided", "select topic_id <> $1 from _live_migration.migration", topic_id)
        stale = Checkpoint(0, held["epoch"], 0, START)  # even where the lane begins now
        with pytest.raises(Fenced):  # a consumer of before can write nothing any more
            await checkpoints.advance(zombie, stale, Advance(1, Position(1, 1), None, 1, 1, None))
        with pytest.raises(Fenced):
            await checkpoints.acquire(zombie, 0, "zombie", topic_id)
        await zombie.close()
        await migration.until_phase("replay")
        attempts = "select min(attempt) >= 3 from _live_migration.tables"  # voided and released, then claimed
        await migration.until("every table copied again", attempts)
        await workload.stop()
        await migration.finish()
        producing.cancel()
        await asyncio.wait([producing])
        await refused(migration, LiveMigrationError, "is done", recopy=True)
    found = differences(await read_rows(source_database), await read_rows(target_database))
    assert not found, found
    assert await indexes(target_database) == await indexes(source_database)


async def test_recopy_without_a_migration_begins_none(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path)
    await refused(migration, LiveMigrationError, "holds no migration", recopy=True)


async def test_a_recopy_killed_at_each_step_goes_on(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    workload = Workload(source_database, 12, connections=3)
    await workload.create(rows=500)
    cli = Cli(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "data")
    options = ["--name", unique_name, "--dir", str(tmp_path / "data"), "--consumers", "1"]
    async with workload:
        migrate = await cli.migrate("--consumers", "1")
        await migrate.until_phase("replay")
        await migrate.kill()
        await asyncio.sleep(random.random())
        await execute(source_database, f"select pg_drop_replication_slot('{unique_name}')")
        for step in STEPS:
            await run_killed(cli, step, "migrate", "--recopy", *options)
        migrate = await cli.migrate("--consumers", "1")
        try:
            await migrate.until_phase("replay")
            await workload.stop()
            code, _, err = await cli.run("cutover")
            assert code == 0, err
            assert await migrate.wait() == 0, migrate.log()
        finally:
            await migrate.close()
    found = differences(await read_rows(source_database), await read_rows(target_database))
    assert not found, found
    assert await indexes(target_database) == await indexes(source_database)
