"""Hypertables that are cut by the hash of a value which has an oid in it: refused, and not brought where they are made meanwhile."""

from __future__ import annotations

import secrets
from pathlib import Path

import asyncpg
import pytest

from live_migration.common.settings import load_settings
from live_migration.coordinator.cutover import CutoverRefused
from live_migration.coordinator.findings import Finding
from live_migration.coordinator.preflight import validate
from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_CUT = "select create_hypertable('{0}', 'at', '{1}', 4, chunk_time_interval => interval '1 day'{2})"
_BY_TEXT = ", partitioning_func => '_timescaledb_functions.get_partition_for_key'"
_MAKE = (
    "create type mood as enum ('sad', 'ok', 'happy', 'wild')",
    "create domain moods as mood[]",
    "create function halves(v anyelement) returns int language sql immutable as 'select 1'",
    *(
        f"create table {name} (at timestamptz not null, kind {type} not null, v int)"
        for name, type in (
            ("by_enum", "mood"),
            ("by_list", "moods"),
            ("by_label", "mood"),
            ("by_text", "text"),
            ("by_int", "int"),
            ("by_own", "int"),
        )
    ),
    *(_CUT.format(name, "kind", "") for name in ("by_enum", "by_list", "by_text", "by_int")),
    _CUT.format("by_label", "kind", _BY_TEXT),
    _CUT.format("by_own", "kind", ", partitioning_func => 'halves'"),
)


async def _found(source: str, target: str, **options: object) -> list[Finding]:
    settings = load_settings({"source": source, "target": target, "name": f"lm_{secrets.token_hex(4)}", **options})
    return [each for each in await validate(settings) if "are cut by" in each.what]


async def test_validate_refuses_hashes_with_oids_in_them(
    source_of_either_version: str, timescale_target_database: str
) -> None:
    await execute(source_of_either_version, *_MAKE)
    refused, own = await _found(source_of_either_version, timescale_target_database)
    assert refused.level == "error"
    assert refused.what.endswith(": public.by_enum (kind), public.by_list (kind)")
    assert (own.level, own.what.endswith(": public.by_own (kind): public.halves")) == ("warning", True)


async def test_hypertables_that_become_plain_tables_may_be_cut_by_any_hash(
    timescale_source_database: str, target_database: str
) -> None:
    await execute(timescale_source_database, *_MAKE)
    assert await _found(timescale_source_database, target_database, flatten=True) == []


_ROWS = """
    insert into {} select t, k, 1 from generate_series('2026-01-02'::timestamptz, '2026-01-02 23:00', '1 hour') t,
                                       unnest(enum_range(null::mood)) k
"""


async def test_one_that_is_made_meanwhile_is_named_and_refuses_the_cutover(
    timescale_source_database: str, target_of_timescale: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    """One by the labels' text comes over; its twin by their oids does once it is gone from the source."""
    source, target = timescale_source_database, target_of_timescale
    await world.make(source)
    await execute(source, _MAKE[0])
    make = "create table {} (at timestamptz not null, kind mood not null, v int, primary key (at, kind))"
    async with Migration(source, target, kafka_bootstrap, unique_name, tmp_path, pause_source_jobs=True) as migration:
        await migration.until_phase("replay", timeout=240)
        await execute(source, make.format("by_enum"), _CUT.format("by_enum", "kind", ""), _ROWS.format("by_enum"))
        await execute(
            source, make.format("by_label"), _CUT.format("by_label", "kind", _BY_TEXT), _ROWS.format("by_label")
        )
        await migration.until(
            "brought",
            "select count(*) = 1 from _live_migration.tables where newcomer = 'followed' and rebuild is null",
        )
        await execute(source, "update by_enum set v = 2")
        with pytest.raises(
            CutoverRefused,
            match="by_enum cannot be brought: hypertables are cut by the hash of a value that has an oid",
        ):
            await migration.finish()
        await execute(source, "drop table by_enum")
        migration.start_coordinator()
        await migration.finish()
        assert await world.differences(source, target, tables=(*world.TABLES, "by_label")) == []
        connection = await asyncpg.connect(target)
        try:
            count = "select count(*) from by_label where kind = '{}'"
            assert [await connection.fetchval(count.format(each)) for each in ("sad", "ok", "happy", "wild")] == [
                24
            ] * 4
            assert await connection.fetchval("select to_regclass('by_enum') is null")
        finally:
            await connection.close()
