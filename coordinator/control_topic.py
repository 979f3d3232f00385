"""What the coordinator writes into the control topic: the producer's configuration, and where the chunks belong that it may find gone."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from live_migration.common.control import CONFIG, Homes, ProducerConfig, pack_homes
from live_migration.common.errors import LiveMigrationError
from live_migration.common.kafka import admin, sending, topic_exists
from live_migration.common.postgres import asking
from live_migration.common.settings import Settings
from live_migration.common.state import Migration, require_migration
from live_migration.coordinator.steps import require_role


def producer_config(settings: Settings, migration: Migration) -> ProducerConfig:
    """Give what the producer must know of a prepared migration."""
    if migration.start_lsn is None or migration.binary_stream is None:
        raise LiveMigrationError("the migration is not prepared")
    return ProducerConfig(
        migration_id=str(migration.id),
        topic_id=str(migration.topic_id),
        slot=settings.slot,
        publications=(settings.publication, settings.insert_publication),
        binary=migration.binary_stream,
        lane_count=migration.lane_count,
        split=tuple((name.schema, name.name, count) for name, count in migration.lane_map.split),
        system_identifier=migration.source_system,
        timeline=migration.source_timeline,
        start_lsn=migration.start_lsn,
        publication_change=migration.publication_change,
    )


async def write_config(settings: Settings, config: ProducerConfig) -> None:
    """Put the configuration into the control topic; it is there when this returns."""
    await write_records(settings, [(CONFIG, config.model_dump_json().encode())])


async def write_homes(settings: Settings, homes: Homes) -> None:
    """Put what chunks the source has into the control topic, before any producer reads it; it is there when this returns."""
    await write_records(settings, pack_homes(homes))


async def write_records(settings: Settings, records: Sequence[tuple[bytes, bytes]]) -> None:
    """Put records, key and value, into the control topic; they are there when this returns."""
    async with sending(settings, settings.control_topic) as producer:
        for key, value in records:
            await producer.send_and_wait(settings.control_topic, key=key, value=value, partition=0)


async def announce_end(settings: Settings, migration: Migration) -> None:
    """Tell the producer that its migration is taken away, unless it has never been told of it.

    Whoever resumes the migration after all writes the configuration anew.
    """
    if migration.start_lsn is None or migration.binary_stream is None:
        return
    async with admin(settings) as client:
        if not await topic_exists(client, settings.control_topic):
            return
    await write_config(settings, producer_config(settings, migration).model_copy(update={"is_ended": True}))


async def announce_publication_change(settings: Settings, target: asyncpg.Connection, epoch: int) -> int:
    """Make the producer reconnect its walsender after a publication was changed; give the change's number."""
    with asking("target", "recording a change of the publications"):
        async with target.transaction():
            await require_role(target, epoch)
            change: int = await target.fetchval(
                """update _live_migration.migration set publication_change = publication_change + 1
                   returning publication_change"""
            )
        migration = await require_migration(target)  # another timeline may have been taken over meanwhile
    await write_config(settings, producer_config(settings, migration))
    return change
