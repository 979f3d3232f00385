"""Every supported major version as source and as target: every kind of value, and a random workload, on each pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.migration import Migration
from tests.e2e.test_wide import migrate_wide
from tests.fixtures.fix_postgres import DatabaseFactory, PostgresFactory
from tests.support.workload import Workload, differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

PAIRS = [(14, 14), (14, 15), (15, 16), (16, 17), (17, 18), (18, 18)]


@pytest.mark.parametrize(("old", "new"), PAIRS)
async def test_every_value_arrives_unchanged_between_versions(
    old: int,
    new: int,
    postgres_server: PostgresFactory,
    fresh_database: DatabaseFactory,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    source = await fresh_database(postgres_server(old))
    target = await fresh_database(postgres_server(new))
    await migrate_wide(source, target, kafka_bootstrap, unique_name, tmp_path, custom=True)


async def test_a_pair_over_tls(
    postgres_server: PostgresFactory,
    fresh_database: DatabaseFactory,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    source = await fresh_database(postgres_server(16, ssl=True)) + "?sslmode=require"
    target = await fresh_database(postgres_server(17, ssl=True)) + "?sslmode=require"
    workload = Workload(source, 1)
    await workload.create(rows=500)
    async with workload, Migration(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        plain = await migration.until(
            "sessions",
            "select string_agg(distinct ssl::text, ',') from pg_stat_ssl join pg_stat_activity using (pid) "
            "where application_name like 'live-migration%' and datname = current_database()",
            where="source",
        )
        assert plain == "true"
        await workload.stop()
        await migration.finish()
    assert not differences(await read_rows(source), await read_rows(target))
