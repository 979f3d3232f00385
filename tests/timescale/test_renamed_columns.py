"""The column that a hypertable is cut by gets another name on both ends, while ranges of its chunks are known by the one before."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from tests.fixtures.fix_postgres import execute
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_RENAMES = (
    "alter table events rename column ts to happened",
    "alter table samples rename column at to happened",
    "alter table samples rename column place to site",
)
_PLANNED = "select array_agg(table_name) from _live_migration.tables where kind = 'chunk' and range is not null"
_ARE_NOTED = """
    select bool_and(coalesce(c.range, c.seen_range) ~ 'happened')
    from _live_migration.tables c join _live_migration.tables h on h.oid = c.hypertable_oid
    where c.kind = 'chunk' and h.table_name in ('events', 'samples') and coalesce(c.newcomer, '') <> 'gone'
"""
_DAYS = "insert into {} select t, 'new' from generate_series('{}'::timestamptz, '{}', '1 hour') t"


async def test_columns_that_are_renamed_cost_no_copy(
    source_of_either_version: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = source_of_either_version, target_of_timescale
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        planned = await world.value(target, _PLANNED)
        await execute(source, _DAYS.format("events", "2026-01-20", "2026-01-20 20:00"))
        await migration.until("new", "select count(*) > 0 from events where kind = 'new'")
        await execute(source, *_RENAMES)
        await execute(target, *_RENAMES)
        await execute(
            source,
            "insert into events values ('2026-01-20 21:00', 'after', '{}'), ('2026-01-02 21:00', 'after', '{}')",
            "update samples set v = v + 100 where site is null and happened < '2026-01-02'",
            "delete from samples where site = 'p2' and happened > '2026-01-04'",
        )
        await migration.until("ranges by their new names", _ARE_NOTED)
        await execute(source, _DAYS.format("samples (happened, site)", "2026-01-21", "2026-01-22"))
        await migration.finish()
        copied = " ".join(note for note in migration.observer.notes if "copied anew" in note)
        assert [name for name in planned if f"{name}," in f"{copied},"] == []
    assert await world.differences(source, target) == []


async def test_rows_that_were_dropped_before_a_column_was_renamed_and_are_loaded_again(
    source_of_either_version: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The range of the chunk that is gone is known by the old name alone, unless another chunk tells the new one."""
    source, target = source_of_either_version, target_of_timescale
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await execute(source, "create table saved as select * from events where ts < '2026-01-02'")
        await execute(source, "select drop_chunks('events', older_than => '2026-01-02'::timestamptz)", *_RENAMES)
        await execute(target, *_RENAMES)
        await execute(source, "insert into events values ('2026-01-20 21:00', 'after', '{}')")
        await migration.until("applied", "select count(*) = 1 from events where kind = 'after'")
        await execute(source, "insert into events select * from saved", "drop table saved")
        await migration.finish()
    assert await world.differences(source, target) == []


async def test_all_chunks_are_dropped_before_a_column_is_renamed(
    source_of_either_version: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Nothing tells what the column of the ranges that are known is called by now: what comes is copied anew."""
    source, target = source_of_either_version, target_of_timescale
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await execute(source, "create table saved as select * from events")
        await execute(source, "select drop_chunks('events', older_than => '2026-02-01'::timestamptz)", *_RENAMES)
        await execute(target, *_RENAMES)
        await execute(source, "insert into events select * from saved", "drop table saved")
        await migration.finish()
    assert await world.differences(source, target) == []


async def test_chunks_are_merged_when_a_column_has_been_renamed(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = timescale_source_database, target_of_timescale
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        connection = await asyncpg.connect(source)
        first, second, *_ = [row[0] for row in await connection.fetch("select c::text from show_chunks('events') c")]
        await connection.close()
        await execute(source, *_RENAMES, f"call merge_chunks('{first}', '{second}')")
        await execute(target, *_RENAMES)
        await execute(source, "insert into events values ('2026-01-20 21:00', 'after', '{}')")
        await migration.until("ranges by their new names", _ARE_NOTED)
        await execute(source, "insert into events values ('2026-01-01 21:00', 'after', '{}')")
        await migration.finish()
    assert await world.differences(source, target) == []
