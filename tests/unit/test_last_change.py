"""A transaction that one session was sent in part, and the next is sent otherwise: its changes are in the log once all the same.

Which tables are published is what a walsender's cache says, and that depends on what it has decoded before (`producer.last_change`).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from live_migration.common.pgoutput import FormatError
from live_migration.common.relation import QualifiedName
from live_migration.common.segment import COMMIT_ORDINAL, START, Position
from live_migration.common.timescale import Layout
from live_migration.producer.ack_tracker import AckTracker
from live_migration.producer.homes import Homes, StaleHomes
from live_migration.producer.last_change import ChangeTail, LastChange
from live_migration.producer.router import Router
from tests.unit.test_router import LANES, OIDS, SEGMENT_BYTES, decoded, put_insert, put_relation, values_by_lane

JOINING, *STAYING = OIDS
PREFIX = 30


@dataclass(frozen=True)
class Change:
    """A row, and the LSN of the record that it stands in."""

    lsn: int
    oid: int
    value: bytes


Transaction = list[Change]


def copied(lsn: int, message: bytes) -> bytes:
    body = b"w" + struct.pack(">QQq", lsn, lsn, 12345) + message
    return b"d" + struct.pack(">I", len(body) + 4) + body


def commit_lsn(transaction: Transaction) -> int:
    return transaction[-1].lsn + 8


def session(transactions: Sequence[Transaction], first: int, unsent: set[int]) -> Iterator[bytes]:
    """Give what a session is sent that begins with a transaction, without the joining table's changes at these LSNs."""
    told: set[int] = set()
    for transaction in transactions[first:]:
        end = commit_lsn(transaction)
        yield copied(transaction[0].lsn, b"B" + struct.pack(">QqI", end, 0, 1))
        for change in transaction:
            if change.oid == JOINING and change.lsn in unsent:
                continue
            if change.oid not in told:
                told.add(change.oid)
                yield copied(change.lsn, put_relation(change.oid))
            yield copied(change.lsn, put_insert(change.oid, change.value))
        yield copied(end, b"C\0" + struct.pack(">QQq", end, end + 8, 0))


def make(rng: random.Random) -> list[Transaction]:
    """Transactions of single rows and of rows that one record holds, of which some come to several reads."""
    lsn, transactions = 1 << 33, []
    for number in range(4):
        transaction: Transaction = []
        for _ in range(rng.randint(1, 12)):
            lsn += rng.randint(16, 4000)
            oid = rng.choice(OIDS)
            rows = rng.choice((1, 1, 1, 5, 40))
            size = rng.choice((8, 8, 60, 900)) if rows > 1 else rng.choice((8, 60, 5_000))
            transaction += [Change(lsn, oid, b"%d %d %d" % (number, lsn, row) + b"x" * size) for row in range(rows)]
        transactions.append(transaction)
        lsn += 100
    return transactions


def route(transactions: Sequence[Transaction], rng: random.Random) -> dict[int, list[bytes]]:
    """Route what four sessions are sent, three of which end anywhere; give the log by lane."""
    log: dict[int, list[bytes]] = {lane: [] for lane in range(LANES)}
    positions, held, first = [START] * LANES, None, 0
    lsns = sorted({change.lsn for transaction in transactions for change in transaction})
    for left in range(3, -1, -1):
        unsent = set(lsns[: rng.randint(0, len(lsns))])
        messages = list(session(transactions, first, unsent))
        router = Router(
            migration_id="m", topic_id=bytes(16), segment_bytes=SEGMENT_BYTES, positions=positions, acks=AckTracker(0), held=held
        )  # fmt: skip
        end = len(messages) if left == 0 else rng.randint(0, len(messages))
        at, committed = 0, first
        while at < end:
            upto = min(end, at + rng.choice((1, 2, 7, 30)))
            if left > 0 and upto == end and rng.random() < 0.5:  # the next message ends the session
                with pytest.raises(FormatError):
                    router.drain(b"".join(messages[at:upto]) + copied(1, b"?"))
            elif upto == at + 1 and rng.random() < 0.5:
                assert router.drain(memoryview(messages[at])) == len(messages[at])
            else:
                data = b"".join(messages[at:upto]) + (messages[upto][:40] if upto < len(messages) else b"")
                assert router.drain(data) == len(b"".join(messages[at:upto]))
            committed += sum(message[PREFIX : PREFIX + 1] == b"C" for message in messages[at:upto])
            at = upto
            if rng.random() < 0.4 or (left == 0 and at == end):
                for lane, found in values_by_lane(router.take()).items():
                    log[lane] += found
                positions, held, first = list(router.positions), router.last_change, committed
    return log


