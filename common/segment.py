"""The change log's format: what one Kafka record of the topic `<name>.changes` holds.

A record is a *segment*, a run of raw pgoutput messages of one lane in commit order, or a *fragment* of a message that is
too big for a record. All numbers are big-endian.

    header (66 bytes)
      u16  magic 0x4C4D ("LM")
      u8   version, now 1
      u8   kind: 1 segment, 2 fragment
      16s  topic id (UUID): which incarnation of the topic the segment was written for
      u16  lane
      u64 u64  previous: commit LSN, ordinal of the lane's last change before this segment
      u64 u64  last:     commit LSN, ordinal of the last change in it
      u32  number of changes
      u32  fragment index
      u32  fragment count (0 for a segment)
    body of a segment: frames, each
      u32  length of the message
      u32  ordinal of the change, less the base of the Begin frame before it (0 for others)
      ...  the pgoutput message, as it came; after a Begin message, u64: the ordinal that frames after it count from
    body of a fragment: a slice of what would have been the segment's body

A segment is self-contained: the Relation message of each table in it stands before its first row, and the Begin
of each transaction, repeated where a transaction goes over several segments. Commit stands in each lane that
the transaction touched. A change's position is (commit LSN, ordinal in its transaction, from 1, counted over row,
truncate and logical messages of all lanes); a Commit's ordinal is COMMIT_ORDINAL. The chain of previous and last
positions lets a consumer prove that nothing is missing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from live_migration.common import pgoutput
from live_migration.common.errors import FormatError
from live_migration.common.lsn import Lsn

MAGIC = 0x4C4D
VERSION = 1
SEGMENT = 1
FRAGMENT = 2

COMMIT_ORDINAL = 2**63 - 1
"""Ordinal of a Commit: above that of every change of its transaction."""

HEADER = struct.Struct(">HBB16sHQQQQIII")
FRAME = struct.Struct(">II")
BASE = struct.Struct(">Q")


class Position(NamedTuple):
    """Where a change stands in the log: total order within a lane."""

    commit_lsn: int
    ordinal: int

    def __str__(self) -> str:
        ordinal = "commit" if self.ordinal == COMMIT_ORDINAL else self.ordinal
        return f"{Lsn(self.commit_lsn)}#{ordinal}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read a change's position as it prints, `X/Y#n`.

        Raises:
            ValueError: `text` is not an LSN and an ordinal from 1.
        """
        lsn, _, ordinal = text.strip().partition("#")
        if not (ordinal.isascii() and ordinal.isdigit() and 0 < int(ordinal) < COMMIT_ORDINAL):
            raise ValueError(f"not a position: {text!r}")
        return cls(Lsn.parse(lsn), int(ordinal))


START = Position(0, 0)


class SegmentHeader(NamedTuple):
    """A record's header; `fragment_count` is 0 for a whole segment."""

    kind: int
    topic_id: bytes
    lane: int
    previous: Position
    last: Position
    change_count: int
    fragment_index: int
    fragment_count: int


Body = TypeVar("Body", bytes, memoryview)


class Frame(NamedTuple, Generic[Body]):
    """One message of a segment. `ordinal` is 0 for messages that are not changes."""

    kind: int
    ordinal: int
    message: Body


def encode_header(header: SegmentHeader) -> bytes:
    """Give the bytes that stand before a record's body."""
    return HEADER.pack(
        MAGIC,
        VERSION,
        header.kind,
        header.topic_id,
        header.lane,
        *header.previous,
        *header.last,
        header.change_count,
        header.fragment_index,
        header.fragment_count,
    )


def decode_header(record: bytes) -> SegmentHeader:
    """Read a record's header.

    Raises:
        FormatError: not a record of ours, or one of a newer version.
    """
    try:
        magic, version, kind, topic_id, lane, pl, po, ll, lo, changes, index, count = HEADER.unpack_from(record)
    except struct.error as error:
        raise FormatError(f"record of {len(record)} bytes is too short for a segment") from error
    if magic != MAGIC or kind not in (SEGMENT, FRAGMENT):
        raise FormatError("record is not a segment of this program", hint="Somebody else writes into the topic.")
    if version != VERSION:
        raise FormatError(
            f"segment has format version {version}, this program reads {VERSION}", hint="Use the newer program."
        )
    return SegmentHeader(kind, topic_id, lane, Position(pl, po), Position(ll, lo), changes, index, count)


def begin_frame(message: bytes, base: int) -> bytes:
    """Frame a Begin message; `base` is what the ordinals of frames after it count from."""
    return FRAME.pack(len(message) + 8, 0) + message + BASE.pack(base)


def frame(message: bytes, relative_ordinal: int = 0) -> bytes:
    """Frame any other message."""
    return FRAME.pack(len(message), relative_ordinal) + message


def iterate_frames(body: bytes) -> Iterator[Frame[bytes]]:
    """Give a segment's frames in order, Begin frames without their base.

    This is the readable form, for people's tools and tests; the consumer's decoder has a faster loop of its own.

    Raises:
        FormatError: the body ends within a frame.
    """
    for _, each in iterate_placed_frames(body):
        yield each


def iterate_placed_frames(body: Body) -> Iterator[tuple[int, Frame[Body]]]:
    """Give `iterate_frames`, each with the byte that its frame begins at; those of a view hold views."""
    at, end, base = 0, len(body), 0
    while at < end:
        if at + FRAME.size > end:
            raise FormatError(f"segment ends within a frame at byte {at}")
        length, relative = FRAME.unpack_from(body, at)
        begin = at
        at += FRAME.size
        message = body[at : at + length]
        if not length or len(message) != length:
            raise FormatError(f"segment ends within a frame at byte {at}")
        at += length
        kind = message[0]
        if kind == pgoutput.BEGIN:
            if length <= BASE.size:
                raise FormatError(f"begin frame at byte {at - length} is too short")
            (base,) = BASE.unpack_from(message, length - 8)
            yield begin, Frame(kind, 0, message[:-8])
        else:
            yield begin, Frame(kind, base + relative if relative else 0, message)
