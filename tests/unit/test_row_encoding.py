from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.consumer.row_encoding import (
    BIG_BYTES,
    BINARY_HEADER,
    BINARY_TRAILER,
    binary_row,
    copy_chunks,
    decode_tuple,
    insert_as_binary_row,
    insert_as_text_row,
    is_binary,
    message_form,
    text_row,
)
from tests.support.messages import put_insert

values = st.lists(
    st.one_of(st.none(), st.binary(max_size=30), st.sampled_from([b"\t", b"\\N", b"\n", b"\r", b"\\."])), max_size=6
)


@given(values, st.booleans())
def test_a_tuple_comes_back(row: list[bytes | None], binary: bool) -> None:
    message = put_insert(7, row, binary=binary)
    decoded, end = decode_tuple(message, 6)
    assert decoded == row
    assert end == len(message)
    assert is_binary(message, 6) == (binary if any(value is not None for value in row) else None)


@given(values)
def test_an_insert_gives_the_same_row_as_its_values(row: list[bytes | None]) -> None:
    assert insert_as_binary_row(put_insert(7, row, binary=True)) == binary_row(row)
    assert insert_as_text_row(put_insert(7, row)) == text_row(row)


@given(values.filter(bool))
def test_a_text_row_reads_back_as_copy_reads_it(row: list[bytes | None]) -> None:
    line = text_row(row)
    assert line.endswith(b"\n")
    assert b"\n" not in line[:-1]
    unescape = {b"\\\\": b"\\", b"\\t": b"\t", b"\\n": b"\n", b"\\r": b"\r"}
    read = []
    for field in line[:-1].split(b"\t"):
        if field == b"\\N":
            read.append(None)
            continue
        out, at = b"", 0
        while at < len(field):
            step = 2 if field[at : at + 1] == b"\\" else 1
            out += unescape.get(field[at : at + step], field[at : at + step])
            at += step
        read.append(out)
    assert read == row


def test_binary_chunks_have_header_and_trailer_even_without_rows() -> None:
    assert b"".join(copy_chunks([], binary=True)) == BINARY_HEADER + BINARY_TRAILER
    assert b"".join(copy_chunks([], binary=False)) == b""


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=50))
def test_chunks_lose_nothing(rows: list[bytes]) -> None:
    assert b"".join(copy_chunks(rows, binary=False, chunk_bytes=64)) == b"".join(rows)


@settings(deadline=None, max_examples=20)
@given(values.filter(bool), st.booleans())
def test_a_view_of_a_message_gives_the_same_rows_in_pieces(row: list[bytes | None], binary: bool) -> None:
    row = [*row, b"\\x\t" * BIG_BYTES, b"end"]
    message = put_insert(7, row, binary=binary)
    values, end = decode_tuple(memoryview(message), 6)
    assert (values, end) == (row, len(message))
    encode, encode_values = (insert_as_binary_row, binary_row) if binary else (insert_as_text_row, text_row)
    expected = encode(message)
    for pieces in (encode(memoryview(message)), encode_values(values)):
        chunks = list(copy_chunks([b"before", pieces, b"after"], binary=False))
        assert b"".join(chunks) == b"before" + expected + b"after"
        assert max(map(len, chunks)) < BIG_BYTES


@pytest.mark.parametrize("old", [b"O", b"K"])
@pytest.mark.parametrize("value", [b"b", b"t"])
def test_the_form_of_an_update_of_a_row_of_nulls_is_that_of_its_new_row(old: bytes, value: bytes) -> None:
    """Four digits of a binary integer would be taken for a number in text, else."""
    head, nulls = b"U" + (7).to_bytes(4, "big") + old, b"\0\2nn"
    new = b"N\0\2n" + value + (4).to_bytes(4, "big") + b"1234"
    assert is_binary(head + nulls + new, 6) is None
    assert message_form(head + nulls + new) is (value == b"b")
    assert message_form(head + nulls + b"N" + nulls) is None
    assert message_form(b"D" + head[1:] + nulls) is None
    assert message_form(b"U" + head[1:5] + new) is (value == b"b")
