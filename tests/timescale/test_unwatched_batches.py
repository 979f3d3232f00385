"""Whole compressed batches that are deleted before anybody watches the table that they lie in: nothing in the stream tells of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from live_migration.consumer import chunk_rebuild
from live_migration.coordinator import chunk_watch, cutover
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import Server, database, execute
from tests.fixtures.fix_timescale import timescale_database
from tests.timescale import world
from tests.timescale.acts import COMPRESSED, DECOMPRESSED, DELETED, compress, decompress, watched

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_DAYS = (2, 3, 9)
"""Two chunks of the plan that are not compressed, and one that is made during replay."""
_NEW_CHUNK = """
    insert into metrics select t, d, 7, 'new' from generate_series('2026-01-10'::timestamptz, '2026-01-10 20:00', '10 min') t, generate_series(1, 5) d
"""
_MORE_ROWS = """
    insert into metrics select t, 4, 8, 'more' from unnest(array['2026-01-03 12:01', '2026-01-04 12:01', '2026-01-10 12:01']::timestamptz[]) t
"""
_AGAIN = """
    insert into metrics select t, 3, 9, 'again' from generate_series('2026-01-03 05:00'::timestamptz, '2026-01-03 05:20', '10 min') t
"""
_FIRST_CHUNK = "select c::text from show_chunks('metrics', older_than => '2026-01-04'::timestamptz, newer_than => '2026-01-03'::timestamptz) c"
_DELETE = "delete from metrics where device = {}"
_RECOMPRESS = """
    select compress_chunk(c, recompress => true) from show_chunks('metrics', newer_than => '2026-01-03'::timestamptz) c
"""
_MOMENTS = {
    "decompressed": ("compress", "delete 3", "decompress"),
    "compressed again": ("compress", "delete 3", "decompress", "compress"),
    "twice": ("compress", "delete 3", "decompress", "compress", "delete 4", "decompress"),
    "recompressed": ("compress", "delete 3", "more", "compress again", "delete 4", "decompress"),
    "compressed anew": ("compress", "delete 3", "more", "compress anew", "delete 4", "decompress"),
    "another segmentby": ("compress", "delete 3", "alter", "compress anew", "decompress"),
    "emptied": ("compress", "empty", "decompress"),
}
_LOOSE = (
    "create table loose (time timestamptz not null, device int not null, temp float8)",
    "select create_hypertable('loose', 'time', chunk_time_interval => interval '1 day', create_default_indexes => false)",
    "alter table loose set (timescaledb.compress, timescaledb.compress_segmentby = 'device', timescaledb.compress_orderby = 'time')",
    "alter table loose replica identity full",
)
"""Nothing that keeps rows from being compressed as they come."""
_LOOSE_ROWS = """
    insert into loose select t, d, 7 from generate_series(1, 5) d, generate_series('2026-01-12'::timestamptz, '2026-01-12 23:00', '1 min') t
"""
_SUM = "select string_agg(x::text, ' ' order by x::text) from loose x"
_DIRECT = f"set timescaledb.enable_direct_compress_insert = on; {_LOOSE_ROWS}"
_IS_DIRECT = """
    select 'COMPRESSED' = any(_timescaledb_functions.chunk_status_text(format('%I.%I', chunk_schema, chunk_name)::regclass))
    from timescaledb_information.chunks where hypertable_name = 'loose'
