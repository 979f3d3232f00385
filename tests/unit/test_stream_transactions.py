"""Small transactions taken by the hundred: the log is the very one that taking each message by itself makes, byte for byte."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.common.lanes import LaneMap
from live_migration.common.relation import QualifiedName
from live_migration.common.segment import START, Position
from live_migration.producer import router as router_module
from live_migration.producer.ack_tracker import AckTracker
from live_migration.producer.batcher import LaneBuffer
from live_migration.producer.last_change import LastChange
from live_migration.producer.router import Router
from live_migration.producer.transactions import StreamTransactions, find_transactions
from tests.unit.test_router import (
    MIGRATION,
    OIDS,
    TOPIC,
    copy_data,
    keepalive,
    put_begin,
    put_commit,
    put_insert,
    put_message,
    put_relation,
    put_truncate,
)

SPLIT = QualifiedName("public", f"t{OIDS[5]}")


def new_router(
    shared: int, segment_bytes: int, positions: list[Position] | None = None, held: LastChange | None = None
) -> tuple[Router, AckTracker]:
    lane_map = LaneMap(shared, ((SPLIT, 2),))
    acks = AckTracker(0)
    router = Router(
        migration_id=MIGRATION,
        topic_id=TOPIC,
        segment_bytes=segment_bytes,
        positions=positions or [START] * lane_map.lane_count,
        acks=acks,
        lane_map=lane_map,
        held=held,
    )
    return router, acks


@pytest.fixture(autouse=True)
def always_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few are taken together, too, which would not be worth it."""
    monkeypatch.setattr(router_module, "_are_worth", lambda found, lanes: True)


def put_row(kind: bytes, oid: int, value: bytes) -> bytes:
    return kind + struct.pack(">I", oid) + b"N" + struct.pack(">HcI", 1, b"t", len(value)) + value


def random_stream(rng: random.Random, count: int, oids: list[int], others: float) -> list[bytes]:
    """Give a stream of small transactions, now and then with something else in one."""
    messages: list[bytes] = []
    lsn = 0
    described: set[int] = set()
    # Where sizes are many, rows are put together otherwise than where they are few; those of one kind are taken for a span.
    sizes = rng.choice(((0, 4, 4, 4, 40, 41, 300), range(60)))
    kinds = rng.choice(((b"I", b"I", b"U", b"D"), (b"I",), (b"D",)))
    for _ in range(count):
        lsn += rng.randrange(1, 1 << 20)
        messages.append(put_begin(lsn))
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 8))):
            oid = rng.choice(oids)
            if oid not in described or rng.random() < others / 3:
                described.add(oid)
                messages.append(put_relation(oid, f"t{oid}"))
            value = rng.randbytes(rng.choice(sizes))
            if rng.random() < others:
                value = copy_data([put_begin(5), put_row(b"I", oid, b"x"), put_commit(5)])
            messages.append(put_row(rng.choice(kinds), oid, value))
            if rng.random() < others:
                messages.append(
                    rng.choice(
                        (
                            put_message("somebody", "x"),
                            put_truncate([oid]),
                            b"Y" + bytes(9),
                            put_insert(oid, bytes(5000)),
                        )
                    )
                )
        messages.append(put_commit(lsn))
        if rng.random() < others:
            messages.append(rng.choice((keepalive(lsn + 8), put_message("somebody", "x", transactional=False))))
    return messages


def same_state(one: tuple[Router, AckTracker], other: tuple[Router, AckTracker]) -> None:
    assert one[0].positions == other[0].positions
    assert one[0].change_count == other[0].change_count
    assert one[0].last_change == other[0].last_change
    assert (one[1].in_transaction, one[1].confirmable_lsn) == (other[1].in_transaction, other[1].confirmable_lsn)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(),
    st.integers(1, 3),
    st.sampled_from((600, 4096, 100_000)),
    st.sampled_from((0.0, 0.01, 0.1)),
    st.booleans(),
)
def test_the_log_is_that_of_each_message_by_itself(
    seed: int, shared: int, segment_bytes: int, others: float, has_split: bool
) -> None:
    rng = random.Random(seed)
    messages = random_stream(rng, rng.randrange(1, 120), list(OIDS[:4]) + ([OIDS[5]] if has_split else []), others)
    end = rng.choice((len(messages), rng.randrange(1, len(messages) + 1)))  # within a transaction, too
    messages = messages[:end]
    one_by_one, at_once = new_router(shared, segment_bytes), new_router(shared, segment_bytes)
    for message in messages:
        one_by_one[0].drain(copy_data([message]))
    expected = [(record.lane, record.key, list(record.values)) for record in one_by_one[0].take()]
    data = copy_data(messages)
    found: list[tuple[int, bytes | None, list[bytes]]] = []
    at = until = 0
    while at < len(data):
        until = min(len(data), until + rng.choice((900, 5_000, 64 << 10)))
        at += at_once[0].drain(data[at:until])
    found = [(record.lane, record.key, list(record.values)) for record in at_once[0].take()]
    same_state(one_by_one, at_once)
    assert found == expected


@settings(deadline=None, max_examples=100)
@given(st.integers(), st.booleans())
def test_after_a_restart_only_what_is_new_goes_into_the_log(seed: int, is_held: bool) -> None:
    """The log may end in the middle of a transaction; what comes again is dropped, in either way the same."""
    rng = random.Random(seed)
    messages = random_stream(rng, 80, list(OIDS[:4]), 0.02)
    first, _ = new_router(2, 4096)
    first.drain(copy_data(messages[: rng.randrange(1, len(messages))]))
    first.take()
    held = first.last_change if is_held else None
    one_by_one, at_once = (new_router(2, 4096, list(first.positions), held) for _ in range(2))
    for message in messages:
        one_by_one[0].drain(copy_data([message]))
    expected = [(record.lane, record.key, list(record.values)) for record in one_by_one[0].take()]
    data = copy_data(messages)
    assert at_once[0].drain(data) == len(data)
    found = [(record.lane, record.key, list(record.values)) for record in at_once[0].take()]
    same_state(one_by_one, at_once)
    assert found == expected


