"""A table with several lanes: whatever the lanes' pace, and wherever producers die, the source's rows come out."""

from __future__ import annotations

import random

import pytest

from live_migration.common.lanes import LaneMap
from live_migration.common.segment import START, Position
from live_migration.producer.ack_tracker import AckTracker
from live_migration.producer.router import Router
from tests.support.split_stream import HOT, Lanes, OrderLost, Source, session

LANES = LaneMap(2, ((HOT, 4),))
SEGMENT_BYTES = 700


def _router(positions: list[Position]) -> Router:
    return Router(
        migration_id="m",
        topic_id=bytes(16),
        segment_bytes=SEGMENT_BYTES,
        positions=positions,
        acks=AckTracker(0),
        lane_map=LANES,
    )


def _copy_data(message: bytes) -> bytes:
    copied = b"w" + bytes(24) + message
    return b"d" + (len(copied) + 4).to_bytes(4, "big") + copied


def _publish(source: Source, rng: random.Random, lanes: Lanes, *, crashes: int) -> None:
    """Route the source's transactions, flush now and then, and die that often with what is not flushed."""
    positions = [START] * LANES.lane_count
    first = 0  # the first transaction that is not wholly in the log
    for left in range(crashes, -1, -1):
        router = _router(positions)
        messages = list(session(source.transactions, first))
        end = len(messages) if left == 0 else rng.randint(0, len(messages))
        at, committed = 0, first
        while at < end:
            upto = min(end, at + rng.choice((1, 3, 40, 400)))
            data = b"".join(map(_copy_data, messages[at:upto]))
            assert router.drain(data) == len(data)
            committed += sum(message[:1] == b"C" for message in messages[at:upto])
            at = upto
            if rng.random() < 0.4 or (left == 0 and at == end):
                for record in router.take():
                    for value in record.values:
                        lanes.add(record.lane, value)
                positions, first = list(router.positions), committed


def _replay(seed: int, *, crashes: int, heeds_meetings: bool = True) -> tuple[Source, Lanes]:
    rng = random.Random(seed)
    source = Source(rng)
    for _ in range(25):
        source.transact()
    lanes = Lanes(LANES.lane_count, rng, heeds_meetings=heeds_meetings)
    _publish(source, rng, lanes, crashes=crashes)
    lanes.run()
    return source, lanes


@pytest.mark.parametrize("crashes", [0, 1, 5])
def test_rows_come_out_as_on_the_source_whatever_the_lanes_pace(crashes: int) -> None:
    met = 0
    for seed in range(60):
        source, lanes = _replay(seed, crashes=crashes)
        assert lanes.rows == source.rows, f"seed {seed}"
        met += lanes.meeting_count
    assert met > 500


def test_lanes_that_do_not_wait_for_one_another_lose_the_order() -> None:
    """Else the test above would prove nothing."""
    lost = 0
    for seed in range(40):
        try:
            source, lanes = _replay(seed, crashes=0, heeds_meetings=False)
        except OrderLost:
            lost += 1
        else:
            lost += lanes.rows != source.rows
    assert lost > 20


def test_only_what_concerns_all_lanes_makes_them_meet() -> None:
    """Rows go their own ways, keys that change included, as long as the new row is whole."""
    source = Source(random.Random(1))
    while len(source.transactions) < 60:
        before = dict(source.rows), source.shape
        source.transact()
        told = b"".join(change.message for change in source.transactions[-1])
        if source.shape != before[1] or b"Nu" in told or b"T\0\0\0\1\0" in told or b"u" in told:
            source.transactions.pop()
            source.rows, source.shape = before
    lanes = Lanes(LANES.lane_count, random.Random(1))
    _publish(source, random.Random(1), lanes, crashes=0)
    lanes.run()
    assert lanes.rows == source.rows
    assert lanes.meeting_count == 0
