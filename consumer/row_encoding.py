"""pgoutput tuples to values, and values to COPY rows: text and binary, byte for byte, nothing converted.

A value is `bytes` as the source sent it, `None` for NULL, or `UNCHANGED` for a TOASTed value that an UPDATE left alone and
the stream therefore does not carry. Text and binary values never mix within a stream.

Source: PostgreSQL manual, "Logical Replication Message Formats" (TupleData) and "COPY" (File Formats).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import Final, Literal

from live_migration.common.errors import FormatError


class Unchanged(Enum):
    """A value that the stream does not carry, for the UPDATE did not touch it."""

    UNCHANGED = "unchanged"


UNCHANGED: Final = Unchanged.UNCHANGED

BIG_BYTES = 1 << 20
"""A message from this size on is a view of its segment, and so are its big values: they are not copied again and again."""

Message = bytes | memoryview

Value = bytes | None | Literal[Unchanged.UNCHANGED]

CopyRow = bytes | Iterator[Message]
"""An encoded row; one with big values comes in pieces."""

_PIECE_BYTES = 131_072
Row = Sequence[Value]

_UPDATE, _NEW = ord("U"), ord("N")
_NULL = ord("n")
_TOASTED = ord("u")
_TEXT = ord("t")
_BINARY = ord("b")

BINARY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
BINARY_TRAILER = b"\xff\xff"
_BINARY_NULL = b"\xff\xff\xff\xff"

_VALUE_HEAD = struct.Struct(">I")
_SPECIAL = re.compile(rb"[\\\t\n\r]")


def decode_tuple(message: Message, at: int) -> tuple[list[Value], int]:
    """Give the values of the tuple that starts at byte `at` of a message, and where it ends.

    Raises:
        FormatError: the tuple is cut short or has an unknown kind of value.
    """
    from_bytes = int.from_bytes
    count = from_bytes(message[at : at + 2], "big")
    at += 2
    values: list[Value] = []
    append = values.append
    for _ in range(count):
        kind = message[at] if at < len(message) else -1
        if kind in (_TEXT, _BINARY):
            start = at + 5
            at = start + from_bytes(message[at + 1 : start], "big")
            # a view is bytes to all that is done with values: joined, compared, hashed
            append(message[start:at] if type(message) is bytes or at - start >= BIG_BYTES else bytes(message[start:at]))  # type: ignore[arg-type]
        elif kind == _NULL:
            append(None)
            at += 1
        elif kind == _TOASTED:
            append(UNCHANGED)
            at += 1
        else:
            raise FormatError(f"row message of {len(message)} bytes: no value at byte {at}")
    if at > len(message):
        raise FormatError(f"row message of {len(message)} bytes is cut short")
    return values, at


def is_binary(message: Message, at: int) -> bool | None:
    """Tell by its first non-NULL value whether the tuple at byte `at` is binary; None if it has none."""
    count = int.from_bytes(message[at : at + 2], "big")
    at += 2
    for _ in range(count):
        kind = message[at]
        if kind in (_TEXT, _BINARY):
            return kind == _BINARY
        at += 1
    return None


def message_form(message: Message) -> bool | None:
    """Tell by its first non-NULL value whether a row message is binary, the new row of an UPDATE looked at after the old; None if it has none."""
    found = is_binary(message, 6)
    if found is None and message[0] == _UPDATE and message[5] != _NEW:
        new_at = 8 + int.from_bytes(message[6:8], "big")  # each value of the old row is one byte
        return is_binary(message, new_at + 1)
    return found


def escape_text(value: Message) -> Message:
    """Escape a text value for COPY's text format."""
    if _SPECIAL.search(value) is None:
        return value
    escaped = bytes(value).replace(b"\\", b"\\\\").replace(b"\t", b"\\t")
    return escaped.replace(b"\n", b"\\n").replace(b"\r", b"\\r")


def text_row(values: Sequence[Message | None]) -> CopyRow:
    """Give one row of COPY's text format."""
    if memoryview in map(type, values):
        return _text_pieces(values)
    return b"\t".join([b"\\N" if value is None else escape_text(value) for value in values]) + b"\n"


