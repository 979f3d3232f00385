"""A commit of the source's that its lane has, and that is not visible yet: it waits for a synchronous standby."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from live_migration.consumer import committing, strangers
from live_migration.consumer.chunk_copy import look_without
from live_migration.consumer.claim_endings import CopyOrigin
from live_migration.consumer.claims import TableClaim
from live_migration.consumer.target_tables import NotPlanned
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import NO_STANDBY, execute
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_WORLD = (
    "create table h (time timestamptz not null, v int)",
    "select create_hypertable('h', 'time', chunk_time_interval => interval '1 day')",
    "insert into h values ('2026-01-01', 1)",
)
_LATE = """
    begin;
    create table late (time timestamptz not null, v int);
    select create_hypertable('late', 'time');
    insert into late values ('2026-01-01', 1), ('2026-01-02', 2);
    commit
"""
_IS_TOLD = "select exists (select from _live_migration.events where message ~ 'waits for transactions on the source')"
_IS_GONE = "select exists (select from _live_migration.tables where newcomer = 'gone')"


@asynccontextmanager
async def _hanging(source: str, *statements: str) -> AsyncIterator[None]:
    """The last statement's commit is in the WAL, and visible to nobody until the context ends."""
    session = await asyncpg.connect(source)
    for statement in ("set synchronous_commit = on", *statements[:-1]):
        await session.execute(statement)
    ending = asyncio.ensure_future(session.execute(statements[-1]))
    try:
        yield
    finally:
        await execute(source, *NO_STANDBY)
        await ending
        await session.close()


@pytest.mark.parametrize("is_fooled", [False, True])
async def test_a_hypertable_whose_commit_is_not_visible_yet_comes_over_once(
    is_fooled: bool,
    source_with_standby: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its rows stand in the lane before the coordinator can see it. A lane that takes its chunks for gone (`is_fooled`) is put right when it is followed."""
    monkeypatch.setattr(committing, "TELL_SECONDS", 0.0)
    if is_fooled:
        monkeypatch.setattr(strangers, "_look_behind", _look_at_once)
    source, target = source_with_standby, target_of_timescale
    await execute(source, *_WORLD)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await migration.until_phase("replay")
        async with _hanging(source, _LATE):
            await migration.until("looked for", _IS_GONE if is_fooled else f"select ({_IS_TOLD}) or ({_IS_GONE})")
        await migration.until(
            "followed", "select bool_or(newcomer = 'followed' and rebuild is null) from _live_migration.tables"
        )
        await execute(source, "insert into late values ('2026-01-01 01:00', 3)")
        await migration.finish()
        assert await world.all_rows(target, "late") == await world.all_rows(source, "late")


_DIRECT = (
    "set timescaledb.enable_direct_compress_insert = on",
    "insert into h select '2026-02-01'::timestamptz + i * interval '1 second', i from generate_series(1, 20000) i",
)
_IS_MARKED = "select exists (select from _live_migration.tables where rebuild = 'rows changed unseen')"


async def test_a_chunk_whose_compressed_rows_come_with_it_is_marked_by_its_own_oid(
    source_with_standby: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody sees the chunk yet. Under the oid of the table of its compressed rows, which takes its place, it can be copied by nobody."""
    monkeypatch.setattr(committing, "TELL_SECONDS", 0.0)
    source, target = source_with_standby, target_of_timescale
    await execute(source, *_WORLD, "alter table h set (timescaledb.compress, timescaledb.compress_orderby = 'time')")
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay")
        async with _hanging(source, *_DIRECT):
            await migration.until("looked for", f"select ({_IS_TOLD}) or ({_IS_MARKED})")
        await migration.finish()
        assert await world.compression(source), "rows came compressed"
        assert await world.all_rows(target, "h") == await world.all_rows(source, "h")


async def _look_at_once(source: asyncpg.Connection, stranger: NotPlanned, *_: object) -> CopyOrigin:
    relation = stranger.relation
    return await look_without(source, TableClaim(relation.oid, relation.name, 0, has_parts=False))
