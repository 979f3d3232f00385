"""Changes of a real source applied to hypertables of a real target, with compressed and uncompressed chunks."""

from __future__ import annotations

import json
import random

import asyncpg
import pytest

from live_migration.common import state
from live_migration.common.errors import LaneStopped
from live_migration.common.timescale import read_layout
from tests.fixtures.fix_postgres import Server
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
                    """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state,
                                                            root_schema, root_name)
                       values ($1, 'public', $2, 0, 'all', $3, true, 'ready', 'public', $4)""",
                    relation["oid"], relation["name"], json.dumps([]), table,
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
    for _ in range(3):
        assert await compress_half(pair.target, pair.tables, rng) > 5
        await workload.run(50)
        await pair.replay(
            binary=rng.random() < 0.5,
            most_changes=rng.choice((1, 7, 1000)),
            segments_per_batch=rng.choice((1, 5, 100_000)),
        )
        await pair.assert_tables_equal()
    print(workload.kinds)
    await pair.close()


@pytest.mark.parametrize("source_chunks", [False, True], ids=["plain source", "source of chunks"])
@pytest.mark.parametrize("seed", range(2))
async def test_a_random_workload_replays_exactly(
    timescale_source_database: str, timescale_target_database: str, unique_name: str, seed: int, source_chunks: bool
) -> None:
    pair = HypertablePair(timescale_source_database, timescale_target_database, unique_name)
    await _random_workload(pair, seed, source_chunks=source_chunks)


@pytest.mark.parametrize("source_chunks", [False, True], ids=["plain source", "source of chunks"])
@pytest.mark.parametrize("seed", range(2, 4))
async def test_a_random_workload_replays_exactly_on_another_version(
    other_timescale: Server, unique_name: str, seed: int, source_chunks: bool
) -> None:
    async with timescale_database(other_timescale) as source, timescale_database(other_timescale) as target:
        await _random_workload(HypertablePair(source, target, unique_name), seed, source_chunks=source_chunks)


METRICS = """
    create table metrics (time timestamptz not null, device int not null, v int, primary key (time, device));
    insert into metrics select timestamptz '2026-03-01' + i * interval '1 hour', d, 0
    from generate_series(0, 95) i, generate_series(1, 3) d;
"""


async def _metrics(source_uri: str, target_uri: str, name: str) -> HypertablePair:
    """Follow one table whose target is a hypertable of four compressed chunks."""
    pair = HypertablePair(source_uri, target_uri, name)
    pair.tables = ("metrics",)
    pair.source, pair.target = await asyncpg.connect(source_uri), await asyncpg.connect(target_uri)
    await pair.source.execute(METRICS)
    await pair.target.execute(METRICS)
    await pair.target.execute("""
        select create_hypertable('metrics', 'time', chunk_time_interval => interval '1 day', migrate_data => true);
        alter table metrics set (timescaledb.compress, timescaledb.compress_segmentby = 'device');
        select compress_chunk(c) from show_chunks('metrics') c""")
    await pair.follow(pair.tables)
    return pair


async def _at_once(pair: HypertablePair) -> None:
    await pair.replay(binary=True, most_changes=1000, segments_per_batch=1000)


async def _compressed_rows(pair: HypertablePair) -> int:
    """Give how many rows still lie in compressed batches."""
    layout = await read_layout(pair.target)
    assert layout is not None
    names = [await pair.target.fetchval("select $1::oid::regclass::text", oid) for oid in layout.compressed]
    return sum([await pair.target.fetchval(f"select coalesce(sum(_ts_meta_count), 0) from {name}") for name in names])


async def _check_what_is_refused(pair: HypertablePair) -> None:
    await pair.source.execute("delete from metrics where time = '2026-03-02 05:00+00' and device = 2")
    await pair.source.fetchval(f"select count(*) from pg_logical_slot_get_binary_changes('{pair.slot}', null, null, "
                               f"'proto_version', '1', 'publication_names', '{pair.slot}')")  # fmt: skip
    await pair.source.execute("insert into metrics values ('2026-03-02 05:00+00', 2, 7), ('2026-03-02 05:30+00', 2, 7)")
    with pytest.raises(LaneStopped, match="SQLSTATE 23505"):
        await _at_once(pair)
    await pair.target.execute("delete from metrics where time = '2026-03-02 05:00+00' and device = 2")
    await pair.source.execute(
        "update metrics set v = 1 where time >= '2026-03-02'; delete from metrics where device = 3"
    )
    await pair.target.execute("delete from metrics where time = '2026-03-03 05:00+00' and device = 3")
    # what was read from the slot for the refused batch is gone from it: the target gets it by hand
    await pair.target.execute("insert into metrics values ('2026-03-02 05:00+00', 2, 7), ('2026-03-02 05:30+00', 2, 7)")
    with pytest.raises(LaneStopped, match=r"DELETE hits 95 rows where the source changed 96"):
        await _at_once(pair)


async def test_a_row_that_is_compressed_already_is_refused_and_one_that_is_gone_is_missed(
    timescale_source_database: str, timescale_target_database: str, unique_name: str
) -> None:
    pair = await _metrics(timescale_source_database, timescale_target_database, unique_name)
    await _check_what_is_refused(pair)
    await pair.close()


async def test_a_row_that_is_compressed_already_is_refused_on_another_version(
    other_timescale: Server, unique_name: str
) -> None:
    async with timescale_database(other_timescale) as source, timescale_database(other_timescale) as target:
        pair = await _metrics(source, target, unique_name)
        await _check_what_is_refused(pair)
        await pair.close()


async def test_only_the_batches_of_changed_rows_are_decompressed(
    timescale_source_database: str, timescale_target_database: str, unique_name: str
) -> None:
    """Two days apart, one device: two batches of 24 rows of twelve."""
    pair = await _metrics(timescale_source_database, timescale_target_database, unique_name)
    assert await _compressed_rows(pair) == 288
    await pair.source.execute(
        "update metrics set v = 1 where device = 2 and time in ('2026-03-01 03:00+00', '2026-03-04 04:00+00')"
    )
    await pair.source.execute("delete from metrics where device = 2 and time = '2026-03-04 05:00+00'")
    await _at_once(pair)
    await pair.assert_tables_equal()
    assert await _compressed_rows(pair) == 288 - 48
    await pair.close()


async def test_whole_batches_are_counted_row_by_row(
    timescale_source_database: str, timescale_target_database: str, unique_name: str
) -> None:
    """TimescaleDB would delete a batch without a look at its rows where conditions of constants cover it."""
    pair = await _metrics(timescale_source_database, timescale_target_database, unique_name)
    await pair.source.execute(
        "delete from metrics where device = 1 and extract(hour from time at time zone 'UTC') in (0, 23)"
    )
    await _at_once(pair)
    await pair.assert_tables_equal()
    await pair.close()


async def test_a_truncate_empties_the_hypertable_once(
    timescale_source_database: str, timescale_target_database: str, unique_name: str
) -> None:
    pair = await _metrics(timescale_source_database, timescale_target_database, unique_name)
    await pair.source.execute("truncate metrics; insert into metrics values ('2026-03-02', 1, 1)")
    await _at_once(pair)
    await pair.assert_tables_equal()
    await pair.close()
