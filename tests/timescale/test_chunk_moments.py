"""Chunks that are compressed, decompressed or dropped between planning and copy, each at a moment that is made certain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest

from live_migration.consumer.service import run_consumer
from tests.e2e.migration import Migration, Service
from tests.fixtures.fix_postgres import execute
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_SCHEMA = (
    "create table m (time timestamptz not null, device int not null, v float8, primary key (device, time))",
    "select create_hypertable('m', 'time', chunk_time_interval => interval '1 day', create_default_indexes => false)",
    "alter table m set (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time')",
    """insert into m select t, d, 1
       from generate_series('2026-01-01'::timestamptz, '2026-01-03 23:00', '1 hour') t, generate_series(1, 3) d""",
    "select compress_chunk(c) from show_chunks('m', newer_than => '2026-01-02'::timestamptz, older_than => '2026-01-03'::timestamptz) c",
)
_STEPS = {
    "compressed": ("2026-01-03", "select compress_chunk('{}')"),
    "decompressed": ("2026-01-02", "select decompress_chunk('{}')"),
    "dropped": ("2026-01-01", "select drop_chunks('m', older_than => '2026-01-02'::timestamptz)"),
}
"""Day of the chunk, and what is done to it."""
_CHANGES = (
    "update m set v = v + {1} where device = 1 and time >= '{0}'::timestamptz and time < '{0} 12:00'::timestamptz",
    "delete from m where device = 2 and time = '{0} 0{1}:00'::timestamptz",
    "insert into m values ('{0} 12:3{1}'::timestamptz, 3, {1})",
)
_CHUNK = "select c::text from show_chunks('m', newer_than => $1::text::timestamptz, older_than => $1::text::timestamptz + interval '1 day') c"
_LOCKED = """
    select exists (select from pg_locks l join pg_stat_activity a on a.pid = l.pid
                   where l.relation = $1::text::regclass and l.database = (select oid from pg_database where datname = current_database())
                     and l.granted = $2 and a.application_name like 'live-migration%')
"""
_VERSION = "select extversion from pg_extension where extname = 'timescaledb'"
_WAITS_FOR_US = """
    select exists (select from unnest(pg_blocking_pids($1)) b join pg_stat_activity a on a.pid = b
                   where a.application_name like 'live-migration%')
"""


@pytest.fixture(params=["timescale_source", "other_timescale"], ids=["same version", "another version"])
async def source(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A source whose version the target has, so that chunks come over as they are; and one whose chunks are made anew."""
    async with timescale_database(request.getfixturevalue(request.param)) as uri:
        await execute(uri, *_SCHEMA)
        yield uri


class _Case:
    """A migration whose consumers are not started yet, and the chunk to which something happens."""

    def __init__(
        self, migration: Migration, happens: str, ours: asyncpg.Connection, theirs: asyncpg.Connection
    ) -> None:
        self.migration = migration
        self.day, self._step = _STEPS[happens]
        self.ours, self.theirs = ours, theirs
        self.chunk = ""

    async def begin(self) -> None:
        await self.migration.until_phase("copy", timeout=240)
        self.chunk = str(await self.ours.fetchval(_CHUNK, self.day))
        await self.change(1)

    async def change(self, number: int) -> None:
        for statement in _CHANGES:
            await self.ours.execute(statement.format(self.day, number))

    async def act(self) -> None:
        await self.ours.execute(self._step.format(self.chunk))

    def start_consumer(self) -> None:
        self.migration.consumers.append(Service(run_consumer, self.migration.settings))
        self.migration.consumers[0].start()


async def _before(case: _Case) -> None:
    await case.act()
    await case.change(2)
    case.start_consumer()


async def _while_the_copy_waits_for_its_lock(case: _Case) -> None:
    async with case.ours.transaction():
        await case.act()
        case.start_consumer()
        await case.migration.until("the copy waits", _LOCKED, case.chunk, False, where="source")
    await case.change(2)


async def _while_the_copy_has_its_snapshot(case: _Case) -> None:
    """It is held between the two: source locked and seen, nothing written to the target yet."""
    versions = {await each.fetchval(_VERSION) for each in (case.ours, case.theirs)}
    written = case.chunk if len(versions) == 1 else "m"
    async with case.theirs.transaction():
        await case.theirs.execute(f"lock table {written} in access exclusive mode")
        case.start_consumer()
        await case.migration.until("source locked", _LOCKED, case.chunk, True, where="source")
        await case.migration.until("target waits", _LOCKED, written, False)
        acting = asyncio.ensure_future(case.act())
        await case.migration.until("it waits", _WAITS_FOR_US, case.ours.get_server_pid(), where="source")
        assert not acting.done()
    await asyncio.wait_for(acting, 60)
    await case.change(2)


# One that is dropped once its copy has its snapshot stays on the target, for the stream does not tell of it: docs/timescaledb.md.
@pytest.mark.parametrize(
    ("happens", "moment"),
    [
        *((happens, moment) for happens in _STEPS for moment in (_before, _while_the_copy_waits_for_its_lock)),
        *((happens, _while_the_copy_has_its_snapshot) for happens in ("compressed", "decompressed")),
    ],
)
async def test_a_chunk_comes_out_right(
    source: str,
    happens: str,
    moment: Callable[[_Case], Awaitable[None]],
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """With rows that change before it, after it, and when all is copied."""
    target = target_of_timescale
    ours, theirs = await asyncpg.connect(source), await asyncpg.connect(target)
    options = {"pause_source_jobs": True, "consumers": 0}
    try:
        async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, **options) as migration:
            case = _Case(migration, happens, ours, theirs)
            await case.begin()
            await moment(case)
            await migration.until_phase("replay", timeout=240)
            await case.change(3)
            await migration.finish()
            assert await world.all_rows(source, "m") == await world.all_rows(target, "m") != []
            here, there = await world.chunks(source), await world.chunks(target)
            assert {key: bool(status) for key, status in here.items()} == {key: bool(s) for key, s in there.items()}
    finally:
        await ours.close()
        await theirs.close()
