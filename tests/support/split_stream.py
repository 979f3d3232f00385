"""A table with several lanes without servers: a source that makes up changes, and lanes that apply them at their own pace."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from live_migration.common import pgoutput
from live_migration.common.meeting import GATHER, SCATTER, Meeting, decode_meeting
from live_migration.common.relation import QualifiedName
from live_migration.common.segment import FRAGMENT, HEADER, SEGMENT, START, Position, decode_header, iterate_frames
from live_migration.consumer.folding import decode_change
from live_migration.consumer.row_encoding import UNCHANGED, Value
from tests.support.messages import put_delete, put_insert, put_tuple, put_update

HOT = QualifiedName("public", "hot")
HOT_OID, OTHER_OID = 20_001, 20_002
KEYS = 14
Row = tuple[Value, ...]


@dataclass(frozen=True)
class Change:
    """A change of the hot table under one of its shapes (a number), or of another table (-1)."""

    shape: int
    message: bytes


@dataclass
class Source:
    """Makes up transactions, and knows what they come to: `rows` by key."""

    rng: random.Random
    rows: dict[bytes, Row] = field(default_factory=dict)
    shape: int = 0
    transactions: list[list[Change]] = field(default_factory=list)

    def transact(self) -> None:
        """Add a transaction."""
        changes: list[Change] = []
        if self.rng.random() < 0.1:
            self.shape += 1  # a column more, NULL in the rows of before
            self.rows = {key: (*row, None) for key, row in self.rows.items()}
        for _ in range(self.rng.choice((1, 1, 2, 5, 30))):
            changes.append(self._change())
            if self.rng.random() < 0.2:
                changes.append(Change(-1, put_insert(OTHER_OID, [b"other"])))
        self.transactions.append(changes)

    def _change(self) -> Change:
        free = [key for key in (b"%d" % n for n in range(KEYS)) if key not in self.rows]
        kind = self.rng.choices("iudkt", (4, 4, 2, 3, 0.15))[0]
        if kind == "t":
            self.rows.clear()
            return Change(self.shape, b"T" + struct.pack(">IBI", 1, 0, HOT_OID))
        if not self.rows or (kind == "i" and free):
            key = self.rng.choice(free)
            self.rows[key] = self._row(key)
            return Change(self.shape, put_insert(HOT_OID, self.rows[key]))
        key = self.rng.choice(sorted(self.rows))
        if kind == "d":
            del self.rows[key]
            return Change(self.shape, put_delete(HOT_OID, key=self._old_key(key)))
        if kind == "k" and free:
            return self._change_key(key, self.rng.choice(free))
        new = self._row(key)
        self.rows[key] = new
        return Change(self.shape, put_update(HOT_OID, new))

    def _change_key(self, key: bytes, to: bytes) -> Change:
        new = self._row(to)
        before = self.rows.pop(key)
        if self.rng.random() < 0.3:  # the big value stays, and is not sent
            sent: Row = (*new[:2], UNCHANGED, *new[3:])
            new = (*new[:2], before[2], *new[3:])
        else:
            sent = new
        self.rows[to] = new
        return Change(self.shape, put_update(HOT_OID, sent, key=self._old_key(key)))

    def _row(self, key: bytes) -> Row:
        value, big = (b"%d" % self.rng.getrandbits(64) for _ in range(2))
        big *= self.rng.choice((1, 1, 1, 200))
        return (key, value, big, *(b"%d" % self.rng.getrandbits(20) for _ in range(self.shape)))

    def _old_key(self, key: bytes) -> Row:
        return (key, None, None, *[None] * self.shape)


def session(transactions: Sequence[list[Change]], first: int) -> Iterator[bytes]:
    """Give the messages of a replication session that begins with this transaction: it tells each shape once more."""
    told: dict[int, int] = {}
    for number, changes in enumerate(transactions[first:], first):
        lsn = 1000 * (number + 1)
        yield b"B" + struct.pack(">QqI", lsn, 0, number)
        for change in changes:
            oid = OTHER_OID if change.shape < 0 else HOT_OID
            if told.get(oid) != change.shape:
                told[oid] = change.shape
                yield put_relation(change.shape)
            yield change.message
        yield b"C\0" + struct.pack(">QQq", lsn, lsn + 8, 0)


def put_relation(shape: int) -> bytes:
    oid, name = (OTHER_OID, b"other") if shape < 0 else (HOT_OID, b"hot")
    columns = [b"id", b"v", b"big", *(b"c%d" % n for n in range(shape))] if shape >= 0 else [b"v"]
    described = [
        bytes([n == 0 and shape >= 0]) + column + b"\0" + struct.pack(">Ii", 25, -1) for n, column in enumerate(columns)
    ]
    return b"R%bpublic\0%b\0d%b%b" % (
        struct.pack(">I", oid),
        name,
        struct.pack(">H", len(columns)),
        b"".join(described),
    )


class OrderLost(AssertionError):
    """A lane came upon rows, or a shape, that could not be there in the source's order."""


