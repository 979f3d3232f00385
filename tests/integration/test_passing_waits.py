"""Locks and open transactions of others that outlast our patience: what waited is named, and goes on by itself; no migration ends for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from live_migration.common.errors import LiveMigrationError, Retry
from live_migration.common.postgres import session
from live_migration.consumer.chunk_marks import NOT_KNOWN_YET
from live_migration.coordinator import chunk_watch, cutover, newcomers, timeline_watch
from live_migration.coordinator import prepare as prepare_module
from live_migration.coordinator.cutover import SourceBusy, cut_over
from live_migration.coordinator.entries import run_entries
from live_migration.coordinator.identity_watch import move_lost
from live_migration.coordinator.newcomers import bring_newcomers
from live_migration.coordinator.prepare import prepare, publish_tables
from live_migration.coordinator.publication_watch import publish_again
from live_migration.coordinator.schema import read_post_data, restore_schema
from live_migration.coordinator.timeline_watch import follow_timeline
from live_migration.producer.publication import (
    ALL_OPERATIONS,
    INSERT_ONLY,
    LockTimeout,
    PublishedTable,
    create_publication,
    published_tables,
)
from live_migration.producer.slot import SlotTimeout
from live_migration.producer.timeline import SourceTimeline
from tests.fixtures.change_log import wait_for
from tests.integration.test_chunk_rules import COLUMNS, SOURCE, _stand_for_a_hypertable, _unseen
from tests.integration.test_conductor import (  # noqa: F401
    Bench,
    MakeSettings,
    bench,
    fetch,
    make_settings,
    stand_in_for_consumers,
)
from tests.support.begun import begun

pytestmark = pytest.mark.integration


@asynccontextmanager
async def held(uri: str, statement: str) -> AsyncIterator[asyncpg.Connection]:
    """Hold what a statement takes in a transaction that is open until the end, or until it is ended."""
    async with session(uri, "source", application="somebody") as holder:
        await holder.execute(f"begin; {statement}")
        yield holder
        await holder.execute("rollback")


async def copied(b: Bench) -> None:
    """Come to phase copy, with every table copied."""
    await prepare(b.run)
    await restore_schema(b.run)
    await stand_in_for_consumers(b.settings)
    await run_entries(b.run, "partitioned indexes", (await read_post_data(b.run)).partitioned)


def impatient(b: Bench, seconds: float) -> None:
    b.run.settings = b.run.settings.model_copy(update={"slot_timeout": seconds, "lock_timeout": seconds})


async def test_an_open_transaction_holds_a_new_chunk_up_and_nothing_else(
    source_database: str, target_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def has_timescale(_: object) -> str:
        return "2.0"

    monkeypatch.setattr(chunk_watch, "read_version", has_timescale)
    monkeypatch.setattr(chunk_watch, "INTERVAL_SECONDS", 0.1)
    options = {"slot_timeout": 0.3}
    async with (
        session(source_database, "source") as source,
        begun(source_database, target_database, **options) as (run, observer),
    ):
        await source.execute("create table public.t0 (id integer primary key, v text);" + SOURCE)
        await create_publication(source, run.settings.publication, ALL_OPERATIONS)
        await create_publication(source, run.settings.insert_publication, INSERT_ONLY)
        root, _ = await _stand_for_a_hypertable(source, monkeypatch)
        await run.target.execute(
            """insert into _live_migration.tables (oid, schema_name, table_name, lane, publication, columns, binary_copy, state, kind,
                   root_schema, root_name)
               values ($1, 'public', 't0', 3, 'all', $2, true, 'ready', 'hypertable', 'public', 't0')""",
            root.oid, COLUMNS,
        )  # fmt: skip
        await run.target.execute("update _live_migration.migration set phase = 'replay'")
        await run.reload()
        watching = None
        try:
            async with held(source_database, "select pg_current_xact_id()"):
                watching = asyncio.ensure_future(chunk_watch.watch_chunks(run))

                async def is_said() -> bool:
                    assert not watching.done(), watching
                    return any("still open after 0.3 s" in warning for warning in observer.warnings)

                await wait_for(is_said)
                assert await _unseen(run.target) == NOT_KNOWN_YET

            async def is_told() -> bool:
                assert not watching.done(), watching
                return await _unseen(run.target) < NOT_KNOWN_YET

            await wait_for(is_told)
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.wait([watching])


@pytest.mark.parametrize("error", [SlotTimeout("open"), LockTimeout("locked")])
async def test_a_chunk_that_waits_refuses_the_cutover_and_replay_goes_on(
    error: LiveMigrationError,
    make_settings: MakeSettings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings()
    async with bench(settings) as b:
        await copied(b)
        await b.target("update _live_migration.migration set phase = 'cutover'")
        await b.run.reload()

        async def waits(*_: object) -> int:
            raise error

        monkeypatch.setattr(cutover, "follow_chunks", waits)
        with pytest.raises(SourceBusy, match=error.message):
            await cut_over(b.run)
        assert b.run.phase.value == "replay"


async def test_a_newcomer_that_somebody_locks_is_named_and_holds_up_the_cutover_alone(
    make_settings: MakeSettings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CREATE INDEX holds such a lock for as long as it runs, VACUUM another one that stands in the way, too."""
    monkeypatch.setattr(newcomers, "PATIENCE_SECONDS", 0.2)
    settings = make_settings(lock_timeout=0.1)
    async with bench(settings) as b:
        await copied(b)
        await b.source("create table public.big (id int)")
        async with b.run.source_session("test") as source:
            async with held(settings.source_uri(), "lock table public.big in share mode"):
                problems = await bring_newcomers(b.run, source)
                assert problems.keys() == {"public.big"}
                assert "no lock within 0.2 s; held by pid" in problems["public.big"]
                await b.target("update _live_migration.migration set phase = 'cutover'")
                await b.run.reload()
                with pytest.raises(SourceBusy, match=r"public\.big.*no lock within"):
                    await cut_over(b.run)
                assert b.run.phase.value == "replay"
            assert await bring_newcomers(b.run, source) == {}
            assert await b.target("select newcomer from _live_migration.tables where table_name = 'big'") == [
                ("followed",)
            ]


