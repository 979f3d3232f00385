"""The consent to pausing jobs, asked for on a terminal: given, withheld, and remembered when the migration goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.e2e.test_cli import on_terminal, run
from tests.timescale import world

pytestmark = [pytest.mark.e2e, pytest.mark.integration]

_SCHEDULED = "select count(*) filter (where scheduled)::int from timescaledb_information.jobs where job_id >= 1000"
_QUESTION = "Pause these jobs of TimescaleDB on the source until `live-migration clean`? [y/N]"


async def test_jobs_are_paused_with_the_users_consent_alone(
    timescale_source_database: str, target_of_timescale: str, unique_name: str, tmp_path: Path
) -> None:
    source = timescale_source_database
    await world.make(source)
    kept = {name: value for name, value in os.environ.items() if name != "KAFKA" and "LIVE_MIGRATION_" not in name}
    ours = {"LIVE_MIGRATION_NAME": unique_name, "LIVE_MIGRATION_DIR": str(tmp_path / "data"), "TERM": "xterm"}
    environment = {**kept, **ours, "SOURCE": source, "TARGET": target_of_timescale, "COLUMNS": "200"}

    async with on_terminal(environment, "migrate") as screen:
        await screen.until(_QUESTION)
        assert "moves data: Retention Policy [1002] of public.events" in screen.shown
        screen.type("\n")
        assert await asyncio.wait_for(screen.process.wait(), 120) == 1, screen.shown
        assert "--pause-source-jobs" in screen.shown
    assert await world.value(source, _SCHEDULED) == 3
    assert (
        await world.value(source, "select count(*)::int from pg_replication_slots where slot_name = $1", unique_name)
        == 0
    )

    async with on_terminal(environment, "migrate") as screen:
        await screen.until(_QUESTION)
        screen.type("y\n")
        await screen.until("phase replay")
        assert await world.value(source, _SCHEDULED) == 0
        screen.process.send_signal(signal.SIGINT)
        await asyncio.wait_for(screen.process.wait(), 120)

    async with on_terminal(environment, "migrate") as screen:  # goes on, and asks for nothing
        await screen.until("Target has caught up with source")
        assert _QUESTION not in screen.shown
        screen.process.send_signal(signal.SIGINT)
        await asyncio.wait_for(screen.process.wait(), 120)

    code, _, said = await run(environment, "clean", "--prune")
    assert code == 0, said
    assert await world.value(source, _SCHEDULED) == 3
