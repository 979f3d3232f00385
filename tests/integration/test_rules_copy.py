"""Rules of the copy: what a table's snapshot and horizon say, and whose done mark counts."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from live_migration.common.errors import Fenced
from live_migration.common.postgres import session
from live_migration.common.relation import QualifiedName
from live_migration.common.visibility import CopySnapshot
from live_migration.consumer import part_copier
from live_migration.consumer.claim_endings import CopyOrigin, finish_part, finish_table, share_snapshot
from live_migration.consumer.claims import Claimant, PartClaim, TableClaim, claim_part
from live_migration.consumer.copy_errors import AttemptOver
from live_migration.consumer.copy_stream import CopyCount, CopyPlan
from live_migration.consumer.copy_transactions import begin_on_target
from live_migration.consumer.parts import BlockRange
from live_migration.consumer.sessions import Backend, open_session
from live_migration.consumer.table_snapshot import import_snapshot, lock_table
from tests.support.copying import consumers, contents, fetch_value, plan, run_sql, settings_for, until, until_ready
from tests.support.sessions import keeping_settings

pytestmark = pytest.mark.integration

NAME = QualifiedName("public", "t")


async def test_the_snapshot_is_taken_under_the_lock_and_the_horizon_after_the_snapshot(source_database: str) -> None:
    """Whoever held the table before us has committed: his rows are in the copy, and the rule must say so."""
    writer, watcher = await asyncpg.connect(source_database), await asyncpg.connect(source_database)
    await writer.execute("create table public.t (id int primary key)")
    oid = await writer.fetchval("select 'public.t'::regclass::oid")
    await writer.execute("begin; lock table public.t in access exclusive mode; insert into public.t values (1)")
    xid = int(await writer.fetchval("select pg_current_xact_id()::text"))
    async with session(source_database, "source") as connection:
        locking = asyncio.ensure_future(lock_table(connection, TableClaim(oid, NAME, 1, False), 30))
        async with asyncio.timeout(20):
            while not await watcher.fetchval("select count(*) from pg_locks where not granted and relation = $1", oid):
                assert not locking.done()
                await asyncio.sleep(0.02)
        commit_lsn = int(
            await writer.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
        )  # or a little above it
        await writer.execute("commit")
        later = int(await watcher.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))
        locked = await locking
        seen = await connection.fetchval("select count(*) from public.t")
        snapshot = CopySnapshot.parse(locked.snapshot, int(locked.horizon))
        assert seen == 1
        assert snapshot.horizon >= later
        assert snapshot.includes(commit_lsn, xid & 0xFFFFFFFF)
        assert not snapshot.includes(snapshot.horizon, xid & 0xFFFFFFFF)
        await connection.execute("rollback")
    await writer.close()
    await watcher.close()


async def test_a_transaction_that_ran_while_the_snapshot_was_taken_is_not_in_the_copy(source_database: str) -> None:
    writer = await asyncpg.connect(source_database)
    await writer.execute("create table public.t (id int primary key)")
    oid = await writer.fetchval("select 'public.t'::regclass::oid")
    await writer.execute("begin; insert into public.t values (1)")
    xid = int(await writer.fetchval("select pg_current_xact_id()::text"))
    async with session(source_database, "source") as other, session(source_database, "source") as connection:
        await other.execute("insert into public.t values (2)")  # a later xid, committed before
        done = int(await other.fetchval("select xmin::text from public.t where id = 2"))
        locked = await lock_table(connection, TableClaim(oid, NAME, 1, False), 5)
        await writer.execute("commit")
        assert await connection.fetch("select id from public.t") == [(2,)]
        snapshot = CopySnapshot.parse(locked.snapshot, int(locked.horizon))
        below = snapshot.horizon - 1
        assert done > xid
        assert snapshot.includes(below, done & 0xFFFFFFFF)
        assert not snapshot.includes(below, xid & 0xFFFFFFFF)
        await connection.execute("rollback")
    await writer.close()


async def plan_one(source: str, target: str) -> int:
    for uri in (source, target):
        await run_sql(uri, "create table public.t (id int not null)")
    await plan(source, target)
    oid: int = await fetch_value(target, "select oid from _live_migration.tables")
    return oid


async def make_part(target: asyncpg.Connection, oid: int) -> None:
    """Have a table be copied in its second attempt, with one part, which is at work."""
    await target.execute(
        """update _live_migration.tables set state = 'copying', attempt = 2, owner = 'holder', snapshot_id = 'snapshot',
               timeline = 1, lease_until = clock_timestamp() + interval '1 hour'"""
    )
    await target.execute(
        """insert into _live_migration.parts (oid, part, attempt, first_block, end_block, size_bytes, state, owner)
           values ($1, 0, 2, 0, null, 8192, 'copying', 'me')""",
        oid,
    )


async def test_a_parts_done_mark_waits_for_who_begins_the_table_anew(
    source_database: str, target_database: str
) -> None:
    """The attempt rises in a transaction that is not ended yet: a mark that did not wait would count for what is emptied next."""
    oid = await plan_one(source_database, target_database)
    async with (
        session(target_database, "target") as target,
        session(target_database, "target") as marking,
        session(target_database, "target") as successor,
    ):
        await make_part(target, oid)
        await successor.execute("begin; update _live_migration.tables set attempt = attempt + 1")
        claim = PartClaim(
            oid, NAME, 2, 0, BlockRange(0, None, 8192), "snapshot", CopyPlan(NAME, ("id",), True), 1, "1:1:"
        )
        mark = asyncio.ensure_future(finish_part(marking, claim, "me", CopyCount(5, 50)))
        waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = $1"
        async with asyncio.timeout(20):
            while not mark.done() and not await target.fetchval(waits, marking.get_server_pid()):
                await asyncio.sleep(0.02)
        await successor.execute("commit")
        with pytest.raises(Fenced):
            await mark
        assert await target.fetchval("select state from _live_migration.parts") == "copying"


async def test_no_part_is_begun_whose_holder_is_not_heard_of(source_database: str, target_database: str) -> None:
    """Its snapshot is gone or about to be, and the table begins anew."""
    oid = await plan_one(source_database, target_database)
    async with session(target_database, "target") as target:
        await make_part(target, oid)
        await target.execute("update _live_migration.parts set state = 'pending', owner = null")
        started = await target.fetchval("select backend_start from pg_stat_activity where pid = pg_backend_pid()")
        backend = Backend(target.get_server_pid(), started)
        who = Claimant("me", backend, backend, 15)
        await target.execute("update _live_migration.tables set lease_until = clock_timestamp() - interval '1 s'")
        assert await claim_part(target, who) is None
        await target.execute("update _live_migration.tables set lease_until = clock_timestamp() + interval '1 hour'")
        assert await claim_part(target, who) is not None


@pytest.mark.parametrize("wrong", ["attempt", "owner", "state"])
async def test_a_parts_done_mark_counts_only_for_its_own_attempt(
    source_database: str, target_database: str, wrong: str
) -> None:
    """The table began anew, and the same consumer is at the same part again: what is left of the earlier attempt must not count."""
    oid = await plan_one(source_database, target_database)
    async with session(target_database, "target") as target:
        await target.execute("update _live_migration.tables set state = 'copying', attempt = 2, owner = 'holder'")
        await target.execute(
            """insert into _live_migration.parts (oid, part, attempt, first_block, end_block, size_bytes, state, owner)
               values ($1, 0, 2, 0, null, 8192, 'copying', 'me')""",
            oid,
        )
        stands = await target.fetchrow("select * from _live_migration.parts")

        def claim(attempt: int) -> PartClaim:
            return PartClaim(
                oid, NAME, attempt, 0, BlockRange(0, None, 8192), "snapshot", CopyPlan(NAME, ("id",), True), 1, "1:1:"
            )

        if wrong == "state":
            await target.execute("update _live_migration.tables set state = 'planned'")
        with pytest.raises(Fenced):
            await finish_part(
                target, claim(1 if wrong == "attempt" else 2), "you" if wrong == "owner" else "me", CopyCount(5, 50)
            )
        assert await target.fetchrow("select * from _live_migration.parts") == stands
        if wrong != "state":
            await finish_part(target, claim(2), "me", CopyCount(5, 50))
            assert tuple(await target.fetchrow("select state, row_count from _live_migration.parts")) == ("done", 5)


@pytest.mark.parametrize(("attempt", "owner"), [(1, "me"), (2, "you")])
async def test_a_tables_done_mark_counts_only_for_its_own_attempt(
    source_database: str, target_database: str, attempt: int, owner: str
) -> None:
    oid = await plan_one(source_database, target_database)
    async with session(target_database, "target") as target:
        await target.execute("update _live_migration.tables set state = 'copying', attempt = 2, owner = 'me'")
        with pytest.raises(Fenced):
            await finish_table(
                target,
                TableClaim(oid, NAME, attempt, False),
                owner,
                CopyOrigin("1:1:", 1, 1, "[]", True),
                CopyCount(5, 50),
            )
        assert await target.fetchval("select state from _live_migration.tables") == "copying"


@pytest.mark.parametrize(("attempt", "owner"), [(1, "me"), (2, "you")])
async def test_a_table_is_emptied_only_for_its_own_attempt(
    source_database: str, target_database: str, attempt: int, owner: str
) -> None:
    oid = await plan_one(source_database, target_database)
    async with session(target_database, "target") as target:
        await target.execute("update _live_migration.tables set state = 'copying', attempt = 2, owner = 'me'")
        await target.execute(
            """insert into _live_migration.parts (oid, part, attempt, first_block, end_block, size_bytes, state)
               values ($1, 0, 2, 0, null, 8192, 'done')""",
            oid,
        )
        origin = CopyOrigin("1:1:", 1, 1, "[]", True)
        claim = TableClaim(oid, NAME, attempt, False)
        async with target.transaction():  # the one that empties the table
            with pytest.raises(Fenced):
                await share_snapshot(target, claim, owner, origin, "snapshot", [BlockRange(0, None, 8192)])
        assert await target.fetchval("select state from _live_migration.parts") == "done"


async def test_what_a_copying_transaction_sets_ends_with_it(target_database: str) -> None:
    copying = await open_session(target_database, "target")
    async with keeping_settings(copying.connection):
        await begin_on_target(copying, "t", part_copier._AWAIT_CHUNK)
        await copying.connection.execute("commit")
    await copying.connection.close()


async def test_no_trigger_of_the_target_acts_on_what_is_copied(source_database: str, target_database: str) -> None:
    for uri in (source_database, target_database):
        await run_sql(uri, "create table public.t (id int not null, v int)")
    await run_sql(source_database, "insert into public.t select i, i from generate_series(1, 20000) i")
    await run_sql(
        target_database,
        """create function public.act() returns trigger language plpgsql as $$begin new.v := -1; return new; end$$;
           create trigger act before insert on public.t for each row execute function public.act()""",
    )
    await plan(source_database, target_database)
    for part_size in (1 << 30, 64 * 1024):
        async with consumers(settings_for(source_database, target_database, part_size=part_size), 2):
            await until_ready(target_database)
        assert await contents(target_database) == await contents(source_database)
        await run_sql(target_database, "update _live_migration.tables set state = 'planned'")


@pytest.mark.parametrize("part_size", [1 << 30, 64 * 1024])
async def test_no_table_is_copied_from_a_timeline_that_the_coordinator_does_not_know(
    source_database: str, target_database: str, part_size: int
) -> None:
    """After a failover the coordinator compares what was published and copied first; and the former primary may still run."""
    await run_sql(
        source_database, "create table public.t (id int); insert into public.t select generate_series(1, 20000)"
    )
    await run_sql(target_database, "create table public.t (id int)")
    await plan(source_database, target_database)
    await run_sql(target_database, "update _live_migration.migration set source_timeline = 7")
    async with consumers(settings_for(source_database, target_database, part_size=part_size)):
        error = await until(target_database, "select error from _live_migration.tables where state = 'stopped'")
        assert "timeline 1, the migration on 7" in error
        await run_sql(target_database, "update _live_migration.migration set source_timeline = 1")
        await until_ready(target_database)
    assert await contents(target_database) == await contents(source_database)


async def test_a_part_is_not_copied_under_another_timelines_snapshot(source_database: str) -> None:
    """Two servers may each have a snapshot of the same name."""
    await run_sql(source_database, "create table public.t (id int)")
    oid = await fetch_value(source_database, "select 'public.t'::regclass::oid")
    async with session(source_database, "source") as holder, session(source_database, "source") as other:
        locked = await lock_table(holder, TableClaim(oid, NAME, 1, False), 5)
        snapshot = await holder.fetchval("select pg_export_snapshot()")

        def claim(timeline: int) -> PartClaim:
            plan = CopyPlan(NAME, ("id",), True)
            return PartClaim(oid, NAME, 1, 0, BlockRange(0, None, 8192), snapshot, plan, timeline, locked.snapshot)

        with pytest.raises(AttemptOver, match="failed over"):
            await import_snapshot(other, claim(locked.timeline + 1), 5)
        await other.execute("rollback")
        await import_snapshot(other, claim(locked.timeline), 5)


async def test_a_part_is_not_copied_under_another_snapshot_of_the_same_name(source_database: str) -> None:
    """A server that crashed counts them anew: the one that is imported may be anybody's."""
    await run_sql(source_database, "create table public.t (id int)")
    oid = await fetch_value(source_database, "select 'public.t'::regclass::oid")
    async with session(source_database, "source") as holder, session(source_database, "source") as other:
        locked = await lock_table(holder, TableClaim(oid, NAME, 1, False), 5)
        await run_sql(source_database, "insert into public.t values (1)")
        async with session(source_database, "source") as stranger:
            await stranger.execute("begin isolation level repeatable read")
            name = await stranger.fetchval("select pg_export_snapshot()")
            plan = CopyPlan(NAME, ("id",), True)
            claim = PartClaim(oid, NAME, 1, 0, BlockRange(0, None, 8192), name, plan, locked.timeline, locked.snapshot)
            with pytest.raises(AttemptOver, match="another one bears its name"):
                await import_snapshot(other, claim, 5)


