"""Encoders of inserts made for one shape of row: what is known of its columns' sizes is not looked up row by row.

Between columns of variable size everything stands at known places, so that a whole row without NULLs is a few slices. The code is
written for each list of sizes, as `collections.namedtuple` does it; nothing but numbers goes into it.
Measured: 0.6 µs for a row of four columns one of which is variable, where the loop over the columns takes 1.5 µs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

from live_migration.common.relation import Relation
from live_migration.consumer.layouts import FIXED_SIZES
from live_migration.consumer.row_encoding import CopyRow, Message, in_blocks, insert_as_binary_row, insert_text_blocks

Encoder = Callable[[Message], CopyRow]

_MOST_COLUMNS = 64
_MANY_VARIABLE = 8
"""Columns of variable size from which on `split_row` is faster than code made for the shape."""
_TAG_AND_ZERO = b"b\0"
_SPLIT_BYTES = 8192
"""Messages below it are split: the first byte of each value's size is then 0."""
_SIZES = [b"\xff\xff\xff"] * 3 + [size.to_bytes(3, "big") for size in range(_SPLIT_BYTES)]
"""By the size of a part: the rest of the value's size that it must begin with."""
_FIRST_TAG = 8
"""Where an Insert message's first value begins; the count of columns stands before it."""
_HEAD_BYTES = 5
"""Of a value: its tag and size."""


def copy_rows(relation: Relation, messages: Sequence[Message], *, binary: bool) -> Iterator[CopyRow]:
    """Give messages whose tuple stands where an Insert's does as rows of COPY: all columns of the relation.

    Raises:
        FormatError: a value is not in the stream, or of the other form.
    """
    if not binary:
        return insert_text_blocks(messages)
    sizes = tuple([FIXED_SIZES.get(column.type_oid) for column in relation.columns])
    return in_blocks(messages, binary_row_encoder(sizes))


@lru_cache(maxsize=256)
def binary_row_encoder(sizes: tuple[int | None, ...]) -> Encoder:
    """Give a function that does what `insert_as_binary_row` does, for columns of these sizes, None where they vary.

    A row that has NULLs, or is big, goes the long way.
    """
    if sizes.count(None) >= _MANY_VARIABLE:
        return partial(split_row, len(sizes))
    if not any(size is not None for size in sizes) or len(sizes) > _MOST_COLUMNS:
        return insert_as_binary_row
    names: dict[str, object] = {"general": insert_as_binary_row, "number": int.from_bytes}
    exec(compile(_source(sizes), "<row encoder>", "exec"), names)  # noqa: S102
    encoder: Encoder = names["encode"]  # type: ignore[assignment]
    return encoder


def split_row(column_count: int, message: Message) -> CopyRow:
    """Do what `insert_as_binary_row` does: COPY has a value's size before it, and a message a tag and the size, which begins with a zero.

    So the message is cut at its tags. It may be cut within a value, too; that all parts have the size that they begin with tells that
    it was not. A row that has NULLs, or is big, goes the long way.
    Measured on 50 columns: half the time of code made for the shape.
    """
    if len(message) < _SPLIT_BYTES and type(message) is bytes:
        first, *parts = message[_FIRST_TAG:].split(_TAG_AND_ZERO)
        if (
            not first
            and len(parts) == column_count
            and all(map(bytes.startswith, parts, map(_SIZES.__getitem__, map(len, parts))))
        ):
            return b"\0".join((message[6:_FIRST_TAG], *parts))
    return insert_as_binary_row(message)


def _source(sizes: Sequence[int | None]) -> str:
    """Write the function: `a` is where the part after the last variable column begins, other places count from it."""
    lines = ["def encode(m):"]
    slices = ["m[6:8]"]
    indent = "    "
    base, at = "", _FIRST_TAG  # the next tag stands at base + at
    tags: list[str] = []

    def place(offset: int) -> str:
        return f"{base} + {offset}" if base else str(offset)

    def check(rest: int) -> None:
        nonlocal indent
        conditions = [f"len(m) >= {place(at + rest)}", *tags]
        if not base:
            conditions.insert(0, "type(m) is bytes")
        lines.append(f"{indent}if {' and '.join(conditions)}:")
        indent += "    "
        tags.clear()

    for number, size in enumerate(sizes):
        tags.append(f"m[{place(at)}] == 98")
        if size is not None:
            slices.append(f"m[{place(at + 1)}:{place(at + _HEAD_BYTES + size)}]")
            at += _HEAD_BYTES + size
            continue
        end = f"a{number}"
        check(_HEAD_BYTES)
        start, value = place(at + 1), place(at + _HEAD_BYTES)
        lines.append(f"{indent}{end} = {value} + number(m[{start}:{value}], 'big')")
        slices.append(f"m[{start}:{end}]")
        base, at = end, 0
    conditions = [f"len(m) == {place(at)}", *tags]
    if not base:
        conditions.insert(0, "type(m) is bytes")
    lines.append(f"{indent}if {' and '.join(conditions)}:")
    lines.append(f"{indent}    return {' + '.join(slices)}")
    lines.append("    return general(m)")
    return "\n".join(lines)
