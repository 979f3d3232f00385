"""Looks at a TimescaleDB's catalog while somebody locks a hypertable: they wait, for a lock that passes must end no migration.

Conditions, indexes and views are printed by functions that lock what these belong to; our sessions give way at a lock after a moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import asyncpg
import pytest

from live_migration.common.postgres import session
from live_migration.coordinator import (
    archives,
    changed_definitions,
    made_definitions,
    made_jobs,
    newcomer_jobs,
    newcomers,
    steps,
    timescale_handover,
)
from live_migration.coordinator.hypertable_definitions import Definitions
from live_migration.coordinator.hypertable_entries import EntriesOfTimescale
from live_migration.coordinator.run import Run
from live_migration.coordinator.timescale_catalog import POST_RESTORE
from live_migration.coordinator.timescale_source import publish_inner
from live_migration.producer.publication import ALL_OPERATIONS, INSERT_ONLY, create_publication
from tests.fixtures.change_log import wait_for
from tests.fixtures.fix_postgres import execute
from tests.support.begun import begun

pytestmark = pytest.mark.integration

SCHEMA = (
    "create table m (time timestamptz not null, v float8)",
    "select create_hypertable('m', 'time', chunk_time_interval => interval '1 day')",
    "insert into m select t, 1 from generate_series('2026-01-01'::timestamptz, '2026-01-03', '1 hour') t",
    """create materialized view h with (timescaledb.continuous) as
       select time_bucket('1 hour', time) b, avg(v) from m group by 1 with no data""",
)
_EVERYTHING = """
    select string_agg(format('%I.%I', n.nspname, c.relname), ', ') from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.relkind = 'r' and (n.nspname in ('public', '_timescaledb_internal')) and c.relname ~ '^(m$|_hyper|_materialized)'
"""

Look = Callable[[], Awaitable[object]]
Prepared = Callable[[Run, asyncpg.Connection], Awaitable[Look]]


async def _publish(run: Run, source: asyncpg.Connection) -> Look:
    return lambda: publish_inner(run, source)


async def _find_newcomers(run: Run, source: asyncpg.Connection) -> Look:
    tables = await run.list_tables(source)
    return lambda: newcomers._find(run, source, [], tables)


async def _bring_jobs(run: Run, source: asyncpg.Connection) -> Look:
    await steps.finish(run.target, run.epoch, POST_RESTORE)
    return lambda: newcomer_jobs.bring_jobs(run, source, run.target)


async def _make_jobs(run: Run, source: asyncpg.Connection) -> Look:
    nothing = made_definitions.Made(Definitions("2.0", "public", ()), EntriesOfTimescale(frozenset(), frozenset()))
    await archives.keep(run.target, made_definitions.ARCHIVE, nothing.encode())
    return lambda: made_jobs.make_jobs(run, source)


async def _read_aggregates(run: Run, source: asyncpg.Connection) -> Look:
    return lambda: timescale_handover.keep_aggregates(run, source)


async def _mark_suspects(run: Run, source: asyncpg.Connection) -> Look:
    await run.target.execute(
        "insert into _live_migration.suspects values (1, '_timescaledb_internal', $1, 'public', 'm')",
        await source.fetchval("select min(relname) from pg_class where relname ~ '^_hyper.*chunk$'"),
    )
    return lambda: timescale_handover._mark_suspects(run, source)


async def _read_definitions(run: Run, source: asyncpg.Connection) -> Look:
    return lambda: changed_definitions._read(run, source)


@pytest.fixture
async def source_uri(timescale_source_database: str) -> str:
    await execute(timescale_source_database, *SCHEMA)
    return timescale_source_database


@pytest.mark.parametrize(
    "prepared",
    [_publish, _find_newcomers, _bring_jobs, _make_jobs, _read_aggregates, _mark_suspects, _read_definitions],
)
async def test_a_look_waits_for_who_locks_a_hypertable(
    prepared: Prepared, source_uri: str, timescale_target_database: str
) -> None:
    async with (
        begun(source_uri, timescale_target_database, lock_timeout=0.1) as (run, observer),
        session(source_uri, "source") as holder,
        run.source_session("test") as source,
    ):
        await create_publication(source, run.settings.publication, ALL_OPERATIONS)
        await create_publication(source, run.settings.insert_publication, INSERT_ONLY)
        look = await prepared(run, source)
        everything = await holder.fetchval(_EVERYTHING)
        await holder.execute(f"begin; lock table only {everything} in access exclusive mode")
        looking = asyncio.ensure_future(look())

        async def has_said_so() -> bool:
            assert not looking.done(), looking
            return any("waits for somebody who locks" in note for note in observer.notes)

        try:
            await wait_for(has_said_so)
        finally:
            await holder.execute("rollback")
        await looking
