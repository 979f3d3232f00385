"""Decoder, folding and applier against a real target, fed with real pgoutput messages of a real source."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
import pytest

from live_migration.common import postgres, state
from live_migration.common.catalog import list_tables
from live_migration.common.errors import LaneStopped
from live_migration.consumer.applier import Applier
from live_migration.consumer.decoder import Batch, LaneDecoder
from live_migration.consumer.net_changes import folded_runs, work_ahead
from live_migration.consumer.target_tables import TargetTables
from tests.support import wide
from tests.support import workload as module
from tests.support.sessions import keeping_settings
from tests.support.wal import read_messages, segment_bodies
from tests.support.workload import TABLES, Workload, differences, read_rows

pytestmark = pytest.mark.integration


class Pair:
    """A source with a slot and a target with the same, empty tables; `replay` applies what the source's WAL says."""

    def __init__(self, source_uri: str, target_uri: str, slot: str) -> None:
        self.source_uri, self.target_uri, self.slot = source_uri, target_uri, slot

    async def prepare(self, schema: str) -> None:
        self.source = await asyncpg.connect(self.source_uri)
        await self.source.execute(schema)
        target = await asyncpg.connect(self.target_uri)
        await target.execute(schema)
        await target.execute("""
            do $$ declare c record; begin
                for c in select conrelid::regclass as t, conname from pg_constraint where contype = 'f' and conparentid = 0 loop
                    execute format('alter table %s drop constraint %I', c.t, c.conname);
                end loop;
            end $$""")
        await state.create_schema(target)
        for table in await list_tables(self.source):
            columns = [{"name": c.name, "type": c.type, "generated": c.generated} for c in table.columns]
            await target.execute(
                """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state)
                   values ($1, $2, $3, 0, 'all', $4, true, 'ready')""",
                table.oid,
                table.name.schema,
                table.name.name,
                json.dumps(columns),
            )
        await target.close()
        await self.source.execute(f"create publication {self.slot} for all tables")
        await self.source.fetchval("select pg_create_logical_replication_slot($1, 'pgoutput')::text", self.slot)

    async def replay(self, *, binary: bool, most_changes: int, segments_per_batch: int) -> None:
        """Apply all, what comes of every second batch being found ahead, as the pipeline does while the target is at work."""
        messages = await read_messages(self.source, self.slot, self.slot, binary=binary)
        bodies = segment_bodies(messages, most_changes=most_changes)
        async with postgres.session(self.target_uri, "target") as connection, keeping_settings(connection):
            decoder = LaneDecoder(TargetTables(connection, 0), "none")
            applier = Applier(connection, 0)
            is_ahead = False
            while bodies:
                batch, is_ahead = Batch(), not is_ahead
                while bodies and (segments_per_batch > 0 or (batch.must_end_at_commit and batch.is_inside_transaction)):
                    await decoder.decode(bodies.pop(0), batch)
                    segments_per_batch -= 1
                if is_ahead:
                    work_ahead(folded_runs(batch))
                await applier.begin()
                await applier.apply(batch)
                await connection.execute("commit")
                segments_per_batch = max(segments_per_batch, 1)

    async def close(self) -> None:
        await self.source.execute(f"drop publication {self.slot}")
        await self.source.close()

    async def assert_equal(self, tables: tuple[str, ...]) -> None:
        found = differences(await read_rows(self.source_uri, tables), await read_rows(self.target_uri, tables))
        assert not found, found


@pytest.fixture
async def pair(source_database: str, target_database: str, unique_name: str) -> Pair:
    return Pair(source_database, target_database, unique_name)


# the source keeps no identity for insert_only: for these tests it gets one, so that FOR ALL TABLES harms nothing
WORKLOAD_SCHEMA_EXTRA = "alter table app.insert_only replica identity full;"


