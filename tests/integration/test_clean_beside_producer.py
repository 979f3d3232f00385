"""`clean` beside a producer that is a command of its own: it ends, and calls nothing lost that was taken away on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from live_migration.common.errors import LogGap, SlotLost
from live_migration.common.kafka import delete_topics
from live_migration.common.postgres import session
from live_migration.common.settings import Settings
from live_migration.common.state import require_migration
from live_migration.coordinator.clean import clean
from live_migration.coordinator.control_topic import announce_end
from live_migration.producer import slot
from live_migration.producer.publisher import Publisher
from live_migration.producer.service import run_producer
from tests.e2e.migration import Migration
from tests.fixtures.change_log import (
    active_walsender,
    prepare,
    run_sql,
    running_producer,
    source_lsn,
    wait_for,
    wait_until_published,
    write_config,
)
from tests.fixtures.fix_postgres import execute
from tests.integration.test_producer import NAMES, TABLES, make_settings
from tests.support.workload import differences, read_rows

pytestmark = pytest.mark.integration

ENDED = "the migration was ended by `live-migration clean`: nothing is left to do"


@pytest.fixture(autouse=True)
def every_level() -> None:
    """Whoever ran before in this process may have set a level, which hides lines from `capture_logs`."""
    structlog.reset_defaults()


@pytest.fixture
async def settings(source_database: str, kafka_bootstrap: str, unique_name: str) -> Settings:
    given = make_settings(source_database, kafka_bootstrap, unique_name)
    await run_sql(given, TABLES)
    return given


class Deafness:
    """Once it has begun, producers take nothing in from Kafka while they work, and tell it nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._is_wanted = False
        self._has_begun = asyncio.Event()
        self._watch, self._publish = Publisher.watch, Publisher.publish
        monkeypatch.setattr(Publisher, "watch", lambda *given: self._watch_unless_deaf(*given))
        monkeypatch.setattr(Publisher, "publish", lambda *given: self._publish_unless_deaf(*given))

    async def begin(self) -> None:
        """Return once a producer hears nothing any more: it may have been listening."""
        self._is_wanted = True
        await asyncio.wait_for(self._has_begun.wait(), 30)

    async def _watch_unless_deaf(self, publisher: Publisher) -> None:
        if not self._is_wanted:
            await self._watch(publisher)
            return
        self._has_begun.set()
        await asyncio.sleep(0.1)

    async def _publish_unless_deaf(self, publisher: Publisher, *what: Any) -> None:
        if not self._is_wanted:
            await self._publish(publisher, *what)


@pytest.fixture
def deafness(monkeypatch: pytest.MonkeyPatch) -> Deafness:
    return Deafness(monkeypatch)


async def end_walsender(settings: Settings) -> None:
    query = "select pg_terminate_backend(active_pid, 5000) from pg_replication_slots where slot_name = '{}'"
    await run_sql(settings, query.format(settings.slot))


async def drop_slot(settings: Settings) -> None:
    """Drop the slot, its reader ended first."""
    async with session(settings.source_uri(), "source") as connection:
        await slot.drop_slot(connection, settings.slot)


def is_told(logs: Sequence[Mapping[str, Any]], what: str) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return any(each["event"].startswith(what) for each in logs)

    return look


async def until_streaming(settings: Settings) -> None:
    async with session(settings.source_uri(), "source") as connection:
        await wait_for(lambda: active_walsender(connection, settings.slot))


async def until_over(task: asyncio.Task[None] | None) -> None:
    assert task is not None
    await asyncio.wait_for(task, 60)


async def test_a_producer_ends_when_its_migration_is_cleaned_and_works_for_the_next_one_of_the_name(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await execute(source_database, "create table t (id int primary key); insert into t select generate_series(1, 100)")
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path, partitions=2)
    async with migration:
        for turn in range(2):
            await migration.until_phase("replay")
            await execute(source_database, f"insert into t values ({1000 + turn})")
            await migration.until("applied", f"select exists (select from t where id = {1000 + turn})")
            for consumer in migration.consumers:
                await consumer.drain()
            await migration.stop()
            with capture_logs() as logs:
                await clean(migration.settings, prune=False, note=print)
                await until_over(migration.producer.task)
            assert ENDED in [each["event"] for each in logs]
            await execute(target_database, "drop table t")
            migration.producer.start()
            for consumer in migration.consumers:
                consumer.start()
            migration.start_coordinator()
        await migration.until_phase("replay")
        await migration.finish()
    found = differences(*[await read_rows(uri, ("public.t",)) for uri in (source_database, target_database)])
    assert not found, found