def test_each_change_stands_in_the_log_once_whatever_each_session_is_sent() -> None:
    sent_otherwise = 0
    for seed in range(400):
        rng = random.Random(seed)
        transactions = make(rng)
        found = decoded(route(transactions, rng))
        for lane, changes in found.items():
            positions = [change.position for change in changes]
            assert positions == sorted(set(positions)), f"seed {seed}, lane {lane}"
            open_ones = {each.commit_lsn for each in positions} - {
                each.commit_lsn for each in positions if each.ordinal == COMMIT_ORDINAL
            }
            assert not open_ones, f"seed {seed}, lane {lane}: no Commit"
        messages = [change.message for changes in found.values() for change in changes if change.message[:1] == b"I"]
        rows = [put_insert(each.oid, each.value) for transaction in transactions for each in transaction]
        staying = [row for row in rows if int.from_bytes(row[1:5], "big") != JOINING]
        for oid in STAYING:
            key = struct.pack(">I", oid)
            assert [m for m in messages if m[1:5] == key] == [r for r in staying if r[1:5] == key], f"seed {seed}"
        joined = [m for m in messages if m[1:5] == struct.pack(">I", JOINING)]
        assert len(joined) == len(set(joined)), f"seed {seed}"
        sent_otherwise += len(joined) < len(rows) - len(staying)
    assert sent_otherwise > 100


def test_what_a_session_is_not_sent_any_more_hides_no_other_tables_changes() -> None:
    """As it was found: three rows of a table that joins meanwhile, then a transaction that is cut after five of another."""
    other = STAYING[0]
    transaction = [Change(100 + n, JOINING if n < 3 else other, b"%d" % n) for n in range(13)]
    router = Router(
        migration_id="m", topic_id=bytes(16), segment_bytes=SEGMENT_BYTES, positions=[START] * LANES, acks=AckTracker(0)
    )
    messages = list(session([transaction], 0, set()))
    router.drain(b"".join(messages[:11]))
    log = values_by_lane(router.take())
    assert router.last_change == LastChange(commit_lsn(transaction), 107, 1, 8)
    again = Router(
        migration_id="m", topic_id=bytes(16), segment_bytes=SEGMENT_BYTES, positions=router.positions, acks=AckTracker(0), held=router.last_change
    )  # fmt: skip
    again.drain(b"".join(session([transaction], 0, {100, 101, 102})))
    for lane, found in values_by_lane(again.take()).items():
        log[lane] += found
    rows = [
        c.message
        for changes in decoded(log).values()
        for c in changes
        if c.message[:5] == b"I" + struct.pack(">I", other)
    ]
    assert rows == [put_insert(other, each.value) for each in transaction[3:]]
    assert again.last_change is None


def test_a_session_that_has_not_come_so_far_yet_says_what_the_log_holds() -> None:
    held = LastChange(1000, 900, 2, 50)
    router = Router(
        migration_id="m", topic_id=bytes(16), segment_bytes=SEGMENT_BYTES, positions=[Position(1000, 50), *[START] * (LANES - 1)],
        acks=AckTracker(0), held=held,
    )  # fmt: skip
    assert router.last_change == held
    begin = copied(900, b"B" + struct.pack(">QqI", 1000, 0, 1))
    router.drain(begin + copied(900, put_relation(OIDS[1])) + copied(900, put_insert(OIDS[1], b"1")) * 2)
    assert router.last_change == held
    assert router.take() == []
    router.drain(copied(900, put_insert(OIDS[1], b"1")))
    assert router.last_change == LastChange(1000, 900, 3, 51)


