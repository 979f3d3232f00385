"""The source fails over to a standby that lags: every row is equal to the new primary's in the end, or the migration refuses to go on."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.errors import SlotLost
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute
from tests.support.failover import SLOT, Failover
from tests.support.workload import Workload, differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

TABLES = ("app.early", "app.keyless", "app.big")
SCHEMA = """
    create schema app;
    create table app.early (id int primary key, v text);
    create table app.keyless (line text);
    alter table app.keyless replica identity full;
    create table app.big (id int primary key, v text);
    create index on app.big (v);
    insert into app.early select i, 'e' from generate_series(1, 200) i;
    insert into app.keyless select 'k' || i from generate_series(1, 200) i;
    insert into app.big select i, repeat('b', 100) from generate_series(1, 20000) i;
"""
LOST = """
    insert into app.keyless select 'lost ' || i from generate_series(1, 50) i;
    delete from app.keyless where line = 'k1';
    update app.big set v = 'lost' where id % 50 = 1;
    insert into app.big select 100000 + i, 'lost' from generate_series(1, 50) i;
"""
INSTEAD = """
    insert into app.keyless select 'instead ' || i from generate_series(1, 30) i;
    delete from app.keyless where line = 'k2';
    update app.big set v = 'instead' where id % 50 = 2;
    insert into app.big select 100000 + i, 'instead' from generate_series(1, 20) i;
    update app.early set v = 'instead' where id % 3 = 0;
"""


async def run(uri: str, script: str) -> None:
    """Run statements, each in a transaction of its own."""
    for statement in script.split(";"):
        if statement.strip():
            await execute(uri, statement)


async def fetch(uri: str, query: str) -> object:
    connection = await asyncpg.connect(uri)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def assert_equal(source: str, target: str, tables: tuple[str, ...] = TABLES) -> dict[str, Counter[str]]:
    rows = await read_rows(source, tables)
    found = differences(rows, await read_rows(target, tables))
    assert not found, found
    return rows


@pytest.mark.parametrize("moment", ["while parts are copied", "after the copy"])
async def test_rows_copied_that_the_new_primary_never_had_are_copied_again(
    moment: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Nothing of them is published: only the horizons tell. The new primary gives their xids and positions to other rows."""
    async with Failover() as source:
        await execute(source.primary_uri, SCHEMA)
        await source.start_standby()
        migration = Migration(
            *(source.uri, target_database, kafka_bootstrap, unique_name, tmp_path / "data"),
            consumers=2,
            partitions=3,
            part_size=65536,
        )
        migration.start_coordinator()
        migration.producer.start()
        try:
            await migration.until_phase("copy")
            # the first table is copied while the standby keeps up, the others later
            await execute(target_database, HOLD_BACK)
            for consumer in migration.consumers:
                consumer.start()
            query = "select state in ('copied', 'ready') from _live_migration.tables where table_name = 'early'"
            await migration.until("the first table copied", query)
            await source.until_slot_is_there(unique_name)
            await migration.producer.crash()
            await source.until_caught_up()
            await source.link.stop()
            await run(source.primary_uri, LOST)
            await execute(target_database, LET_GO)
            if moment == "after the copy":
                await migration.until_phase("replay")
            else:
                await migration.until(
                    "parts copied",
                    """select (select count(*) > 2 from _live_migration.parts where state = 'done')
                          and exists (select from _live_migration.tables where table_name = 'keyless' and state = 'ready')""",
                )
            await source.promote()
            await run(source.standby_uri, INSTEAD)
            migration.producer.start()
            await migration.until("timeline taken over", "select source_timeline = 2 from _live_migration.migration")
            await migration.until_phase("replay")
            await run(source.standby_uri, "insert into app.keyless values ('late'); delete from app.big where id = 7")
            await migration.finish()
        finally:
            await migration.__aexit__()
        rows = await assert_equal(source.standby_uri, target_database)
        assert rows["app.keyless"]['("instead 1")'] == 1
        assert any("failed over" in warning and "app.keyless" in warning for warning in migration.observer.warnings)
        assert (
            await fetch(target_database, "select attempt from _live_migration.tables where table_name = 'early'") == 1
        )


HOLD_BACK = "update _live_migration.tables set retry_at = 'infinity' where table_name <> 'early' and state = 'planned'"
LET_GO = "update _live_migration.tables set retry_at = null where table_name <> 'early' and state = 'planned'"


async def test_changes_published_that_the_new_primary_never_had_are_refused_and_mended_by_recopy(
    target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    async with Failover() as source:
        await execute(source.primary_uri, SCHEMA)
        await source.start_standby()
        migration = Migration(
            source.uri, target_database, kafka_bootstrap, unique_name, tmp_path / "data", partitions=3
        )
        async with migration:
            await migration.until_phase("replay")
            await source.until_slot_is_there(unique_name)
            await source.link.stop()
            await run(source.primary_uri, LOST)
            await migration.until("lost rows applied", "select count(*) = 50 from app.keyless where line like 'lost%'")
            await migration.until("lost rows applied", "select count(*) = 50 from app.big where id > 100000")
            producer, coordinator = migration.producer.task, migration.coordinator
            migration.producer.task = migration.coordinator = None
            assert producer is not None
            assert coordinator is not None
            await source.promote()
            await run(source.standby_uri, INSTEAD)
            for task in (producer, coordinator):
                with pytest.raises(SlotLost, match="after a failover the source is on timeline 2") as raised:
                    await asyncio.wait_for(task, 60)
                assert "3 tables" in raised.value.message
                assert "migrate --recopy" in raised.value.hint
            migration.start_coordinator(recopy=True)
            await migration.until("log made anew", "select source_timeline = 2 from _live_migration.migration")
            migration.producer.start()
            await migration.until_phase("replay")
            await migration.finish()
        await assert_equal(source.standby_uri, target_database)


async def test_a_failover_that_loses_nothing_is_followed_under_load(
    target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The primary sends to us what the standby has, and no more (synchronized_standby_slots): nothing is copied again."""
    async with Failover(synchronized_standby_slots=SLOT) as source:
        workload = Workload(source.primary_uri, 21, connections=4)
        await workload.create(rows=1000)
        await source.start_standby()
        migration = Migration(
            source.uri, target_database, kafka_bootstrap, unique_name, tmp_path / "data", partitions=3
        )
        async with migration:
            async with workload:
                await migration.until_phase("replay")
                await source.until_slot_is_there(unique_name)
                commits = workload.commits
                while workload.commits < commits + 100:
                    await asyncio.sleep(0.05)
            await source.until_caught_up()
            await source.promote()
            after = Workload(source.standby_uri, 22, connections=4)
            async with after:
                while after.commits < 100:
                    await asyncio.sleep(0.05)
            await migration.until("timeline taken over", "select source_timeline = 2 from _live_migration.migration")
            await migration.finish()
        found = differences(await read_rows(source.standby_uri), await read_rows(target_database))
        assert not found, found
        assert await fetch(target_database, "select max(attempt) from _live_migration.tables") == 1
