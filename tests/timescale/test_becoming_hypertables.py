"""Plain tables made during replay that become hypertables on their way to the target: CREATE TABLE and create_hypertable in two transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.coordinator import newcomer_leaving, newcomers
from live_migration.coordinator.cutover import CutoverRefused
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_WORLD = (
    "create table h (time timestamptz not null, v int, primary key (time, v))",
    "select create_hypertable('h', 'time')",
    "insert into h values ('2026-01-01', 1)",
)
_TABLE = "create table late (time timestamptz not null, v int, primary key (time, v))"
_ROWS = "insert into late values ('2026-01-01', 1), ('2026-01-02', 2)"
_CONVERT = "select create_hypertable('late', 'time', chunk_time_interval => interval '1 day', migrate_data => true)"
_MORE = ("insert into late values ('2026-01-01 01:00', 3), ('2026-01-05', 4)", "delete from late where v = 1")
_FOLLOWED = """select exists (select from _live_migration.tables where table_name = 'late' and newcomer = 'followed' and rebuild is null)"""
_CHUNKS = "select count(*) from timescaledb_information.chunks where hypertable_name = 'late'"

Publish = Callable[..., Awaitable[None]]


@pytest.fixture(params=["superuser", "owner"])
async def source(
    request: pytest.FixtureRequest, timescale_source_database: str, target_of_timescale: str, unique_name: str
) -> str:
    """A source whose role sees new chunks in the stream at once, then one whose role must look for them."""
    uri = timescale_source_database
    if request.param == "owner":
        uri = await world.as_owner(uri, target_of_timescale, f"{unique_name}_owner")
    await execute(uri, *_WORLD)
    return uri


async def _is_whole(migration: Migration) -> None:
    source, target = migration.source, migration.target
    await migration.until("followed", _FOLLOWED)
    await execute(source, *_MORE)
    await migration.finish()
    assert await world.all_rows(target, "late") == await world.all_rows(source, "late")
    assert await world.value(source, "select count(*) from late") == 3
    assert await world.value(target, _CHUNKS) == await world.value(source, _CHUNKS) == 3


async def test_a_table_that_was_seen_before_it_became_a_hypertable(
    source: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TimescaleDB would refuse create_hypertable for a table in a publication: no statement of the source's own may fail."""
    bring, looked = newcomers.bring_newcomers, asyncio.Event()
    made = False

    async def noting(*arguments: Any, **options: Any) -> dict[str, str]:
        is_there = made
        problems = await bring(*arguments, **options)
        if is_there:
            looked.set()
        return problems

    async with Migration(
        source, target_of_timescale, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
    ) as migration:
        await migration.until_phase("replay", timeout=240)
        monkeypatch.setattr(newcomers, "bring_newcomers", noting)
        await execute(source, _TABLE, _ROWS)
        made = True
        await asyncio.wait_for(looked.wait(), 60)
        await execute(source, _CONVERT)
        await _is_whole(migration)


def _converting(source: str) -> Publish:
    publish, done = newcomers._publish, []

    async def convert_and_publish(run: Any, connection: Any, target: Any, tables: Any, oids: Any) -> None:
        if not done:
            done.append(True)
            await execute(source, _CONVERT)
            tables = await run.list_tables(connection)
        await publish(run, connection, target, tables, oids)

    return convert_and_publish


async def test_a_table_that_becomes_a_hypertable_between_being_made_and_published(
    source: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Migration(
        source, target_of_timescale, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
    ) as migration:
        await migration.until_phase("replay", timeout=240)
        monkeypatch.setattr(newcomers, "_publish", _converting(source))
        await execute(source, f"{_TABLE}; {_ROWS}")
        await _is_whole(migration)


async def test_a_table_that_becomes_a_hypertable_between_being_found_and_made(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the cutover, where none is waited for: it is brought by the same look."""
    source, make, done = timescale_source_database, newcomers._make, []

    async def convert_and_make(*arguments: Any) -> dict[str, str]:
        if not done:
            done.append(True)
            await execute(source, _CONVERT)
        return await make(*arguments)

    await execute(source, *_WORLD)
    async with Migration(
        source, target_of_timescale, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
    ) as migration:
        await migration.until_phase("replay", timeout=240)
        monkeypatch.setattr(newcomers, "_make", convert_and_make)
        await execute(source, f"{_TABLE}; {_ROWS}")
        await migration.finish()
        assert done
        assert await world.all_rows(target_of_timescale, "late") == await world.all_rows(source, "late")
        assert await world.value(target_of_timescale, _CHUNKS) == 2


async def test_a_table_whose_kind_is_not_the_plans_refuses_the_cutover(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """Should it ever come to that: of what was taken out of the publication and altered, and published again, nobody knows the rest."""
    source = timescale_source_database
    await execute(source, *_WORLD, _TABLE, _ROWS)
    async with Migration(
        source, target_of_timescale, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
    ) as migration:
        await migration.until_phase("replay", timeout=240)
        publication = migration.settings.publication
        await execute(
            source,
            f"begin; alter publication {publication} drop table only late; {_CONVERT}; alter publication {publication} add table only late; commit",
        )
        with pytest.raises(CutoverRefused, match=r"another kind of table.*late, now a hypertable"):
            await migration.finish()


async def test_a_coordinator_that_dies_while_it_unmakes_what_became_a_hypertable(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything, when it has left the publications, before the target's transaction commits, and behind it."""
    source = timescale_source_database
    await execute(source, *_WORLD)
    reached = asyncio.Event()
    left = ["first", "unpublished", "dropped", "last"]

    async def die_at(moment: str) -> None:
        if left[:1] == [moment]:
            left.pop(0)
            reached.set()
            await asyncio.Event().wait()

    unmake, drop = newcomers.unmake, newcomer_leaving._drop

    async def dying_unmake(*arguments: Any, **options: Any) -> None:
        await die_at("first")
        await unmake(*arguments, **options)
        await die_at("last")

    async def dying_drop(target: asyncpg.Connection, oid: int, condition: str = "") -> None:
        await die_at("unpublished")
        await drop(target, oid, condition)
        await die_at("dropped")

    async with Migration(
        source, target_of_timescale, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
    ) as migration:
        await migration.until_phase("replay", timeout=240)
        monkeypatch.setattr(newcomers, "_publish", _converting(source))
        monkeypatch.setattr(newcomers, "unmake", dying_unmake)
        monkeypatch.setattr(newcomer_leaving, "_drop", dying_drop)
        await execute(source, f"{_TABLE}; {_ROWS}")
        while left:
            await asyncio.wait_for(reached.wait(), 90)
            reached.clear()
            assert migration.coordinator is not None
            migration.coordinator.cancel()
            with suppress(asyncio.CancelledError):
                await migration.coordinator
            await execute(source, f"insert into late values ('2026-01-02 0{len(left)}:00', 9)")
            migration.start_coordinator()
        await migration.until("followed", _FOLLOWED)
        await migration.finish()
        assert await world.all_rows(target_of_timescale, "late") == await world.all_rows(source, "late")
        assert await world.value(source, "select count(*) from late") == 6
