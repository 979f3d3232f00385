"""A consumer whose SOURCE leads elsewhere copies nothing: what another database lacks is not gone from the source."""

from __future__ import annotations

import asyncio

import pytest

from live_migration.common.errors import SourceError
from live_migration.consumer.copy_phase import run_copy_phase
from tests.support.copying import consumers, fetch_value, plan, run_sql, settings_for, until_ready

pytestmark = pytest.mark.integration


async def test_a_consumer_on_another_database_copies_nothing(source_database: str, target_database: str) -> None:
    for uri in (source_database, target_database):
        await run_sql(uri, "create table public.t (id int not null, v text); create table public.u (id int not null)")
    await run_sql(
        source_database,
        "insert into public.t select i, 'x' from generate_series(1, 100) i; insert into public.u values (1)",
    )
    await plan(source_database, target_database)
    elsewhere = source_database.rpartition("/")[0] + "/postgres"
    with pytest.raises(SourceError, match="leads to database postgres"):
        await asyncio.wait_for(
            run_copy_phase(settings_for(elsewhere, target_database), "consumer", asyncio.Event()), 60
        )
    untouched = "select count(*) = 2 from _live_migration.tables where state = 'planned' and snapshot is null"
    assert await fetch_value(target_database, untouched)
    async with consumers(settings_for(source_database, target_database), 1):
        await until_ready(target_database)
    assert await fetch_value(target_database, "select count(*) from public.t") == 100
