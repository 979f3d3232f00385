"""Exactness: a random concurrent workload from before the slot until cutover, then every row of every table compared."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Self

import asyncpg
import pytest

from tests.e2e.migration import Migration
from tests.support.workload import Workload, differences, lanes_by_key, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SEEDS = range(int(os.environ.get("LIVE_MIGRATION_TEST_SEEDS", "10")))

TOUCH_ALL = """
    insert into app.by_key values (-{n}, 1, 'open transaction {n}');
    update app.by_key set note = 'touched {n}' where id = 5000 + {n};
    insert into app.by_time values ('1999-01-01 00:00:0{n}', 'open', {n});
    insert into app.by_unique values (gen_random_uuid(), 'open {n}', {n}, repeat('y', 5000));
    insert into app.by_nothing_full values (7, 'open {n}', 1.00), (7, 'open {n}', 1.0);
    insert into app.insert_only values (now(), 'open {n}'), (now(), 'open {n}');
    insert into app.parent (id, name) values (-{n}, 'open {n}');
    insert into app.child (parent, doc) values (-{n}, '[]');
    insert into app.by_part values (-{n}, 1, 1), (-{n}, 2, 1);
    insert into app."Odd ""name"" ü" values ('open {n}', 'x');
"""


class OpenTransaction:
    """A transaction that has written to every table and is still open."""

    def __init__(self, uri: str, number: int) -> None:
        self._uri, self._number = uri, number

    async def begin(self) -> Self:
        self._connection = await asyncpg.connect(self._uri)
        await self._connection.execute("begin")
        await self._connection.execute(TOUCH_ALL.format(n=self._number))
        return self

    async def commit(self) -> None:
        await self._connection.execute("commit")
        await self._connection.close()


async def _restart_something(migration: Migration, rng: random.Random) -> None:
    service = rng.choice([migration.producer, *migration.consumers])
    await (service.crash() if rng.random() < 0.7 else service.drain())
    await asyncio.sleep(rng.random() * 0.5)
    service.start()


@pytest.mark.parametrize("seed", SEEDS)
async def test_every_row_is_equal_after_cutover_under_load(
    seed: int, source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    workload = Workload(source_database, seed)
    await workload.create(rows=3000)
    migration = Migration(
        source_database,
        target_database,
        kafka_bootstrap,
        unique_name,
        tmp_path,
        partitions=(partitions := rng.choice((1, 3, 8))),
        lanes=lanes_by_key(seed) if partitions > 1 else (),
        part_size=rng.choice((65536, 512 * 1024 * 1024)),
        segment_bytes=rng.choice((4096, 131072)),
        batch_rows=rng.choice((50, 100_000)),
    )
    async with workload:
        before = await OpenTransaction(source_database, 1).begin()
        async with migration:
            await migration.until(
                "slot creation", "select 1 from pg_replication_slots where slot_name = $1", unique_name, where="source"
            )
            during = await OpenTransaction(source_database, 2).begin()
            await before.commit()
            await asyncio.sleep(rng.random())  # anywhere in the slot's wait; not for something to happen
            await during.commit()
            await migration.until_phase("schema", "copy")
            across = await OpenTransaction(source_database, 3).begin()
            await migration.until_copied()
            await across.commit()
            await migration.until_phase("replay")
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(rng.random())  # a random moment of the replay
                await _restart_something(migration, rng)
            await asyncio.sleep(1)  # a moment of plain replay under load
            await workload.stop()
            await migration.finish()
    assert workload.commits > 50
    found = differences(await read_rows(source_database), await read_rows(target_database))
    assert not found, f"seed {seed}: {found}"
    await _assert_foreign_keys_are_valid(target_database)


async def _assert_foreign_keys_are_valid(uri: str) -> None:
    connection = await asyncpg.connect(uri)
    try:
        rows = await connection.fetch(
            "select conname, convalidated from pg_constraint where contype = 'f' and connamespace = 'app'::regnamespace"
        )
        assert [tuple(row) for row in rows] == [("child_parent_fkey", True)]
    finally:
        await connection.close()