"""


async def _do(connection: asyncpg.Connection, what: str) -> None:
    """Do one thing to all of the chunks, and make sure that it was done."""
    if what == "compress":
        assert [await compress(connection, "metrics", day) for day in _DAYS] == [[COMPRESSED]] * len(_DAYS)
    elif what == "decompress":
        assert [await decompress(connection, "metrics", day) for day in _DAYS] == [[DECOMPRESSED]] * len(_DAYS)
    elif what == "empty":
        for device in range(1, 6):
            assert DELETED in await watched(connection, _DELETE.format(device))
    elif what.startswith("delete"):
        assert DELETED in await watched(connection, _DELETE.format(what.split()[1]))
    elif what == "more":
        await connection.execute(_MORE_ROWS)
    elif what == "compress again":
        assert all([await compress(connection, "metrics", day) for day in _DAYS])
    elif what == "compress anew":
        await connection.execute(_RECOMPRESS)
    else:
        assert what == "alter"
        await connection.execute("alter table metrics set (timescaledb.compress_segmentby = '')")


async def _nobody_looks(*_: object, **__: object) -> int:
    return 0


async def _act(migration: Migration, moment: str, *, is_one_transaction: bool = False) -> None:
    """Let the chunks be where nothing waits to be applied, then let everything of a moment happen."""
    connection = await asyncpg.connect(migration.source)
    await connection.execute(_NEW_CHUNK)
    await migration.until("rows applied", "select count(*) = 605 from metrics where note = 'new'")
    if is_one_transaction:
        async with connection.transaction():
            for what in _MOMENTS[moment]:
                await _do(connection, what)
    else:
        for what in _MOMENTS[moment]:
            async with connection.transaction():
                await _do(connection, what)
    await connection.close()


@pytest.mark.parametrize("is_one_transaction", [False, True], ids=["each by itself", "in one transaction"])
@pytest.mark.parametrize("moment", _MOMENTS)
async def test_batches_deleted_before_their_table_is_watched(
    moment: str,
    is_one_transaction: bool,
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of it falls between two looks: what looks at the source sees at the end what it saw before."""
    source, target = timescale_source_database, target_of_timescale
    monkeypatch.setattr(chunk_watch, "follow_chunks", _nobody_looks)  # but for the one before the barriers
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await _act(migration, moment, is_one_transaction=is_one_transaction)
        await migration.finish()
        assert await world.differences(source, target) == []


