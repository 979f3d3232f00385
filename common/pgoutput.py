"""pgoutput messages, protocol version 1: bytes to values, and nothing else.

Row messages are left undecoded by the producer; `decode_tuple` and its users belong to the consumer.

Source: PostgreSQL manual, "Logical Replication Message Formats".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from live_migration.common.errors import FormatError
from live_migration.common.relation import Column, QualifiedName, Relation, ReplicaIdentity

BEGIN = 0x42  # 'B'
COMMIT = 0x43  # 'C'
RELATION = 0x52  # 'R'
TYPE = 0x59  # 'Y'
ORIGIN = 0x4F  # 'O'
INSERT = 0x49  # 'I'
UPDATE = 0x55  # 'U'
DELETE = 0x44  # 'D'
TRUNCATE = 0x54  # 'T'
MESSAGE = 0x4D  # 'M'

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
"""What PostgreSQL counts its times from."""

_BEGIN = struct.Struct(">BQqI")
_COMMIT = struct.Struct(">BBQQq")
_COLUMN_TAIL = struct.Struct(">Ii")
_U32 = struct.Struct(">I")
_U16 = struct.Struct(">H")


@dataclass(frozen=True, slots=True)
class Begin:
    """Start of a committed transaction. `commit_lsn`: start of its commit record. `commit_time`: µs since 2000-01-01 UTC."""

    commit_lsn: int
    commit_time: int
    xid: int


@dataclass(frozen=True, slots=True)
class Commit:
    """End of a transaction. `end_lsn`: one past its commit record, what the slot may be moved to."""

    commit_lsn: int
    end_lsn: int
    commit_time: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """A TRUNCATE of several relations (their oids)."""

    relation_oids: tuple[int, ...]
    cascade: bool
    restart_identity: bool


@dataclass(frozen=True, slots=True)
class LogicalMessage:
    """A message written by `pg_logical_emit_message`."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


def _text(body: bytes, start: int, what: str) -> tuple[str, int]:
    end = body.find(b"\0", start)
    if end < 0:
        raise FormatError(f"{what} message: string at byte {start} has no end")
    try:
        return body[start:end].decode(), end + 1
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{what} message: string at byte {start} is not UTF-8",
            hint="The source's database must have an encoding that converts to UTF-8; SQL_ASCII does not.",
        ) from error


def timestamp(microseconds: int) -> datetime:
    """Give a time of the stream, µs since `EPOCH`."""
    return EPOCH + timedelta(microseconds=microseconds)


def decode_begin(message: bytes) -> Begin:
    """Decode a Begin message ('B')."""
    try:
        _, commit_lsn, commit_time, xid = _BEGIN.unpack_from(message)
    except struct.error as error:
        raise FormatError(f"begin message of {len(message)} bytes is cut short") from error
    return Begin(commit_lsn, commit_time, xid)


def decode_commit(message: bytes) -> Commit:
    """Decode a Commit message ('C')."""
    try:
        _, _, commit_lsn, end_lsn, commit_time = _COMMIT.unpack_from(message)
    except struct.error as error:
        raise FormatError(f"commit message of {len(message)} bytes is cut short") from error
    return Commit(commit_lsn, end_lsn, commit_time)


def decode_relation(message: bytes) -> Relation:
    """Decode a Relation message ('R').

    Raises:
        FormatError: the message is cut short or malformed.
    """
    try:
        (oid,) = _U32.unpack_from(message, 1)
        schema, at = _text(message, 5, "relation")
        name, at = _text(message, at, "relation")
        identity = ReplicaIdentity(chr(message[at]))
        (column_count,) = _U16.unpack_from(message, at + 1)
        at += 3
        columns = []
        for _ in range(column_count):
            is_key = bool(message[at] & 1)
            column, at = _text(message, at + 1, "relation")
            type_oid, modifier = _COLUMN_TAIL.unpack_from(message, at)
            at += 8
            columns.append(Column(column, type_oid, modifier, is_key))
    except (struct.error, IndexError, ValueError) as error:
        raise FormatError(f"relation message of {len(message)} bytes is malformed") from error
    return Relation(oid, QualifiedName(schema or "pg_catalog", name), identity, tuple(columns))


def decode_truncate(message: bytes) -> Truncate:
    """Decode a Truncate message ('T')."""
    try:
        (count,) = _U32.unpack_from(message, 1)
        flags = message[5]
        oids = struct.unpack_from(f">{count}I", message, 6)
    except (struct.error, IndexError) as error:
        raise FormatError(f"truncate message of {len(message)} bytes is cut short") from error
    return Truncate(oids, bool(flags & 1), bool(flags & 2))


def decode_logical_message(message: bytes) -> LogicalMessage:
    """Decode a logical Message ('M')."""
    try:
        flags = message[1]
        (lsn,) = struct.unpack_from(">Q", message, 2)
        prefix, at = _text(message, 10, "logical")
        (length,) = _U32.unpack_from(message, at)
    except (struct.error, IndexError) as error:
        raise FormatError(f"logical message of {len(message)} bytes is cut short") from error
    content = message[at + 4 : at + 4 + length]
    if len(content) != length:
        raise FormatError(f"logical message of {len(message)} bytes is cut short")
    return LogicalMessage(bool(flags & 1), lsn, prefix, bytes(content))


def relation_oid(message: bytes) -> int:
    """Give the relation of a row message (I, U, D) or Relation message."""
    return int.from_bytes(message[1:5], "big")
