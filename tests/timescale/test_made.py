"""Whole migrations to a TimescaleDB of another version, where hypertables are made anew."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from live_migration.common.local_postgres import LocalPostgres
from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]


@pytest.fixture
async def older(other_timescale: LocalPostgres) -> AsyncIterator[str]:
    async with timescale_database(other_timescale) as uri:
        yield uri


async def test_a_quiet_database_comes_over(
    older: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source, target = older, target_of_timescale
    await world.make(source)
    jobs = await world.jobs(source)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, cutover="auto") as migration:
        await migration.until_phase("done")
        await migration.finish()
        assert await world.differences(source, target) == []
        assert await world.jobs(target) == jobs
        assert await world.compression(source) == await world.compression(target)
        report = await verify(migration.settings)
        assert report.is_equal, report.results
    assert not [each for each in migration.observer.warnings if "left out" in each]
