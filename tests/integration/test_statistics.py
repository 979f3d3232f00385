"""By which name statistics are known: it changes with whatever discards what they counted, and with nothing else."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import asyncpg
import pytest

from live_migration.coordinator.statistics import read_statistics
from tests.fixtures.fix_postgres import execute
from tests.support.crashing import LOST, crash, kept_server
from tests.support.failover import Failover

pytestmark = pytest.mark.integration


async def name(uri: str) -> str | None:
    connection = await asyncpg.connect(uri)
    try:
        return await read_statistics(connection)
    finally:
        await connection.close()


async def until_another(uri: str, before: str | None, version: int) -> str | None:
    """Wait until the server is there and its statistics have another name.

    Before 15 they are shown some time after they were sent, and a database that nobody was in yet has none of its own.
    """
    async with asyncio.timeout(60):
        while True:
            with suppress(*LOST):
                now = await name(uri)
                if now != before and (version > 14 or (now is not None and now.count("/") == 2)):
                    return now
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("version", [14, 15, 16, 17, 18])
async def test_statistics_are_others_after_a_crash_or_a_reset_and_the_same_after_a_clean_restart(version: int) -> None:
    async with kept_server(version) as server:
        uri = server.uri()
        await execute(uri, "create table t (v int)")
        first = await until_another(uri, None, version)
        await server.stop()
        await server.start()
        assert await name(uri) == first
        await crash(uri)
        crashed = await until_another(uri, first, version)
        await execute(uri, "select pg_stat_reset()")
        reset = await until_another(uri, crashed, version)
        await execute(uri, "select pg_stat_reset_single_table_counters('t'::regclass)")
        again = await until_another(uri, reset, version)
        assert len({first, crashed, reset, again, None}) == 5
        await execute(uri, "alter database postgres set track_counts = off")
        assert await name(uri) is None


async def test_a_promoted_standby_has_other_statistics() -> None:
    async with Failover() as source:
        before = await name(source.uri)
        await source.start_standby()
        await source.promote()
        assert await name(source.uri) not in (None, before)
