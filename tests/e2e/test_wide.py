"""Every kind of value, identifier and table through the whole path: in the snapshot and in the stream, as text and as binary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.coordinator.verify import verify
from tests.e2e.migration import Migration
from tests.support import wide
from tests.support.workload import differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]


async def _execute(uri: str, script: str) -> None:
    connection = await asyncpg.connect(uri)
    try:
        await connection.execute(script)
    finally:
        await connection.close()


async def _tables(uri: str) -> tuple[str, ...]:
    connection = await asyncpg.connect(uri)
    try:
        query = "select format('%I.%I', schemaname, tablename) from pg_tables where schemaname = 'wide' order by 1"
        return tuple(row[0] for row in await connection.fetch(query))
    finally:
        await connection.close()


async def _has_xml(uri: str) -> bool:
    connection = await asyncpg.connect(uri)
    try:
        return bool(await connection.fetchval("select '<a/>'::xml is document"))
    except asyncpg.FeatureNotSupportedError:
        return False
    finally:
        await connection.close()


async def migrate_wide(
    source: str, target: str, kafka: str, name: str, folder: Path, *, custom: bool, **options: Any
) -> None:
    """Migrate the wide tables, with values in the copy and in the stream, and compare every row."""
    kinds = {"custom": custom, "xml": await _has_xml(source) and await _has_xml(target)}
    await _execute(source, wide.schema(**kinds))
    for number in (1000, 3000):
        await _execute(source, wide.fill(number, **kinds))
    async with Migration(source, target, kafka, name, folder, **options) as migration:
        await migration.until_phase("replay")
        await _execute(source, wide.fill(5000, **kinds))
        await _execute(source, wide.change(3000, **kinds))
        await _execute(source, wide.change(5000, **kinds))
        await _execute(source, "update wide.big set id = -id where id >= 5000; " + wide.fill(7000, **kinds))
        await migration.finish()
        binary = await migration.until("mode", "select binary_stream::text from _live_migration.migration")
    assert binary == ("false" if custom else "true")
    tables = await _tables(source)
    found = differences(await read_rows(source, tables), await read_rows(target, tables))
    assert not found, found
    assert len(tables) >= 18
    report = await verify(migration.settings)
    assert report.is_equal


@pytest.mark.parametrize("custom", [False, True], ids=["binary", "text"])
@pytest.mark.parametrize("partitions", [1, 4])
async def test_every_value_arrives_unchanged(
    custom: bool,
    partitions: int,
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    await migrate_wide(
        source_database, target_database, kafka_bootstrap, unique_name, tmp_path, custom=custom, partitions=partitions
    )
