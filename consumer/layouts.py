"""Runs of inserts or updates whose rows all have the same size, by the run instead of by the row.

Rows of numbers, times, uuids, or of texts that have one size, differ in binary and without NULLs in nothing but their values' bytes:
everything else of a frame stands at the same place with the same content. One regular expression finds how many such frames follow
one another, and a COPY row is put together for all of them at once, a byte position at a time.
Measured: 0.15 µs a row of four columns, where a loop over the columns takes 2.4 µs.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from live_migration.common.segment import FRAME

SHORTEST_SPAN = 16
"""Frames below which a span is not worth its fixed costs."""
FIXED_SIZES = {
    **dict.fromkeys((16, 18), 1),  # bool, "char"
    21: 2,  # int2
    **dict.fromkeys((23, 26, 28, 700, 1082), 4),  # int4, oid, xid, float4, date
    829: 6,  # macaddr
    **dict.fromkeys(
        (20, 701, 774, 790, 1083, 1114, 1184, 3220), 8
    ),  # int8, float8, macaddr8, money, time, timestamps, pg_lsn
    1266: 12,  # timetz
    **dict.fromkeys((600, 1186, 2950), 16),  # point, interval, uuid
}
"""Built-in types whose binary values all have one size, by oid, in bytes."""
_MOST_BYTES = 1024
_MOST_COLUMN_BYTES = 64
"""Of a message, and of a value on average: above it the loop over the columns costs little beside the bytes themselves."""
_MOST_LAYOUTS = 4
_CREDIT = 64
_MOST_CREDIT = 1024
_WORTH_ROWS = 4
"""Rows that a span must have to pay for the search."""
_LAYOUT_COSTS = 16
"""Rows that a new layout must gain to pay for itself."""
_NULL_FIELD = b"\xff\xff\xff\xff"
_TUPLE_AT = 6
"""Where the tuple begins in the message of an insert, or of an update without the old row: after type byte, relation and the 'N'."""


class Span(NamedTuple):
    """Frames of one layout that follow one another in a segment's body, the first at `start`."""

    body: bytes
    start: int
    row_count: int
    layout: Layout

    @property
    def kind(self) -> int:
        """The messages' type byte."""
        return self.body[self.start + FRAME.size]

    def messages(self) -> list[bytes]:
        """Give the messages."""
        stride, body = self.layout.stride, self.body
        first = self.start + FRAME.size
        return [body[at : at + stride - FRAME.size] for at in range(first, first + self.row_count * stride, stride)]

    def ordinal(self, index: int) -> int:
        """Give the ordinal of a message, less its transaction's base."""
        _, relative = FRAME.unpack_from(self.body, self.start + index * self.layout.stride)
        return int(relative)

    def leading_values(self, count: int) -> list[bytes] | None:
        """Give each row's first values as they stand in the messages, with tags and sizes; None where one is NULL."""
        size = self.layout.leading_bytes(count)
        if size is None:
            return None
        stride, body = self.layout.stride, self.body
        first = self.start + FRAME.size + _TUPLE_AT + 2
        return [body[at : at + size] for at in range(first, first + self.row_count * stride, stride)]

    def rows(self) -> bytes:
        """Give the rows in COPY's binary format."""
        return self.layout.encode(self.body, self.start, self.row_count)