async def test_a_table_that_loses_its_identity_as_it_is_published_is_moved_once_its_lock_is_gone(
    make_settings: MakeSettings,  # noqa: F811
) -> None:
    settings = make_settings(lock_timeout=0.2)
    async with bench(settings) as b:
        await b.source("create table public.t (id int primary key)")
        await prepare(b.run)
        await b.source("alter table public.t drop constraint t_pkey")
        async with b.run.source_session("test") as source, session(settings.source_uri(), "source") as watcher:
            pid, waits = source.get_server_pid(), set()
            async with held(settings.source_uri(), "lock table public.t in share mode"):
                publishing = asyncio.ensure_future(publish_tables(b.run, source))

                async def has_waited_again() -> bool:
                    assert not publishing.done(), publishing
                    query = "select waitstart from pg_locks where pid = $1 and waitstart is not null"
                    waits.update(row[0] for row in await watcher.fetch(query, pid))
                    return len(waits) > 1

                await wait_for(has_waited_again)
            await publishing
            assert list((await published_tables(source, settings.insert_publication)).values())
            assert not await published_tables(source, settings.publication)


async def test_a_table_that_whoever_watches_identities_moves_as_it_is_published_is_looked_at_again(
    make_settings: MakeSettings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both find it at once; who comes second finds it in that publication no more."""
    settings = make_settings()
    look, moved = prepare_module.tables_without_identity, []

    async def look_and_be_second(connection: asyncpg.Connection, name: str, **options: bool) -> list[PublishedTable]:
        found = await look(connection, name, **options)
        if found and not moved:
            moved.extend(found)
            async with b.run.source_session("watch") as watch, b.run.target_session("watch") as target:
                await move_lost(b.run, watch, target)
        return found

    async with bench(settings) as b:
        await b.source("create table public.t (id int primary key)")
        await prepare(b.run)
        await b.source("alter table public.t drop constraint t_pkey")
        monkeypatch.setattr(prepare_module, "tables_without_identity", look_and_be_second)
        async with b.run.source_session("test") as source:
            members = await publish_tables(b.run, source)
        assert moved
        assert [str(each.name) for each in members.insert] == ["public.t"]


@pytest.mark.parametrize("what", ["select pg_current_xact_id()", "lock table public.t in share mode"])
async def test_a_table_that_is_published_again_waits_and_is_led_to_anew(
    what: str,
    make_settings: MakeSettings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mark stands in the state, and with it the copy to come, whoever else publishes the table meanwhile."""
    monkeypatch.setattr("live_migration.producer.publication._PATIENCE_SECONDS", 0.2)
    settings = make_settings()
    async with bench(settings) as b:
        await b.source("create table public.t (id int primary key)")
        await copied(b)
        await b.source(f"alter publication {settings.publication} drop table public.t")
        impatient(b, 0.3)
        async with held(settings.source_uri(), what):
            with pytest.raises(LiveMigrationError, match=r"still open after 0\.3 s|no lock within") as raised:
                await publish_again(b.run)
            assert raised.value.retry is Retry.RECONNECT
        await publish_again(b.run)
        assert await b.target("select state, is_unpublished from _live_migration.tables") == [("planned", False)]


async def test_a_failover_whose_tables_wait_to_be_published_is_followed_at_the_next_attempt(
    make_settings: MakeSettings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A table that the new primary does not publish is copied again, though the first attempt has published it by then."""
    settings = make_settings()
    async with bench(settings) as b:
        await b.source("create table public.t (id int primary key)")
        await copied(b)
        await b.source(f"alter publication {settings.publication} drop table public.t")
        impatient(b, 0.3)
        timeline = b.run.migration.source_timeline

        async def has_failed_over(_: str) -> SourceTimeline:
            return SourceTimeline(timeline + 1, {timeline: 2**62})

        monkeypatch.setattr(timeline_watch, "read_timeline", has_failed_over)
        async with held(settings.source_uri(), "select pg_current_xact_id()"):
            with pytest.raises(LiveMigrationError, match=r"still open after 0\.3 s") as raised:
                await follow_timeline(b.run)
            assert raised.value.retry is Retry.RECONNECT
        await follow_timeline(b.run)
        await publish_again(b.run)
        assert b.run.migration.source_timeline == timeline + 1
        assert await b.target("select state, is_unpublished from _live_migration.tables") == [("planned", False)]