@pytest.mark.parametrize("is_decompressed", [True, False])
async def test_keys_that_come_again_once_their_batches_were_deleted_unseen(
    is_decompressed: bool,
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rows that stand in their way are refused before anybody has said that the chunk is suspect: all of it is in one segment."""
    source, target = timescale_source_database, target_of_timescale
    monkeypatch.setattr(chunk_watch, "follow_chunks", _nobody_looks)
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        connection = await asyncpg.connect(source)
        async with connection.transaction():
            assert await compress(connection, "metrics", 2) == [COMPRESSED]
            assert DELETED in await watched(connection, _DELETE.format(3))
            if is_decompressed:
                assert await decompress(connection, "metrics", 2) == [DECOMPRESSED]
            await connection.execute(_AGAIN)
        await connection.close()
        await migration.until("the lane goes on", "select count(*) = 3 from metrics where note = 'again'")
        await migration.finish()
        assert await world.differences(source, target) == []


@pytest.mark.parametrize("moment", ["decompressed", "compressed anew"])
async def test_batches_deleted_while_the_producer_is_away(
    moment: str,
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tables that held the compressed rows are gone from the catalogs when it reads them in the stream."""
    source, target = timescale_source_database, target_of_timescale
    monkeypatch.setattr(chunk_watch, "follow_chunks", _nobody_looks)
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        connection = await asyncpg.connect(source)
        await connection.execute(_NEW_CHUNK)
        await migration.producer.crash()
        for what in _MOMENTS[moment]:
            await _do(connection, what)
        await connection.close()
        migration.producer.start()
        await migration.finish()
        assert await world.differences(source, target) == []


async def test_batches_deleted_of_rows_that_were_compressed_as_they_came(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No marker stands around them: the chunk is copied when they come, and what is deleted after that copy is in no stream."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    await execute(source, *_LOOSE)
    monkeypatch.setattr(chunk_watch, "follow_chunks", _nobody_looks)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        connection = await asyncpg.connect(source)
        await connection.execute(_DIRECT)
        assert await connection.fetchval(_IS_DIRECT)
        await migration.until("rows copied", "select count(*) = 5 * 1381 from loose")
        assert DELETED in await watched(connection, "delete from loose where device = 3")
        assert await decompress(connection, "loose", 11) == [DECOMPRESSED]
        await connection.close()
        await migration.finish()
        assert await world.differences(source, target, tables=("loose",)) == []


@pytest.mark.parametrize("is_superuser", [True, False])
@pytest.mark.parametrize("moment", ["compressed", "decompressed", "emptied"])
async def test_batches_deleted_behind_the_last_look(
    moment: str,
    is_superuser: bool,
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Just before the first barrier, so that it refuses no cutover: nobody looks for new tables of compressed rows any more."""
    source, target = timescale_source_database, target_of_timescale
    if not is_superuser:
        source = await world.as_owner(source, target, unique_name)
    await world.make(source)
    monkeypatch.setattr(chunk_watch, "follow_chunks", _nobody_looks)
    follow_chunks = cutover.follow_chunks
    connection = await asyncpg.connect(source)

    async def look_and_act(*arguments: Any) -> int:
        found = await follow_chunks(*arguments)
        for what in _MOMENTS.get(moment, ("compress", "delete 3")):
            await _do(connection, what)
        return found

    monkeypatch.setattr(cutover, "follow_chunks", look_and_act)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await connection.execute(_NEW_CHUNK)
        await migration.finish()
        assert await world.differences(source, target) == []
    await connection.close()


@pytest.mark.parametrize("moment", _MOMENTS)
async def test_batches_deleted_on_a_source_whose_role_is_no_superuser(
    moment: str,
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither the catalog nor a table of compressed rows is in the stream before the next look: rows that come back by decompression are.

    Where none comes back, the chunk lies in another file than before.
    """
    source, target = (
        await world.as_owner(timescale_source_database, target_of_timescale, unique_name),
        target_of_timescale,
    )
    monkeypatch.setattr(chunk_watch, "follow_chunks", _nobody_looks)
    async with world.migrating(source, target, kafka_bootstrap, unique_name, tmp_path) as migration:
        await _act(migration, moment)
        await migration.finish()
        assert await world.differences(source, target) == []


async def test_batches_deleted_on_a_source_of_another_version(
    other_timescale: Server,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a hypertable without aggregates: before these were logged without a trigger, one with them had its batches taken apart."""
    async with timescale_database(other_timescale) as source, database(other_timescale) as target:
        await execute(source, *_LOOSE, _LOOSE_ROWS)
        monkeypatch.setattr(chunk_watch, "follow_chunks", _nobody_looks)
        async with Migration(
            source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True
        ) as migration:
            await migration.until_phase("replay", timeout=240)
            connection = await asyncpg.connect(source)
            assert await compress(connection, "loose", 11) == [COMPRESSED]
            assert DELETED in await watched(connection, "delete from loose where device = 3")
            assert await decompress(connection, "loose", 11) == [DECOMPRESSED]
            await connection.close()
            await migration.finish()
            assert await world.value(source, _SUM) == await world.value(target, _SUM)


async def test_a_chunk_that_is_copied_anew_gives_way_to_whoever_waits_for_it(
    timescale_source_database: str,
    target_of_timescale: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever wants the chunk for itself waits for the copy's lock, and all readers and writers of the chunk behind it."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    stream_copy = chunk_rebuild.stream_copy
    chunk = str(await world.value(source, _FIRST_CHUNK))
    has_waited = asyncio.Event()

    async def copy_with_somebody_waiting(*arguments: Any, **options: Any) -> Any:
        if not has_waited.is_set():
            async with asyncio.timeout(60):
                await execute(source, f"begin; lock table {chunk} in access exclusive mode; commit")
            has_waited.set()
        return await stream_copy(*arguments, **options)

    monkeypatch.setattr(chunk_rebuild, "stream_copy", copy_with_somebody_waiting)
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(source, f"select compress_chunk('{chunk}')")
        async with asyncio.timeout(120):
            while not has_waited.is_set():
                migration.raise_failures()
                await asyncio.sleep(0.1)
        await migration.finish()
        assert await world.differences(source, target) == []
