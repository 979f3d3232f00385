"""What guards the source while the broker is away: the slot's bound, tables that lose their replica identity."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from live_migration.common.errors import KafkaAway, SlotLost
from live_migration.common.postgres import session
from live_migration.coordinator import identity_watch, slot_watch
from live_migration.coordinator.conductor import conduct
from live_migration.coordinator.identity_watch import watch_identities
from live_migration.coordinator.prepare import prepare
from live_migration.coordinator.run import Run
from live_migration.producer.publication import published_tables
from tests.fixtures.change_log import wait_for
from tests.fixtures.fix_postgres import execute
from tests.integration.test_conductor import MakeSettings, bench, make_settings  # noqa: F401
from tests.integration.test_slot_watch import TABLES, WRITE, Conducted

pytestmark = pytest.mark.integration

NOWHERE = "127.0.0.1:1"
"""An address of no broker."""


async def test_a_slot_above_max_slot_lag_is_dropped_though_the_broker_is_away(
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That is when nobody confirms the slot, and the source's disk fills."""
    monkeypatch.setattr(slot_watch, "INTERVAL_SECONDS", 0.1)
    options = {"max_slot_lag": 64 << 20}
    await execute(source_database, TABLES)
    before = Conducted(source_database, target_database, kafka_bootstrap, unique_name, tmp_path, **options)
    async with before.running():
        pass
    await execute(source_database, *[WRITE.format(4)] * 24)
    after = Conducted(source_database, target_database, NOWHERE, unique_name, tmp_path, **options)
    leading = conduct(after.settings, stop=asyncio.Event(), ask_cutover=asyncio.Event(), observer=after.observer)
    with pytest.raises(SlotLost, match="--max-slot-lag"):
        await asyncio.wait_for(leading, 60)


async def test_a_table_that_loses_its_identity_is_moved_though_the_broker_is_away(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Its writers on the source would fail until the broker is back."""
    await execute(source_database, TABLES)
    before = Conducted(source_database, target_database, kafka_bootstrap, unique_name, tmp_path)
    async with before.running():
        pass
    after = Conducted(source_database, target_database, NOWHERE, unique_name, tmp_path)
    leading = asyncio.ensure_future(
        conduct(after.settings, stop=asyncio.Event(), ask_cutover=asyncio.Event(), observer=after.observer)
    )
    try:
        await after.until(leading, lambda: bool(after.warned("trying again")))
        async with session(source_database, "source") as source:
            await source.execute("alter table app.big drop constraint big_pkey")

            async def is_moved() -> bool:
                assert not leading.done(), leading
                return bool(await published_tables(source, after.settings.insert_publication))

            await wait_for(is_moved)
            await source.execute("update app.big set id = id + 1")
    finally:
        leading.cancel()
        with suppress(asyncio.CancelledError):
            await leading


async def test_the_watch_of_identities_outlives_a_broker_that_cannot_be_told(
    make_settings: MakeSettings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(identity_watch, "_INTERVAL_SECONDS", 0.05)
    settings = make_settings()
    async with bench(settings) as b:
        await b.source("create table public.t (id int primary key); create table public.u (id int primary key)")
        await prepare(b.run)
        is_away, told = True, asyncio.Event()

        async def tell(*_: object) -> None:
            if is_away:
                raise KafkaAway("no broker")
            told.set()

        monkeypatch.setattr(Run, "publications_changed", tell)
        watching = asyncio.ensure_future(watch_identities(b.run))
        try:
            async with b.run.source_session("test") as source:
                for number, table in enumerate("tu", start=1):
                    await b.source(f"alter table public.{table} drop constraint {table}_pkey")

                    async def are_moved(number: int = number) -> bool:
                        assert not watching.done(), watching
                        return len(await published_tables(source, settings.insert_publication)) == number

                    await wait_for(are_moved)
            assert [each for each in b.observer.warnings if "cannot be told yet" in each and "no broker" in each]
            is_away = False
            await asyncio.wait_for(told.wait(), 30)
        finally:
            watching.cancel()
            await asyncio.wait([watching])
