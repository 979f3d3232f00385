"""Whoever takes a table out of our publications, or does away with one, loses no row: it is noticed, and copied again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.common.errors import LiveMigrationError, PublicationLost
from live_migration.common.local_postgres import LocalPostgres
from live_migration.consumer import committing
from live_migration.coordinator import cutover, publication_watch
from live_migration.coordinator.cutover import CutoverRefused
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import HAS_STANDBY, NO_STANDBY, execute
from tests.integration.test_log_lost import keep_producing
from tests.support.workload import differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SCHEMA = """
    create table t (id int primary key, v text);
    create index on t (v);
    create table keyless (line text);
    create table u (id int primary key, v text);
    insert into t select i, 'old' from generate_series(1, 1000) i;
    insert into keyless select 'old ' || i from generate_series(1, 10) i;
    insert into u select i, 'old' from generate_series(1, 1000) i;
"""
TABLES = ("public.t", "public.keyless", "public.u")
# What is not in the stream of a table that left, and then what would stop its lane without a copy.
UNSEEN = """
    insert into t values (2001, 'unseen'), (2002, 'unseen'); update t set v = 'unseen' where id % 10 = 1; delete from t where id % 10 = 2;
    insert into keyless values ('unseen'); update u set v = 'seen' where id % 10 = 3
"""
SEEN = """
    update t set v = 'seen' where id = 2001; delete from t where id = 2002; insert into t values (2, 'seen'), (3001, 'seen');
    insert into keyless values ('seen'); delete from u where id = 5
"""
LEAVES = {
    "dropped": "alter publication {0} drop table only t; alter publication {0}_insert drop table only keyless",
    "set": "alter publication {0} set table only u",
    "filtered": "alter publication {0} set table only t where (id < 0), only u",
    "columns": "alter publication {0} set table only t (id), only u",
    "moved": "alter publication {0} drop table only t; alter publication {0}_insert add table only t",
}
COPIED_AGAIN = "select min(attempt) > 1 from _live_migration.tables where table_name = 't'"


@pytest.fixture
async def migration(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> Migration:
    await execute(source_database, SCHEMA)
    return Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path, partitions=2)


async def run(migration: Migration, statements: str) -> None:
    await execute(migration.source, *statements.format(migration.settings.publication).split(";"))


async def assert_equal(migration: Migration) -> None:
    found = differences(await read_rows(migration.source, TABLES), await read_rows(migration.target, TABLES))
    assert not found, found


async def ends_with(migration: Migration, error: type[LiveMigrationError], match: str) -> LiveMigrationError:
    assert migration.coordinator is not None
    with pytest.raises(error, match=match) as raised:
        await asyncio.wait_for(migration.coordinator, 60)
    migration.coordinator = None
    return raised.value


@pytest.mark.parametrize("how", LEAVES)
async def test_a_table_that_leaves_the_publication_is_copied_again(
    how: str, migration: Migration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication_watch, "INTERVAL_SECONDS", 0.5)
    async with migration:
        await migration.until_phase("replay")
        await run(migration, f"{LEAVES[how]};{UNSEEN}")
        await migration.until("copied again", COPIED_AGAIN)
        await migration.until_phase("replay")
        await run(migration, SEEN)
        await migration.finish()
    await assert_equal(migration)
    assert any("public.t" in warning and "copied again" in warning for warning in migration.observer.warnings)


async def test_a_commit_that_is_applied_and_not_visible_yet_outlives_the_copy_that_is_made_again(
    target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a standby when its table is copied again: its lane has passed it, and the copy's snapshot would not show it."""
    monkeypatch.setattr(publication_watch, "INTERVAL_SECONDS", 0.5)
    monkeypatch.setattr(committing, "TELL_SECONDS", 0.1)
    end_work = publication_watch.end_work
    async with LocalPostgres(settings=HAS_STANDBY) as server:
        await execute(server.uri(), SCHEMA)
        migration = Migration(server.uri(), target_database, kafka_bootstrap, unique_name, tmp_path, partitions=2)
        hanging = await asyncpg.connect(server.uri())
        await hanging.execute("set synchronous_commit = on")
        inserting: list[asyncio.Future[str]] = []

        async def insert_and_end_work(*arguments: Any) -> None:
            if not inserting:
                inserting.append(asyncio.ensure_future(hanging.execute("insert into t values (5000, 'hangs')")))
                await migration.until("applied", "select exists (select from t where id = 5000)")
            await end_work(*arguments)

        monkeypatch.setattr(publication_watch, "end_work", insert_and_end_work)
        async with migration:
            await migration.until_phase("replay")
            await run(migration, f"{LEAVES['dropped']};{UNSEEN}")
            waits = "exists (select from _live_migration.events where message like 'the copy of%about to end%')"
            is_made = (
                "select state in ('copied', 'ready') and attempt > 1 from _live_migration.tables where table_name = 't'"
            )
            await migration.until("it waits, or is made", f"select {waits} or ({is_made})")
            await execute(server.uri(), *NO_STANDBY)
            await inserting[0]
            await migration.until("copied again", COPIED_AGAIN)
            await migration.until_phase("replay")
            await migration.finish()
        await assert_equal(migration)
        await hanging.close()


