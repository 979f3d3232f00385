"""Letters of changes that are skipped: JSON in the topic `<name>.dead-letter`, there before the change is passed over.

A letter goes in one record, or in several where it is longer than PIECE_BYTES: all have the change's position as key and in
their headers the letter's id, the piece's number and, on the last one, `last`. A whole letter is the pieces' values, joined.
"""

from __future__ import annotations

import base64
import codecs
from collections.abc import Iterable, Iterator
from uuid import uuid4

import orjson

from live_migration.common import pgoutput
from live_migration.common.kafka import check_dead_letter_topic, sending
from live_migration.common.readable import readable
from live_migration.common.relation import Relation, ReplicaIdentity
from live_migration.common.settings import Settings
from live_migration.consumer.refusal import OPERATIONS
from live_migration.consumer.row_encoding import UNCHANGED, Message, Value, decode_tuple, is_binary
from live_migration.consumer.segment_walk import LoggedChange

PIECE_BYTES = 512 * 1024
_SLICE_BYTES = 384 * 1024  # a multiple of 3, for base64
_SMALL_BYTES = 64 * 1024
_TEXT_TYPES = frozenset((19, 25, 114, 1042, 1043))
_JSONB = 3802


async def send_letter(settings: Settings, key: str, letter: Iterable[bytes]) -> None:
    """Put a letter into the topic; it is there, on all replicas in sync, when this returns.

    Raises:
        KafkaError: the topic is not as we made it, or the broker refuses.
        ConnectionLost: the broker cannot be reached.
    """
    await check_dead_letter_topic(settings)
    letter_id = uuid4().bytes
    async with sending(settings, settings.dead_letter_topic) as producer:
        for number, (piece, is_last) in enumerate(_pieces(letter)):
            headers = [("letter", letter_id), ("piece", str(number).encode()), *[("last", b"")] * is_last]
            await producer.send_and_wait(
                settings.dead_letter_topic, piece, key=key.encode(), partition=0, headers=headers
            )


def _pieces(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Join chunks into pieces of at most PIECE_BYTES, each with whether it is the last."""
    pending: list[bytes] = []
    size = 0
    parts = (chunk[start : start + PIECE_BYTES] for chunk in chunks for start in range(0, len(chunk), PIECE_BYTES))
    for chunk in parts:
        if size + len(chunk) > PIECE_BYTES:
            yield b"".join(pending), False
            pending, size = [], 0
        pending.append(chunk)
        size += len(chunk)
    yield b"".join(pending), True


def write_letter(head: dict[str, object], change: LoggedChange) -> Iterator[bytes]:
    """Give a change as JSON, in chunks: the head's fields, then what `live-migration tail` shows of it.

    Binary values of common types are shown as text, others as `{"$binary": base64}`; a TOASTed value that an UPDATE did not
    touch, and which the stream therefore does not carry, is `{"$unchanged": true}`.
    """
    fields = {
        **head,
        "position": str(change.position),
        "xid": change.begin.xid,
        "commit_time": pgoutput.timestamp(change.begin.commit_time).isoformat(),
        "table": ", ".join(str(relation.name) for relation in change.relations),
        "op": OPERATIONS[change.kind].lower(),
    }
    if change.kind == pgoutput.TRUNCATE:
        yield orjson.dumps(fields)
        return
    yield orjson.dumps(fields)[:-1]
    (relation,) = change.relations
    at = 5
    while at < len(change.message):
        tag = change.message[at]
        values, end = decode_tuple(change.message, at + 1)
        is_key_only = tag == ord("K") and relation.identity is not ReplicaIdentity.FULL
        yield b',"new":{' if tag == ord("N") else b',"old":{'
        binary = bool(is_binary(change.message, at + 1))
        yield from _row(relation, values, binary=binary, is_key_only=is_key_only)
        yield b"}"
        at = end
    yield b"}"


def _row(relation: Relation, values: list[Value], *, binary: bool, is_key_only: bool) -> Iterator[bytes]:
    comma = b""
    for column, value in zip(relation.columns, values, strict=True):
        if is_key_only and not column.is_key:
            continue
        yield comma + orjson.dumps(column.name) + b":"
        comma = b","
        yield from _value(value, column.type_oid, binary=binary)


def _value(value: Value, type_oid: int, *, binary: bool) -> Iterator[bytes]:
    if value is None:
        yield b"null"
    elif value is UNCHANGED:
        yield b'{"$unchanged":true}'
    elif binary and len(value) <= _SMALL_BYTES:
        yield orjson.dumps(readable(type_oid, bytes(value)))
    elif binary and type_oid not in _TEXT_TYPES and not (type_oid == _JSONB and value[0] == 1):
        yield b'{"$binary":"'
        for start in range(0, len(value), _SLICE_BYTES):
            yield base64.b64encode(value[start : start + _SLICE_BYTES])
        yield b'"}'
    else:
        yield from _string(value[1:] if binary and type_oid == _JSONB else value)


def _string(value: Message) -> Iterator[bytes]:
    """Give a text as a JSON string, in slices: it may be very long."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    yield b'"'
    for start in range(0, len(value), _SLICE_BYTES):
        text = decoder.decode(bytes(value[start : start + _SLICE_BYTES]), start + _SLICE_BYTES >= len(value))
        yield orjson.dumps(text)[1:-1]
    yield b'"'
