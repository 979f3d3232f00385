"""The replication connection on a real server."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
import uvloop

from live_migration.common.errors import ConnectionLost
from live_migration.producer.replication import ReplicationConnection

pytestmark = pytest.mark.integration


def test_one_that_broke_between_two_commands_is_a_lost_connection(source_database: str) -> None:
    """On the loop that the producer runs on, whose transports take no write once they are closed."""

    async def work() -> None:
        async with await ReplicationConnection.open(source_database) as stream:
            await stream.query("IDENTIFY_SYSTEM")
            administrator = await asyncpg.connect(source_database)
            ended = """select pg_terminate_backend(pid, 5000) from pg_stat_activity
                       where datname = current_database() and backend_type = 'walsender'"""
            assert await administrator.fetchval(ended)
            await administrator.close()
            async with asyncio.timeout(20):
                while not stream._input.is_lost:
                    await stream.received()
            await asyncio.sleep(0)  # a turn later the transport is closed for good
            with pytest.raises(ConnectionLost):
                await stream.query("IDENTIFY_SYSTEM")
            with pytest.raises(ConnectionLost):
                await stream.start("any", 0, {})

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())
