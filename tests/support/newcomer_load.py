"""Carries a plan of newcomers out: makes them, straddles their publication, and lets their fates come."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress

import asyncpg

from live_migration.common.postgres import CONNECTION_ERRORS
from tests.support.newcomers import Newcomer, NewcomerPlan, Straddle, TakenOut, write_piece

_LOST = (OSError, asyncpg.InterfaceError, *CONNECTION_ERRORS)
_IN_THE_WAY = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)
_PUBLISHED_SECONDS = 30.0
"""How long a transaction stays open for a publication that does not come: the coordinator may be away."""
_TRIES = 3
_LOCK = "set local lock_timeout = '1s';"
_PUBLICATIONS = """
    select pubname::text from pg_publication p join pg_publication_rel r on r.prpubid = p.oid where r.prrelid = to_regclass($1)
"""
_WIDER = "add column if not exists extra int"


class NewcomerLoad:
    """Runs a plan from the beginning of replay on. `live` are the newcomers that others may write to now.

    `around_commit` is entered when a transaction that has straddled a publication is about to commit, and left when it has.
    """

    def __init__(self, source: str, target: str, plan: NewcomerPlan, live: list[Newcomer]) -> None:
        self.around_commit: Callable[[Straddle], AbstractAsyncContextManager[None]] = lambda _: nullcontext()
        self.happened: Counter[str] = Counter()
        self._source = source
        self._target = target
        self._plan = plan
        self._live = live
        self._wider: list[Newcomer] = []

    @property
    def tables(self) -> tuple[str, ...]:
        """Newcomers that the source has at the end."""
        return tuple(sorted(each.name for each in self._live))

    async def run(self) -> None:
        """Let everything happen; returns when all is done."""
        async with asyncio.TaskGroup() as tasks:
            for newcomer in self._plan.newcomers:
                tasks.create_task(self._live_through(newcomer))
            for taken_out in self._plan.taken_out:
                tasks.create_task(self._take_out(taken_out))

    async def widen_target(self) -> None:
        """Do what the lane of a newcomer that has got another column asks for, wherever the target has it; never returns."""
        while True:
            for newcomer in self._wider:
                with suppress(*_LOST, asyncpg.PostgresError):
                    await self._widen(newcomer)
            await asyncio.sleep(0.5)

    async def _widen(self, newcomer: Newcomer) -> None:
        connection = await asyncpg.connect(self._target, timeout=5)
        try:
            if not await connection.fetchval(_LACKS_COLUMN, newcomer.name):
                return
            await connection.execute(f"{_LOCK} alter table if exists {newcomer.name} {_WIDER}")
        finally:
            connection.terminate()

    async def _live_through(self, newcomer: Newcomer) -> None:
        await asyncio.sleep(newcomer.delay)

        async def make() -> None:
            await self._define(newcomer.creation)
            await self._define(_FIRST_ROWS.format(table=newcomer.name, count=newcomer.rows))
            self.happened[f"made with {newcomer.kind}"] += 1
            self._live.append(newcomer)

        if newcomer.straddle:
            await self._straddle(newcomer.name, newcomer.straddle, make)
        else:
            await make()
        await asyncio.sleep(newcomer.fate_delay)
        await self._meet_fate(newcomer)

    async def _meet_fate(self, newcomer: Newcomer) -> None:
        table = newcomer.name
        self.happened[newcomer.fate] += 1
        match newcomer.fate:
            case "stays":
                return
            case "truncated":
                await self._define(f"truncate {table}")
            case "dropped":
                self._live.remove(newcomer)
                await self._define(f"drop table if exists {table}")
            case "made again":
                await self._define(newcomer.creation)
            case "widened":
                await self._define(f"alter table {table} {_WIDER}")
                self._wider.append(newcomer)
                await self._define(
                    f"insert into {table} (id, n, note, extra) select -i, i, 'wider', i from generate_series(1, 20) i on conflict do nothing"
                )

    async def _take_out(self, taken_out: TakenOut) -> None:
        await asyncio.sleep(taken_out.delay)

        async def take() -> None:
            for publication in await self._publications(taken_out.table):
                with suppress(asyncpg.UndefinedObjectError):  # an earlier try came through unheard
                    await self._define(f'alter publication "{publication}" drop table {taken_out.table}')
                    self.happened["taken out"] += 1

        await self._straddle(taken_out.table, taken_out.straddle, take)

    async def _straddle(self, table: str, straddle: Straddle, begin: Callable[[], Awaitable[None]]) -> None:
        """Have a transaction open while a table is published; `begin` makes the table, or takes it out."""
        begun = asyncio.Event()

        async def begin_once() -> None:
            if not begun.is_set():
                begun.set()
                await begin()

        for _ in range(_TRIES):
            try:
                await self._write_across(table, straddle, begin_once)
                break
            except (*_LOST, *_IN_THE_WAY):
                self.happened["straddle lost"] += 1
            if await self._publications(table):  # then it may even have committed
                break
        await begin_once()

    async def _write_across(self, table: str, straddle: Straddle, begin: Callable[[], Awaitable[None]]) -> None:
        if not straddle.begins_first:
            await begin()
        connection = await asyncpg.connect(self._source, timeout=10)
        try:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("insert into app.insert_only values (now(), 'begins before')")
            await begin()
            for piece in straddle.before:
                await write_piece(connection, piece)
            is_published = await self._until_published(table, connection)
            if is_published and straddle.is_shown:
                await self._define(
                    _FIRST_ROWS.format(table=table, count=3) if table.startswith("app.new_") else _SHOW[table]
                )
            for piece in straddle.after if is_published else ():
                await write_piece(connection, piece)
            if not is_published:
                await transaction.rollback()
                self.happened["straddle without publication"] += 1
                return
            async with self.around_commit(straddle):
                await transaction.commit()
            self.happened["straddled"] += 1
        finally:
            connection.terminate()

    async def _until_published(self, table: str, connection: asyncpg.Connection) -> bool:
        """Tell whether it came to be while the session had its transaction open."""
        try:
            async with asyncio.timeout(_PUBLISHED_SECONDS):
                while not await self._publications(table):
                    await asyncio.sleep(0.1)
                    if connection.is_closed():
                        raise asyncpg.InterfaceError("the session was lost meanwhile")
        except TimeoutError:
            return False
        return True

    async def _publications(self, table: str) -> list[str]:
        """Give the publications that a table is in; waits for a server that is away."""
        while True:
            with suppress(*_LOST):
                connection = await asyncpg.connect(self._source, timeout=5)
                try:
                    return [row[0] for row in await connection.fetch(_PUBLICATIONS, table)]
                finally:
                    connection.terminate()
            await asyncio.sleep(0.2)

    async def _define(self, statements: str) -> None:
        """Run statements in one transaction until they come through, whatever is in the way; they may run twice."""
        while True:
            with suppress(*_LOST, *_IN_THE_WAY):
                connection = await asyncpg.connect(self._source, timeout=5)
                try:
                    await connection.execute(f"{_LOCK} {statements}")
                    return
                finally:
                    connection.terminate()
            await asyncio.sleep(0.2)


_LACKS_COLUMN = """
    select to_regclass($1) is not null
       and not exists (select from pg_attribute where attrelid = to_regclass($1) and attname = 'extra' and not attisdropped)
"""
_FIRST_ROWS = """
    insert into {table} (id, n, note)
    select coalesce(max, 0) + i, i % 20, 'first' from (select max(id) from {table} where id < 1000000) m, generate_series(1, {count}) i
    on conflict do nothing
"""
_SHOW = {
    "app.by_key": "update app.by_key set n = n + 1 where id = (select max(id) from app.by_key)",
    "app.by_nothing_full": "insert into app.by_nothing_full values (1, 'shown', 1)",
    "app.insert_only": "insert into app.insert_only values (now(), 'shown')",
    "app.by_time": "insert into app.by_time values (now(), 'shown', 1) on conflict do nothing",
    "app.by_part_1": "update app.by_part_1 set n = n + 1 where id = (select max(id) from app.by_part_1)",
}