class Lanes:
    """Lanes that apply a change log, each a step at a time, whichever is next."""

    def __init__(self, count: int, rng: random.Random, *, heeds_meetings: bool = True) -> None:
        self.rows: dict[bytes, Row] = {}
        self.meeting_count = 0
        self._heeds = heeds_meetings
        self._rng = rng
        self._queues: list[list[tuple[Position, pgoutput.Begin, int, bytes]]] = [[] for _ in range(count)]
        self._chains = [START] * count
        self._fragments: list[list[bytes]] = [[] for _ in range(count)]
        self._reached = [START] * count
        self._arrived = [0] * count
        self._shape = 3  # columns of the table

    def add(self, lane: int, record: bytes) -> None:
        """Take a record of the log; its segment must follow the lane's last one."""
        header = decode_header(record)
        self._fragments[lane].append(record[HEADER.size :])
        if header.kind != SEGMENT and len(self._fragments[lane]) < header.fragment_count:
            return
        body = b"".join(self._fragments[lane])
        self._fragments[lane].clear()
        assert header.kind in (SEGMENT, FRAGMENT)
        assert header.previous == self._chains[lane]
        assert header.last > header.previous
        self._chains[lane] = header.last
        begin = pgoutput.Begin(0, 0, 0)
        for number, each in enumerate(iterate_frames(body)):
            if each.kind == pgoutput.BEGIN:
                begin = pgoutput.decode_begin(each.message)
            elif each.kind in (GATHER, SCATTER):
                assert number == 1, "lanes meet at the beginning of a segment, all before which they have applied"
            position = Position(begin.commit_lsn, 2**63 - 1 if each.kind == pgoutput.COMMIT else each.ordinal)
            self._queues[lane].append((position, begin, each.kind, each.message))

    def run(self) -> None:
        """Apply everything, lanes in any order; raise OrderLost where that shows, or where all lanes wait for one another."""
        while waiting := [lane for lane, queue in enumerate(self._queues) if queue]:
            self._rng.shuffle(waiting)
            moved = [self._step(lane) for lane in waiting[: self._rng.randint(1, len(waiting))]]
            # twice: in the first round all may have come no further than to arrive
            if not any(moved) and not any(self._step(lane) for lane in (*waiting, *waiting)):
                raise OrderLost(f"lanes {waiting} wait for one another")

    def _step(self, lane: int) -> bool:
        for step in range(self._rng.choice((1, 3, 50))):
            if not self._queues[lane]:
                break
            position, begin, kind, message = self._queues[lane][0]
            if (
                kind in (GATHER, SCATTER)
                and self._heeds
                and not self._may_pass(lane, decode_meeting(message, begin.commit_lsn))
            ):
                return step > 0
            self._queues[lane].pop(0)
            self._apply(kind, message)
            if position.ordinal:
                self._reached[lane] = position
        return True

    def _may_pass(self, lane: int, meeting: Meeting) -> bool:
        if meeting.is_leader:
            assert lane == meeting.leader
            passes = all(self._arrived[each] >= meeting.commit_lsn for each in meeting.lanes[1:])
        else:
            self._arrived[lane] = meeting.commit_lsn
            passes = self._reached[meeting.leader] >= (meeting.commit_lsn, 2**63 - 1)
        self.meeting_count += passes
        return passes

    def _apply(self, kind: int, message: bytes) -> None:
        if kind == pgoutput.RELATION:
            relation = pgoutput.decode_relation(message)
            if relation.oid == HOT_OID and len(relation.columns) > self._shape:
                self.rows = {
                    key: (*row, *[None] * (len(relation.columns) - self._shape)) for key, row in self.rows.items()
                }
                self._shape = len(relation.columns)
        elif kind == pgoutput.TRUNCATE:
            self.rows.clear()
        elif kind in (pgoutput.INSERT, pgoutput.UPDATE, pgoutput.DELETE) and pgoutput.relation_oid(message) == HOT_OID:
            self._apply_row(message)

    def _apply_row(self, message: bytes) -> None:
        kind, old, new = decode_change(message)
        if len(new or old or ()) != self._shape:
            raise OrderLost("a row of another shape than the table's")
        key = _key(old or new)
        if kind != pgoutput.INSERT:
            before = self.rows.pop(key, None)
            if before is None:
                raise OrderLost(f"no row {key!r}")
        if new is not None:
            row = tuple(before[i] if value is UNCHANGED else value for i, value in enumerate(new))
            if _key(new) in self.rows:
                raise OrderLost(f"row {new[0]!r} is there already")
            self.rows[_key(new)] = row


def _key(row: Sequence[Value] | None) -> bytes:
    assert row is not None
    key = row[0]
    assert isinstance(key, bytes)
    return key


__all__ = ["HOT", "HOT_OID", "Lanes", "OrderLost", "Source", "put_relation", "put_tuple", "session"]
