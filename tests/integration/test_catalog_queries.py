"""Each query of ours on TimescaleDB's catalog and views, against tables that have the recorded columns of each version. No TimescaleDB is needed.

A query that names a relation or a column which a version lacks fails here, as it would there.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from live_migration.common import pgoutput, timescale
from live_migration.common.home import Home
from live_migration.common.postgres import session
from live_migration.common.relation import QualifiedName
from live_migration.consumer import hypertables, strangers, stretches
from live_migration.coordinator import (
    aggregate_state,
    hypertable_entries,
    hypertable_findings,
    hypertable_gaps,
    hypertable_source,
    job_owners,
    newcomer_jobs,
    newcomer_making,
    refresh_gaps,
    source_jobs,
    timescale_facts,
)
from live_migration.coordinator.hypertable_definitions import Job
from live_migration.coordinator.hypertable_sql import job_statement
from live_migration.producer.homes import CATALOG_SCHEMA, CATALOG_TABLES, Homes
from tests.support import segments
from tests.support.recorded_catalog import COLUMNS, FOLDER, make_catalog

pytestmark = pytest.mark.integration

PACKAGES = ("common", "producer", "consumer", "coordinator")
NAMES_RELATION = re.compile(
    r"\b(?:from|join|update|into)\s+(?:_timescaledb_(?:catalog|config|internal|cache)|timescaledb_information)\.\w"
)
METRICS = QualifiedName("public", "metrics")
TABLES = """
    create table public.metrics (time timestamptz not null, device int, v float8);
    create table public.chunk (check (time < '2026-01-02')) inherits (public.metrics);
    insert into _timescaledb_catalog.hypertable (id, schema_name, table_name, compression_state, associated_schema_name, associated_table_prefix)
        values (1, 'public', 'metrics', 0, 'public', '_hyper_1');
    insert into _timescaledb_catalog.dimension (id, hypertable_id, column_name, column_type, interval_length)
        values (1, 1, 'time', 'timestamptz'::regtype, 86400000000);
    create temp table stage (t timestamptz);
"""


@asynccontextmanager
async def catalog(uri: str, version: str) -> AsyncIterator[tuple[asyncpg.Connection, list[str]]]:
    """Give a session on a database with a version's catalog, one hypertable in it, and the statements that it runs."""
    async with session(uri, "source") as connection:
        await make_catalog(connection, version)
        await connection.execute(TABLES)
        ran: list[str] = []
        connection.add_query_logger(lambda record: ran.append(record.query))
        yield connection, ran


async def run_all(connection: asyncpg.Connection) -> list[str]:
    """Run, or let the server look at, each statement on TimescaleDB's catalog; give those that it has only looked at."""
    layout = await timescale.read_layout(connection)
    assert layout is not None
    (hypertable,), (chunk,) = layout.hypertables.values(), layout.chunks.values()
    await timescale.is_hypertable(connection, METRICS)
    await timescale.read_slices(connection, layout)
    await timescale.compressed_table(connection, chunk.oid)
    await timescale.compressed_tables(connection, hypertable.oid)
    await timescale.read_chunk_status(connection, chunk.name)
    await timescale.write_chunk_status(connection, chunk.name, 1)
    bounds = await timescale.read_column_bounds(connection, chunk.name)
    await timescale.write_column_bounds(connection, chunk.name, bounds)

    columns = await hypertables.read_hypertable(connection, hypertable.oid, METRICS, ())
    assert columns is not None
    await connection.fetch(stretches._stretches(columns, "pg_temp.stage", "t"))

    assert await hypertable_source.read_definitions(connection)
    await hypertable_entries.read_entries_of_timescale(connection)
    await timescale_facts.read_source(connection, [])
    await source_jobs.read_jobs(connection)
    await source_jobs.read_starts(connection)
    places = await source_jobs._places(connection)
    assert places is not None
    await connection.fetch(source_jobs._RUNNING.format(jobs=places.jobs), [1])
    await connection.execute(places.alter(1000, scheduled=True))
    await job_owners.give_policies_to_owners(connection, places.jobs, [1])
    await job_owners.find_helpless(connection, places.jobs, [1])

    state = await aggregate_state.read_state(connection, layout)
    rows = {table: [(METRICS, (0,) * (len(aggregate_state._TABLES[table]) - 1))] for table in state.rows}
    await aggregate_state.write_state(connection, layout, aggregate_state.AggregateState(rows))
    return await look_at_the_rest(connection)


async def look_at_the_rest(connection: asyncpg.Connection) -> list[str]:
    """Have the server prepare what runs in the midst of something else, or calls functions of TimescaleDB's."""
    target = await hypertable_gaps.read_target(connection)
    assert target is not None
    procedure = QualifiedName("pg_catalog", "pg_advisory_lock")
    job = Job(procedure, "PT1H", config="{}", relation=METRICS, id_key="hypertable_id")
    job_statements = [job_statement(job, aggregates, target) for aggregates in ([], [METRICS])]
    # which function it is matters to the statement's run alone
    job_statements = [
        re.sub(r"'[^']*'::regprocedure", "'pg_catalog.now()'::regprocedure", each) for each in job_statements
    ]
    rest = [
        strangers._NAMESAKES,
        hypertable_findings._DECOMPRESSED,
        newcomer_jobs._AGGREGATE_VIEW,
        newcomer_making._MATERIALIZATION,
        refresh_gaps._WATERMARK,
        *job_statements,
    ]
    for statement in rest:
        await connection.prepare(statement)
    return rest


@pytest.mark.parametrize("version", COLUMNS)
async def test_every_query_fits_the_columns_of_each_version(version: str, source_database: str) -> None:
    async with catalog(source_database, version) as (connection, _):
        await run_all(connection)