async def test_a_migration_that_goes_on_after_a_clean_that_failed_loses_its_slot_as_any_other(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await execute(source_database, "create table t (id int primary key)")
    migration = Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path, partitions=2)
    async with migration:
        await migration.until_phase("replay")
        await until_streaming(migration.settings)
        await migration.stop()
        async with session(target_database, "target") as target:
            await announce_end(migration.settings, await require_migration(target))
        await until_over(migration.producer.task)
        migration.producer.start()  # before anybody says that the migration goes on
        migration.start_coordinator()
        await execute(source_database, "insert into t values (1)")
        await migration.until("applied", "select count(*) = 1 from t")
        await drop_slot(migration.settings)
        with pytest.raises(SlotLost, match="does not exist"):
            await until_over(migration.producer.task)
        migration.producer.task = None


@pytest.mark.parametrize("is_ended", [True, False])
async def test_who_misses_the_slot_reads_the_control_topic_to_its_end_before_it_calls_that_a_loss(
    settings: Settings, is_ended: bool, deafness: Deafness
) -> None:
    config = await prepare(settings, NAMES)
    task = asyncio.create_task(run_producer(settings, asyncio.Event()))
    await until_streaming(settings)
    await deafness.begin()
    await write_config(settings, config.model_copy(update={"is_ended": is_ended, "publication_change": 1}))
    await drop_slot(settings)
    if is_ended:
        await until_over(task)
    else:
        with pytest.raises(SlotLost, match="does not exist"):
            await until_over(task)


async def test_who_begins_when_the_migration_is_ended_waits_for_the_next_word(settings: Settings) -> None:
    config = await prepare(settings, NAMES)
    await write_config(settings, config.model_copy(update={"is_ended": True}))
    with capture_logs() as logs:
        async with running_producer(settings):
            await wait_for(is_told(logs, "waiting for the coordinator's configuration"))
            await write_config(settings, config.model_copy(update={"publication_change": 1}))
            await run_sql(settings, f"insert into {NAMES[0]} values (1, 'row')")
            await wait_until_published(settings, await source_lsn(settings))


async def test_who_waits_for_the_next_word_waits_for_the_next_topics_when_these_go(settings: Settings) -> None:
    config = await prepare(settings, NAMES)
    await write_config(settings, config.model_copy(update={"is_ended": True}))
    with capture_logs() as logs:
        async with running_producer(settings):
            await wait_for(is_told(logs, "waiting for the coordinator's configuration"))
            await delete_topics(settings, with_letters=True)
            await wait_for(is_told(logs, "waiting for the coordinator to make the topics"))


@pytest.mark.parametrize("remains", ["publications", "slot", "nothing"])
async def test_topics_that_are_gone_are_a_loss_unless_slot_and_publications_are_gone_too(
    settings: Settings, remains: str, deafness: Deafness
) -> None:
    """A producer that slept through `clean`, or through the preparing of a recopy, finds nothing; it waits for topics, as at first."""
    config = await prepare(settings, NAMES)
    stop = asyncio.Event()
    with capture_logs() as logs:
        task = asyncio.create_task(run_producer(settings, stop))
        await until_streaming(settings)
        await deafness.begin()
        await delete_topics(settings, with_letters=True)
        if remains != "publications":
            await run_sql(settings, *(f"drop publication {name}" for name in config.publications))
        await (end_walsender if remains == "slot" else drop_slot)(settings)
        if remains != "nothing":
            with pytest.raises(LogGap, match="does not exist any more"):
                await until_over(task)
            return
        await wait_for(is_told(logs, "waiting for the coordinator to make the topics"))
        stop.set()
        await until_over(task)
