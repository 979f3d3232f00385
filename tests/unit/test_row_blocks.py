"""Rows made many at a time are the rows that are made one by one, NULLs and odd messages included."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.common.errors import FormatError
from live_migration.common.segment import frame
from live_migration.consumer import row_blocks
from live_migration.consumer.row_blocks import copy_rows
from live_migration.consumer.row_encoding import (
    BIG_BYTES,
    UNCHANGED,
    Message,
    Value,
    binary_row,
    copy_chunks,
    insert_as_binary_row,
    insert_as_text_row,
    text_row,
)
from live_migration.consumer.spans import Span, find_span
from tests.support.messages import put_insert, put_update

Row = Sequence[bytes | None]


@pytest.fixture(autouse=True)
def always_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are made together, too, which would not be worth it."""
    monkeypatch.setattr(row_blocks, "_WORTH_ROWS", 1)


def span_of(messages: Sequence[bytes]) -> Span:
    span = find_span(b"before" + b"".join(frame(message, 1) for message in messages) + b"behind", 6, 1 << 20)
    assert span is not None
    assert span.messages() == messages
    return span


def spans_of(messages: Sequence[bytes]) -> list[Span]:
    body = b"".join(frame(message, 1) for message in messages)
    spans: list[Span] = []
    at = 0
    while at < len(body):
        span = find_span(body, at, len(body))
        assert span is not None
        spans.append(span)
        at = span.end
    assert [message for span in spans for message in span.messages()] == messages
    return spans


def made(pieces: Sequence[Span | Sequence[Message]], *, binary: bool) -> bytes:
    return b"".join(copy_chunks(copy_rows(pieces, binary=binary), binary=False))


def expected(rows: Sequence[Row], *, binary: bool) -> bytes:
    return b"".join(map(binary_row if binary else text_row, rows))  # type: ignore[arg-type]


# bytes that look like tags and sizes
noise = st.lists(st.sampled_from([b"b", b"n", b"t", b"\0", b"\x04", b"x"]), max_size=12).map(b"".join)
binary_values = st.one_of(st.none(), noise, st.binary(max_size=5), st.just(bytes(8)))
text_values = st.one_of(
    st.none(),
    st.text(alphabet="tnbuNI\\\t\n\r\x01aé", max_size=12).map(str.encode),
    st.sampled_from([b"", b"t", b"n", b"nt", b"tn", b"N", b"\\N", b"\\.", b"x" * 300]),
)
oids = st.sampled_from([7, 0x74006E00, 0x6E740000, 0x41424344, 0x00090A0D, 0x5C4E7400])
"""Some look like the head of a value, or like what COPY escapes."""


def tables(values: st.SearchStrategy[bytes | None]) -> st.SearchStrategy[list[list[bytes | None]]]:
    return st.integers(0, 6).flatmap(
        lambda width: st.lists(st.lists(values, min_size=width, max_size=width), min_size=1, max_size=80)
    )


@settings(deadline=None, max_examples=300)
@given(tables(binary_values), oids, st.sampled_from([put_insert, put_update]), st.integers(1, 3))
def test_binary_rows(rows: list[list[bytes | None]], oid: int, put: Callable[..., bytes], repeated: int) -> None:
    rows = rows * repeated
    messages = [put(oid, row, binary=True) for row in rows]
    cut = len(messages) // 3
    pieces = [messages[:cut], span_of(messages[cut:]), span_of(messages[:1]), messages[:cut]]
    assert made(pieces, binary=True) == expected([*rows, rows[0], *rows[:cut]], binary=True)


@settings(deadline=None, max_examples=300)
@given(tables(text_values), oids, st.sampled_from([put_insert, put_update]), st.integers(1, 3))
def test_text_rows(rows: list[list[bytes | None]], oid: int, put: Callable[..., bytes], repeated: int) -> None:
    rows = rows * repeated
    messages = [put(oid, row) for row in rows]
    cut = len(messages) // 3
    pieces = [messages[:cut], span_of(messages[cut:]), span_of(messages[:1]), messages[:cut]]
    assert made(pieces, binary=False) == expected([*rows, rows[0], *rows[:cut]], binary=False)


@settings(deadline=None)
@given(st.lists(st.sampled_from([1, 4, 8, None]), min_size=1, max_size=6), st.integers(16, 60), st.data())
def test_binary_rows_of_one_size(sizes: list[int | None], count: int, data: st.DataObject) -> None:
    """Their values stand at the same places or do not: two may be exchanged, one may be NULL where others have its bytes."""
    whole = [None if size is None else bytes([number] * size) for number, size in enumerate(sizes, 0x62)]
    rows = [whole] * count
    if data.draw(st.booleans()):
        rows[data.draw(st.integers(0, count - 1))] = whole[::-1]
    messages = [put_insert(7, row, binary=True) for row in rows]
    for pieces in ([span_of(messages)], [messages]):
        assert made(pieces, binary=True) == expected(rows, binary=True)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("limit", "most"), [("_BLOCK_BYTES", 3000), ("_BLOCK_VALUES", 300)])
