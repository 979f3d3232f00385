"""Nothing twice, nothing lost: processes killed and started again in each phase, under load; then every row compared."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import asyncpg
import pytest

from tests.e2e.processes import Cli, Migrate
from tests.support.workload import Workload, differences, read_rows

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

PHASES = ("prepare", "schema", "copy", "replay", "cutover")


async def _strike(cli: Cli, migrate: Migrate, victim: str) -> Migrate:
    """Kill (or stop) the victim and see that the work goes on; gives the `migrate` that runs then."""
    if victim == "coordinator":
        await migrate.kill()
        return await cli.migrate("--consumers", "2")
    if victim == "interrupt":
        code = await migrate.interrupt()
        assert code == 130, migrate.log()
        return await cli.migrate("--consumers", "2")
    for worker in migrate.children(victim)[:1]:
        worker.kill()
    return migrate


@pytest.mark.parametrize("victim", ["coordinator", "interrupt", "producer", "consumer"])
@pytest.mark.parametrize("seed", [1])
async def test_killed_in_every_phase(
    victim: str,
    seed: int,
    source_database: str,
    target_database: str,
    kafka_bootstrap: str,
    unique_name: str,
    tmp_path: Path,
) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    cli = Cli(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "data")
    workload = Workload(source_database, seed)
    await workload.create(rows=20_000)
    migrate = await cli.migrate("--consumers", "2")
    try:
        async with workload:
            for phase in PHASES[:-1]:
                await migrate.until_phase(phase, *PHASES[PHASES.index(phase) :])
                await asyncio.sleep(rng.random() * 0.3)  # a random moment of the phase
                migrate = await _strike(cli, migrate, victim)
            await migrate.until_phase("replay")
            await asyncio.sleep(1)  # a moment of plain replay under load
            migrate = await _strike(cli, migrate, victim)
            await migrate.until_phase("replay")
        code, _, err = await cli.run("cutover")
        assert code == 0, err
        await migrate.until_phase("cutover", "done")
        if await cli.phase() != "done":
            migrate = await _strike(cli, migrate, victim)
        assert await migrate.wait() == 0, migrate.log()
    finally:
        await migrate.close()
    found = differences(await read_rows(source_database), await read_rows(target_database))
    assert not found, f"seed {seed}: {found}"
    code, _, err = await cli.run("verify")
    assert code == 0, err


async def test_migrate_after_done_changes_nothing_and_clean_leaves_no_trace(
    source_database: str, target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    cli = Cli(source_database, target_database, kafka_bootstrap, unique_name, tmp_path / "data")
    workload = Workload(source_database, 5)
    await workload.create(rows=500)
    migrate = await cli.migrate("--cutover", "auto")
    try:
        assert await migrate.wait() == 0, migrate.log()
    finally:
        await migrate.close()
    again = await cli.migrate()
    assert await again.wait() == 0, again.log()
    assert "done" in again.log()
    code, _, err = await cli.run("clean", "--prune")
    assert code == 0, err
    await _assert_no_trace(source_database, unique_name)
    await _assert_no_trace(target_database, unique_name)
    assert not (tmp_path / "data").exists()
    assert not differences(await read_rows(source_database), await read_rows(target_database))


async def _assert_no_trace(uri: str, name: str) -> None:
    connection = await asyncpg.connect(uri)
    try:
        left = await connection.fetch(
            """select 'slot ' || slot_name from pg_replication_slots where slot_name like $1 || '%'
               union all select 'publication ' || pubname from pg_publication
               union all select 'schema ' || nspname from pg_namespace where nspname like '%live_migration%'
               union all select 'table ' || relname from pg_class where relname like '%live_migration%'
               union all select 'function ' || proname from pg_proc where proname like '%live_migration%'
               union all select 'session ' || application_name from pg_stat_activity
                         where application_name like 'live-migration%' and datname = current_database()""",
            name,
        )
        assert not left, [row[0] for row in left]
    finally:
        await connection.close()
