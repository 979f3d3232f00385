"""Kafka's answer to the end of a transaction comes before every partition shows it: what is read meanwhile is no loss."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from live_migration.common.control import POSITION, LogPosition
from live_migration.common.kafka import ControlReader
from live_migration.common.kafka_clients import client_options
from live_migration.coordinator.losses import find_loss
from live_migration.coordinator.prepare import prepare
from tests.integration.test_conductor import MakeSettings, bench, make_settings  # noqa: F401

pytestmark = pytest.mark.integration


async def test_a_slot_that_is_ahead_of_a_position_whose_transaction_is_about_to_end_is_whole(
    make_settings: MakeSettings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings()
    has_read = asyncio.Event()
    read = ControlReader.read

    async def noting(reader: ControlReader) -> dict[bytes, bytes]:
        found = await read(reader)
        has_read.set()
        return found

    async with bench(settings) as b:
        await prepare(b.run)
        await b.source("select pg_logical_emit_message(true, 'test', 'behind the beginning of the log')")
        ((lsn,),) = await b.source(
            "select end_lsn - '0/0' from pg_replication_slot_advance($1, pg_current_wal_flush_lsn())", settings.slot
        )
        migration = b.run.migration
        assert migration.start_lsn is not None
        assert lsn > migration.start_lsn
        position = LogPosition(
            confirm_lsn=int(lsn), lanes=((0, 0),) * 3, system_identifier=migration.source_system,
            timeline=migration.source_timeline, sent_at=0.0,
        )  # fmt: skip
        options: dict[str, Any] = {"transactional_id": f"{settings.name}-test", "enable_idempotence": True}
        async with AIOKafkaProducer(**client_options(settings), **options) as producer:
            await producer.begin_transaction()
            record = position.model_dump_json().encode()
            await producer.send_and_wait(settings.control_topic, key=POSITION, value=record, partition=0)
            monkeypatch.setattr(ControlReader, "read", noting)
            looking = asyncio.ensure_future(find_loss(b.run))
            await has_read.wait()
            await producer.commit_transaction()
            assert await looking is None
