"""A transaction that is open while a table joins our publications, cut in the log: the next session is sent another part of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from live_migration.producer.publisher import Publisher
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute
from tests.support.workload import differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_PUBLISHED = "select exists (select from pg_publication_tables where tablename = 'joining')"
_ROWS = "insert into staying select i, repeat('x', 200) from generate_series(1, 40000) i"


async def test_a_producer_dies_within_a_transaction_with_changes_of_a_table_that_joined_meanwhile(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first session is sent them, for what committed meanwhile told it that the table is published; the second is not."""
    cut = asyncio.Event()
    publish = Publisher.publish

    async def publish_and_stand_still(self: Publisher, *arguments: object) -> None:
        await publish(self, *arguments)  # type: ignore[arg-type]
        if self.position and self.position.change and self.position.change[3] > 2_000 and not cut.is_set():
            cut.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(Publisher, "publish", publish_and_stand_still)
    source = source_database
    await execute(source, "create table staying (id int primary key, v text)", "insert into staying values (0, 'old')")
    options = {"flush_bytes": 1 << 20, "partitions": 3}
    writer = await asyncpg.connect(source)
    async with Migration(source, target_database, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
        await migration.until_phase("replay")
        await execute(source, "create table joining (id int primary key)")
        async with writer.transaction():
            await writer.execute("insert into joining select generate_series(1, 500)")
            await migration.until("publication", _PUBLISHED, where="source")
            await execute(source, "insert into joining values (-1)")
            await writer.execute(_ROWS)
        async with asyncio.timeout(60):
            await cut.wait()
        await migration.producer.crash()
        migration.producer.start()
        await migration.finish()
    await writer.close()
    tables = ("public.staying", "public.joining")
    assert differences(await read_rows(source, tables), await read_rows(target_database, tables)) == {}
