"""Changes of a real source applied to hypertables of a real target, with compressed and uncompressed chunks."""

from __future__ import annotations

import json
import random

import asyncpg
import pytest

from live_migration.common import state
from live_migration.common.local_postgres import LocalPostgres
from tests.fixtures.fix_timescale import timescale_database
from tests.integration.test_applier import Pair
from tests.support.hypertables import (
    TABLES,
    HypertableWorkload,
    compress_half,
    enable_compression,
    initial_rows,
    make_hypertables,
    rows_of,
    source_schema,
)

pytestmark = pytest.mark.integration


class HypertablePair(Pair):
    """A source, of plain tables or of hypertables, and a target of hypertables that has the source's first rows."""

    async def prepare_tables(self, *, source_chunks: bool) -> None:
        self.tables = TABLES if source_chunks else (*TABLES, "by_id")
        self.source = await asyncpg.connect(self.source_uri)
        await self.source.execute(source_schema())
        if source_chunks:
            await self.source.execute(make_hypertables(by_id=False))
        await self.source.execute(initial_rows())
        self.target = await asyncpg.connect(self.target_uri)
        await self.target.execute(source_schema() + make_hypertables(by_id=True) + enable_compression(by_id=True))
        await self.follow(self.tables)
        for table in self.tables:
            await self._copy(table)

    async def follow(self, tables: tuple[str, ...]) -> None:
        """Make state, publication and slot; each of a table's relations on the source names the target's table."""
        await state.create_schema(self.target)
        # each chunk's row names the root here
        await self.target.execute(
            "alter table _live_migration.tables drop constraint tables_schema_name_table_name_key"
        )
        leaves = []
        for table in tables:
            relations = await self.source.fetch(
                """with recursive r as (select $1::regclass::oid as oid union all
                                        select i.inhrelid from pg_inherits i join r on i.inhparent = r.oid)
                   select oid, oid::regclass::text as name from r
                   where not exists (select from pg_inherits where inhparent = oid)""",
                table,
            )
            for relation in relations:
                leaves.append(relation["name"])
                await self.target.execute(
                    """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state)
                       values ($1, 'public', $2, 0, 'all', $3, true, 'ready')""",
                    relation["oid"], table, json.dumps([]),
                )  # fmt: skip
        await self.source.execute(f"create publication {self.slot} for table {', '.join(leaves)}")
        await self.source.fetchval("select pg_create_logical_replication_slot($1, 'pgoutput')::text", self.slot)

    async def _copy(self, table: str) -> None:
        rows = await self.source.fetch(f"select * from {table}")
        names = [name for name in dict(rows[0]) if name != "doubled"]
        await self.target.copy_records_to_table(table, columns=names, records=[[row[n] for n in names] for row in rows])

    async def assert_tables_equal(self) -> None:
        for table in self.tables:
            here, there = await rows_of(self.source_uri, table), await rows_of(self.target_uri, table)
            assert here == there, (table, "lost", dict(here - there), "too many", dict(there - here))

    async def close(self) -> None:
        await self.target.close()
        await super().close()


async def _random_workload(pair: HypertablePair, seed: int, *, source_chunks: bool) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    await pair.prepare_tables(source_chunks=source_chunks)
    workload = HypertableWorkload(pair.source, rng, pair.tables)
    for _ in range(4):
        assert await compress_half(pair.target, pair.tables, rng) > 5
        await workload.run(60)
        await pair.replay(
            binary=rng.random() < 0.5,
            most_changes=rng.choice((1, 7, 1000)),
            segments_per_batch=rng.choice((1, 5, 100_000)),
        )
        await pair.assert_tables_equal()
    print(workload.kinds)
    await pair.close()


@pytest.mark.parametrize("source_chunks", [False, True], ids=["plain source", "source of chunks"])
@pytest.mark.parametrize("seed", range(3))
async def test_a_random_workload_replays_exactly(
    timescale_source_database: str, timescale_target_database: str, unique_name: str, seed: int, source_chunks: bool
) -> None:
    pair = HypertablePair(timescale_source_database, timescale_target_database, unique_name)
    await _random_workload(pair, seed, source_chunks=source_chunks)


@pytest.mark.parametrize("source_chunks", [False, True], ids=["plain source", "source of chunks"])
@pytest.mark.parametrize("seed", range(3, 5))
async def test_a_random_workload_replays_exactly_on_another_version(
    other_timescale: LocalPostgres, unique_name: str, seed: int, source_chunks: bool
) -> None:
    async with timescale_database(other_timescale) as source, timescale_database(other_timescale) as target:
        await _random_workload(HypertablePair(source, target, unique_name), seed, source_chunks=source_chunks)
