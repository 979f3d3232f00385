"""The change log as JSON lines, for people: what is in Kafka, change by change, with values as the source sent them."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field

import orjson
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka import errors as kafka_errors

from live_migration.common import kafka, pgoutput, segment
from live_migration.common.errors import FormatError, KafkaError
from live_migration.common.kafka_clients import LogConsumer, log_consumer
from live_migration.common.readable import JsonValue, readable
from live_migration.common.relation import Relation, ReplicaIdentity
from live_migration.common.segment import Position
from live_migration.common.settings import Settings
from live_migration.common.telemetry import get_logger

log = get_logger(__name__)

_LENGTH = struct.Struct(">I")

Line = dict[str, object]


def decode_tuple(message: bytes, at: int, relation: Relation) -> tuple[list[JsonValue], int]:
    """Decode a TupleData at byte `at` into JSON values, and give the byte after it.

    A binary value of a type that is not known here is `{"$binary": base64}`, a TOAST value that did not change `{"$unchanged": true}`.

    Raises:
        FormatError: it is cut short, or has another number of columns than the relation.

    Source: PostgreSQL manual, "Logical Replication Message Formats", TupleData.
    """
    count = int.from_bytes(message[at : at + 2], "big")
    at += 2
    if count != len(relation.columns):
        raise FormatError(f"tuple of {relation.name} has {count} columns, its relation {len(relation.columns)}")
    values: list[JsonValue] = []
    for column in relation.columns:
        kind = message[at : at + 1]
        at += 1
        if kind == b"n":
            values.append(None)
        elif kind == b"u":
            values.append({"$unchanged": True})
        elif kind in (b"t", b"b"):
            if at + 4 > len(message):
                raise FormatError(f"tuple of {relation.name} is cut short")
            (length,) = _LENGTH.unpack_from(message, at)
            value = message[at + 4 : at + 4 + length]
            at += 4 + length
            if at > len(message):
                raise FormatError(f"tuple of {relation.name} is cut short")
            values.append(value.decode(errors="replace") if kind == b"t" else readable(column.type_oid, value))
        else:
            raise FormatError(f"tuple of {relation.name} has a value of kind {kind!r}")
    return values, at


@dataclass(slots=True)
class LineDecoder:
    """Turns a lane's records into lines; one for each lane, fed in offset order.

    What begins in the midst of a fragmented segment is left out, for its first fragments are not known.
    """

    lane: int
    _fragments: list[bytes] = field(default_factory=list)

    def decode(self, record: bytes, offset: int) -> Iterator[Line]:
        """Give the lines of a record, none before the last fragment of a fragmented segment.

        Raises:
            FormatError: the record is not a segment.
        """
        header = segment.decode_header(record)
        body = record[segment.HEADER.size :]
        if header.kind == segment.FRAGMENT:
            if header.fragment_index == 0:
                self._fragments.clear()
            elif len(self._fragments) != header.fragment_index:
                return
            self._fragments.append(body)
            if len(self._fragments) < header.fragment_count:
                return
            body = b"".join(self._fragments)
        self._fragments.clear()
        yield from self._lines(body, offset)

    def begin_anew(self) -> None:
        """Forget a segment's fragments: what follows is from elsewhere."""
        self._fragments.clear()

    def _lines(self, body: bytes, offset: int) -> Iterator[Line]:
        relations: dict[int, Relation] = {}
        begin: pgoutput.Begin | None = None
        for frame in segment.iterate_frames(body):
            if frame.kind == pgoutput.BEGIN:
                begin = pgoutput.decode_begin(frame.message)
            elif frame.kind == pgoutput.RELATION:
                relation = pgoutput.decode_relation(frame.message)
                relations[relation.oid] = relation
            elif frame.ordinal and begin is not None:
                head = {
                    "lane": self.lane,
                    "offset": offset,
                    "position": str(Position(begin.commit_lsn, frame.ordinal)),
                    "xid": begin.xid,
                    "commit_time": pgoutput.timestamp(begin.commit_time).isoformat(),
                }
                yield head | _describe(frame.kind, frame.message, relations)