def test_many_blocks_are_the_rows(binary: bool, limit: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, limit, most)
    rows: list[list[bytes | None]] = [[b"%d" % number, None, b"y" * (number % 70)] for number in range(1000)]
    messages = [put_insert(7, row, binary=binary) for row in rows]
    spans = [span_of(messages[start : start + 30]) for start in range(0, 1000, 30)]
    for pieces in (spans, [messages], [*spans[:5], messages[150:400], *spans[13:13], messages[400:]]):
        given = list(copy_rows(pieces, binary=binary))
        assert b"".join(given) == expected(rows, binary=binary)  # type: ignore[arg-type]
        assert 5 < len(given) < 30
        assert max(map(len, given)) < 6000  # type: ignore[arg-type]


@pytest.mark.parametrize("binary", [True, False])
def test_big_messages_are_taken_in_pieces_beside_others(binary: bool) -> None:
    big = b"x" * BIG_BYTES
    rows: list[list[bytes | None]] = [[b"1", None, b"plain"], [b"2", big, b"tab\t"], [None, None, None]] * 10
    messages: list[Message] = [
        memoryview(put_insert(7, row, binary=binary)) if big in row else put_insert(7, row, binary=binary)
        for row in rows
    ]
    assert made([messages], binary=binary) == expected(rows, binary=binary)
    small = [put_insert(7, rows[0], binary=binary)] * 50
    beside = list(copy_rows([[*small, messages[1], *small]], binary=binary))
    chunks = list(copy_chunks(beside, binary=False))
    assert b"".join(chunks) == expected([*[rows[0]] * 50, rows[1], *[rows[0]] * 50], binary=binary)
    assert max(map(len, chunks)) < BIG_BYTES


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("at", [0, 50, 99])
def test_what_is_no_whole_row_of_that_form_is_refused(binary: bool, at: int) -> None:
    plain = put_insert(7, [b"1", b"2"], binary=binary)
    rows: list[list[Value]] = [[b"1", UNCHANGED], [UNCHANGED, b"1"]]
    others = [put_insert(7, row, binary=binary) for row in rows]
    others.append(put_insert(7, [b"1", b"2"], binary=not binary))
    others.append(put_update(7, [b"1", b"2"], old=[b"1", b"2"], binary=binary))
    for other in others:
        messages = [plain] * at + [other] + [plain] * (99 - at)
        with pytest.raises(FormatError):
            made([messages], binary=binary)
    toasted = [plain] * at + [others[0]] + [plain] * (99 - at)
    with pytest.raises(FormatError):
        made(spans_of(toasted), binary=binary)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_messages_that_are_cut_short_or_go_on_are_refused(cut: int) -> None:
    plain = put_insert(7, [b"1", b"two"], binary=True)
    for all_odd in ([plain[:-cut]] * 40, [plain + bytes(cut)] * 40):
        for pieces in ([all_odd], spans_of(all_odd)):
            with pytest.raises((FormatError, IndexError, struct.error)):
                made(pieces, binary=True)
    text = put_insert(7, [b"1", b"two"])
    for odd in (text[:-cut], text + bytes(cut)):
        with pytest.raises((FormatError, IndexError)):
            made([[text] * 20 + [odd] + [text] * 20], binary=False)
    for odd in (plain[:-cut], plain + bytes(cut)):
        with pytest.raises((FormatError, IndexError, struct.error)):
            made([[plain] * 20 + [odd] + [plain] * 20], binary=True)
        with pytest.raises((FormatError, IndexError, struct.error)):
            made([span_of([plain] * 20 + [odd] + [plain] * 20)], binary=True)


def test_messages_of_another_width_are_rows_of_that_width() -> None:
    """The server is to say that it is wrong."""
    messages = [put_insert(7, [b"1"] * width, binary=True) for width in (2,) * 20 + (3,) + (2,) * 20]
    assert made([messages], binary=True) == b"".join(map(insert_as_binary_row, messages))  # type: ignore[arg-type]
    messages = [put_insert(7, [b"1"] * width) for width in (2,) * 20 + (3,) + (2,) * 20]
    assert made([messages], binary=False) == b"".join(map(insert_as_text_row, messages))  # type: ignore[arg-type]


def test_a_zero_byte_in_text_changes_nothing() -> None:
    """No server sends one."""
    rows: list[list[bytes | None]] = [[b"1", b"a\0b"], [b"2", None]] * 20
    messages = [put_insert(7, row) for row in rows]
    assert made([messages], binary=False) == expected(rows, binary=False)


@pytest.mark.parametrize("binary", [True, False])
def test_many_columns_of_nulls_take_little_memory(binary: bool) -> None:
    """Each takes a byte in a message, and there is much to be known of it."""
    messages = [put_insert(7, [None] * 1599 + [b"x" * (number % 9)], binary=binary) for number in range(650)]
    for pieces in (spans_of(messages), [messages]):
        tracemalloc.start()
        try:
            for _ in copy_rows(pieces, binary=binary):
                pass
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()


def test_few_rows_are_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    messages = [put_insert(7, [b"x"], binary=True)] * 63
    assert len(list(copy_rows([span_of(messages)], binary=True))) == 63
    assert len(list(copy_rows([span_of([*messages, messages[0]])], binary=True))) == 1
