"""Whether the change log still ends where the control topic says: a topic made again, a tail that the broker lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from aiokafka import TopicPartition
from aiokafka import errors as kafka_errors

from live_migration.common.control import LogPosition
from live_migration.common.errors import LogGap
from live_migration.common.kafka import translate
from live_migration.common.kafka_clients import LogConsumer, log_consumer
from live_migration.common.segment import START, Position, SegmentHeader, decode_header
from live_migration.common.settings import Settings

_FIRST_STEP = 4
"""Offsets looked back at first. The end of each transaction takes one, and a segment stands before it."""
_READ_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class LaneTail:
    """The end of one partition as a reader of committed records sees it. `last`: header of its last record, if it holds any."""

    lane: int
    first_offset: int
    end_offset: int
    last: SegmentHeader | None

    @property
    def position(self) -> Position:
        """Last position in the partition."""
        return self.last.last if self.last else START


async def read_tails(settings: Settings, lane_count: int) -> list[LaneTail]:
    """Read the last committed record of each partition of the change topic, which must exist.

    Raises:
        ConnectionLost | KafkaError: the broker cannot be asked.
        FormatError: a record is none of ours.
    """
    partitions = [TopicPartition(settings.changes_topic, lane) for lane in range(lane_count)]
    consumer = log_consumer(settings)
    try:
        async with asyncio.timeout(_READ_SECONDS):
            await consumer.start()
            consumer.assign(partitions)
            for partition in partitions:
                consumer.seek(partition, 0)  # one without a position would look for a committed one
            consumer.pause(*partitions)
            firsts, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
            tails = []
            for partition in partitions:
                last = await _read_last(consumer, partition, firsts[partition], ends[partition])
                tails.append(LaneTail(partition.partition, firsts[partition], ends[partition], last))
            return tails
    except kafka_errors.KafkaError as error:
        raise translate(error, f"reading the end of {settings.changes_topic}") from error
    except TimeoutError as error:
        timeout = kafka_errors.KafkaTimeoutError(f"nothing within {_READ_SECONDS:.0f} s")
        raise translate(timeout, f"reading the end of {settings.changes_topic}") from error
    finally:
        await consumer.stop()


async def _read_last(consumer: LogConsumer, partition: TopicPartition, first: int, end: int) -> SegmentHeader | None:
    """Read from further and further back until there is a record: what ends transactions, and what was aborted, takes offsets."""
    step, begin = _FIRST_STEP, end
    consumer.resume(partition)
    while begin > first:
        begin = max(first, end - step)
        consumer.seek(partition, begin)
        last: bytes | None = None
        while await consumer.position(partition) < end:
            for record in (await consumer.getmany(partition, timeout_ms=500)).get(partition, []):
                last = record.value
        if last is not None:
            consumer.pause(partition)
            return decode_header(last)
        step *= 8
    consumer.pause(partition)
    return None


def check_tails(
    topic: str, tails: Sequence[LaneTail], topic_id: UUID, position: LogPosition | None, *, may_be_ahead: bool = False
) -> None:
    """Compare each lane's end with the control topic's record of it. `may_be_ahead`: a producer may have gone on since.

    An empty partition whose first offset was moved is one whose segments were deleted once they had been applied.

    Raises:
        LogGap: the log lacks what was published, or is another incarnation of it.
    """
    recorded = [Position(*lane) for lane in position.lanes] if position else [START] * len(tails)
    for tail, published in zip(tails, recorded, strict=True):
        where = f"{topic}-{tail.lane}"
        if tail.last is not None and tail.last.topic_id != topic_id.bytes:
            raise LogGap(
                f"{where}: the topic was made again: it holds segments of another incarnation of the change log"
            )
        if tail.last is None and tail.first_offset > 0:
            continue
        if tail.position < published:
            end = f"ends at {tail.position}" if tail.last else "is empty"
            raise LogGap(
                f"{where} {end} (offset {tail.end_offset}), but changes up to {published} were published: the topic was made "
                "again, or the broker has lost the log's tail"
            )
        if tail.position > published and not may_be_ahead:
            raise LogGap(
                f"{where} ends at {tail.position}, but the control topic knows of changes up to {published} only: the broker "
                "has lost the control topic's tail, or somebody else writes into the log"
            )
