"""Rows of a table that has several lanes, each into the lane of its key. Pure.

The key's columns are hashed as they stand in the message, kind and length included: only types are let in whose equal values have
equal bytes, and the stream sends a column in one form for a migration's life.
"""

from __future__ import annotations

import struct
from zlib import crc32

from live_migration.common import pgoutput
from live_migration.common.errors import FormatError
from live_migration.common.lanes import BYTEWISE_TYPES
from live_migration.common.meeting import GATHER, SCATTER, encode_meeting
from live_migration.common.relation import Relation, ReplicaIdentity
from live_migration.common.segment import frame

Message = bytes | memoryview
"""A pgoutput message; a view of libpq's own buffer where it is too big to be copied."""

_OLD_KEY, _NEW, _UNCHANGED = b"KNu"
_WITHOUT_VALUE = b"nu"
_TUPLE = 6
"""Where the first tuple of a row message begins."""
_length = struct.Struct(">I").unpack_from
_column_count = struct.Struct(">H").unpack_from


class SplitTable:
    """A table's lanes, and whether its changes go into the first of them just now."""

    __slots__ = ("gather_frame", "is_described", "is_gathered", "is_settled", "lanes", "scatter_frame")

    def __init__(self, lanes: range, *, is_settled: bool) -> None:
        self.lanes = lanes
        self.is_gathered = False
        """Whether all changes up to the end of the present transaction go into the leader."""
        self.is_settled = is_settled
        """Whether everything in the log is of the present shape."""
        self.is_described = False
        """Whether its shape has been told in this session."""
        self.gather_frame = frame(encode_meeting(GATHER, lanes))
        self.scatter_frame = frame(encode_meeting(SCATTER, lanes))


class SplitRelation:
    """Where rows of one shape of a table belong: lanes are counted from the table's first one on."""

    __slots__ = ("_count", "_flags", "_is_first", "oid", "table")

    def __init__(self, table: SplitTable, relation: Relation) -> None:
        self.table = table
        self.oid = relation.oid.to_bytes(4, "big")
        self._count = len(table.lanes)
        keys = relation.key_indexes if has_bytewise_key(relation) else ()
        # of each column up to the key's last one: whether it is the key's
        self._flags = tuple(index in keys for index in range(keys[-1] + 1)) if keys else ()
        self._is_first = keys == (0,)

    @property
    def has_key(self) -> bool:
        """Whether rows can be told apart: else all of them are the leader's."""
        return bool(self._flags)

    def place(self, message: Message) -> int | None:
        """Give the lane of a row message; None where it takes `parts` to know. Raises FormatError where it is malformed."""
        try:
            if message[5] != _NEW and (message[0] != pgoutput.DELETE or message[5] != _OLD_KEY):
                return None
            if not self._is_first:
                key = self._key(message, _TUPLE)
                return None if key is None else crc32(key) % self._count
            at = _TUPLE + 2
            if message[at] in _WITHOUT_VALUE:
                return None
            return crc32(message[at : at + 5 + _length(message, at + 1)[0]]) % self._count
        except (struct.error, IndexError) as error:
            raise _malformed(message) from error

    def parts(self, message: Message) -> tuple[tuple[int, Message], ...] | None:
        """Give what becomes of an Update that tells the old key: messages and their lanes, in this order; None: it cannot be split.

        Raises:
            FormatError: it is malformed.
        """
        if message[0] != pgoutput.UPDATE or message[5] != _OLD_KEY or not self._flags:
            return None
        try:
            return self._parts(message)
        except (struct.error, IndexError) as error:
            raise _malformed(message) from error

    def _parts(self, message: Message) -> tuple[tuple[int, Message], ...] | None:
        old_end = _tuple_end(message, _TUPLE)
        old_fields, new_fields = self._fields(message, _TUPLE), self._fields(message, old_end + 1)
        # A key that is TOASTed is told even if it did not change, and is then left out of the new row.
        new_fields = [old if new[0] == _UNCHANGED else new for old, new in zip(old_fields, new_fields, strict=True)]
        old_lane, new_lane = (crc32(b"".join(fields)) % self._count for fields in (old_fields, new_fields))
        if old_lane == new_lane:
            return ((old_lane, message),)
        if _has_unchanged(message, old_end + 1):
            return None
        deleted = b"D" + self.oid + bytes(message[5:old_end])
        inserted = b"I" + self.oid + bytes(message[old_end:])
        return (old_lane, deleted), (new_lane, inserted)

    def _key(self, message: Message, at: int) -> Message | None:
        """Give the key of the tuple at this byte; None where a part of it is left out."""
        if not self._flags:
            return None
        fields = self._fields(message, at)
        return None if any(field[0] == _UNCHANGED for field in fields) else b"".join(fields)

    def _fields(self, message: Message, at: int) -> list[Message]:
        """Give the key's columns of the tuple at this byte, as they stand there."""
        fields = []
        at += 2
        for is_key in self._flags:
            end = _field_end(message, at)
            if is_key:
                fields.append(message[at:end])
            at = end
        return fields


def _malformed(message: Message) -> FormatError:
    return FormatError(f"row message of {len(message)} bytes is malformed")


def has_bytewise_key(relation: Relation) -> bool:
    """Tell whether rows are told apart by a key whose equality is that of its bytes, as far as the stream tells it."""
    keys = [column for column in relation.columns if column.is_key]
    is_index = relation.identity in (ReplicaIdentity.DEFAULT, ReplicaIdentity.INDEX)
    return is_index and bool(keys) and all(column.type_oid in BYTEWISE_TYPES for column in keys)


def _field_end(message: Message, at: int) -> int:
    kind = message[at]
    return at + 1 if kind in _WITHOUT_VALUE else at + 5 + int(_length(message, at + 1)[0])


def _tuple_end(message: Message, at: int) -> int:
    (count,) = _column_count(message, at)
    at += 2
    for _ in range(count):
        at = _field_end(message, at)
    return at


def _has_unchanged(message: Message, at: int) -> bool:
    (count,) = _column_count(message, at)
    at += 2
    for _ in range(count):
        if message[at] == _UNCHANGED:
            return True
        at = _field_end(message, at)
    return False