async def test_one_that_left_while_no_coordinator_ran_is_copied_again(
    migration: Migration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a coordinator that is broken off, too, when the table is published and not copied yet: then it looks as if it had never left."""
    end_work = publication_watch.end_work

    async def break_off(*_: Any) -> None:
        raise LiveMigrationError("broken off")

    async with migration:
        await migration.until_phase("replay")
        await migration.stop()
        await run(migration, f"{LEAVES['dropped']};{UNSEEN}")
        monkeypatch.setattr(publication_watch, "end_work", break_off)
        migration.start_coordinator()
        await ends_with(migration, LiveMigrationError, "broken off")
        is_published = (
            "select count(*) = 3 from pg_publication_tables where pubname in ($1::text, $1::text || '_insert')"
        )
        await migration.until("published", is_published, migration.settings.publication, where="source")
        monkeypatch.setattr(publication_watch, "end_work", end_work)
        migration.start_coordinator()
        await migration.until("copied again", COPIED_AGAIN)
        await migration.until_phase("replay")
        await run(migration, SEEN)
        await migration.finish()
    await assert_equal(migration)


async def test_one_that_leaves_during_the_cutover_is_found_behind_the_last_barrier(
    migration: Migration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it loses there is in no stream: both barriers pass, and no lane moves between them."""
    monkeypatch.setattr(publication_watch, "INTERVAL_SECONDS", 3600)
    emit_barrier = cutover.emit_barrier

    async def leave_first(*arguments: Any) -> Any:
        monkeypatch.setattr(cutover, "emit_barrier", emit_barrier)
        await run(migration, f"{LEAVES['dropped']};insert into t values (2001, 'unseen')")
        return await emit_barrier(*arguments)

    monkeypatch.setattr(cutover, "emit_barrier", leave_first)
    async with migration:
        await migration.until_phase("replay")
        migration.ask_cutover.set()
        refused = await ends_with(migration, CutoverRefused, r"public\.t is not published any more")
        assert "public.keyless" in refused.message
        migration.start_coordinator()
        await migration.until("copied again", COPIED_AGAIN)
        await migration.finish()
    await assert_equal(migration)


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        ("drop publication {}", "does not exist"),
        ("drop publication {}_insert", "_insert does not exist"),
        ("alter publication {} set (publish = 'insert')", "other operations"),
        ("alter publication {}_insert set (publish = 'truncate')", "_insert was altered"),
    ],
)
async def test_a_publication_that_is_gone_or_altered_is_a_loss(
    statement: str, match: str, migration: Migration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the watch and at the start; a walsender of PostgreSQL 18 goes on without a word."""
    monkeypatch.setattr(publication_watch, "INTERVAL_SECONDS", 0.5)
    async with migration:
        await migration.until_phase("replay")
        await run(migration, f"{statement};{UNSEEN}")
        for _ in range(2):
            lost = await ends_with(migration, PublicationLost, match)
            assert "3 tables" in lost.message
            assert "migrate --recopy" in lost.hint
            migration.start_coordinator()
        await ends_with(migration, PublicationLost, match)
        await migration.producer.crash()
        migration.producer.task = None
        producing = asyncio.ensure_future(keep_producing(migration))
        migration.start_coordinator(recopy=True)
        await migration.until("copied again", COPIED_AGAIN)
        await migration.until_phase("replay")
        await run(migration, SEEN)
        await migration.finish()
        producing.cancel()
        await asyncio.wait([producing])
    await assert_equal(migration)


async def test_a_publication_that_goes_during_the_cutover_is_found_behind_the_last_barrier(
    migration: Migration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication_watch, "INTERVAL_SECONDS", 3600)
    emit_barrier = cutover.emit_barrier

    async def drop_first(*arguments: Any) -> Any:
        monkeypatch.setattr(cutover, "emit_barrier", emit_barrier)
        await run(migration, "alter publication {} set (publish = 'insert');update t set v = 'unseen'")
        return await emit_barrier(*arguments)

    monkeypatch.setattr(cutover, "emit_barrier", drop_first)
    async with migration:
        await migration.until_phase("replay")
        migration.ask_cutover.set()
        await ends_with(migration, PublicationLost, "other operations")
        await migration.until("back in replay", "select phase = 'replay' from _live_migration.migration")
