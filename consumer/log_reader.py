"""The Kafka side of a lane: records of one partition become whole segments, proven to follow one another."""

from __future__ import annotations

from dataclasses import dataclass

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka import errors as kafka_errors

from live_migration.common.errors import RECOPY, FormatError, LogGap
from live_migration.common.kafka import translate
from live_migration.common.kafka_clients import log_consumer
from live_migration.common.segment import FRAGMENT, HEADER, Position, SegmentHeader, decode_header
from live_migration.common.settings import Settings
from live_migration.consumer.memory_budget import MemoryBudget

FETCH_BYTES = 1024 * 1024
"""What the client asks for at a time, and holds at most beside the budget; one record may be larger."""
RECORDS_AT_ONCE = 16
POLL_MS = 1000
_DELETED_HINT = (
    "Applied segments are deleted behind the checkpoints that are flushed on the target. If the target was restored or failed over, "
    f"go back to the newest state of it; else: {RECOPY} Such a target needs --keep-changes."
)


@dataclass(frozen=True, slots=True)
class Segment:
    """The whole body of a segment. `held_bytes` are taken from the budget; whoever is done with it gives them back."""

    body: bytes
    last: Position
    next_offset: int
    held_bytes: int


class SegmentChain:
    """Pure: accepts a lane's records in order, joins fragments, skips what is applied, and refuses a gap."""

    def __init__(self, topic: str, lane: int, topic_id: bytes, position: Position) -> None:
        self._place = f"{topic}-{lane}"
        self._lane = lane
        self._topic_id = topic_id
        self._position = position
        self._fragments: list[bytes] = []
        self._first: SegmentHeader | None = None

    def needed_bytes(self, record: bytes) -> int:
        """Give what to take from the budget before `accept`: a whole message at its first fragment, so that lanes
        with halves of huge messages cannot wait for one another."""
        header = decode_header(record)
        body_bytes = len(record) - HEADER.size
        if header.kind != FRAGMENT:
            return body_bytes
        return body_bytes * header.fragment_count if header.fragment_index == 0 else 0

    def accept(self, record: bytes, offset: int) -> tuple[bytes, Position] | None:
        """Give the body and last position of the segment that this record completes; None for one to skip or half a one.

        Raises:
            LogGap: the record does not follow the one before, or belongs to another topic's incarnation.
            FormatError: not a record of this lane.
        """
        where = f"{self._place}-{offset}"
        header = decode_header(record)
        self._check_origin(header, where)
        if header.kind == FRAGMENT:
            return self._accept_fragment(header, record, where)
        if self._first is not None:
            raise LogGap(f"{where}: a segment stands where fragment {len(self._fragments)} of a message must be")
        return self._advance(header, record[HEADER.size :], where)

    @property
    def is_between_segments(self) -> bool:
        return self._first is None

    def _check_origin(self, header: SegmentHeader, where: str) -> None:
        if header.topic_id != self._topic_id:
            raise LogGap(f"{where}: the segment was written for another incarnation of the topic")
        if header.lane != self._lane:
            raise FormatError(f"{where}: the segment belongs to lane {header.lane}", hint=LogGap.default_hint)

    def _accept_fragment(self, header: SegmentHeader, record: bytes, where: str) -> tuple[bytes, Position] | None:
        expected = len(self._fragments)
        if self._first is not None and (header.last, header.previous) != (self._first.last, self._first.previous):
            raise LogGap(f"{where}: a fragment of another message stands where fragment {expected} must be")
        if header.fragment_index != expected:
            raise LogGap(f"{where}: fragment {header.fragment_index} stands where fragment {expected} must be")
        if header.fragment_index >= header.fragment_count:
            raise FormatError(f"{where}: fragment {header.fragment_index} of {header.fragment_count} cannot be")
        self._first = self._first or header
        self._fragments.append(record[HEADER.size :])
        if len(self._fragments) < header.fragment_count:
            return None
        body = b"".join(self._fragments)
        self._fragments.clear()
        self._first = None
        return self._advance(header, body, where)

    def _advance(self, header: SegmentHeader, body: bytes, where: str) -> tuple[bytes, Position] | None:
        if header.last <= self._position:
            return None
        if header.previous != self._position:
            raise LogGap(
                f"{where}: the segment follows {header.previous}, but the lane stands at {self._position}: "
                "the changes between them are missing"
            )
        self._position = header.last
        return body, header.last


