"""Memory is bounded in bytes: one huge transaction, and one huge value, through processes whose resident memory is watched."""

from __future__ import annotations

import os
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.local_postgres import LocalPostgres
from tests.e2e.processes import Cli
from tests.fixtures.fix_postgres import SETTINGS
from tests.support.memory import Bounds, watched_memory
from tests.support.walsender import PATIENCE, STATUS_SECONDS, TIMEOUT_MESSAGE
from tests.support.workload import differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

ROWS = int(os.environ.get("LIVE_MIGRATION_TEST_ROWS", "1500000"))
"""Of the one huge transaction."""
BOUNDS = Bounds(batch_bytes=8 << 20)


async def _migrate_with(source: str, target: str, cli: Cli, change: str, *options: str) -> dict[str, int]:
    migrate = await cli.migrate("--consumers", "2", *options)
    try:
        async with watched_memory(migrate) as peaks:
            await migrate.until_phase("replay")
            connection = await asyncpg.connect(source)
            await connection.execute(change, timeout=300)
            await connection.close()
            code, _, err = await cli.run("cutover")
            assert code == 0, err
            assert await migrate.wait(timeout=400) == 0, migrate.log()
    finally:
        await migrate.close()
    return peaks


async def test_a_transaction_of_millions_of_rows_passes_in_bounded_memory(
    target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """And the source's walsender, which waits for an answer for a few seconds only, has one all the while."""
    async with LocalPostgres(settings=SETTINGS | {"wal_sender_timeout": f"{PATIENCE}s"}) as server:
        connection = await asyncpg.connect(server.uri())
        await connection.execute("create table public.huge (id bigint primary key, a int, b text)")
        await connection.close()
        cli = Cli(server.uri(), target_database, kafka_bootstrap, unique_name, tmp_path / "data")
        change = f"insert into public.huge select i, i % 1000, 'row ' || i from generate_series(1, {ROWS}) i"
        peaks = await _migrate_with(
            server.uri(), target_database, cli, change, "--status-interval", str(STATUS_SECONDS), *BOUNDS.options
        )
        assert TIMEOUT_MESSAGE not in server.log_path.read_text()
        count = "select (count(*), sum(hashtextextended(t::text, 0)))::text from public.huge t"
        results = []
        for uri in (server.uri(), target_database):
            connection = await asyncpg.connect(uri)
            results.append(await connection.fetchval(count))
            await connection.close()
    assert results[0] == results[1]
    BOUNDS.require(peaks)


@pytest.mark.parametrize("form", ["binary", "text"])
async def test_a_value_of_200_mb_passes_in_copy_and_stream(
    form: str, source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    connection = await asyncpg.connect(source_database)
    await connection.execute("create table public.large (id int primary key, v bytea, n int)")
    if form == "text":
        await connection.execute(
            "create type public.forces_text as enum ('x'); create table public.other (e public.forces_text primary key)"
        )
    await connection.execute("alter table public.large alter v set storage external")
    await connection.execute("insert into public.large select 1, decode(repeat('00ff10', 66666667), 'hex'), 0")
    await connection.close()
    cli = Cli(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "data")
    change = """insert into public.large select 2, decode(repeat('ab09c1', 66666667), 'hex'), 0;
                update public.large set n = 1 where id = 1"""
    peaks = await _migrate_with(source_database, target_database, cli, change, *BOUNDS.options)
    tables = ("(select id, md5(v), length(v), n from public.large)",)
    assert not differences(await read_rows(source_database, tables), await read_rows(target_database, tables))
    BOUNDS.require(peaks, 400_000_000 if form == "text" else 200_000_000)  # in text form bytea is twice as long
