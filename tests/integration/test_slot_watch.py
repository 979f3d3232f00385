"""The slot is watched: warned of, dropped at our own bound, and an error that says what to do once it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.errors import Fenced, LiveMigrationError, SlotLost
from live_migration.common.local_postgres import LocalPostgres
from live_migration.common.settings import load_settings
from live_migration.coordinator import absent, slot_watch
from live_migration.coordinator.clean import clean
from live_migration.coordinator.conductor import conduct
from live_migration.coordinator.prepare import prepare
from live_migration.producer.slot import read_slot
from tests.e2e.migration import RecordingObserver
from tests.fixtures.fix_postgres import SETTINGS, database, execute
from tests.integration.test_conductor import MakeSettings, bench, make_settings  # noqa: F401

pytestmark = pytest.mark.integration

TABLES = "create schema app; create table app.big (id int primary key); create table app.small (id int primary key)"
WRITE = "select pg_logical_emit_message(false, 'test', repeat('x', {} << 20))"


class Conducted:
    """A coordinator alone: nobody reads the slot."""

    def __init__(self, source: str, target: str, kafka: str, name: str, folder: Path, **options: object) -> None:
        given = {"source": source, "target": target, "kafka": kafka, "name": name, "dir": folder, "workers": False}
        self.settings = load_settings({**given, "partitions": 2, **options})
        self.observer = RecordingObserver()
        self.task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        """Run it; give the task once it is in phase copy, and end it afterwards."""
        never = asyncio.Event()
        task = asyncio.ensure_future(
            conduct(self.settings, stop=never, ask_cutover=asyncio.Event(), observer=self.observer)
        )
        try:
            await self.until(task, lambda: bool(self.observer.phases) and self.observer.phases[-1].value == "copy")
            yield task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def until(self, task: asyncio.Task[None], is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not is_so():
                assert not task.done(), task
                await asyncio.sleep(0.05)

    def warned(self, text: str) -> list[str]:
        return [warning for warning in self.observer.warnings if text in warning]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_watch, "INTERVAL_SECONDS", 0.1)


async def test_a_slot_that_loses_its_wal_is_warned_of_and_then_names_what_to_copy_again(
    target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    small = {"max_slot_wal_keep_size": "128MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}
    async with LocalPostgres(settings=SETTINGS | small) as server, database(server) as source:
        await execute(source, TABLES)
        conducted = Conducted(source, target_database, kafka_bootstrap, unique_name, tmp_path)
        async with conducted.running() as task:
            for percent in (50, 80, 95):
                while not conducted.warned(f"over {percent} %"):
                    assert not task.done(), f"lost before the warning of {percent} %: {conducted.observer.warnings}"
                    await execute(source, WRITE.format(2 if percent < 95 else 1))
                    await asyncio.sleep(0.12)
            while not task.done():
                await execute(source, f"{WRITE.format(4)}; select pg_switch_wal(); checkpoint")
            with pytest.raises(SlotLost, match="removed WAL") as raised:
                await task
    assert "2 tables" in raised.value.message
    assert "app.big" in raised.value.message
    assert "migrate --recopy" in raised.value.hint
    assert len(conducted.warned("max_slot_wal_keep_size lets it")) == 3, conducted.observer.warnings


async def test_a_slot_above_max_slot_lag_is_dropped_before_it_fills_the_sources_disk(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await execute(source_database, TABLES)
    limit = 64 << 20
    conducted = Conducted(source_database, target_database, kafka_bootstrap, unique_name, tmp_path, max_slot_lag=limit)
    async with conducted.running() as task:
        while not task.done():
            await execute(source_database, WRITE.format(4))
            await asyncio.sleep(0.15)
        with pytest.raises(SlotLost, match="--max-slot-lag") as raised:
            await task
    assert "app.small" in raised.value.message
    assert conducted.warned("over 80 % of --max-slot-lag")
    connection = await asyncpg.connect(source_database)
    slots = await connection.fetchval("select count(*) from pg_replication_slots where slot_name = $1", unique_name)
    await connection.close()
    assert slots == 0


async def test_who_has_a_successor_drops_no_slot(make_settings: MakeSettings) -> None:  # noqa: F811
    settings = make_settings(max_slot_lag=1)
    async with bench(settings) as b:
        await prepare(b.run)
        await b.target("update _live_migration.migration set epoch = epoch + 1")
        async with b.run.source_session("test") as source:
            slot = await read_slot(source, settings.slot)
            assert slot is not None
            with pytest.raises(Fenced):
                await slot_watch._drop_above_limit(b.run, source, replace(slot, retained_bytes=2))
            assert await read_slot(source, settings.slot) is not None
    await clean(settings, prune=False, note=print)


async def test_it_is_said_when_nobody_runs_the_workers(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(absent, "INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(absent, "PATIENCE_SECONDS", 0.5)
    await execute(source_database, TABLES)
    conducted = Conducted(source_database, target_database, kafka_bootstrap, unique_name, tmp_path)
    async with conducted.running() as task:
        for kind in ("consumer", "producer"):
            await conducted.until(task, lambda kind=kind: bool(conducted.warned(f"no {kind} has run for a while")))


async def test_a_slot_is_not_needed_any_more_after_the_last_barrier(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await execute(source_database, TABLES)
    conducted = Conducted(source_database, target_database, kafka_bootstrap, unique_name, tmp_path)
    async with conducted.running() as task:
        await execute(target_database, "insert into _live_migration.steps (name, is_done) values ('barrier', true)")
        await execute(source_database, f"select pg_drop_replication_slot('{unique_name}')")
        await conducted.until(task, lambda: bool(conducted.warned("nothing is lost")))
        assert not task.done()
    with pytest.raises(LiveMigrationError, match="passed the last barrier"):
        await conduct(
            conducted.settings,
            stop=asyncio.Event(),
            ask_cutover=asyncio.Event(),
            observer=conducted.observer,
            recopy=True,
        )
