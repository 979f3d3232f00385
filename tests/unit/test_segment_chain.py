"""A lane's records must follow one another: what is missing, out of order or of another topic stops the lane."""

from __future__ import annotations

import pytest

from live_migration.common.errors import FormatError, LogGap
from live_migration.common.segment import (
    COMMIT_ORDINAL,
    FRAGMENT,
    SEGMENT,
    START,
    Position,
    SegmentHeader,
    encode_header,
)
from live_migration.consumer.log_reader import SegmentChain

TOPIC_ID = bytes(range(16))
LANE = 3


def put_record(
    previous: Position, last: Position, body: bytes = b"body", *, part: int = 0, parts: int = 0, **changed: object
) -> bytes:
    """A segment or, with `parts`, a fragment."""
    header = SegmentHeader(FRAGMENT if parts else SEGMENT, TOPIC_ID, LANE, previous, last, 1, part, parts)
    return encode_header(header._replace(**changed)) + body  # type: ignore[arg-type]


def make_chain(position: Position = START) -> SegmentChain:
    return SegmentChain("m.changes", LANE, TOPIC_ID, position)


FIRST, SECOND, THIRD = Position(10, COMMIT_ORDINAL), Position(20, 4), Position(20, COMMIT_ORDINAL)


def test_records_that_follow_one_another_pass() -> None:
    chain = make_chain()
    assert chain.accept(put_record(START, FIRST, b"a"), 0) == (b"a", FIRST)
    assert chain.accept(put_record(FIRST, SECOND, b"b"), 1) == (b"b", SECOND)
    assert chain.accept(put_record(SECOND, THIRD, b"c"), 3) == (b"c", THIRD)


def test_a_missing_segment_stops_the_lane() -> None:
    chain = make_chain()
    chain.accept(put_record(START, FIRST), 0)
    with pytest.raises(LogGap, match=r"m\.changes-3-2: .*changes between them are missing"):
        chain.accept(put_record(SECOND, THIRD), 2)


@pytest.mark.parametrize("start", [SECOND, THIRD])
def test_what_is_applied_already_is_passed_over_and_the_next_is_taken(start: Position) -> None:
    """A topic that holds a segment twice, or an offset below the checkpoint: nothing is applied twice."""
    chain = make_chain(start)
    assert chain.accept(put_record(START, FIRST), 0) is None
    assert chain.accept(put_record(FIRST, SECOND), 1) is None
    taken = chain.accept(put_record(SECOND, THIRD, b"c"), 2)
    assert taken == (None if start == THIRD else (b"c", THIRD))
    fourth = Position(30, 1)
    assert chain.accept(put_record(THIRD, fourth, b"d"), 3) == (b"d", fourth)


def test_fragments_are_joined_in_their_order() -> None:
    chain = make_chain()
    for part, body in enumerate([b"a", b"b"]):
        assert chain.accept(put_record(START, FIRST, body, part=part, parts=3), part) is None
        assert not chain.is_between_segments
    assert chain.accept(put_record(START, FIRST, b"c", part=2, parts=3), 2) == (b"abc", FIRST)
    assert chain.is_between_segments


@pytest.mark.parametrize("parts", [(1,), (0, 2), (0, 1, 1), (0, 0), (0, 2, 1)])
def test_fragments_out_of_order_stop_the_lane(parts: tuple[int, ...]) -> None:
    chain = make_chain()
    *fine, wrong = parts[: next(i for i, part in enumerate(parts) if part != i) + 1]
    for part in fine:
        assert chain.accept(put_record(START, FIRST, part=part, parts=3), part) is None
    with pytest.raises(LogGap, match=f"fragment {wrong} stands where fragment {len(fine)} must be"):
        chain.accept(put_record(START, FIRST, part=wrong, parts=3), 9)


def test_a_fragment_of_another_message_stops_the_lane() -> None:
    chain = make_chain()
    chain.accept(put_record(START, FIRST, part=0, parts=2), 0)
    with pytest.raises(LogGap, match="a fragment of another message"):
        chain.accept(put_record(FIRST, SECOND, part=1, parts=2), 1)


def test_a_segment_between_fragments_stops_the_lane() -> None:
    chain = make_chain()
    chain.accept(put_record(START, FIRST, part=0, parts=2), 0)
    with pytest.raises(LogGap, match="a segment stands where fragment 1"):
        chain.accept(put_record(FIRST, SECOND), 1)


def test_a_record_of_another_incarnation_or_lane_stops_the_lane() -> None:
    with pytest.raises(LogGap, match="another incarnation of the topic"):
        make_chain().accept(put_record(START, FIRST, topic_id=bytes(16)), 0)
    with pytest.raises(FormatError, match="belongs to lane 4"):
        make_chain().accept(put_record(START, FIRST, lane=4), 0)