class LogReader:
    """Reads one lane's partition from an offset on, with a client of its own.

    A client for each lane, and not one for all: a client asks a broker for more only when every partition's records have been
    taken, so that a lane that stands still would hold up the others.
    """

    def __init__(
        self, settings: Settings, lane: int, topic_id: bytes, start: Position, start_offset: int, budget: MemoryBudget
    ) -> None:
        self._partition = TopicPartition(settings.changes_topic, lane)
        self._start_offset = start_offset
        self._chain = SegmentChain(settings.changes_topic, lane, topic_id, start)
        self._budget = budget
        self._held_for_fragments = 0
        self._client = log_consumer(settings, max_partition_fetch_bytes=FETCH_BYTES, fetch_max_bytes=FETCH_BYTES)

    async def open(self) -> None:
        """Connect. Raises ConnectionLost when no broker answers, LogGap when the log ends before the lane's checkpoint."""
        try:
            await self._client.start()
        except kafka_errors.KafkaError as error:
            raise translate(error, f"connecting to read {self._partition.topic}") from error
        self._client.assign([self._partition])
        self._client.seek(self._partition, self._start_offset)
        await self._check_end()

    async def _check_end(self) -> None:
        """Raise LogGap when the partition ends before where the lane goes on: what comes there next is another log's."""
        try:
            end = (await self._client.end_offsets([self._partition]))[self._partition]
        except kafka_errors.KafkaError as error:
            raise translate(error, f"looking at the end of {self._partition.topic}") from error
        if end < self._start_offset:
            raise LogGap(
                f"{self._partition.topic}-{self._partition.partition} ends at offset {end}, but the lane is applied up to "
                f"offset {self._start_offset}: the topic was made again, or the broker has lost the log's tail"
            )

    async def close(self) -> None:
        """Close the connection and give back what fragments hold."""
        self._budget.release(self._held_for_fragments)
        self._held_for_fragments = 0
        await self._client.stop()

    async def fetch(self) -> list[ConsumerRecord[bytes, bytes]]:
        """Give records as they come, none when there are none for a while.

        Raises:
            LogGap: the broker has no such offset any more.
        """
        try:
            records = await self._client.getmany(self._partition, timeout_ms=POLL_MS, max_records=RECORDS_AT_ONCE)
        except kafka_errors.OffsetOutOfRangeError as error:
            raise await self._explain_missing() from error
        except kafka_errors.KafkaError as error:
            raise translate(error, f"reading {self._partition.topic}-{self._partition.partition}") from error
        found: list[ConsumerRecord[bytes, bytes]] = records.get(self._partition, [])
        return found

    async def _explain_missing(self) -> LogGap:
        """Give the error for an offset that the broker does not have."""
        topic, lane = self._partition
        try:
            offset = await self._client.position(self._partition)
            first = (await self._client.beginning_offsets([self._partition]))[self._partition]
            end = (await self._client.end_offsets([self._partition]))[self._partition]
        except kafka_errors.KafkaError as error:
            raise translate(error, f"reading {topic}-{lane}") from error
        needed = f"{topic}-{lane}-{offset}: the broker does not have this offset, which the lane needs next"
        if offset < first:
            return LogGap(f"{needed}: it begins at {first}, what was before is deleted", hint=_DELETED_HINT)
        return LogGap(f"{needed}: it ends at {end}")

    async def take(self, record: ConsumerRecord[bytes, bytes]) -> Segment | None:
        """Give the segment that a record completes, once its bytes fit into the budget."""
        value = record.value or b""
        needed = self._chain.needed_bytes(value)
        await self._budget.acquire(needed)
        self._held_for_fragments += needed
        accepted = self._chain.accept(value, record.offset)
        if not self._chain.is_between_segments:
            return None
        held, self._held_for_fragments = self._held_for_fragments, 0
        if accepted is None:
            self._budget.release(held)
            return None
        body, last = accepted
        return Segment(body, last, record.offset + 1, held)
