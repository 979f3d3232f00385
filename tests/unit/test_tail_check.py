"""What the ends of the change log's partitions say beside the position record and the checkpoints."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from live_migration.common.control import LogPosition
from live_migration.common.errors import LogGap
from live_migration.common.segment import SEGMENT, START, Position, SegmentHeader
from live_migration.coordinator.losses import check_lane
from live_migration.producer.tail_check import LaneTail, check_tails

TOPIC_ID = uuid4()
P10, P20, P30 = Position(10, 1), Position(20, 1), Position(30, 1)


def tail(last: Position | None, first: int = 0, end: int = 8, topic_id: UUID = TOPIC_ID) -> LaneTail:
    header = SegmentHeader(SEGMENT, topic_id.bytes, 0, START, last, 1, 0, 0) if last else None
    return LaneTail(0, first, end, header)


def record(last: Position) -> LogPosition:
    return LogPosition(confirm_lsn=50, lanes=((*last,),), system_identifier="1", timeline=1, sent_at=0.0)


@pytest.mark.parametrize(
    ("end", "position"),
    [
        (tail(None, end=0), None),
        (tail(None, end=0), record(START)),
        (tail(P20), record(P20)),
        (tail(None, first=8), record(P20)),  # deleted once they had been applied
    ],
)
def test_a_log_that_ends_where_the_record_says_goes_on(end: LaneTail, position: LogPosition | None) -> None:
    check_tails("t", [end], TOPIC_ID, position)


@pytest.mark.parametrize(
    ("end", "position", "match"),
    [
        (tail(None, end=0), record(P20), "is empty"),
        (tail(None, end=5), record(P20), "is empty"),
        (tail(P10), record(P20), "ends at"),
        (tail(P30), record(P20), "control topic's tail"),
        (tail(P20), None, "control topic's tail"),
        (tail(P20, topic_id=uuid4()), record(P20), "made again"),
    ],
)
def test_a_log_that_ends_elsewhere_is_refused(end: LaneTail, position: LogPosition | None, match: str) -> None:
    with pytest.raises(LogGap, match=match):
        check_tails("t", [end], TOPIC_ID, position)


def test_a_running_producer_may_be_ahead_of_the_record_but_never_behind() -> None:
    check_tails("t", [tail(P30)], TOPIC_ID, record(P20), may_be_ahead=True)
    with pytest.raises(LogGap):
        check_tails("t", [tail(P10)], TOPIC_ID, record(P20), may_be_ahead=True)


@pytest.mark.parametrize(
    ("end", "next_offset", "applied"),
    [
        (tail(P20), 8, P20),
        (tail(P20), 7, P10),
        (tail(P20, first=7), 7, P10),
        (tail(None, first=8), 7, P20),  # all applied; what stood at the offset ends a transaction
        (tail(None, end=0), 0, START),
    ],
)
def test_a_lane_that_finds_what_it_needs_goes_on(end: LaneTail, next_offset: int, applied: Position) -> None:
    check_lane("t", end, next_offset, applied, record(P20 if end.end_offset else START))


@pytest.mark.parametrize(
    ("end", "next_offset", "applied"),
    [
        (tail(P20), 9, P20),  # the partition ends before it
        (tail(P20, first=7), 6, P10),
        (tail(None, first=8), 7, P10),
        (tail(None, first=8), 8, P10),
    ],
)
def test_a_lane_that_cannot_find_what_it_needs_is_refused(end: LaneTail, next_offset: int, applied: Position) -> None:
    with pytest.raises(LogGap):
        check_lane("t", end, next_offset, applied, record(P20))
