"""Materialized views that read continuous aggregates: filled with what the aggregates give on the source, whose oldest rows are gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import Server, execute
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
        owner, admin = f"{unique_name}_owner", f"{unique_name}_admin"
        await execute(target, FEW_RIGHTS.format(admin=admin, owner=owner, database=target.rsplit("/", 1)[1]))
        target = target.replace("postgres@", f"{admin}@")
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
