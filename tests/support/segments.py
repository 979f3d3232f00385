"""A producer by hand: pgoutput messages, segments with their chain of positions, and Kafka transactions of them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from aiokafka import AIOKafkaProducer

from live_migration.common import pgoutput, segment
from live_migration.common.home import SUSPECT, Home, decode_suspect, encode_home
from live_migration.common.segment import COMMIT_ORDINAL, FRAGMENT, SEGMENT, START, Position, SegmentHeader

Cell = str | bytes | int | None
"""Text as str, binary as bytes or (int4) int, NULL."""
INT4, TEXT = 23, 25


def text(value: str) -> bytes:
    return value.encode() + b"\0"


REAL_OIDS: dict[str, int] = {}
"""Of tables that a test has on a source."""


def oid_of(table: str) -> int:
    """Give a source oid for a table: any number, the same each time, where it has no real one."""
    return REAL_OIDS.get(table) or zlib.crc32(table.encode()) % 1_000_000 + 20_000


def relation(table: str, columns: Sequence[tuple[str, int, bool]], *, identity: str = "d") -> bytes:
    """A Relation message; columns are name, type oid, whether of the key."""
    described = b"".join(
        bytes([is_key]) + text(name) + struct.pack(">Ii", type_oid, -1) for name, type_oid, is_key in columns
    )
    head = b"R" + struct.pack(">I", oid_of(table)) + text("public") + text(table) + identity.encode()
    return head + struct.pack(">H", len(columns)) + described


def row(cells: Sequence[Cell]) -> bytes:
    """A tuple; a str goes as text, an int or bytes as binary."""
    encoded = struct.pack(">H", len(cells))
    for cell in cells:
        if cell is None:
            encoded += b"n"
            continue
        value = cell.encode() if isinstance(cell, str) else struct.pack(">i", cell) if isinstance(cell, int) else cell
        encoded += (b"t" if isinstance(cell, str) else b"b") + struct.pack(">I", len(value)) + value
    return encoded


def insert(table: str, *cells: Cell) -> bytes:
    return b"I" + struct.pack(">I", oid_of(table)) + b"N" + row(cells)


def update(table: str, *cells: Cell, key: Sequence[Cell] | None = None) -> bytes:
    old = b"" if key is None else b"K" + row(key)
    return b"U" + struct.pack(">I", oid_of(table)) + old + b"N" + row(cells)


def delete(table: str, *cells: Cell) -> bytes:
    return b"D" + struct.pack(">I", oid_of(table)) + b"K" + row(cells)


def truncate(*tables: str) -> bytes:
    return b"T" + struct.pack(f">IB{len(tables)}I", len(tables), 0, *map(oid_of, tables))


def logical_message(prefix: str, content: bytes) -> bytes:
    return b"M\x01" + struct.pack(">Q", 0) + text(prefix) + struct.pack(">I", len(content)) + content


@dataclass
class LaneWriter:
    """Builds one lane's records; keeps its chain. `cut` ends the present segment, wherever it stands."""

    lane: int
    topic_id: bytes
    relations: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    records: list[bytes] = field(default_factory=list)
    position: Position = START
    next_lsn: int = 0x1000
    xid: int = 0
    """Of every transaction; 0: each has one of its own, far above those of any server."""
    _previous: Position = START
    _body: bytes = b""
    _described: set[int] = field(default_factory=set)
    _change_count: int = 0
    _ordinal: int = 0
    _lsn: int = 0

    def describe(self, table: str, message: bytes, *, home: Home | None = None) -> None:
        before = () if home is None else (encode_home(oid_of(table), home),)
        self.relations[oid_of(table)] = (*before, message)

    def transaction(self, changes: Sequence[bytes], *, cut_after: int = 0) -> None:
        """Add a source transaction; with `cut_after`, a segment ends after each so many of its changes."""
        self._lsn = self.next_lsn
        self.next_lsn += 0x100
        self._ordinal = 0
        self._begin()
        for number, change in enumerate(changes, 1):
            self._add(change)
            if cut_after and number % cut_after == 0:
                self.cut()
                self._begin()
        self._body += segment.frame(b"C\0" + struct.pack(">QQq", self._lsn, self._lsn + 0x80, self._lsn))
        self.position = Position(self._lsn, COMMIT_ORDINAL)

    def _begin(self) -> None:
        message = b"B" + struct.pack(">QqI", self._lsn, self._lsn, self.xid or 1_000_000 + self._lsn)
        self._body += segment.begin_frame(message, self._ordinal)
        self._base = self._ordinal

    def _add(self, change: bytes) -> None:
        self._ordinal += 1
        oids: tuple[int, ...] = ()
        if change[0] in b"IUD":
            oids = (pgoutput.relation_oid(change),)
        elif change[0] in b"T":
            oids = pgoutput.decode_truncate(change).relation_oids
        elif change[0] == SUSPECT:
            oids = (decode_suspect(change),)
        for oid in oids:
            if oid not in self._described:
                self._body += b"".join(map(segment.frame, self.relations[oid]))
                self._described.add(oid)
        self._body += segment.frame(change, self._ordinal - self._base)
        self._change_count += 1
        self.position = Position(self._lsn, self._ordinal)

    def cut(self, *, fragment_bytes: int = 0) -> None:
        """End the segment; with `fragment_bytes` it goes in fragments of that size."""
        pieces = [self._body]
        if fragment_bytes:
            pieces = [self._body[i : i + fragment_bytes] for i in range(0, len(self._body), fragment_bytes)]
        for index, piece in enumerate(pieces):
            header = SegmentHeader(
                FRAGMENT if fragment_bytes else SEGMENT,
                self.topic_id,
                self.lane,
                self._previous,
                self.position,
                self._change_count,
                index,
                len(pieces) if fragment_bytes else 0,
            )
            self.records.append(segment.encode_header(header) + piece)
        self._previous = self.position
        self._body = b""
        self._described.clear()
        self._change_count = 0

    def take(self) -> list[tuple[int, bytes]]:
        """Give the records built since the last time, as (lane, record)."""
        records, self.records = self.records, []
        return [(self.lane, record) for record in records]


async def send(producer: AIOKafkaProducer, topic: str, records: Sequence[tuple[int, bytes]]) -> None:
    """Send records in one Kafka transaction."""
    async with producer.transaction():
        for lane, record in records:
            await producer.send(topic, record, partition=lane)