async def test_no_query_on_the_catalog_is_left_out(source_database: str, target_database: str) -> None:
    """Whatever stands in the program and names a relation of TimescaleDB's has been run for one version or another."""
    ran: list[str] = []
    for uri, version in zip((source_database, target_database), COLUMNS, strict=True):
        async with catalog(uri, version) as (connection, statements):
            ran += await run_all(connection) + statements
    everything = [squeeze(each) for each in ran]
    found = list(pieces())
    assert len(found) > 20
    assert [each for each in found if not any(each in statement for statement in everything)] == []


async def test_a_query_for_another_version_fails(source_database: str, target_database: str) -> None:
    for uri, version, query in (
        (source_database, "2.29.2", timescale._COMPRESSED_BY_CHUNK),
        (target_database, "2.24.0", "select relid from _timescaledb_catalog.chunk"),
    ):
        async with catalog(uri, version) as (connection, _):
            with pytest.raises(asyncpg.UndefinedColumnError):
                await connection.fetch(query)


HASHED = """
    create function public.hash(k int) returns int language sql immutable strict as 'select k * 10';
    create table public.spaced (at int not null, k int);
    create table public.low (check (at < 10), check (public.hash(k) < 100)) inherits (public.spaced);
    create table public.high (check (at < 10), check (public.hash(k) >= 100)) inherits (public.spaced);
    insert into _timescaledb_catalog.dimension (id, hypertable_id, column_name, column_type, interval_length, num_slices)
        values (5, 7, 'at', 'int'::regtype, 10, null), (6, 7, 'k', 'int'::regtype, null, 2);
"""
CHUNKS_OF = {
    "2.24.0": """
        insert into _timescaledb_catalog.chunk (id, hypertable_id, schema_name, table_name) values (1, 7, 'public', 'low'), (2, 7, 'public', 'high');
        insert into _timescaledb_catalog.dimension_slice (id, dimension_id, range_start, range_end)
            values (1, 5, 0, 10), (2, 6, -9223372036854775808, 100), (3, 6, 100, 9223372036854775807);
        insert into _timescaledb_catalog.chunk_constraint (chunk_id, dimension_slice_id, constraint_name)
            values (1, 1, 'a'), (1, 2, 'b'), (2, 1, 'a'), (2, 3, 'b');
    """,
    "2.29.2": """
        insert into _timescaledb_catalog.chunk (id, hypertable_id, relid) values (1, 7, 'public.low'::regclass), (2, 7, 'public.high'::regclass);
        insert into _timescaledb_catalog.dimension_slice (id, chunk_id, dimension_id, range_start, range_end)
            values (1, 1, 5, 0, 10), (2, 1, 6, -9223372036854775808, 100), (3, 2, 5, 0, 10), (4, 2, 6, 100, 9223372036854775807);
    """,
}


@pytest.mark.parametrize("version", COLUMNS)
async def test_a_row_that_is_hashed_by_nothing_belongs_to_the_chunk_of_zero(version: str, source_database: str) -> None:
    async with catalog(source_database, version) as (connection, _):
        await connection.execute(HASHED + CHUNKS_OF[version])
        low, high = [await connection.fetchval(f"select 'public.{each}'::regclass::oid") for each in ("low", "high")]
        ranges = await timescale.chunk_ranges(connection, [low, high])
        assert ranges == {
            low: "(at < 10) and (k is null or (public.hash(k) < 100))",
            high: "(at < 10) and (public.hash(k) >= 100)",
        }
        await connection.execute("alter table public.spaced alter k set not null")
        assert await timescale.chunk_range(connection, low) == "(at < 10) and (public.hash(k) < 100)"


def pieces() -> Iterator[str]:
    """Give what the program has of statements that name TimescaleDB's relations: pieces between what is put in at run time."""
    for package in PACKAGES:
        for path in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for piece in re.split(r"\{[^}]*\}", node.value):
                        if NAMES_RELATION.search(piece):
                            yield squeeze(piece)


def squeeze(statement: str) -> str:
    return " ".join(statement.split())


@pytest.mark.parametrize("version", COLUMNS)
def test_homes_are_learnt_from_the_columns_that_each_version_sends(version: str) -> None:
    """A hypertable, its chunk and that chunk's compressed table, each from its row in the stream."""
    values = {
        "hypertable": {"id": "7", "schema_name": "public", "table_name": "metrics", "compression_state": "0"},
        "chunk": {
            "hypertable_id": "7",
            "schema_name": "inner",
            "table_name": "chunk_1",
            "relid": "inner.chunk_1",
        },
        "compression_settings": {"relid": "inner.chunk_1", "compress_relid": "inner.packed_1"},
    }
    homes = Homes(timescale.Layout(version), {})
    for table in CATALOG_TABLES:
        columns = list(COLUMNS[version][f"{CATALOG_SCHEMA}.{table}"])
        message = segments.relation(table, [(name, segments.TEXT, False) for name in columns], schema=CATALOG_SCHEMA)
        relation = pgoutput.decode_relation(message)
        homes.learn_columns(relation)
        homes.learn_row(relation.name, segments.insert(table, *(values[table].get(name) for name in columns)))
    chunk = QualifiedName("inner", "chunk_1")
    assert homes.find(chunk) == Home(METRICS, chunk)
    assert homes.find(QualifiedName("inner", "packed_1")) == Home(METRICS, chunk, is_compressed=True)


def test_the_recordings_of_one_version_agree() -> None:
    views = json.loads((FOLDER / "catalog_views.json").read_text())
    for name, view in views.items():
        if isinstance(view, dict) and "columns" in view:
            assert list(COLUMNS["2.29.2"][f"timescaledb_information.{name}"]) == view["columns"], name