def _describe(kind: int, message: bytes, relations: dict[int, Relation]) -> Line:
    if kind in (pgoutput.INSERT, pgoutput.UPDATE, pgoutput.DELETE):
        relation = _relation(relations, pgoutput.relation_oid(message))
        return {"table": str(relation.name), **_row_change(message, relation)}
    if kind == pgoutput.TRUNCATE:
        truncate = pgoutput.decode_truncate(message)
        names = [str(_relation(relations, oid).name) for oid in truncate.relation_oids]
        return {"table": ", ".join(names), "op": "truncate", "restart_identity": truncate.restart_identity}
    if kind == pgoutput.MESSAGE:
        logical = pgoutput.decode_logical_message(message)
        return {"op": "message", "prefix": logical.prefix, "content": logical.content.decode(errors="replace")}
    return {"op": chr(kind)}


def _relation(relations: dict[int, Relation], oid: int) -> Relation:
    try:
        return relations[oid]
    except KeyError:
        raise FormatError(f"segment holds a change of relation {oid} without its Relation message") from None


def _row_change(message: bytes, relation: Relation) -> Line:
    """Give operation and tuples of an Insert, Update or Delete message; of an old key only its key columns."""
    operation = {pgoutput.INSERT: "insert", pgoutput.UPDATE: "update", pgoutput.DELETE: "delete"}[message[0]]
    change: Line = {"op": operation}
    at = 5
    while at < len(message):
        tag = message[at : at + 1]
        values, at = decode_tuple(message, at + 1, relation)
        is_key_only = tag == b"K" and relation.identity is not ReplicaIdentity.FULL
        change["new" if tag == b"N" else "old"] = {
            column.name: value
            for column, value in zip(relation.columns, values, strict=True)
            if column.is_key or not is_key_only
        }
    return change


async def tail(
    settings: Settings, *, table: str | None = None, from_beginning: bool = False, limit: int | None = None
) -> AsyncIterator[bytes]:
    """Give the change log's changes as JSON lines, committed ones only, for ever or until `limit`.

    Args:
        table: only changes of this table, `schema.name`.
        from_beginning: begin with the oldest change that is kept; else with what comes from now on.

    Raises:
        KafkaError: the topic does not exist.
        FormatError: somebody else writes into the topic.
    """
    async with kafka.admin(settings) as client:
        if not await kafka.topic_exists(client, settings.changes_topic):
            raise KafkaError(
                f"topic {settings.changes_topic} does not exist",
                hint="Check KAFKA and --name; has the migration begun?",
            )
        (description,) = await client.describe_topics([settings.changes_topic])
    partitions = [TopicPartition(settings.changes_topic, each["partition"]) for each in description["partitions"]]
    consumer = log_consumer(settings)
    try:
        await consumer.start()
        consumer.assign(partitions)
        bounds = await (consumer.beginning_offsets if from_beginning else consumer.end_offsets)(partitions)
        for partition, offset in bounds.items():
            consumer.seek(partition, offset)
        decoders = {partition.partition: LineDecoder(partition.partition) for partition in partitions}
        given = 0
        while limit is None or given < limit:
            for record in await _next_records(consumer, decoders):
                for line in decoders[record.partition].decode(record.value, record.offset):
                    if table is not None and table not in str(line.get("table", "")).split(", "):
                        continue
                    yield orjson.dumps(line)
                    given += 1
                    if given == limit:
                        return
    except kafka_errors.KafkaError as error:
        raise kafka.translate(error, f"reading {settings.changes_topic}") from error
    finally:
        await asyncio.shield(consumer.stop())


async def _next_records(consumer: LogConsumer, decoders: Mapping[int, LineDecoder]) -> list[ConsumerRecord]:
    try:
        fetched = await consumer.getmany(timeout_ms=1000, max_records=100)
    except kafka_errors.OffsetOutOfRangeError as error:
        await _skip_deleted(consumer, list(error.args[0]), decoders)
        return []
    return [record for records in fetched.values() for record in records]


async def _skip_deleted(
    consumer: LogConsumer, partitions: list[TopicPartition], decoders: Mapping[int, LineDecoder]
) -> None:
    """Go on where the log now begins: applied segments are deleted while the migration runs."""
    first = await consumer.beginning_offsets(partitions)
    for partition in partitions:
        position = await consumer.position(partition)
        if position >= first[partition]:
            raise KafkaError(
                f"{partition.topic}-{partition.partition} has no offset {position} any more",
                hint="The broker has lost the end of its log, or the topic was made again.",
            )
        log.warning("deleted before it was shown", lane=partition.partition, offset=position, until=first[partition])
        consumer.seek(partition, first[partition])
        decoders[partition.partition].begin_anew()
