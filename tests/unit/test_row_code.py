"""An encoder made for a shape gives the very rows that the general one gives, NULLs and odd messages included."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.common.errors import FormatError
from live_migration.consumer.row_code import binary_row_encoder
from live_migration.consumer.row_encoding import BIG_BYTES, copy_chunks, insert_as_binary_row
from tests.support.messages import put_insert

shapes = st.lists(st.sampled_from([None, 1, 4, 8]), min_size=1, max_size=8)
# bytes that look like tags
noise = st.lists(st.sampled_from([b"b", b"n", b"\0", b"\x04", b"x"]), max_size=12).map(b"".join)


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_a_row_is_what_the_general_encoder_gives(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    row: list[bytes | None] = []
    for size in shape:
        fixed = noise if size is None else st.binary(min_size=size, max_size=size)
        row.append(data.draw(st.one_of(fixed, fixed, fixed, st.none())))
    message = put_insert(9, row, binary=True)
    encode = binary_row_encoder(tuple(shape))
    assert encode(message) == insert_as_binary_row(message)


@settings(deadline=None, max_examples=600)
@given(
    st.lists(
        st.one_of(noise, noise, st.binary(max_size=3), st.sampled_from([b"b\0", b"b\0\0\0\x01"])),
        min_size=8,
        max_size=14,
    ),
    st.data(),
)
def test_a_row_cut_at_its_tags_is_the_same(row: list[bytes | None], data: st.DataObject) -> None:
    """Values that look like tags and sizes cut it elsewhere; NULLs may make up the number."""
    for at in data.draw(st.lists(st.integers(0, len(row) - 1), max_size=3)):
        row[at] = None
    message = put_insert(9, row, binary=True)
    encode = binary_row_encoder((None,) * len(row))
    assert encode is not insert_as_binary_row
    assert encode(message) == insert_as_binary_row(message)


def test_long_rows_are_not_cut() -> None:
    row: list[bytes | None] = [b"x" * 9000, *[b"y"] * 9]
    message = put_insert(9, row, binary=True)
    assert binary_row_encoder((None,) * 10)(message) == insert_as_binary_row(message)


def test_no_column_many_columns_and_big_messages_go_the_long_way() -> None:
    assert binary_row_encoder(()) is insert_as_binary_row
    assert binary_row_encoder((None, None)) is insert_as_binary_row
    assert binary_row_encoder((8,) * 100) is insert_as_binary_row
    message = put_insert(9, [bytes(8), b"x" * BIG_BYTES], binary=True)
    encode = binary_row_encoder((8, None))
    assert b"".join(copy_chunks([encode(memoryview(message))], binary=False)) == insert_as_binary_row(message)


@pytest.mark.parametrize("row", [[b"1234", b"x"], [bytes(8)], [bytes(8), b"x", b"y"], []])
def test_a_row_of_another_shape_is_not_taken_for_ours(row: list[bytes | None]) -> None:
    message = put_insert(9, row, binary=True)
    assert binary_row_encoder((8, None))(message) == insert_as_binary_row(message)


def test_text_in_a_binary_stream_is_refused() -> None:
    with pytest.raises(FormatError):
        binary_row_encoder((8, None))(put_insert(9, [bytes(8), b"x"]))