def binary_row(values: Sequence[Message | None]) -> CopyRow:
    """Give one row of COPY's binary format."""
    if memoryview in map(type, values):
        return _binary_pieces(values)
    parts: list[Message] = [len(values).to_bytes(2, "big")]
    for value in values:
        if value is None:
            parts.append(_BINARY_NULL)
        else:
            parts.append(len(value).to_bytes(4, "big"))
            parts.append(value)
    return b"".join(parts)


def _text_pieces(values: Sequence[Message | None]) -> Iterator[Message]:
    for number, value in enumerate(values):
        if number:
            yield b"\t"
        if value is None:
            yield b"\\N"
        else:
            for start in range(0, len(value), _PIECE_BYTES):
                yield escape_text(value[start : start + _PIECE_BYTES])
    yield b"\n"


def _binary_pieces(values: Sequence[Message | None]) -> Iterator[Message]:
    yield len(values).to_bytes(2, "big")
    for value in values:
        if value is None:
            yield _BINARY_NULL
        else:
            yield len(value).to_bytes(4, "big")
            for start in range(0, len(value), _PIECE_BYTES):
                yield value[start : start + _PIECE_BYTES]


def insert_as_binary_row(message: Message) -> CopyRow:
    """Give an Insert message with binary values as a row of COPY's binary format: all its columns, in their order."""
    if isinstance(message, memoryview):
        return _binary_pieces(_inserted(message))
    unpack, end = _VALUE_HEAD.unpack_from, len(message)
    parts = [message[6:8]]
    append = parts.append
    at = 8
    while at < end:
        kind = message[at]
        start = at + 1
        if kind == _BINARY:
            at += 5 + unpack(message, start)[0]
            append(message[start:at])
        elif kind == _NULL:
            append(_BINARY_NULL)
            at = start
        else:
            raise FormatError("insert message: a value that is not binary in a binary stream")
    if at != end or len(parts) != 1 + int.from_bytes(parts[0], "big"):
        raise FormatError(f"insert message of {end} bytes is cut short")
    return b"".join(parts)


def insert_as_text_row(message: Message) -> CopyRow:
    """Give an Insert message with text values as a row of COPY's text format: all its columns, in their order."""
    if isinstance(message, memoryview):
        return _text_pieces(_inserted(message))
    from_bytes = int.from_bytes
    parts: list[Message] = []
    append = parts.append
    at = 8
    special = _SPECIAL.search(message, 8) is not None  # lengths may look special too: then each value is asked
    for _ in range(from_bytes(message[6:8], "big")):
        if message[at] == _TEXT:
            start = at + 5
            at = start + from_bytes(message[at + 1 : start], "big")
            append(message[start:at] if not special else escape_text(message[start:at]))
        elif message[at] == _NULL:
            append(b"\\N")
            at += 1
        else:
            raise FormatError("insert message: a value that is not text in a text stream")
    if at != len(message):
        raise FormatError(f"insert message of {len(message)} bytes is cut short, or has more than its values")
    return b"\t".join(parts) + b"\n"


def _inserted(message: memoryview) -> list[bytes | None]:
    values, _ = decode_tuple(message, 6)
    if UNCHANGED in values:
        raise FormatError("insert message: a value is missing")
    return values  # type: ignore[return-value]


def copy_chunks(rows: Iterable[CopyRow], *, binary: bool, chunk_bytes: int = 131_072) -> Iterator[Message]:
    """Join rows into chunks of about `chunk_bytes` for COPY FROM STDIN, with header and trailer where binary."""
    pending: list[bytes] = [BINARY_HEADER] if binary else []
    size = 0
    for row in rows:
        if type(row) is bytes:
            pending.append(row)
            size += len(row)
        else:
            yield b"".join(pending)
            pending, size = [], 0
            yield from row  # type: ignore[misc]
        if size >= chunk_bytes:
            yield b"".join(pending)
            pending, size = [], 0
    if binary:
        pending.append(BINARY_TRAILER)
    if pending:
        yield b"".join(pending)
