"""Continuous aggregates whose oldest rows are gone, and materialized views that read them: they give what they give on the source."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import Server, database, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world
from tests.timescale.test_administrator import FEW_RIGHTS

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_WORLD = (
    "create table r (time timestamptz not null, v int, primary key (time, v))",
    "select create_hypertable('r', 'time', chunk_time_interval => interval '1 day')",
    "insert into r select t, 1 from generate_series('2026-01-01'::timestamptz, '2026-01-05', '1 hour') t",
    """create materialized view daily with (timescaledb.continuous, timescaledb.materialized_only = false) as
       select time_bucket('1 day', time) as day, count(*) as n from r group by 1 with no data""",
    "call refresh_continuous_aggregate('daily', null, null)",
    "select drop_chunks('r', older_than => '2026-01-03'::timestamptz)",
    "create view plain as select day, n from daily",
    "create materialized view report as select day, n from plain",
    "create materialized view total as select sum(n) as n from report",
)
_VIEWS = ("daily", "report", "total")


async def _as_owner(target: str, name: str) -> str:
    """Give the target's URI for a role that may not write TimescaleDB's catalog."""
    owner, admin = f"{name}_owner", f"{name}_admin"
    await execute(target, FEW_RIGHTS.format(admin=admin, owner=owner, database=target.rsplit("/", 1)[1]))
    return target.replace("postgres@", f"{admin}@")


@pytest.mark.parametrize("may_write", [True, False], ids=["catalog", "no catalog"])
async def test_views_over_real_time_aggregates_are_filled_with_what_those_give(
    may_write: bool,
    other_timescale: Server,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """Of another version, for there the target's aggregates know of nothing materialized until they are given the source's watermarks."""
    target = target_of_timescale
    if not may_write:
        target = await _as_owner(target, unique_name)
    async with timescale_database(other_timescale) as source:
        await execute(source, *_WORLD)
        async with Migration(
            source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
        ) as migration:
            await migration.until_phase("replay", timeout=240)
            await migration.finish()
            ours, theirs = [[await world.all_rows(uri, view) for view in _VIEWS] for uri in (source, target)]
            assert theirs == ours
            assert len(ours[1]) == 5


_STRAY = (
    "create table r (time timestamptz not null, v int, primary key (time, v))",
    "select create_hypertable('r', 'time', chunk_time_interval => interval '1 day')",
    "insert into r select t, 1 from generate_series('2026-01-01'::timestamptz, '2026-01-20 23:00', '1 hour') t",
    "insert into r values ('2025-11-01 10:05', 7)",
    *(
        f"""create materialized view {name} with (timescaledb.continuous, timescaledb.materialized_only = {mode}) as
            select time_bucket('{width}', {column}) as day, {value} as n from {parent} group by 1 with no data"""
        for name, mode, width, column, value, parent in (
            ("hourly", "false", "1 hour", "time", "sum(v)", "r"),
            ("daily", "false", "1 day", "day", "sum(n)", "hourly"),
            ("weekly", "true", "7 days", "time", "sum(v)", "r"),
        )
    ),
    *(f"call refresh_continuous_aggregate('{name}', null, null)" for name in ("hourly", "daily", "weekly")),
    "select drop_chunks('r', older_than => '2026-01-06'::timestamptz, newer_than => '2026-01-01'::timestamptz)",
    "select drop_chunks('r', older_than => '2026-01-11'::timestamptz, newer_than => '2026-01-08'::timestamptz)",
)

_DELETED = (
    *_STRAY[:-2],
    "delete from r where time >= '2026-01-01' and time < '2026-01-06'",
    "delete from r where time >= '2026-01-08' and time < '2026-01-11'",
    "delete from r where time >= '2026-01-19'",
)
"""The chunks are there, their rows are not, and no refresh has taken the buckets away: those of the last days among them."""


@pytest.mark.parametrize("world_of", [_STRAY, _DELETED], ids=["chunks dropped", "rows deleted"])
async def test_buckets_between_rows_that_are_there_are_kept(
    world_of: tuple[str, ...],
    timescale_target: Server,
    other_timescale: Server,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """One stray row from long ago: a refresh from there on would take away what is materialized of rows that are gone."""
    async with timescale_database(other_timescale) as source, database(timescale_target) as target:
        admin = await _as_owner(target, unique_name)
        await execute(source, *world_of)
        async with Migration(
            source, admin, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
        ) as migration:
            await migration.until_phase("replay", timeout=240)
            await migration.finish()
            for name, count in (("hourly", 481), ("daily", 21), ("weekly", 5)):
                assert await world.all_rows(target, name) == await world.all_rows(source, name), name
                assert await world.value(source, f"select count(*) from {name}") == count
            assert [each for each in migration.observer.warnings if "refreshed" in each and "by hand" in each] == []
