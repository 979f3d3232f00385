"""A COMMIT whose answer is lost may have been done: what is so is read from the target, and nothing is repeated blindly."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import pytest
from pydantic import SecretStr

from live_migration.common.local_postgres import LocalPostgres
from tests.fixtures.fix_postgres import SETTINGS
from tests.support.copying import consumers, contents, index_definitions, plan, run_sql, settings_for, until_ready
from tests.support.lanes import grow, replay
from tests.support.proxy import Proxy, is_commit

pytestmark = pytest.mark.integration


@asynccontextmanager
async def losing_answers(uri: str, *, seed: int, chance: float) -> AsyncIterator[Proxy]:
    """Give a proxy before a server that commits, and of whose answers to COMMIT this part is never heard of."""
    rng = random.Random(seed)
    port = urlsplit(uri).port
    assert port is not None
    async with Proxy(lambda: port) as proxy:
        proxy.lose_answer(lambda chunk: is_commit(chunk) and rng.random() < chance, once=False)
        yield proxy


async def test_batches_whose_commit_is_not_answered_count_once(
    target_database: str, kafka_bootstrap: str, unique_name: str
) -> None:
    async with (
        losing_answers(target_database, seed=1, chance=0.3) as proxy,
        replay(target_database, kafka_bootstrap, unique_name, lane_count=2, batch_rows=100) as it,
    ):
        it.settings = it.settings.model_copy(update={"target": SecretStr(proxy.uri(target_database))})
        expected: list[dict[int, str]] = [{} for _ in it.lanes]
        async with it.consumer():
            for number in range(25):
                for lane, rows in zip(it.lanes, expected, strict=True):
                    grow(lane, rows, range(number * 40, number * 40 + 40), cut_after=17)
                await it.send()
                await asyncio.sleep(0.1)
            await it.until_applied(60)
        assert proxy.losses > 5
        for lane, rows in enumerate(expected):
            assert await it.rows(lane) == rows
            assert (await it.checkpoint(lane))["change_count"] == 2 * len(rows)


async def test_parts_tables_and_indexes_whose_commit_is_not_answered_are_made_once(
    source_database: str, target_database: str
) -> None:
    """Tables without a key, whose rows would stand there twice."""
    for uri in (source_database, target_database):
        await run_sql(uri, "; ".join(f"create table public.t{i} (id int, v text)" for i in range(6)))
    await run_sql(
        source_database,
        "; ".join(
            f"insert into public.t{i} select g, repeat('x', g % 50) from generate_series(1, {9000 if i < 2 else 300}) g;"
            f" create index on public.t{i} (id)"
            for i in range(6)
        ),
    )
    await plan(source_database, target_database)
    async with losing_answers(target_database, seed=2, chance=0.25) as proxy:
        settings = settings_for(source_database, proxy.uri(target_database), part_size=64 * 1024)
        async with consumers(settings, 2):
            await until_ready(target_database, timeout=90)
    assert proxy.losses > 5
    assert await contents(target_database) == await contents(source_database)
    assert await index_definitions(target_database) == await index_definitions(source_database)


async def test_groups_of_small_tables_whose_commit_is_not_answered_are_made_once(
    source_database: str, target_database: str
) -> None:
    """The same for tables that are copied together with their indexes."""
    for uri in (source_database, target_database):
        await run_sql(uri, "; ".join(f"create table public.t{i} (id int, v text)" for i in range(80)))
    await run_sql(
        source_database,
        "; ".join(
            f"insert into public.t{i} select g, repeat('x', g % 50) from generate_series(1, {i % 4 * 10}) g;"
            f" create index on public.t{i} (id)"
            for i in range(80)
        ),
    )
    await plan(source_database, target_database)
    async with losing_answers(target_database, seed=3, chance=0.4) as proxy:
        async with consumers(settings_for(source_database, proxy.uri(target_database)), 2):
            await until_ready(target_database, timeout=90)
    assert proxy.losses > 5
    assert await contents(target_database) == await contents(source_database)
    assert await index_definitions(target_database) == await index_definitions(source_database)


async def test_a_target_that_crashes_loses_changes_and_checkpoint_together(
    kafka_bootstrap: str, unique_name: str
) -> None:
    """Lanes commit without waiting for the disk: what a crash undoes is applied again from the checkpoint that is left."""
    async with (
        LocalPostgres(settings={**SETTINGS, "fsync": "on", "wal_writer_delay": "10s"}) as server,
        replay(server.uri(), kafka_bootstrap, unique_name, lane_count=2, batch_rows=100) as it,
    ):
        expected: list[dict[int, str]] = [{} for _ in it.lanes]
        lost = 0
        async with it.consumer():
            for number in range(3):
                for lane, rows in zip(it.lanes, expected, strict=True):
                    for start in range(0, 200, 40):
                        grow(lane, rows, range(number * 200 + start, number * 200 + start + 40), cut_after=17)
                await it.send()
                await it.until_applied(60)
                before = await it.target.fetchval("select sum(change_count) from _live_migration.checkpoints")
                it.target.terminate()
                await server.restart(immediate=True)
                it.target = await asyncpg.connect(server.uri())
                lost += before - await it.target.fetchval("select sum(change_count) from _live_migration.checkpoints")
            await it.until_applied(60)
        for lane, rows in enumerate(expected):
            assert await it.rows(lane) == rows
            assert (await it.checkpoint(lane))["change_count"] == 2 * len(rows)
        print(f"{lost} changes were undone by the crashes and applied again")
