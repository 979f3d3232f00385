"""A source with hypertables fails over to a standby that lags: chunks that were copied beyond it are copied again, by their lanes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import Server, database, execute
from tests.fixtures.fix_timescale import TIMESCALE_SETTINGS, timescale_bin
from tests.support.failover import Failover
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_LOST = (
    "insert into metrics select t, 6, 1, 'lost' from generate_series('2026-01-02 00:05'::timestamptz, '2026-01-12', '7 hours') t",
    "delete from metrics where device = 1 and time > '2026-01-04'",
    "insert into events select t, 'lost' from generate_series('2026-01-02 00:05'::timestamptz, '2026-01-12', '7 hours') t",
    "insert into app.readings select t, 40, 1 from generate_series('2026-01-02 00:05'::timestamptz, '2026-01-12', '7 hours') t",
    "select compress_chunk(c) from show_chunks('metrics', newer_than => '2026-01-03'::timestamptz, older_than => '2026-01-04'::timestamptz) c",
)
_INSTEAD = (
    "insert into metrics select t, 7, 2, 'instead' from generate_series('2026-01-01 00:05'::timestamptz, '2026-01-14', '5 hours') t",
    "update metrics set temp = 5 where device = 2 and time > '2026-01-02 12:00'",
    "insert into events select t, 'instead' from generate_series('2026-01-01 00:05'::timestamptz, '2026-01-14', '5 hours') t",
    "insert into app.readings select t, 41, 2 from generate_series('2026-01-01 00:05'::timestamptz, '2026-01-14', '5 hours') t",
)


@pytest.mark.parametrize("flatten", [False, True])
async def test_chunks_copied_that_the_new_primary_never_had_are_copied_again(
    flatten: bool,
    timescale_target: Server,
    target_server: Server,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    """Nothing of what is lost is published: the horizons of the copies tell. Restoring mode is over, rows are routed."""
    async with (
        Failover(server_bin=timescale_bin(), base_settings=TIMESCALE_SETTINGS) as source,
        database(target_server if flatten else timescale_target) as target,
    ):
        await execute(source.primary_uri, "create extension timescaledb")
        await world.make(source.primary_uri)
        await source.start_standby()
        options = {"pause_source_jobs": True, "flatten": flatten, "partitions": 3}
        migration = Migration(source.uri, target, kafka_bootstrap, unique_name, tmp_path / "data", **options)
        migration.start_coordinator()
        migration.producer.start()
        try:
            await migration.until_phase("copy", timeout=240)
            await source.until_slot_is_there(unique_name)
            await migration.producer.crash()
            await source.until_caught_up()
            await source.link.stop()
            await execute(source.primary_uri, *_LOST)
            for consumer in migration.consumers:
                consumer.start()
            await migration.until_phase("replay", timeout=240)
            lost = "select count(*) from {} where {} = 'lost'"
            assert await world.value(target, lost.format("metrics", "note")), "nothing was copied that is lost"
            await source.promote()
            await execute(source.standby_uri, *_INSTEAD)
            migration.producer.start()
            await migration.until("timeline taken over", "select source_timeline = 2 from _live_migration.migration")
            await migration.until_phase("replay", timeout=240)
            await execute(source.standby_uri, "insert into events values ('2026-01-04', 'late')")
            await migration.finish()
        finally:
            await migration.__aexit__()
        print("\n".join(migration.observer.notes + migration.observer.warnings))
        if not flatten:
            assert await world.differences(source.standby_uri, target) == []
        for table in world.TABLES:
            assert await world.all_rows(source.standby_uri, table) == await world.all_rows(target, table) != []
        assert any("failed over" in each and "_hyper_" in each for each in migration.observer.warnings)
