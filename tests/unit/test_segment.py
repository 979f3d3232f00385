"""The change log's format: what is encoded is read back, and what is cut short is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from live_migration.common import pgoutput
from live_migration.common.errors import FormatError
from live_migration.common.segment import (
    COMMIT_ORDINAL,
    HEADER,
    Position,
    SegmentHeader,
    begin_frame,
    decode_header,
    encode_header,
    frame,
    iterate_frames,
)

u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
positions = st.builds(Position, u64, u64)
headers = st.builds(
    SegmentHeader,
    st.sampled_from([1, 2]),
    st.binary(min_size=16, max_size=16),
    u16,
    positions,
    positions,
    u32,
    u32,
    u32,
)
begin_messages = st.binary(min_size=20, max_size=20).map(lambda body: b"B" + body)
others = st.sampled_from([b"I", b"U", b"D", b"T", b"M", b"R", b"C"])
other_messages = st.tuples(others, st.binary(max_size=60)).map(b"".join)


@given(headers, st.binary(max_size=10))
def test_a_header_is_read_back_from_the_head_of_a_record(header: SegmentHeader, body: bytes) -> None:
    assert decode_header(encode_header(header) + body) == header


@given(headers, st.integers(0, HEADER.size - 1))
def test_a_header_cut_short_is_refused(header: SegmentHeader, length: int) -> None:
    with pytest.raises(FormatError):
        decode_header(encode_header(header)[:length])


@pytest.mark.parametrize(("at", "value"), [(0, 0), (2, 9), (3, 3), (3, 0)])
def test_a_foreign_record_is_refused(at: int, value: int) -> None:
    record = bytearray(encode_header(SegmentHeader(1, bytes(16), 0, Position(0, 0), Position(1, 1), 1, 0, 0)))
    record[at] = value
    with pytest.raises(FormatError):
        decode_header(bytes(record))


@given(begin_messages, st.integers(0, 2**63), st.lists(st.tuples(other_messages, u32), max_size=8))
def test_frames_come_back_with_their_ordinals(begin: bytes, base: int, changes: list[tuple[bytes, int]]) -> None:
    body = begin_frame(begin, base) + b"".join(frame(message, relative) for message, relative in changes)
    found = list(iterate_frames(body))
    assert found[0] == (pgoutput.BEGIN, 0, begin)
    assert found[1:] == [(m[0], base + relative if relative else 0, m) for m, relative in changes]


@given(begin_messages, st.lists(other_messages, min_size=1, max_size=4), st.data())
def test_a_body_cut_within_a_frame_is_refused(begin: bytes, messages: list[bytes], data: st.DataObject) -> None:
    frames = [begin_frame(begin, 7), *(frame(message, 1) for message in messages)]
    body = b"".join(frames)
    ends = {sum(map(len, frames[:count])) for count in range(len(frames) + 1)}
    length = data.draw(st.integers(1, len(body) - 1).filter(lambda length: length not in ends))
    with pytest.raises(FormatError):
        list(iterate_frames(body[:length]))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_format_error_or_frames(body: bytes) -> None:
    try:
        list(iterate_frames(body))
    except FormatError:
        return


def test_positions_are_in_commit_order_and_a_commit_stands_last() -> None:
    mixed = [Position(2, 1), Position(1, COMMIT_ORDINAL), Position(1, 2), Position(1, 1)]
    assert sorted(mixed) == mixed[::-1]
    assert str(Position(0x16B374D848, COMMIT_ORDINAL)) == "16/B374D848#commit"


def test_a_begin_frame_without_its_base_is_refused() -> None:
    with pytest.raises(FormatError):
        list(iterate_frames(frame(b"B123")))
