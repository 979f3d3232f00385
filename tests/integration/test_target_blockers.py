"""Sessions on the target that hold what the cutover needs: it waits for them, and names them."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from live_migration.common import state
from live_migration.coordinator import handover, target_blockers, waiting
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.run import target_session
from live_migration.coordinator.schema import restore_schema
from live_migration.coordinator.target_blockers import warn_of_open_transactions
from tests.integration.test_conductor import Bench, MakeSettings, bench, fetch, make_settings, stand_in_for_consumers

__all__ = ["make_settings"]

pytestmark = pytest.mark.integration

TABLES = "create table t (id int primary key); create table p (id int primary key, t int references t); alter table t enable row level security"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_blockers, "_INTERVAL_SECONDS", 0.1)


async def locked(uri: str, name: str, statement: str) -> asyncpg.Connection:
    """Open a transaction that has looked at something."""
    connection = await asyncpg.connect(uri, server_settings={"application_name": name})
    await connection.execute(f"begin; {statement}")
    return connection


async def until_warned(b: Bench, *words: str) -> str:
    async with asyncio.timeout(30):
        while True:
            for line in b.observer.warnings:
                if all(word in line for word in words):
                    return line
            await asyncio.sleep(0.02)


async def test_who_keeps_the_hand_over_waiting_is_named_until_it_goes(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), TABLES)
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await stand_in_for_consumers(b.settings)
        reader = await locked(settings.target_uri(), "nightly report", "select * from t")
        pid = reader.get_server_pid()
        async with b.run.source_session("test") as source, asyncio.TaskGroup() as group:
            work = handover.hand_over(b.run, source)
            handing = group.create_task(target_blockers.naming_blockers(b.run, "the cutover", work))
            said = await until_warned(
                b, "the cutover waits on the target", "nightly report", "its transaction began at"
            )
            assert f"select pg_terminate_backend({pid})" in said
            assert not handing.done()
            await fetch(settings.target_uri(), "select pg_terminate_backend($1)", pid)
            await handing
        assert len([line for line in b.observer.warnings if "nightly report" in line]) == 1
        reader.terminate()


async def test_who_keeps_what_follows_it_waiting_is_named(make_settings: MakeSettings) -> None:
    """Another session of ours waits, not the one that looks: it is known by its coordinator's mark."""
    settings = make_settings()
    await fetch(settings.source_uri(), "create table t (id int primary key)")
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await stand_in_for_consumers(b.settings)
        async with b.run.source_session("test") as source:
            await handover.hand_over(b.run, source)
        holder = await locked(settings.target_uri(), "migration tool", "lock table t in access exclusive mode")
        async with asyncio.TaskGroup() as group:
            finishing = group.create_task(handover.finish_after_handover(b.run))
            await until_warned(b, "what follows the hand-over waits on the target", "migration tool")
            await holder.close()
            await finishing


async def test_who_keeps_phase_copy_from_its_end_is_named(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(
        settings.source_uri(),
        "create table m (id int primary key) partition by list (id); create table m1 partition of m for values in (1)",
    )
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        await stand_in_for_consumers(b.settings)
        holder = await locked(settings.target_uri(), "curious", "select * from m")
        async with asyncio.TaskGroup() as group:
            ending = group.create_task(waiting.await_copy(b.run))
            await until_warned(b, "partitioned tables", "waits on the target", "curious")
            await holder.close()
            await ending


async def test_only_what_our_own_sessions_wait_for_is_named(make_settings: MakeSettings) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), TABLES)
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        holder = await locked(settings.target_uri(), "holder", "lock table t, p in access exclusive mode")
        other = await asyncpg.connect(settings.target_uri(), server_settings={"application_name": "another's"})
        async with target_session(settings, state.worker_id("coordinator"), "another's") as theirs:
            waiters = [asyncio.ensure_future(each.execute("select from public.t")) for each in (other, theirs)]
            blocked = "select count(*) from pg_stat_activity where cardinality(pg_blocking_pids(pid)) > 0 and datname = current_database()"
            async with asyncio.timeout(30):
                while (await b.target(blocked))[0][0] < 2:
                    await asyncio.sleep(0.02)
            ours = asyncio.Event()

            async def wait_as_well() -> None:
                for _ in range(3):  # looks that find nobody
                    async with b.run.target_session("test") as target:
                        await target.execute("select 1")
                    await asyncio.sleep(0.1)
                assert b.observer.warnings == before
                ours.set()
                async with b.run.target_session("test") as target:
                    await target.execute("select from public.p")

            before = list(b.observer.warnings)
            async with asyncio.TaskGroup() as group:
                working = group.create_task(target_blockers.naming_blockers(b.run, "our work", wait_as_well()))
                await ours.wait()
                await until_warned(b, "our work waits", "holder")
                await holder.close()
                await working
            await asyncio.gather(*waiters)
        await other.close()


async def test_transactions_that_are_open_on_the_target_are_named_before_the_barrier(
    make_settings: MakeSettings, unique_name: str
) -> None:
    settings = make_settings()
    await fetch(settings.source_uri(), TABLES)
    async with bench(settings) as b:
        await prepare(b.run)
        await restore_schema(b.run)
        idle = await locked(settings.target_uri(), "looks at nothing", "select 1")
        await warn_of_open_transactions(b.run)
        reader = await locked(settings.target_uri(), "nightly report", "select * from t")
        await warn_of_open_transactions(b.run)
        prepared = await locked(
            settings.target_uri(), "xa", f"insert into t values (1); prepare transaction '{unique_name}'"
        )
        await warn_of_open_transactions(b.run)
        await prepared.execute(f"rollback prepared '{unique_name}'")
        said = [line for line in b.observer.warnings if "transactions are open on the target" in line]
        assert "nightly report" in said[0]
        assert unique_name in said[1]
        assert len(said) == 2
        assert not any("looks at nothing" in line for line in said)
        for connection in (idle, reader, prepared):
            await connection.close()