def test_most_small_transactions_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    data = copy_data(random_stream(rng, 500, list(OIDS[:4]), 0.0))
    taken = []

    def watched(data: bytes, at: int, end: int) -> StreamTransactions | None:
        found = find_transactions(data, at, end)
        taken.append(found.count if found else 0)
        return found

    monkeypatch.setattr(router_module, "find_transactions", watched)
    assert new_router(3, 1 << 20)[0].drain(data) == len(data)
    assert sum(taken) > 480
    assert len(taken) < 12


@pytest.mark.parametrize("rows", [1, 3])
def test_where_none_can_be_taken_it_is_not_tried_for_each(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    messages = [put_relation(OIDS[0]), put_relation(OIDS[5])]
    known = put_insert(OIDS[0], b"x")
    for number in range(1, 300):
        row = put_insert(OIDS[5], struct.pack(">I", number))  # a table of several lanes
        messages += [put_begin(number * 100), known, *[row] * rows, put_commit(number * 100)]
    tries = []
    monkeypatch.setattr(router_module, "find_transactions", lambda data, at, end: tries.append(at))
    data = copy_data(messages)
    router, _ = new_router(1, 1 << 20)
    assert router.drain(data) == len(data)
    begun = len(tries)
    assert begun < 20
    messages = [put_begin(100_000), known, *[put_insert(OIDS[5], bytes(4))] * rows, put_commit(100_000)] * 50
    for _ in range(20):
        router.drain(copy_data(messages))
    assert 5 < len(tries) - begun < 15


def found_in(messages: list[bytes]) -> int:
    found = find_transactions(copy_data(messages), 0, 1 << 20)
    return found.count if found else 0


def test_what_is_no_whole_transaction_of_rows_ends_them() -> None:
    whole = [put_begin(100), put_insert(OIDS[0], b"x"), put_insert(OIDS[1], b""), put_commit(100)]
    assert found_in(whole * 3) == 3
    for odd in (
        [put_begin(100), put_insert(OIDS[0], b"x")],
        [put_begin(100), put_relation(OIDS[0]), put_commit(100)],
        [put_begin(100), put_truncate([OIDS[0]]), put_commit(100)],
        [put_begin(100), put_message("a", "b"), put_commit(100)],
        [put_begin(100), b"O" + bytes(20), put_commit(100)],
        [put_begin(100), put_begin(100), put_commit(100)],
        [put_insert(OIDS[0], b"x"), put_commit(100)],
        [put_commit(100)],
        [put_begin(100) + b"x", put_commit(100)],
        [put_begin(100), put_commit(100)[:-1]],
        [put_begin(100), b"I123", put_commit(100)],
        [keepalive(7)],
    ):
        assert found_in([*whole * 2, *odd, *whole * 2]) == 2, odd
        assert found_in([*odd, *whole * 2]) == 0, odd


def test_a_transaction_that_is_not_whole_is_left() -> None:
    whole = [put_begin(100), put_insert(OIDS[0], b"x"), put_commit(100)]
    data = copy_data(whole * 2)
    for cut in range(1, len(data) // 2):
        found = find_transactions(data[:-cut], 0, 1 << 20)
        assert found is not None
        assert (found.count, found.end) == (1, len(data) // 2)
    for cut in range(len(data) // 2 + 1, len(data) + 1):
        assert find_transactions(data[: len(data) - cut], 0, 1 << 20) is None


def test_transactions_that_go_back_in_the_wal_are_left_to_the_loop() -> None:
    """No server sends them so; the loop drops what is not above its lane's last position."""
    messages = [put_relation(OIDS[0])]
    for lsn in (100, 300, 200, 400, 400, 500):
        messages += [put_begin(lsn), *[put_insert(OIDS[0], bytes(100))] * 4, put_commit(lsn)]
    one_by_one, at_once = new_router(1, 1 << 20), new_router(1, 1 << 20)
    for message in messages:
        one_by_one[0].drain(copy_data([message]))
    at_once[0].drain(copy_data(messages))
    assert [list(record.values) for record in at_once[0].take()] == [list(r.values) for r in one_by_one[0].take()]


def test_a_row_that_nothing_is_known_of_is_no_reason_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []
    monkeypatch.setattr(router_module, "find_transactions", lambda data, at, end: tries.append(at))
    messages = [put_relation(OIDS[5])]
    for number in range(1, 100):
        messages += [put_begin(number * 100), put_insert(OIDS[5], struct.pack(">I", number)), put_commit(number * 100)]
    new_router(1, 1 << 20)[0].drain(copy_data(messages))
    assert not tries


@pytest.mark.parametrize(("count", "is_taken"), [(20, False), (60, True)])
def test_few_transactions_are_left_to_the_loop(count: int, is_taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be done for each lane costs more than it saves."""
    monkeypatch.undo()
    messages = [put_begin(100), put_relation(OIDS[0]), put_insert(OIDS[0], b"x"), put_commit(100)]
    for number in range(2, count + 2):
        messages += [put_begin(number * 100), put_insert(OIDS[0], b"x"), put_commit(number * 100)]
    taken: list[int] = []
    real = LaneBuffer.append_transactions
    monkeypatch.setattr(
        LaneBuffer, "append_transactions", lambda lane, given: taken.append(given.change_count) or real(lane, given)
    )
    new_router(1, 1 << 20)[0].drain(copy_data(messages))
    assert taken == ([count] if is_taken else [])
