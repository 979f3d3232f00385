"""Messages of the stream that are taken many at a time: only whole ones, of the stream's form, and their frames in the log."""

from __future__ import annotations

import pytest

from live_migration.common.segment import iterate_frames
from live_migration.producer.spans import BEFORE_MESSAGE_BYTES, StreamSpan, find_span
from tests.unit.test_router import OIDS, copy_data, put_commit, put_insert

VALUES = [b"", b"x" * 7, b"I" * 40, put_insert(OIDS[0], b"y")[1:], b"z" * 100] * 5
MESSAGES = [put_insert(OIDS[0], value) for value in VALUES]


def span_of(messages: list[bytes], at: int = 0) -> StreamSpan:
    data = copy_data(messages)
    return find_span(data, at, len(data))


def framed(span: StreamSpan, first: int) -> list[tuple[int, bytes]]:
    return [(frame.ordinal, frame.message) for frame in iterate_frames(span.log_frames(first))]


@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[:1], MESSAGES[1:2] * 30])
def test_frames_are_those_of_the_log(messages: list[bytes]) -> None:
    span = span_of(messages)
    assert (span.count, span.end) == (len(messages), len(copy_data(messages)))
    assert span.last == len(copy_data(messages[:-1]))
    assert framed(span, 5) == list(enumerate(messages, 5))


def test_a_span_begins_where_it_is_asked_for_and_ends_at_another_message() -> None:
    begin = len(copy_data([put_commit(50)]))
    for other in (put_commit(50), put_insert(OIDS[1], b"x"), b"U" + MESSAGES[0][1:]):
        assert framed(span_of([put_commit(50), *MESSAGES, other, *MESSAGES], begin), 1) == list(enumerate(MESSAGES, 1))


def test_what_looks_like_a_message_in_a_value_ends_a_span_at_most() -> None:
    tricky = put_insert(OIDS[0], copy_data([put_insert(OIDS[0], b"y")] * 2))
    first = span_of([*MESSAGES, tricky, *MESSAGES])
    assert framed(first, 1) == list(enumerate([*MESSAGES, tricky], 1))
    assert framed(span_of([*MESSAGES, tricky, *MESSAGES], first.end), 1) == list(enumerate(MESSAGES, 1))


def test_a_message_that_is_not_whole_is_not_taken() -> None:
    data = copy_data(MESSAGES)
    for cut in range(1, BEFORE_MESSAGE_BYTES + 100):
        expected = len(MESSAGES) - 1 - (cut >= len(copy_data(MESSAGES[-1:])))
        assert find_span(data[:-cut], 0, len(data) - cut).count == expected
    assert find_span(data[:20], 0, 20).count == 0


@pytest.mark.parametrize("at", [0, 5])
def test_what_is_no_row_of_the_stream_ends_a_span(at: int) -> None:
    """Another message of the server, or of CopyData's, whatever comes in it."""
    odd = bytearray(copy_data([MESSAGES[1]]))
    odd[at] = ord("k")
    data = copy_data(MESSAGES) + bytes(odd) + copy_data(MESSAGES)
    assert find_span(data, 0, len(data)).count == len(MESSAGES)


def test_as_many_as_there_is_room_for() -> None:
    span = span_of(MESSAGES)
    sizes = [len(span.within(limit).log_frames(1)) if span.within(limit).count else 0 for limit in range(400)]
    assert all(size <= limit for limit, size in enumerate(sizes))
    assert sorted(set(sizes)) == [
        len(StreamSpan(span.data, span.starts[:n], span.ends[:n]).log_frames(1)) if n else 0
        for n in range(len(set(sizes)))
    ]