@pytest.mark.parametrize("seed", range(4))
async def test_a_random_workload_replays_exactly(pair: Pair, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    workload = Workload(pair.source_uri, seed, connections=4, pause=0.0)
    await pair.prepare(module.SCHEMA + WORKLOAD_SCHEMA_EXTRA)
    with empty_schema():
        await workload.create(rows=400)
    async with workload:
        await pair.source.fetchval("select pg_sleep(1.5)")
    await pair.replay(
        binary=rng.random() < 0.5, most_changes=rng.choice((1, 7, 1000)), segments_per_batch=rng.choice((1, 5, 100_000))
    )
    assert workload.commits > 20
    await pair.assert_equal(TABLES)
    await pair.close()


@contextmanager
def empty_schema() -> Iterator[None]:
    """Let `Workload.create` only fill tables that are there."""
    schema, module.SCHEMA = module.SCHEMA, "select 1;"
    try:
        yield
    finally:
        module.SCHEMA = schema


@pytest.mark.parametrize(
    ("custom", "binary"),
    [(False, False), (False, True), (True, False)],  # user-defined types never travel in binary form
    ids=["built-in text", "built-in binary", "custom text"],
)
@pytest.mark.parametrize("batch", [1, 1_000_000])
async def test_every_kind_of_value_replays_exactly(pair: Pair, custom: bool, binary: bool, batch: int) -> None:
    kinds = {"custom": custom, "xml": False}
    await pair.prepare(wide.schema(**kinds) + FULL_FOR_KEYLESS)
    for script in (
        wide.fill(1000, **kinds),
        wide.change(1000, **kinds),
        wide.fill(3000, **kinds),
        wide.change(3000, **kinds),
    ):
        await pair.source.execute(script)
    await pair.replay(binary=binary, most_changes=batch, segments_per_batch=batch)
    tables = await pair.source.fetch(
        "select format('%I.%I', schemaname, tablename) from pg_tables where schemaname = 'wide'"
    )
    await pair.assert_equal(tuple(row[0] for row in tables))
    await pair.close()


FULL_FOR_KEYLESS = "alter table wide.nothing replica identity full;"


async def test_a_change_that_finds_no_row_stops_the_lane(pair: Pair) -> None:
    await pair.prepare("create table t (id int primary key, v int)")
    await pair.source.execute("insert into t values (1, 1), (2, 2)")
    await pair.replay(binary=True, most_changes=100, segments_per_batch=100)
    target = await asyncpg.connect(pair.target_uri)
    await target.execute("delete from t where id = 1")
    await pair.source.execute("update t set v = 5 where id = 1")
    with pytest.raises(LaneStopped, match=r"public\.t: UPDATE hits 0 rows where the source changed 1"):
        await pair.replay(binary=True, most_changes=100, segments_per_batch=100)
    await target.close()
    await pair.close()


async def test_a_row_that_the_target_refuses_names_table_position_and_sqlstate(pair: Pair) -> None:
    await pair.prepare("create table t (id int primary key, v int)")
    target = await asyncpg.connect(pair.target_uri)
    await target.execute("alter table t add check (v < 10)")
    await pair.source.execute("insert into t values (1, 11)")
    with pytest.raises(LaneStopped, match=r"public\.t: .*#1.*SQLSTATE 23514"):
        await pair.replay(binary=True, most_changes=100, segments_per_batch=100)
    await target.close()
    await pair.close()


async def test_a_column_that_the_target_lacks_is_named_with_the_alter_that_mends_it(pair: Pair) -> None:
    await pair.prepare("create table t (id int primary key)")
    await pair.source.execute("alter table t add column extra numeric(5, 2)")
    await pair.source.execute("insert into t values (1, 1.5)")
    with pytest.raises(LaneStopped) as stopped:
        await pair.replay(binary=True, most_changes=100, segments_per_batch=100)
    assert 'ALTER TABLE "public"."t" ADD COLUMN "extra" numeric(5,2);' in stopped.value.hint
    await pair.close()


async def test_deferrable_unique_swap_in_one_transaction(pair: Pair) -> None:
    await pair.prepare("create table t (id int primary key, code int unique deferrable initially immediate)")
    await pair.source.execute("insert into t values (1, 1), (2, 2), (3, 3)")
    await pair.source.execute(
        "begin; set constraints all deferred; update t set code = 2 where id = 1; update t set code = 1 where id = 2; commit"
    )
    await pair.source.execute("update t set code = code + 1")
    await pair.replay(binary=True, most_changes=1, segments_per_batch=1)
    await pair.assert_equal(("t",))
    await pair.close()


async def test_a_shape_that_only_changes_in_the_copy_had_is_not_refused(pair: Pair) -> None:
    """A column altered between slot and copy: the stream still tells of the old shape, in changes that the copy holds."""
    await pair.prepare("create table t (id int primary key, v int)")
    await pair.source.execute("insert into t values (1, 1)")
    alter = "alter table t alter v type bigint, add column w text default 'd'"
    await pair.source.execute(alter)
    seen = await pair.source.fetchrow("select pg_current_snapshot()::text, pg_current_wal_insert_lsn()")
    target = await asyncpg.connect(pair.target_uri)
    await target.execute(f"{alter}; insert into t values (1, 1, 'd')")
    await target.execute("update _live_migration.tables set snapshot = $1, horizon = $2", *seen)
    await target.close()
    await pair.source.execute("update t set v = 3000000000, w = 'new'; insert into t values (2, 2, 'w')")
    await pair.replay(binary=True, most_changes=1, segments_per_batch=1)
    await pair.assert_equal(("t",))
    await pair.close()
