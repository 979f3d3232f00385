"""A migration that has begun and done nothing yet, held by a coordinator of the test's."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

from live_migration.common import state
from live_migration.common.postgres import session
from live_migration.common.settings import Settings, load_settings
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.run import Run
from live_migration.producer.slot import identify_system
from tests.e2e.migration import RecordingObserver


async def begin_state(settings: Settings) -> None:
    """Write the state that a migration begins with, without checking anything."""
    identity = await identify_system(settings.source_uri())
    async with session(settings.target_uri(), "target") as target, target.transaction():
        await state.create_schema(target)
        await target.execute(
            """insert into _live_migration.migration (id, name, phase, settings, kafka, source_address, source_system,
                   source_timeline, source_database, source_version, topic_id, lane_count)
               values ($1, $2, 'prepare', '{}', '', 'here', $3, $4, $5, 180000, $1, 8)""",
            uuid4(), settings.name, identity.system_identifier, identity.timeline, identity.database,
        )  # fmt: skip


@asynccontextmanager
async def begun(source: str, target: str, **options: object) -> AsyncIterator[tuple[Run, RecordingObserver]]:
    """Begin a migration and be its coordinator; what it says is recorded."""
    settings = load_settings({"source": source, "target": target, "name": f"lm_{secrets.token_hex(4)}", **options})
    await begin_state(settings)
    observer = RecordingObserver()
    async with session(target, "target") as keeper, session(target, "target") as connection:
        epoch = await state.acquire_coordinator_lease(keeper, "test", 60)
        yield Run(settings, Reporter(observer), connection, epoch, await state.require_migration(connection)), observer
        await state.release_coordinator_lease(keeper, epoch)
