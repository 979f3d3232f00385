"""What `migrate --recopy` does to the state: nobody who was at work can end it, and nobody can begin before there is a slot."""

from __future__ import annotations

import asyncpg
import pytest

from live_migration.common.errors import Fenced
from live_migration.common.postgres import session
from live_migration.consumer.claim_endings import CopyOrigin, finish_table
from live_migration.consumer.claims import Claimant, claim_table
from live_migration.consumer.copy_stream import CopyCount
from live_migration.consumer.sessions import Backend
from live_migration.coordinator import recopy
from tests.support.copying import plan, run_sql

pytestmark = pytest.mark.integration


async def claimant(connection: asyncpg.Connection) -> Claimant:
    started = await connection.fetchval("select backend_start from pg_stat_activity where pid = pg_backend_pid()")
    backend = Backend(connection.get_server_pid(), started)
    return Claimant("sleeper", backend, backend, 60.0)


async def test_a_consumer_that_slept_through_it_can_neither_end_nor_begin_a_copy(
    source_database: str, target_database: str
) -> None:
    await run_sql(source_database, "create table public.t (id int); create table public.u (id int)")
    await plan(source_database, target_database)
    async with session(target_database, "target") as sleeper, session(target_database, "target") as coordinator:
        who = await claimant(sleeper)
        before = await claim_table(sleeper, who)
        assert before is not None
        await coordinator.execute(recopy.VOID)
        assert await claim_table(sleeper, who) is None, "claimed before there was a slot"
        origin = CopyOrigin("1:1:", 0, 1, "[]", True)
        with pytest.raises(Fenced):
            await finish_table(sleeper, before, "sleeper", origin, CopyCount(1, 1))
        # should it have claimed in a moment that we did not think of, entering phase copy ends that
        await coordinator.execute("update _live_migration.tables set state = 'planned'")
        between = await claim_table(sleeper, who)
        assert between is not None
        await coordinator.execute(recopy.RELEASE)
        with pytest.raises(Fenced):
            await finish_table(sleeper, between, "sleeper", origin, CopyCount(1, 1))
        after = await claim_table(sleeper, who)
        assert after is not None
        await finish_table(sleeper, after, "sleeper", origin, CopyCount(1, 1))


async def test_chunks_that_lanes_took_for_gone_are_met_anew(source_database: str, target_database: str) -> None:
    """Their rows tell of a log that counts no more; those of a hypertable that was dropped stay, as it does."""
    await plan(source_database, target_database)
    async with session(target_database, "target") as coordinator:
        await coordinator.execute(
            """insert into _live_migration.tables
                   (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind, hypertable_oid, newcomer)
               values (5, 'public', 'dropped', 0, 'all', '[]', true, 'ready', 'hypertable', null, 'gone'),
                      (6, 'store', 'with_it', 0, 'all', '[]', true, 'ready', 'chunk', 5, 'gone'),
                      (7, 'store', 'by_a_lane', 0, 'all', '[]', true, 'ready', 'chunk', null, 'gone'),
                      (8, 'store', 'met', 0, 'all', '[]', true, 'ready', 'chunk', 9, 'met')"""
        )
        await coordinator.execute(recopy.VOID)
        rows = await coordinator.fetch("select oid from _live_migration.tables order by oid")
        assert [row["oid"] for row in rows] == [5, 6, 8]