async def test_parts_are_of_the_table_alone_and_cut_by_its_real_size(
    source_database: str, target_database: str
) -> None:
    """A table that nobody has analysed yet has no pages by its statistics; one that others inherit from shows their rows too."""
    for uri in (source_database, target_database):
        await run_sql(uri, "create table public.t (id int, v text); create table public.u () inherits (public.t)")
    await run_sql(
        source_database,
        """insert into public.t select i, repeat('x', 50) from generate_series(1, 9000) i;
           insert into public.u select i, repeat('y', 50) from generate_series(1, 9000) i""",
    )
    await plan(source_database, target_database)
    assert await fetch_value(source_database, "select max(relpages) from pg_class where relname in ('t', 'u')") <= 0
    async with consumers(settings_for(source_database, target_database, part_size=64 * 1024), 2):
        await until_ready(target_database)
    assert (
        await fetch_value(
            target_database, "select min(count) from (select count(*) from _live_migration.parts group by oid)"
        )
        > 5
    )
    assert await contents(target_database) == await contents(source_database)


@pytest.mark.parametrize("part_size", [1 << 30, 64 * 1024])
async def test_a_row_that_the_target_swallows_stops_the_table(
    source_database: str, target_database: str, part_size: int
) -> None:
    for uri in (source_database, target_database):
        await run_sql(uri, "create table public.t (id int not null, v text)")
    await run_sql(source_database, "insert into public.t select i, repeat('x', 50) from generate_series(1, 3000) i")
    await run_sql(
        target_database,
        """create function public.swallow() returns trigger language plpgsql as 'begin return null; end';
           create trigger swallow before insert on public.t for each row when (new.id = 2000) execute function public.swallow();
           alter table public.t enable always trigger swallow""",
    )
    await plan(source_database, target_database)
    async with consumers(settings_for(source_database, target_database, part_size=part_size)):
        error = await until(target_database, "select error from _live_migration.tables where error is not null")
        assert "rows, the target took" in error
        assert not await fetch_value(
            target_database, "select count(*) from _live_migration.tables where state = 'ready'"
        )
        await run_sql(target_database, "drop trigger swallow on public.t")
        await until_ready(target_database)
    assert await contents(target_database) == await contents(source_database)
