"""TRUNCATE of a continuous aggregate on the source during replay, against real servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_MATERIALIZED = """
    select format('%I.%I', materialization_hypertable_schema, materialization_hypertable_name)
    from timescaledb_information.continuous_aggregates where view_name = 'daily'
"""


@pytest.fixture
async def source(source_of_either_version: str) -> str:
    await world.make(source_of_either_version)
    return source_of_either_version


async def test_an_aggregate_that_is_truncated_is_empty_on_the_target_and_filled_again(
    source: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The stream tells a TRUNCATE of what it materializes into, which no server takes from anybody."""
    target = target_of_timescale
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(source, "truncate daily")
        table = str(await world.value(target, _MATERIALIZED))
        await migration.until("the TRUNCATE", f"select count(*) = 0 from {table}")
        await execute(source, "call refresh_continuous_aggregate('daily', null, '2026-01-03')")
        await migration.finish()
        assert await world.differences(source, target) == []
