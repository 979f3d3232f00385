"""Spans of a segment's body hold the very messages that its frames do, in their order, whatever stands in the values."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.common.segment import frame, iterate_frames
from live_migration.consumer.spans import Span, find_span
from tests.support.messages import put_delete, put_insert, put_update

KEY = bytes(4)


def body_of(messages: list[bytes]) -> bytes:
    return b"".join(frame(message, number) for number, message in enumerate(messages, 1))


def found(body: bytes, at: int = 0) -> Span:
    span = find_span(body, at, len(body))
    assert span is not None
    return span


lookalikes = st.sampled_from(
    [b"", b"I", b"IIIIIIII", put_insert(9, [b"x", b"y"])[:8], frame(put_insert(9, [b"x", b"y"]), 3), b"\0" * 12]
)
messages = st.one_of(
    st.tuples(lookalikes, st.one_of(lookalikes, st.none(), st.binary(max_size=40))).map(
        lambda row: put_insert(9, row, binary=True)
    ),
    st.sampled_from(
        [
            put_insert(10, [b"x", b"y"], binary=True),
            put_update(9, [b"x", b"y"], binary=True),
            put_delete(9, key=[b"x", None]),
            b"C" + bytes(25),
        ]
    ),
)


@settings(deadline=None)
@given(st.lists(st.tuples(messages, st.integers(1, 20)), min_size=1, max_size=8))
def test_a_body_is_walked_by_spans_without_losing_or_changing_a_message(runs: list[tuple[bytes, int]]) -> None:
    expected = [message for message, repeated in runs for _ in range(repeated)]
    body = body_of(expected)
    walked: list[bytes] = []
    ordinals: list[int] = []
    at = 0
    while at < len(body):
        span = found(body, at)
        assert (span.begin, span.row_count) == (at, len(span.messages()))
        assert {message[:8] for message in span.messages()} == {expected[len(walked)][:8]}
        ordinals += map(span.ordinal, range(span.row_count))
        walked += span.messages()
        at = span.end
    assert walked == expected
    assert ordinals == list(range(1, len(expected) + 1))
    assert [each.message for each in iterate_frames(body)] == expected


def test_a_span_ends_at_another_relation_kind_or_number_of_values() -> None:
    first = put_insert(9, [bytes(8)], binary=True)
    run = [first, put_insert(9, [None], binary=True), put_insert(9, [bytes(3)], binary=True)] * 7
    for other in (
        put_insert(10, [bytes(8)], binary=True),
        put_insert(9, [bytes(8), bytes(8)], binary=True),
        put_update(9, [bytes(8)], binary=True),
        b"C" + bytes(25),
    ):
        span = found(body_of([*run, other, *run]))
        assert (span.kind, span.tuple_kind, span.messages()) == (ord("I"), ord("N"), run), other


def test_many_of_one_size_are_a_span_of_their_own() -> None:
    """They are found without a search."""
    run = [put_insert(9, [number.to_bytes(8, "big")], binary=True) for number in range(100)]
    others = [put_insert(9, [bytes(size)], binary=True) for size in range(20)]
    body = body_of([*run, *others])
    first = found(body)
    assert first.messages() == run
    assert found(body, first.end).messages() == others
    for cut in (1, 5, 20, 30):
        assert found(body_of(run)[:-cut]).row_count == 100 - 1 - (cut > 29)
    odd = [put_insert(8, [bytes(8)], binary=True), put_insert(9, [None] * 13, binary=True), b"C" + bytes(20)]
    for other in odd:
        assert found(body_of([*run, other, *run])).messages() == run


def test_a_value_that_looks_like_a_frame_ends_a_span_at_most() -> None:
    plain = put_insert(9, [bytes(8)], binary=True)
    tricky = put_insert(9, [frame(plain, 7) * 3], binary=True)
    body = body_of([plain] * 10 + [tricky] + [plain] * 10)
    first = found(body)
    assert first.messages() == [plain] * 10 + [tricky]
    assert found(body, first.end).messages() == [plain] * 10


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_frame_that_is_cut_short_is_in_no_span(cut: int) -> None:
    run = [put_insert(9, [bytes(8)], binary=True)] * 5
    assert found(body_of(run)[:-cut]).row_count == 4
    assert find_span(body_of(run[:1])[:-cut], 0, 1 << 20) is None


def test_a_search_has_an_end() -> None:
    """A body may be a gigabyte."""
    body = body_of([put_insert(9, [bytes(1000)], binary=True)] * 2000)
    span = find_span(body, 0, 1 << 20)
    assert span is not None
    assert 900 < span.row_count < 1100


def test_leading_values_are_those_of_one_size() -> None:
    def keys(rows: list[list[bytes | None]], count: int) -> list[bytes] | None:
        values = found(body_of([put_update(9, row, binary=True) for row in rows])).leading_values(count)
        return None if values is None else [bytes(value) for value in values]

    assert keys([[b"1234", b"x"], [b"5678", b"yz"]], 1) == [b"b\0\0\0\x041234", b"b\0\0\0\x045678"]
    assert keys([[b"1234", b"x"], [b"5678", b"y"]], 2) == [b"b\0\0\0\x041234b\0\0\0\1x", b"b\0\0\0\x045678b\0\0\0\1y"]
    assert keys([[b"1234", b"x"], [b"5678", b"yz"]], 2) is None
    assert keys([[b"1234", b"x"], [None, b"x"]], 1) is None
    text = body_of([put_update(9, [b"1234", b"x"])])
    assert found(text).leading_values(1) is None
