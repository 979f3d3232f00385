"""Chunks that leave the source while nobody reads its WAL, with changes of theirs unread, against real servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from live_migration.producer.service import run_producer
from tests.e2e.migration import Migration, Service
from tests.fixtures.fix_postgres import execute
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

CHANGES = (
    "update metrics set temp = temp + 1 where device = 1",
    "insert into events select ts, 'late' from events where ts < '2026-01-02'",
    "delete from app.readings where sensor = 3",
)
DROPS = (
    "select drop_chunks('metrics', older_than => '2026-01-02'::timestamptz)",
    "truncate events",
    "select drop_chunks('app.readings', older_than => '2026-01-03'::timestamptz)",
    "insert into events values ('2026-01-03', 'again')",
    "insert into app.readings values ('2026-01-04 00:01', 3, 1)",
)
_IS_COPIED = "select count(*) = 0 from _live_migration.tables where state <> 'ready'"


class _Later(Service):
    """A producer whose first start comes only when it is asked for by name."""

    def start(self) -> None:
        return

    def start_now(self) -> None:
        super().start()


@pytest.fixture
async def source(source_of_either_version: str) -> str:
    await world.make(source_of_either_version)
    return source_of_either_version


async def _change_and_drop(source: str) -> dict[str, list[str]]:
    """Change rows and drop their chunks; give what the target must hold then, where drop_chunks drops nothing."""
    await execute(source, *CHANGES)
    before = {table: await world.all_rows(source, table) for table in ("metrics", "app.readings")}
    await execute(source, *DROPS)
    after = {table: await world.all_rows(source, table) for table in before}
    assert all(set(before[table]) - set(after[table]) for table in before)
    kept = {table: sorted({*before[table], *after[table]}) for table in before}
    return {**kept, **{table: await world.all_rows(source, table) for table in ("events", "plain", "devices")}}


async def test_changes_of_chunks_that_went_while_the_producer_was_away(
    source: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The next session reads changes of chunks that no catalog knows any more, in lanes of hypertables."""
    target = target_of_timescale
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(source, "insert into plain values (1000, 'read')")
        await migration.until("the stream to be read", "select count(*) = 1 from plain where id = 1000")
        await migration.producer.crash()
        expected = await _change_and_drop(source)
        migration.producer.start()
        await migration.finish()
        assert {table: await world.all_rows(target, table) for table in expected} == expected


async def test_changes_of_chunks_that_went_before_the_producer_first_came(
    source: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """The change log begins where the plan is made, not where the producer first looks at the source."""
    target = target_of_timescale
    migration = Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True)
    migration.producer = producer = _Later(run_producer, migration.settings)
    async with migration:
        await migration.until_phase("copy", timeout=240)
        await migration.until("all copied", _IS_COPIED)
        expected = await _change_and_drop(source)
        producer.start_now()
        await migration.finish()
        assert {table: await world.all_rows(target, table) for table in expected} == expected


_AGAIN = (
    *(
        f"create temp table old_{number} as select * from {table} where {column} < '2026-01-03' {but}"
        for number, (table, column, but) in enumerate(
            (
                ("events", "ts", "and kind <> 'k17'"),
                ("metrics", "time", "and device <> 4"),
                ("app.readings", "time", "and sensor <> 2"),
                ("samples", "at", "and place is distinct from 'p3'"),
            )
        )
    ),
    *(
        f"select drop_chunks('{table}', older_than => '2026-01-03'::timestamptz)"
        for table in ("events", "metrics", "app.readings", "samples")
    ),
    "insert into events select * from old_0",
    "insert into metrics select * from old_1",
    "insert into app.readings select * from old_2",
    "insert into samples select * from old_3",
)
_OF = "from _live_migration.tables where kind = 'chunk' and hypertable_oid in (select oid from _live_migration.tables where table_name = $1)"
_KNOWN = f"select count(range) {_OF}"
_COPIED = f"select count(range) > $2 and bool_and(rebuild is null) {_OF}"


async def test_rows_that_are_dropped_and_loaded_again_are_there_once(
    source: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """With a key, with REPLICA IDENTITY FULL and without any: what the target kept gives way, what was not loaded again, too. And once more."""
    target = target_of_timescale
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        for _ in range(2):
            known = {
                name: await world.value(target, _KNOWN, name) for name in ("events", "metrics", "readings", "samples")
            }
            await execute(source, *_AGAIN)
            for name, count in known.items():
                await migration.until(f"{name} copied anew", _COPIED, name, count)
        await migration.finish()
        assert await world.differences(source, target) == []
