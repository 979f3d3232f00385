"""A hypertable whose key has a column of a domain, on a real TimescaleDB."""

from __future__ import annotations

import asyncpg
import pytest

from tests.timescale.test_apply_hypertable import HypertablePair

pytestmark = pytest.mark.integration

SCHEMA = """
    create domain device as text not null;
    create table metrics (time timestamptz not null, device device, v int, primary key (time, device));
    insert into metrics select timestamptz '2026-03-01' + i * interval '1 hour', d::text, 0
    from generate_series(0, 95) i, generate_series(1, 3) d;
"""


async def test_rows_under_a_key_with_a_domain_are_changed_exactly(
    timescale_source_database: str, timescale_target_database: str, unique_name: str
) -> None:
    pair = HypertablePair(timescale_source_database, timescale_target_database, unique_name)
    pair.tables = ("metrics",)
    pair.source = await asyncpg.connect(timescale_source_database)
    pair.target = await asyncpg.connect(timescale_target_database)
    await pair.source.execute(SCHEMA)
    await pair.target.execute(SCHEMA)
    await pair.target.execute(
        "select create_hypertable('metrics', 'time', chunk_time_interval => interval '1 day', migrate_data => true)"
    )
    await pair.follow(pair.tables)
    await pair.source.execute(
        "update metrics set v = 1 where device = '2'; update metrics set device = '4' where device = '3'; delete from metrics where device = '1'"
    )
    await pair.replay(binary=False, most_changes=1000, segments_per_batch=1000)
    await pair.assert_tables_equal()
    await pair.close()
