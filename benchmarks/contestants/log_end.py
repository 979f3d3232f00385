"""How far Kafka holds the source's changes: the producer's own record of it, read as it is committed."""

from __future__ import annotations

import time
from collections.abc import Callable

from aiokafka import AIOKafkaConsumer, TopicPartition

from benchmarks.contestants.processes import NAME
from live_migration.common.control import POSITION, LogPosition


class LogEnd:
    """Follows the control topic from its end on."""

    def __init__(self, bootstrap: str) -> None:
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap,
            group_id=None,
            enable_auto_commit=False,
            isolation_level="read_committed",
            fetch_max_wait_ms=50,
        )

    async def open(self) -> None:
        partition = TopicPartition(f"{NAME}.control", 0)
        await self._consumer.start()
        self._consumer.assign([partition])
        await self._consumer.seek_to_end(partition)
        await self._consumer.position(partition)

    async def close(self) -> None:
        await self._consumer.stop()

    async def until(self, lsn: int, check: Callable[[], None]) -> float:
        """Wait until all transactions that end at or below `lsn` are in Kafka; give the time."""
        while True:
            check()
            for records in (await self._consumer.getmany(timeout_ms=100)).values():
                positions = [LogPosition.model_validate_json(each.value) for each in records if each.key == POSITION]
                if any(each.confirm_lsn >= lsn for each in positions):
                    return time.monotonic()