class Layout:
    """Where everything stands in the frames of a relation's inserts or updates, taken from one of them."""

    __slots__ = ("_fields", "_match", "_moves", "_row", "stride")

    def __init__(self, message: bytes, fields: list[tuple[int, int]]) -> None:
        """`fields`: where each value stands in the message, and its size, -1 for NULL."""
        self.stride = FRAME.size + len(message)
        pattern = [re.escape(FRAME.pack(len(message), 0)[:4]), b".{4}", re.escape(message[: _TUPLE_AT + 2])]
        row = [message[_TUPLE_AT : _TUPLE_AT + 2]]
        moves: list[tuple[int, int]] = []
        row_bytes = 2
        for at, size in fields:
            if size < 0:
                pattern.append(b"n")
                row.append(_NULL_FIELD)
                row_bytes += 4
                continue
            pattern += [re.escape(message[at - 5 : at]), b".{%d}" % size]
            row += [message[at - 4 : at], bytes(size)]
            row_bytes += 4
            moves += [(FRAME.size + at + i, row_bytes + i) for i in range(size)]
            row_bytes += size
        self._fields = fields
        self._match = re.compile(b"(?:" + b"".join(pattern) + b")*+", re.DOTALL).match
        self._row = b"".join(row)
        self._moves = moves

    def leading_bytes(self, count: int) -> int | None:
        """Give how many bytes the first `count` values take in a message, None where one is NULL."""
        fields = self._fields[:count]
        if len(fields) < count or any(size < 0 for _, size in fields):
            return None
        at, size = fields[-1]
        return at + size - _TUPLE_AT - 2

    def span(self, body: bytes, start: int) -> Span:
        """Give the frames of this layout that follow one another from byte `start` on, maybe none."""
        match = self._match(body, start)
        assert match is not None  # of nothing, at least
        return Span(body, start, (match.end() - start) // self.stride, self)

    def encode(self, body: bytes, start: int, count: int) -> bytes:
        """Give `count` rows in COPY's binary format."""
        rows = bytearray(self._row * count)
        stride, row_bytes = self.stride, len(self._row)
        end = start + count * stride
        for source, to in self._moves:
            rows[to::row_bytes] = body[start + source : end : stride]
        return bytes(rows)


class Layouts:
    """The layouts met lately in a relation's rows: they differ by which values are NULL, and by the sizes of those that vary.

    Where rows are of too many sizes for spans to be worth their search they are given up, until `refresh`.
    """

    __slots__ = ("_credit", "_known")

    def __init__(self) -> None:
        self._known: list[Layout] = []  # the last used first
        self.refresh()

    def refresh(self) -> None:
        """Try again."""
        self._credit = _CREDIT

    @property
    def are_given_up(self) -> bool:
        """Whether spans are not worth a look now."""
        return self._credit < 0

    def span(self, body: bytes, start: int, end: int) -> Span | None:
        """Give the frames of one layout that begin with the one from `start` to `end`, None where it has none or spans are given up."""
        if self._credit < 0:
            return None
        for number, layout in enumerate(self._known):
            span = layout.span(body, start)
            if span.row_count:
                if number:
                    self._known.insert(0, self._known.pop(number))
                return self._gained(span)
        self._credit -= _LAYOUT_COSTS
        new = layout_of(body[start + FRAME.size : end])
        if new is None:
            return None
        self._known.insert(0, new)
        del self._known[_MOST_LAYOUTS:]
        return self._gained(new.span(body, start))

    def _gained(self, span: Span) -> Span:
        self._credit = min(self._credit + span.row_count - _WORTH_ROWS, _MOST_CREDIT)
        return span


def layout_of(message: bytes) -> Layout | None:
    """Give the layout of the message of an insert, or of an update without the old row; None for one in text, with nothing but NULLs, or large."""
    if len(message) > _MOST_BYTES:
        return None
    fields: list[tuple[int, int]] = []
    at = _TUPLE_AT + 2
    for _ in range(int.from_bytes(message[_TUPLE_AT:at], "big")):
        if message[at : at + 1] == b"n":
            fields.append((at + 1, -1))
            at += 1
        elif message[at : at + 1] == b"b":
            size = int.from_bytes(message[at + 1 : at + 5], "big")
            fields.append((at + 5, size))
            at += 5 + size
        else:
            return None
    sizes = [size for _, size in fields if size >= 0]
    is_worth_it = bool(sizes) and sum(sizes) <= _MOST_COLUMN_BYTES * len(sizes)
    return Layout(message, fields) if is_worth_it and at == len(message) else None
