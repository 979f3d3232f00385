"""The transactions that a chaos round has open while tables are published are open then, and what becomes of them is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from tests.fixtures.fix_postgres import execute
from tests.support.newcomer_load import NewcomerLoad
from tests.support.newcomers import Kind, Newcomer, NewcomerPlan, Piece, Straddle, TakenOut
from tests.support.workload import Workload

pytestmark = pytest.mark.integration

_WAITING = "select count(*) from pg_stat_activity where state = 'idle in transaction' and datname = current_database()"
_END_WAITING = """
    select count(pg_terminate_backend(pid)) from pg_stat_activity where state = 'idle in transaction' and datname = current_database()
       and to_regclass('app.new_0') is not null
"""
_NOTED = "select count(*) from {table} where {column} like $1"


def straddle(table: str, *, begins_first: bool) -> Straddle:
    before = (Piece(table, 4 * 10**9, 30, True, "none"), Piece("app.by_key", 5 * 10**9, 20, False, "rolled back"))
    after = (Piece("app.by_key", 6 * 10**9, 40, True, "released"), Piece(table, 7 * 10**9, 10, False, "none"))
    return Straddle(begins_first, before, after, is_shown=True, seed=1)


async def publish_each(source: str, table: str) -> None:
    """Publish a table once it is there, and in no publication."""
    while True:
        connection = await asyncpg.connect(source)
        try:
            if await connection.fetchval(
                "select to_regclass($1) is not null and not exists (select from pg_publication_rel where prrelid = to_regclass($1))",
                table,
            ):
                await connection.execute(f"alter publication ours add table {table}")
        finally:
            await connection.close()
        await asyncio.sleep(0.02)


@asynccontextmanager
async def loaded(source: str, plan: NewcomerPlan, table: str) -> AsyncIterator[NewcomerLoad]:
    """Give the load of a plan beside somebody who publishes the table."""
    await Workload(source, 1).create(rows=100)
    await execute(source, "create publication ours for table app.by_nothing_full, app.by_key")
    publishing = asyncio.create_task(publish_each(source, table))
    try:
        yield NewcomerLoad(source, source, plan, [])
    finally:
        publishing.cancel()


async def count(source: str, query: str, *arguments: object) -> int:
    connection = await asyncpg.connect(source)
    try:
        return int(await connection.fetchval(query, *arguments))
    finally:
        await connection.close()


@pytest.mark.parametrize("begins_first", [True, False])
@pytest.mark.parametrize("kind", ["key", "nothing", "full"])
async def test_a_transaction_with_changes_of_a_newcomer_is_open_while_it_is_published(
    source_database: str, kind: Kind, begins_first: bool
) -> None:
    table = "app.new_0"
    newcomer = Newcomer(table, kind, 0.0, 5, straddle(table, begins_first=begins_first), "stays", 0.0)
    seen: list[int] = []

    @asynccontextmanager
    async def look(_: Straddle) -> AsyncIterator[None]:
        seen.append(await count(source_database, f"select count(*) from {table}"))
        yield

    async with loaded(source_database, NewcomerPlan((newcomer,), (), 0.1), table) as load:
        load.around_commit = look
        await load.run()
        assert seen == [8]  # the first five, and the three that were committed behind the publication
        assert load.happened == {f"made with {kind}": 1, "straddled": 1, "stays": 1}
        assert load.tables == (table,)
    assert await count(source_database, f"select count(*) from {table}") == 48
    assert await count(source_database, _NOTED.format(table="app.by_key", column="note"), "old %") == 40


async def test_a_table_that_is_taken_out_is_changed_by_a_transaction_that_ends_when_it_is_in_again(
    source_database: str,
) -> None:
    table = "app.by_nothing_full"
    taken_out = TakenOut(table, 0.0, straddle(table, begins_first=False))
    async with loaded(source_database, NewcomerPlan((), (taken_out,), 0.1), table) as load:
        await load.run()
        assert load.happened == {"taken out": 1, "straddled": 1}
    assert await count(source_database, _NOTED.format(table=table, column="b"), "old %") == 40
    assert await count(source_database, _NOTED.format(table=table, column="b"), "shown") == 1


@pytest.mark.parametrize(("fate", "rows"), [("truncated", 0), ("dropped", None), ("made again", 0), ("widened", 25)])
async def test_what_becomes_of_a_newcomer(source_database: str, fate: str, rows: int | None) -> None:
    table = "app.new_0"
    newcomer = Newcomer(table, "key", 0.0, 5, None, fate, 0.0)  # type: ignore[arg-type]
    async with loaded(source_database, NewcomerPlan((newcomer,), (), 0.1), table) as load:
        await load.run()
        assert load.happened == {"made with key": 1, fate: 1}
        assert load.tables == (() if rows is None else (table,))
    if rows is not None:
        assert await count(source_database, f"select count(*) from {table}") == rows


async def test_the_target_of_a_newcomer_that_was_widened_is_widened(source_database: str, target_database: str) -> None:
    table = "app.new_0"
    newcomer = Newcomer(table, "nothing", 0.0, 5, None, "widened", 0.0)
    async with loaded(source_database, NewcomerPlan((newcomer,), (), 0.1), table):
        load = NewcomerLoad(source_database, target_database, NewcomerPlan((newcomer,), (), 0.1), [])
        widening = asyncio.create_task(load.widen_target())
        await load.run()
        await execute(target_database, "create schema app", f"create table {table} (id bigint, n int, note text)")
        has_it = "select count(*) from pg_attribute where attrelid = $1::text::regclass and attname = 'extra'"
        async with asyncio.timeout(30):
            while not await count(target_database, has_it, table):
                await asyncio.sleep(0.05)
        widening.cancel()


async def test_a_transaction_that_is_lost_before_the_publication_is_begun_again(source_database: str) -> None:
    table = "app.new_0"
    newcomer = Newcomer(table, "key", 0.0, 5, straddle(table, begins_first=True), "stays", 0.0)
    await Workload(source_database, 1).create(rows=100)
    await execute(source_database, "create publication ours for table app.by_key")
    load = NewcomerLoad(source_database, source_database, NewcomerPlan((newcomer,), (), 0.1), [])
    running = asyncio.create_task(load.run())
    async with asyncio.timeout(30):
        while not await count(source_database, _END_WAITING):
            await asyncio.sleep(0.02)
        while not load.happened["straddle lost"]:
            await asyncio.sleep(0.02)
        while not await count(source_database, _WAITING):  # the next one has begun
            await asyncio.sleep(0.02)
        await execute(source_database, f"alter publication ours add table {table}")
        await running
    assert load.happened == {"made with key": 1, "straddle lost": 1, "straddled": 1, "stays": 1}
    assert await count(source_database, f"select count(*) from {table}") == 48


async def test_a_transaction_that_loses_its_session_is_told_and_the_rest_goes_on(source_database: str) -> None:
    table = "app.new_0"
    newcomer = Newcomer(table, "nothing", 0.0, 5, straddle(table, begins_first=True), "truncated", 0.0)

    @asynccontextmanager
    async def lose(_: Straddle) -> AsyncIterator[None]:
        ended = "select count(pg_terminate_backend(pid)) from pg_stat_activity where state = 'idle in transaction' and datname = current_database()"
        assert await count(source_database, ended) == 1
        yield

    async with loaded(source_database, NewcomerPlan((newcomer,), (), 0.1), table) as load:
        load.around_commit = lose
        await load.run()
        assert load.happened == {"made with nothing": 1, "straddle lost": 1, "truncated": 1}