@pytest.mark.parametrize("reads", [1, 3, 50])
def test_changes_of_one_record_are_numbered_over_all_reads(reads: int) -> None:
    tail = ChangeTail()
    data = [copied(5, put_insert(1, b"x"))] * 2 + [copied(7, put_relation(1))] + [copied(7, put_insert(1, b"x"))] * 50
    size = -(-len(data) // reads)
    for first in range(0, len(data), size):
        some = data[first : first + size]
        end = len(b"".join(some))
        tail.note(b"".join(some) + data[-1], end - len(some[-1]), end)
    assert (tail.lsn, tail.number) == (7, 50)


@pytest.mark.parametrize("read_before", [0, 3])
def test_a_relation_that_nobody_knows_ends_a_session_in_the_midst_of_a_read(read_before: int) -> None:
    """What the read had before it is in the log: five rows of a chunk, then one of a new one, in one transaction."""
    first = session_of(Homes(Layout("2.29.2"), {}, KNOWN - {NEW}))
    transaction = [Change(BASE + 16 * n, OLD_OID, b"row %d" % n) for n in range(5)] + [
        Change(BASE + 500, NEW_OID, b"new")
    ]
    messages = list(session([transaction], 0, set()))
    if read_before:
        first.drain(b"".join(messages[:read_before]))
    with pytest.raises(StaleHomes):
        first.drain(b"".join(messages[read_before:]))
    second = session_of(Homes(Layout("2.29.2"), {}, KNOWN), first)
    second.drain(b"".join(messages))
    assert sorted(rows_of(first, second)) == sorted(put_insert(each.oid, each.value) for each in transaction)


def test_nor_does_it_take_what_is_behind_it_for_had() -> None:
    """A transaction whose changes stand before, and after, those of one that committed earlier."""
    first = session_of(Homes(Layout("2.29.2"), {}, KNOWN - {NEW}))
    earlier = [Change(BASE + 2000, OLD_OID, b"earlier")]
    places = ((100, OLD_OID), (200, OLD_OID), (300, NEW_OID), (400, NEW_OID), (5000, OLD_OID))
    transaction = [Change(BASE + at, oid, b"%d" % at) for at, oid in places]
    messages = list(session([earlier, transaction], 0, set()))
    first.drain(b"".join(messages[:4]))
    with pytest.raises(StaleHomes):
        first.drain(b"".join(messages[4:]))
    second = session_of(Homes(Layout("2.29.2"), {}, KNOWN), first)
    second.drain(b"".join(session([transaction], 0, set())))
    assert sorted(rows_of(first, second)) == sorted(put_insert(each.oid, each.value) for each in earlier + transaction)


@pytest.mark.parametrize("is_transactional", [True, False])
@pytest.mark.parametrize("is_apart", [True, False])
def test_a_message_that_ends_where_the_next_record_begins_is_no_change_of_it(
    is_apart: bool, is_transactional: bool
) -> None:
    """A logical message bears the LSN of its record's end, the rows of a COPY that of their record's beginning: another transaction's."""
    others = copied(
        BASE, b"M" + bytes([is_transactional]) + struct.pack(">Q", BASE) + b"other\0" + struct.pack(">I", 0)
    )
    rows = [Change(BASE, OLD_OID, b"row %d" % n) for n in range(3)]
    begin, relation, *messages, commit = session([rows], 0, set())
    before = [others]
    if is_transactional:
        at = BASE - 8
        before = [
            copied(at, b"B" + struct.pack(">QqI", at, 0, 2)),
            others,
            copied(at, b"C\0" + struct.pack(">QQq", at, at, 0)),
        ]
    first = session_of(Homes(None, {}))
    if is_apart:
        first.drain(b"".join(before))
        first.drain(b"".join([begin, relation, *messages[:2]]))
    else:
        first.drain(b"".join([*before, begin, relation, *messages[:2]]))
    second = session_of(Homes(None, {}), first)
    second.drain(b"".join([begin, relation, *messages, commit]))
    assert sorted(rows_of(first, second)) == sorted(put_insert(each.oid, each.value) for each in rows)


OLD_OID, NEW_OID = OIDS[:2]
KNOWN = frozenset(QualifiedName("public", f"t{oid}") for oid in OIDS)
NEW = QualifiedName("public", f"t{NEW_OID}")
BASE = 1 << 33


def session_of(homes: Homes, before: Router | None = None) -> Router:
    """Give the router of a session, which goes on where another ended."""
    return Router(
        migration_id="m",
        topic_id=bytes(16),
        segment_bytes=SEGMENT_BYTES,
        positions=list(before.positions) if before else [START] * LANES,
        acks=AckTracker(0),
        homes=homes,
        held=before.last_change if before else None,
    )


def rows_of(*routers: Router) -> list[bytes]:
    """Give the rows of a log that these sessions wrote one after another."""
    log: dict[int, list[bytes]] = {lane: [] for lane in range(LANES)}
    for router in routers:
        for lane, values in values_by_lane(router.take()).items():
            log[lane] += values
    return [change.message for changes in decoded(log).values() for change in changes if change.message[:1] == b"I"]
