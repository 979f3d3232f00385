from __future__ import annotations

import struct

import pytest

from live_migration.common import segment
from live_migration.common.errors import FormatError
from live_migration.common.segment import Position, SegmentHeader
from live_migration.coordinator.tail import LineDecoder

OID = 16384
BEGIN = b"B" + struct.pack(">QqI", 0x100, 86_400_000_000, 77)


def relation(identity: bytes = b"d", type_oid: int = 25) -> bytes:
    columns = b"".join(
        bytes([is_key]) + name + b"\0" + struct.pack(">Ii", type_oid, -1) for is_key, name in ((1, b"k"), (0, b"v"))
    )
    return b"R" + struct.pack(">I", OID) + b"s\0t\0" + identity + struct.pack(">H", 2) + columns


def values(*fields: bytes | None, kind: bytes = b"t") -> bytes:
    packed = b"".join(
        b"n" if f is None else b"u" if f == b"UNCHANGED" else kind + struct.pack(">I", len(f)) + f for f in fields
    )
    return struct.pack(">H", len(fields)) + packed


def row(kind: bytes, rest: bytes) -> bytes:
    return kind + struct.pack(">I", OID) + rest


def header(kind: int = segment.SEGMENT, index: int = 0, count: int = 0) -> bytes:
    return segment.encode_header(SegmentHeader(kind, b"x" * 16, 3, Position(0, 0), Position(1, 1), 1, index, count))


def body(*changes: bytes, identity: bytes = b"d", type_oid: int = 25) -> bytes:
    frames = [segment.begin_frame(BEGIN, 10), segment.frame(relation(identity, type_oid))]
    return b"".join([*frames, *(segment.frame(change, number) for number, change in enumerate(changes, 1))])


def lines(*changes: bytes, identity: bytes = b"d", type_oid: int = 25) -> list[dict[str, object]]:
    return list(LineDecoder(3).decode(header() + body(*changes, identity=identity, type_oid=type_oid), 42))


def test_insert_says_where_it_stands_and_what_it_holds() -> None:
    assert lines(row(b"I", b"N" + values(b"a", None))) == [
        {
            "lane": 3,
            "offset": 42,
            "position": "0/100#11",
            "xid": 77,
            "commit_time": "2000-01-02T00:00:00+00:00",
            "table": "s.t",
            "op": "insert",
            "new": {"k": "a", "v": None},
        }
    ]


def test_update_without_old_tuple_marks_what_did_not_change() -> None:
    (line,) = lines(row(b"U", b"N" + values(b"a", b"UNCHANGED")))
    assert (line["op"], line["new"]) == ("update", {"k": "a", "v": {"$unchanged": True}})
    assert "old" not in line


def test_update_of_the_key_shows_the_old_key_alone() -> None:
    (line,) = lines(row(b"U", b"K" + values(b"a", None) + b"N" + values(b"b", b"x")))
    assert (line["old"], line["new"]) == ({"k": "a"}, {"k": "b", "v": "x"})


def test_full_identity_shows_the_whole_old_row() -> None:
    (line,) = lines(row(b"D", b"O" + values(b"a", None)), identity=b"f")
    assert (line["op"], line["old"]) == ("delete", {"k": "a", "v": None})


@pytest.mark.parametrize(
    ("type_oid", "value", "shown"),
    [
        (23, struct.pack(">i", -5), "-5"),
        (20, struct.pack(">q", 2**62), str(2**62)),
        (16, b"\1", "t"),
        (17, b"\0\xff", "\\x00ff"),
        (25, "ü".encode(), "ü"),
        (701, struct.pack(">d", -0.0), "-0.0"),
        (1184, struct.pack(">q", 1_500_000), "2000-01-01 00:00:01.500000+00"),
        (1184, struct.pack(">q", 2**63 - 1), "infinity"),
        (1114, struct.pack(">q", -(2**63) + 1), {"$binary": "gAAAAAAAAAE="}),  # too early for Python
        (2950, bytes(16), "00000000-0000-0000-0000-000000000000"),
        (3802, b"\1{}", "{}"),
        (25, b"\xff", {"$binary": "/w=="}),
        (1700, b"\0\xff", {"$binary": "AP8="}),
    ],
)
def test_binary_value_is_readable_where_its_type_is_known(type_oid: int, value: bytes, shown: object) -> None:
    (line,) = lines(row(b"I", b"N" + values(value, b"", kind=b"b")), type_oid=type_oid)
    assert isinstance(line["new"], dict)
    assert line["new"]["k"] == shown


def test_truncate_and_logical_message() -> None:
    truncate = b"T" + struct.pack(">IBI", 1, 2, OID)
    message = b"M\1" + struct.pack(">Q", 5) + b"app\0" + struct.pack(">I", 2) + b"hi"
    first, second = lines(truncate, message)
    assert (first["op"], first["table"], first["restart_identity"]) == ("truncate", "s.t", True)
    assert (second["op"], second["prefix"], second["content"]) == ("message", "app", "hi")


def test_fragments_are_put_together() -> None:
    whole = body(row(b"I", b"N" + values(b"a" * 100, None)))
    decoder = LineDecoder(3)
    assert list(decoder.decode(header(segment.FRAGMENT, 0, 2) + whole[:50], 1)) == []
    (line,) = decoder.decode(header(segment.FRAGMENT, 1, 2) + whole[50:], 2)
    assert line["new"] == {"k": "a" * 100, "v": None}


def test_reading_that_begins_within_fragments_passes_them_over() -> None:
    decoder = LineDecoder(3)
    assert list(decoder.decode(header(segment.FRAGMENT, 1, 2) + b"rest", 1)) == []
    assert len(list(decoder.decode(header() + body(row(b"I", b"N" + values(b"a", None))), 2))) == 1


@pytest.mark.parametrize("change", [row(b"I", b"N" + values(b"a")), row(b"I", b"N" + values(b"a", b"bcd")[:-1])])
def test_broken_tuple_is_refused(change: bytes) -> None:
    with pytest.raises(FormatError):
        lines(change)


def test_change_without_its_relation_is_refused() -> None:
    record = header() + segment.begin_frame(BEGIN, 0) + segment.frame(row(b"I", b"N" + values(b"a", None)), 1)
    with pytest.raises(FormatError, match="without its Relation"):
        list(LineDecoder(3).decode(record, 1))
