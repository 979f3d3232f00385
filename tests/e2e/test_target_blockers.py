"""A session on the target that holds what the cutover needs, in a migration as it runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from tests.e2e.migration import Migration
from tests.fixtures.fix_postgres import execute

pytestmark = pytest.mark.integration


async def test_the_cutover_names_who_keeps_it_waiting_on_the_target(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    await execute(
        source_database,
        "create table t (id int primary key); create table p (id int primary key, t int references t); insert into t values (1); alter table t enable row level security",
    )
    async with Migration(source_database, target_database, kafka_bootstrap, unique_name, tmp_path, consumers=1) as m:
        await m.until_phase("replay")
        reader = await asyncpg.connect(target_database, server_settings={"application_name": "nightly report"})
        await reader.execute("begin; select * from t")
        finishing = asyncio.ensure_future(m.finish())
        for words in ("transactions are open on the target", "the cutover waits on the target"):
            async with asyncio.timeout(60):
                while not any(words in line and "nightly report" in line for line in m.observer.warnings):
                    await asyncio.wait([finishing], timeout=0.05)
                    assert not finishing.done()
        await reader.close()
        await finishing
