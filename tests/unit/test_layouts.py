"""Runs of inserts of one size give the same rows, positions and messages as each insert by itself."""

from __future__ import annotations

import struct
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.common.segment import frame
from live_migration.consumer.layouts import SHORTEST_SPAN, Layouts, layout_of
from live_migration.consumer.row_encoding import insert_as_binary_row
from tests.support.messages import put_insert, put_update

SIZES = (8, 1, 4)
fields = st.tuples(*(st.one_of(st.none(), st.binary(min_size=size, max_size=size)) for size in SIZES))


def body_of(messages: list[bytes]) -> bytes:
    return b"".join(frame(message, number + 1) for number, message in enumerate(messages))


@settings(deadline=None)
@given(
    st.lists(st.tuples(fields, st.integers(1, 40)), min_size=1, max_size=12), st.sampled_from([put_insert, put_update])
)
def test_spans_and_single_messages_give_every_row_once_and_in_order(
    runs: list[tuple[tuple[bytes | None, ...], int]], put: Callable[..., bytes]
) -> None:
    rows = [list(row) for row, repeated in runs for _ in range(repeated)]
    messages = [put(9, row, binary=True) for row in rows]
    body = body_of(messages)
    layouts = Layouts()
    at = number = 0
    encoded: list[bytes] = []
    while at < len(body):
        end = at + 8 + len(messages[number])
        span = layouts.span(body, at, end)
        if span is None or not span.row_count:
            encoded.append(insert_as_binary_row(messages[number]))  # type: ignore[arg-type]
            at, number = end, number + 1
            continue
        assert span.messages() == messages[number : number + span.row_count]
        assert [span.ordinal(i) for i in range(span.row_count)] == list(range(number + 1, number + 1 + span.row_count))
        encoded.append(span.rows())
        at += span.row_count * span.layout.stride
        number += span.row_count
    assert number == len(messages)
    assert b"".join(encoded) == b"".join(insert_as_binary_row(message) for message in messages)  # type: ignore[arg-type]


def test_rows_of_ever_new_sizes_are_given_up_until_another_try() -> None:
    messages = [put_insert(9, [bytes(8), bytes(size)], binary=True) for size in range(60)]
    layouts = Layouts()
    tried = 0
    while not layouts.are_given_up:
        span = layouts.span(body_of(messages[tried:]), 0, 8 + len(messages[tried]))
        assert span is not None
        assert span.row_count == 1
        tried += 1
    assert tried < 10
    again = body_of([messages[30]] * 20), 0, 8 + len(messages[30])
    assert layouts.span(*again) is None
    layouts.refresh()
    span = layouts.span(*again)
    assert span is not None
    assert span.row_count == 20


def test_sizes_that_come_in_long_runs_are_never_given_up() -> None:
    layouts = Layouts()
    for size in range(60):
        message = put_insert(9, [bytes(8), bytes(size)], binary=True)
        span = layouts.span(body_of([message] * 30), 0, 8 + len(message))
        assert span is not None
        assert span.row_count == 30
    assert not layouts.are_given_up


def test_a_span_ends_at_another_relation_kind_or_size() -> None:
    first = put_insert(9, [bytes(8)], binary=True)
    layout = layout_of(first)
    assert layout is not None
    run = [first] * 20
    for other in (
        put_insert(10, [bytes(8)], binary=True),
        put_insert(9, [bytes(4)], binary=True),
        put_insert(9, [None], binary=True),
        put_insert(9, [bytes(8), bytes(8)], binary=True),
        b"C" + bytes(len(first) - 1),
        put_update(9, [bytes(8)], binary=True),
    ):
        assert layout.span(body_of([*run, other, *run]), 0).row_count == 20, other
    assert layout.span(body_of(run)[:-1], 0).row_count == 19


def test_what_has_no_layout() -> None:
    assert layout_of(put_insert(9, [b"1", b"2"])) is None  # text
    assert layout_of(put_insert(9, [None, None], binary=True)) is None  # of either
    assert layout_of(put_insert(9, [], binary=True)) is None
    assert layout_of(put_insert(9, [bytes(4096)], binary=True)) is None
    assert layout_of(put_insert(9, [bytes(8), bytes(150)], binary=True)) is None  # a loop over the columns is faster
    assert layout_of(put_insert(9, [bytes(8)], binary=True)[:-1]) is None
    assert layout_of(put_insert(9, [bytes(8)], binary=True) + b"x") is None


def test_bytes_that_mean_something_to_regular_expressions_are_only_bytes() -> None:
    values = [b".*+?()[]", b"\\\n|^", struct.pack(">d", 1.5)]
    message = put_insert(0x2E2A2B3F, values, binary=True)
    layout = layout_of(message)
    assert layout is not None
    span = layout.span(body_of([message] * (SHORTEST_SPAN + 1)), 0)
    assert span.row_count == SHORTEST_SPAN + 1
    assert span.rows() == insert_as_binary_row(message) * span.row_count  # type: ignore[operator]
