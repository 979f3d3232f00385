"""A lane's buffer of frames, and the records it is cut into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from live_migration.common.segment import (
    BASE,
    COMMIT_ORDINAL,
    FRAGMENT,
    FRAME,
    SEGMENT,
    Position,
    SegmentHeader,
    begin_frame,
    encode_header,
    frame,
)
from live_migration.producer.splitting import Message, SplitRelation
from live_migration.producer.transactions import LaneFrames

BEGIN_FRAME_BYTES = FRAME.size + 21 + BASE.size
"""Size of a framed Begin message."""


class Record(NamedTuple):
    """A segment, or the fragments of one. `values` are the Kafka records' values, made when asked for and only once."""

    lane: int
    key: bytes | None
    size: int
    values: Iterator[bytes]


class Route(NamedTuple):
    """Where a relation's changes go, and the frame that must stand before the first of them in a segment."""

    lane: LaneBuffer
    relation_frame: bytes
    name: str
    stands_alone: bool = False
    """Whether its changes begin a segment: all before them can be applied, whatever they mean."""
    is_watched: bool = True
    """Whether what is changed in a table of compressed rows is told: it has REPLICA IDENTITY FULL."""
    is_chunk: bool = False
    """Whether its rows are a hypertable's."""
    split: SplitRelation | None = None
    """Which lane a row belongs to, where the table has several; `lane` is the leader then."""


class LaneBuffer:
    """What was received for one lane and is not cut yet. `parts[0]` is the place of the header.

    `router.Router.drain` appends to it without a call; everything rare is done here.
    """

    __slots__ = (
        "_topic_id",
        "base",
        "change_count",
        "commit_lsn",
        "has_begin",
        "lane",
        "last",
        "ordinal",
        "parts",
        "previous",
        "relations",
        "size",
    )

    def __init__(self, lane: int, topic_id: bytes, last: Position) -> None:
        self.lane = lane
        self._topic_id = topic_id
        self.last = last
        """Position of the last change that was cut off."""
        self.commit_lsn, self.ordinal = last
        self._clear()

    def _clear(self) -> None:
        self.parts: list[bytes] = [b""]
        self.size = 0
        self.change_count = 0
        self.base = 0
        self.has_begin = False
        self.relations: dict[bytes, str] = {}
        """Relations whose message stands in the buffer: oid as in the stream, name."""

    @property
    def position(self) -> Position:
        """Position of the last change appended, cut or not."""
        return Position(self.commit_lsn, self.ordinal)

    def is_before_commit_of(self, commit_lsn: int) -> bool:
        """Tell whether the Commit of a transaction comes after all that was appended."""
        return self.commit_lsn < commit_lsn or (self.commit_lsn == commit_lsn and self.ordinal < COMMIT_ORDINAL)

    def prepare(
        self, begin: bytes, commit_lsn: int, base: int, routes: Sequence[tuple[bytes, Route]], before: bytes = b""
    ) -> None:
        """Put before a message what it needs: the transaction's Begin and the Relation messages, where not there yet.

        `before`: a frame that stands between both, in a buffer that is empty.
        """
        if not self.has_begin:
            self._append(begin_frame(begin, base))
            self.has_begin = True
            self.base = base
        if before:
            self._append(before)
        for oid, route in routes:
            if oid not in self.relations:
                self._append(route.relation_frame)
                self.relations[oid] = route.name
        self.commit_lsn = commit_lsn

    def missing_bytes(self, routes: Sequence[tuple[bytes, Route]]) -> int:
        """Give the size of what `prepare` would put in."""
        missing = 0 if self.has_begin else BEGIN_FRAME_BYTES
        for oid, route in routes:
            if oid not in self.relations:
                missing += len(route.relation_frame)
        return missing

    def append_change(self, message: bytes, ordinal: int) -> None:
        """Append a change after `prepare`."""
        self._append(frame(message, ordinal - self.base))
        self.ordinal = ordinal
        self.change_count += 1

    def append_commit(self, framed: bytes) -> None:
        """Append the framed Commit after `prepare`."""
        self._append(framed)
        self.ordinal = COMMIT_ORDINAL
        self.has_begin = False

    def append_transactions(self, given: LaneFrames) -> None:
        """Append whole transactions, after the end of another."""
        self.parts.append(given.frames)
        self.size += len(given.frames)
        self.change_count += given.change_count
        self.commit_lsn, self.ordinal = given.commit_lsn, COMMIT_ORDINAL

    def cut(self) -> Record:
        """Make a segment of all that was appended."""
        self.parts[0] = self._header(SEGMENT)
        value = b"".join(self.parts)
        return self._finish(len(value), iter((value,)))

    def cut_fragments(self, message: Message, ordinal: int, slice_bytes: int) -> Record:
        """Make fragments of what `prepare` put in and a change that is too big for a segment, which is not copied."""
        self.ordinal = ordinal
        self.change_count = 1
        pieces = [*self.parts[1:], FRAME.pack(len(message), ordinal - self.base), message]
        size = self.size + FRAME.size + len(message)
        header = SegmentHeader(
            FRAGMENT, self._topic_id, self.lane, self.last, self.position, 1, 0, -(-size // slice_bytes)
        )
        return self._finish(size, slice_fragments(header, pieces, slice_bytes))

    def _append(self, framed: bytes) -> None:
        self.parts.append(framed)
        self.size += len(framed)

    def _header(self, kind: int) -> bytes:
        header = SegmentHeader(kind, self._topic_id, self.lane, self.last, self.position, self.change_count, 0, 0)
        return encode_header(header)

    def _finish(self, size: int, values: Iterator[bytes]) -> Record:
        key = next(iter(self.relations.values())).encode() if len(self.relations) == 1 else None
        self.last = self.position
        self._clear()
        return Record(self.lane, key, size, values)


def slice_fragments(header: SegmentHeader, pieces: Sequence[Message], slice_bytes: int) -> Iterator[bytes]:
    """Give the fragments of a body that is the pieces joined, one at a time; nothing bigger than a slice is copied."""
    views = [memoryview(piece) for piece in reversed(pieces)]
    for index in range(header.fragment_count):
        value: list[Message] = [encode_header(header._replace(fragment_index=index))]
        wanted = slice_bytes
        while wanted and views:
            taken = views[-1][:wanted]
            wanted -= len(taken)
            value.append(taken)
            if len(taken) == len(views[-1]):
                views.pop()
            else:
                views[-1] = views[-1][len(taken) :]
        yield b"".join(value)
