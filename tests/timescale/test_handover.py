"""What follows the hand-over on hypertables, against real servers: it asks the source for nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr

from live_migration.common.errors import TargetError
from live_migration.coordinator import handover
from live_migration.coordinator.clean import clean
from live_migration.coordinator.foreign_keys import validate_foreign_keys
from tests.e2e.migration import Migration
from tests.fixtures.change_log import wait_for
from tests.fixtures.fix_postgres import execute
from tests.support.begun import begun
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

SWITCHED_OFF = "postgresql://nobody@127.0.0.1:1/none"
_CHUNK = """
    select format('%I.%I', chunk_schema, chunk_name) from timescaledb_information.chunks
    where hypertable_name = 'metrics' and is_compressed = $1 order by range_start limit 1
"""
_SCHEDULED = "select bool_and(scheduled) from timescaledb_information.jobs where job_id >= 1000"


class Died(Exception):
    """The coordinator is gone at this point."""


async def test_a_source_that_is_switched_off_after_the_hand_over_leaves_nothing_undone(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chunk was decompressed and one compressed during replay; the coordinator dies before it has done so on the target."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)

    async def die(*_: object) -> None:
        raise Died

    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        connection = await asyncpg.connect(source)
        compressed, plain = [await connection.fetchval(_CHUNK, flag) for flag in (True, False)]
        await connection.execute(f"select decompress_chunk('{compressed}')")
        await connection.execute(f"select compress_chunk('{plain}')")
        await connection.close()
        await execute(source, "update metrics set temp = 9 where time < '2026-01-01 03:00'")
        with monkeypatch.context() as death:
            death.setattr(handover, "compress_like_source", die)
            with pytest.raises(Died):
                await migration.finish()
        assert any("run `live-migration migrate` again" in each for each in migration.observer.warnings)
        assert not await world.value(target, _SCHEDULED)
        with pytest.raises(TargetError, match="jobs that are still off"):
            await clean(migration.settings, prune=False, note=lambda _: None)

        migration.settings = migration.settings.model_copy(update={"source": SecretStr(SWITCHED_OFF)})
        migration.start_coordinator()
        await migration.finish()
        assert await world.value(target, _SCHEDULED)
        assert await world.compression(target) == await world.compression(source)
        assert await world.differences(source, target) == []
        assert not [each for each in migration.observer.notes if "set as on the source now" in each], (
            "nothing was altered"
        )


_KEYED = (
    "create table alarms (device int, time timestamptz, foreign key (device, time) references metrics)",
    "insert into alarms select device, time from metrics where time < '2026-01-04' and device = 1",
    "create table unpacked (time timestamptz not null, device int references devices)",
    "select create_hypertable('unpacked', 'time', chunk_time_interval => interval '1 day')",
    "insert into unpacked select time, device from metrics where device = 1",
    "create table orphaned (time timestamptz not null, device int references devices)",
    "select create_hypertable('orphaned', 'time', chunk_time_interval => interval '1 day')",
    "set session_replication_role = replica; insert into orphaned values ('2026-01-01', 1), ('2026-01-03', 99)",
)
_REFUSES = """
    create function refuse() returns event_trigger language plpgsql as
        $$begin if to_regclass('_live_migration.migration') is not null then raise 'nobody alters tables here'; end if; end$$;
    create event trigger refuse on ddl_command_start when tag in ('ALTER TABLE') execute function refuse();
"""


async def test_foreign_keys_of_hypertables_and_to_them_hold_for_chunks(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """With compression and without, beside an event trigger that refuses ALTER TABLE on the target; one that does not hold is named."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    await execute(source, *_KEYED, _REFUSES)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await migration.finish()
        (warning,) = [each for each in migration.observer.warnings if "violate a foreign key" in each]
        assert "orphaned" in warning
        valid = "select bool_or(convalidated) from pg_constraint where contype = 'f' and conrelid in (select inhrelid from pg_inherits where inhparent = 'orphaned'::regclass union select 'orphaned'::regclass)"
        assert await world.value(target, valid) is False
        await execute(target, "drop table orphaned")
        await execute(source, "drop table orphaned")
        tables = (*world.TABLES, "alarms", "unpacked")
        assert await world.differences(source, target, tables=tables) == []
        assert (
            await world.value(target, "select evtenabled::text from pg_event_trigger where evtname = 'refuse'") == "O"
        )


_UNVALIDATED = (
    "create table devices (id int primary key)",
    "create table metrics (time timestamptz not null, device int)",
    "select create_hypertable('metrics', 'time')",
    "alter table metrics set (timescaledb.compress)",
    "insert into devices values (1)",
    "insert into metrics values ('2026-01-01', 1), ('2026-02-01', 1)",
    "alter table metrics add constraint known foreign key (device) references devices not valid",
)
_PLANNED = """
    insert into _live_migration.foreign_keys (oid, schema_name, table_name, name, statement, is_partitioned, is_valid, state)
    values (4711, 'public', 'metrics', 'known', '', false, true, 'added')
"""
_KEYS = "select array_agg(format('%s %s', conname, convalidated) order by conname) from pg_constraint where contype = 'f' and conrelid = 'metrics'::regclass"
_CHUNKS_VALID = "select bool_and(convalidated) from pg_constraint where contype = 'f' and conrelid in (select inhrelid from pg_inherits where inhparent = 'metrics'::regclass)"


@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "dies before the last step"])
async def test_readers_and_the_key_itself_are_there_while_a_key_is_made_valid(
    dies: bool, timescale_source_database: str, timescale_target_database: str
) -> None:
    """A reader's transaction stands in the way of nothing but the last, short step; a row without its counterpart is refused all along."""
    target = timescale_target_database
    await execute(target, *_UNVALIDATED)
    async with begun(timescale_source_database, target) as (run, observer):
        await run.target.execute(_PLANNED)
        reader = await asyncpg.connect(target)
        reading = reader.transaction()
        await reading.start()
        await reader.fetch("select * from metrics join devices on id = device")
        validating = asyncio.ensure_future(validate_foreign_keys(run))

        async def is_looked_through() -> bool:
            return "live_migration_valid_4711 t" in await world.value(target, _KEYS)

        await wait_for(is_looked_through)
        assert await world.value(target, _KEYS) == ["known f", "live_migration_valid_4711 t"]
        if dies:
            validating.cancel()
            await asyncio.gather(validating, return_exceptions=True)
        await reading.rollback()
        await reader.close()
        if dies:
            with pytest.raises(asyncpg.ForeignKeyViolationError):
                await execute(target, "insert into metrics values ('2026-01-01', 2)")
            await validate_foreign_keys(run)
        else:
            await validating
        assert await world.value(target, _KEYS) == ["known t"]
        assert await world.value(target, _CHUNKS_VALID)
        assert await run.target.fetchval("select state from _live_migration.foreign_keys") == "valid"
        assert not observer.warnings
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await execute(target, "insert into metrics values ('2026-01-01', 2)")
