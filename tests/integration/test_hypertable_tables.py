"""What is read of a plain source's tables, and what is proposed for them."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common.local_postgres import LocalPostgres
from live_migration.coordinator.hypertable_candidates import propose, read_memory
from live_migration.coordinator.hypertable_tables import Table, read_tables
from tests.fixtures.fix_postgres import DatabaseFactory, PostgresFactory, execute

pytestmark = pytest.mark.integration

SCRIPT = (
    """create table metrics (time timestamptz not null, device int not null, v float8, note text,
                             primary key (device, time) include (v))""",
    "create table epochs (id bigint generated always as identity primary key, at bigint not null, other date)",
    "create table only_epochs (at bigint not null, k int not null, unique (at, k))",
    "create table ages (at timestamp not null default 'infinity', d date not null, id serial)",
    "create index on ages (d desc)",
    "create table refers (device int, time timestamptz, foreign key (device, time) references metrics)",
    """insert into metrics select '2026-01-01'::timestamptz + g * interval '1 minute', g % 7, g, 'x'
       from generate_series(1, 20000) g""",
    "insert into epochs (at) select 1700000000000 + g from generate_series(1, 1000) g",
    "insert into only_epochs select 1700000000 + g, g from generate_series(1, 1000) g",
    "insert into ages select 'infinity', '2026-01-01'::date + g from generate_series(0, 100) g",
    "analyze",
)


async def _read(uri: str) -> dict[str, Table]:
    connection = await asyncpg.connect(uri)
    try:
        return {table.name.name: table for table in await read_tables(connection)}
    finally:
        await connection.close()


async def test_tables_with_keys_and_statistics(source_database: str) -> None:
    await execute(source_database, *SCRIPT)
    tables = await _read(source_database)
    metrics = tables["metrics"]
    (key,) = metrics.keys
    assert (key.name, key.kind, key.columns) == ("metrics_pkey", "primary key", ("device", "time"))
    assert metrics.identity_columns == ("time", "device")
    assert metrics.leading == {"device"}
    assert metrics.size_bytes > 1 << 20
    assert metrics.row_estimate == 20000
    time, device, v, _ = metrics.columns
    assert (time.is_time, time.not_null, v.not_null) == (True, True, False)
    assert time.low == pytest.approx(1767225660, abs=86400)
    assert time.span == pytest.approx(20000 * 60, rel=0.05)
    assert not device.is_counted
    (reference,) = metrics.references
    assert (reference.table.name, reference.key) == ("refers", key.oid)
    assert tables["epochs"].columns[0].is_counted
    at, day, serial = tables["ages"].columns
    assert (at.low, at.span, serial.is_counted) == (None, None, True)
    assert day.span == 100 * 86400
    assert tables["ages"].leading == {"d"}


async def test_proposals(source_database: str) -> None:
    await execute(source_database, *SCRIPT)
    tables = tuple((await _read(source_database)).values())
    connection = await asyncpg.connect(source_database)
    try:
        assert await read_memory(connection) >= 4 << 20
    finally:
        await connection.close()
    found = propose(tables, (2, 29, 2), 1 << 20, least_bytes=8192)
    assert [str(each.spec) for each in found] == [
        "public.metrics:time,1 day",
        "public.only_epochs:at,3600",
        "public.ages:d,365 days",
    ]
    assert found[0].chunk_bytes is not None
    assert found[0].chunk_bytes <= 1 << 18
    assert "rows, chunks of about" in str(found[0])
    assert propose(tables, (2, 29, 2), 1 << 20) == []


@pytest.mark.parametrize("version", [14, 18])
async def test_versions_read_alike(
    postgres_server: PostgresFactory, fresh_database: DatabaseFactory, version: int
) -> None:
    server: LocalPostgres = postgres_server(version)
    uri = await fresh_database(server)
    await execute(uri, *SCRIPT)
    assert len(await _read(uri)) == 5
