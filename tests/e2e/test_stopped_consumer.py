"""A consumer that sleeps within a copy, and is the only one, keeps nobody waiting on the source for longer than its lease."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import asyncpg
import pytest

from tests.e2e.processes import Cli

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

COPYING = """
    select pid from pg_stat_activity where datname = current_database() and application_name like 'live-migration%'
                                           and state = 'active' and query ilike 'copy %'
"""


async def test_an_alter_on_the_source_gets_through_although_the_only_consumer_is_stopped_within_a_copy(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    source = await asyncpg.connect(source_database)
    await source.execute("create table t (id int, v text); alter table t alter v set storage external")
    await source.execute("insert into t select i, repeat('x', 1000) from generate_series(1, 200000) i")
    cli = Cli(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "data")
    migrate = await cli.migrate("--consumers", "1", "--lease", "3")
    consumer = None
    try:
        async with asyncio.timeout(120):
            while not (pid := await source.fetchval(COPYING)):
                assert migrate.process.returncode is None, migrate.log()
        (consumer,) = migrate.children("consumer")
        consumer.send_signal(signal.SIGSTOP)
        assert await source.fetchval(COPYING) == pid, "the copy was over before the consumer was stopped"
        await source.execute("set lock_timeout = '60s'; alter table t add column w int")
        async with asyncio.timeout(30):
            while "gave its lock on the source back" not in migrate.log():
                await asyncio.sleep(0.05)
    finally:
        if consumer is not None:
            consumer.send_signal(signal.SIGCONT)
        await migrate.close()
    await source.close()
