"""A SOURCE that leads to a standby has no slot of ours, and nothing is lost for that."""

from __future__ import annotations

from pathlib import Path

import pytest

from live_migration.common.errors import ConnectionLost, SourceError
from live_migration.common.settings import load_settings
from live_migration.coordinator.losses import find_loss
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.opening import open_migration
from live_migration.coordinator.prepare import prepare
from tests.fixtures.fix_postgres import execute
from tests.integration.test_conductor import RecordingObserver, bench
from tests.support.failover import Failover

pytestmark = pytest.mark.integration


async def test_a_standby_is_not_taken_for_a_source_that_lost_its_slot(
    target_database: str, kafka_bootstrap: str, unique_name: str, tmp_path: Path
) -> None:
    async with Failover() as server:
        await execute(server.primary_uri, "create table t (id int primary key)")
        settings = load_settings(
            {
                "source": server.primary_uri,
                "target": target_database,
                "kafka": kafka_bootstrap,
                "name": unique_name,
                "dir": tmp_path,
                "workers": False,
            }
        )
        async with bench(settings) as b:
            await prepare(b.run)
            await server.start_standby()
            standby = load_settings({**settings.model_dump(exclude={"source", "target"}), "source": server.standby_uri, "target": target_database})  # fmt: skip
            with pytest.raises(SourceError, match="is a standby"):
                await open_migration(standby, Reporter(RecordingObserver()))
            b.run.settings = standby  # as behind an address that leads there for a while
            with pytest.raises(ConnectionLost, match="is a standby"):
                await find_loss(b.run)
