"""Which lanes a table has, the lane of a row's key, what a key that changes becomes, and which tables are refused."""

from __future__ import annotations

import random
import re
import struct
from collections import Counter
from dataclasses import replace
from uuid import uuid4

import pytest

from live_migration.common.errors import FormatError, UsageError
from live_migration.common.lanes import LaneMap, lane_of, parse_lanes
from live_migration.common.meeting import GATHER, Meeting, decode_meeting, encode_meeting
from live_migration.common.relation import Column, QualifiedName, Relation, ReplicaIdentity
from live_migration.common.settings import load_settings
from live_migration.coordinator.lane_findings import LaneFacts, assess_lanes
from live_migration.producer.splitting import SplitRelation, SplitTable, has_bytewise_key
from tests.support.messages import put_delete, put_insert, put_tuple, put_update

INT8, TEXT, NUMERIC, CITEXT, UUID = 20, 25, 1700, 16_999, 2950
NAME = QualifiedName("public", "hot")


def relation(*keys: int, identity: ReplicaIdentity = ReplicaIdentity.DEFAULT, types: tuple[int, ...] = ()) -> Relation:
    """Four columns, of which those with these numbers are the key."""
    columns = types or (INT8,) * 4
    return Relation(7, NAME, identity, tuple(Column(f"c{n}", oid, -1, n in keys) for n, oid in enumerate(columns)))


def split(*keys: int, count: int = 4) -> SplitRelation:
    return SplitRelation(SplitTable(range(8, 8 + count), is_settled=True), relation(*keys))


def number(value: int) -> bytes:
    return struct.pack(">q", value)


def unchanged(message: bytes, column: int) -> bytes:
    """Give an Update without old row, with this column of its new row left out."""
    at = 8
    for _ in range(column):
        at += 1 if message[at : at + 1] == b"n" else 5 + int.from_bytes(message[at + 1 : at + 5], "big")
    return message[:at] + b"u" + message[at + 5 + int.from_bytes(message[at + 1 : at + 5], "big") :]


@pytest.mark.parametrize("keys", [(0,), (2,), (3,), (0, 3), (1, 2)])
@pytest.mark.parametrize("binary", [True, False])
def test_a_row_lies_where_its_key_does_whatever_the_message(keys: tuple[int, ...], binary: bool) -> None:
    relation = split(*keys)
    rng = random.Random(1)
    for _ in range(50):
        row = [rng.randbytes(rng.randint(0, 9)) for _ in range(4)]
        if rng.random() < 0.5:
            row = [value if n in keys or n % 2 else None for n, value in enumerate(row)]  # type: ignore[misc]
        key = [value if n in keys else None for n, value in enumerate(row)]
        other = [value if n in keys else b"new" for n, value in enumerate(row)]
        as_tuple = put_tuple(key, binary=binary)
        lane = relation.place(put_insert(7, row, binary=binary))
        assert lane is not None
        assert relation.place(b"U\0\0\0\7N" + put_tuple(other, binary=binary)) == lane
        assert relation.place(b"D\0\0\0\7K" + as_tuple) == lane
        assert relation.place(memoryview(put_insert(7, row, binary=binary))) == lane
        told = b"U\0\0\0\7K" + as_tuple + b"N" + put_tuple(other, binary=binary)
        assert relation.place(told) is None
        assert relation.parts(told) == ((lane, told),)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
def test_keys_are_spread_evenly(count: int) -> None:
    relation = split(0, count=count)
    for keys in (
        [number(n) for n in range(20_000)],
        [number(n << 20) for n in range(20_000)],
        [b"%d" % n for n in range(20_000)],
        [uuid4().bytes for _ in range(20_000)],
    ):
        lanes = Counter(relation.place(put_insert(7, [key, None, None, None], binary=True)) for key in keys)
        assert set(lanes) == set(range(count))
        assert max(lanes.values()) < 1.25 * len(keys) / count


def test_columns_of_a_key_do_not_run_into_one_another() -> None:
    relation = split(0, 1, count=64)
    pairs = [(b"a" * n, b"a" * (12 - n)) for n in range(13)]
    assert len({relation.place(put_insert(7, [*pair, None, None])) for pair in pairs}) > 4


def test_a_key_that_changes_is_a_delete_in_one_lane_and_an_insert_in_the_other() -> None:
    relation = split(0)
    for n in range(200):
        old, new = b"%d" % n, b"%d" % (n * n)
        message = put_update(7, [new, b"v", None, b"w"], key=[old, None, None, None])
        delete, insert = put_delete(7, key=[old, None, None, None]), put_insert(7, [new, b"v", None, b"w"])
        parts = relation.parts(message)
        assert parts is not None
        from_lane, to_lane = relation.place(delete), relation.place(insert)
        assert parts == (((from_lane, message),) if from_lane == to_lane else ((from_lane, delete), (to_lane, insert)))


def test_a_key_that_changes_lanes_while_a_value_stays_behind_cannot_be_split() -> None:
    relation = split(0)
    outcomes = set()
    for n in range(50):
        message = put_update(7, [b"%d" % (n * n), b"v", b"big", None], key=[b"%d" % n, None, None, None])
        is_moved = len(relation.parts(message) or ()) == 2
        parts = relation.parts(message.replace(b"t\0\0\0\3big", b"u"))
        outcomes.add((is_moved, parts is None))
    assert outcomes == {(True, True), (False, False)}


def test_a_key_that_is_toasted_is_told_although_it_did_not_change() -> None:
    """The new row then leaves it out."""
    relation = split(0)
    key = b"k" * 3000
    plain = put_insert(7, [key, b"v", None, None])
    message = put_update(7, [key, b"w", None, None], key=[key, None, None, None])
    message = message[: message.rindex(b"N")] + b"N" + struct.pack(">H", 4) + b"u" + put_tuple([b"w", None, None])[2:]
    assert relation.parts(message) == ((relation.place(plain), message),)
    assert relation.place(unchanged(put_update(7, [key, b"w", None, None]), 0)) is None
    assert relation.parts(unchanged(put_update(7, [key, b"w", None, None]), 0)) is None


@pytest.mark.parametrize(
    ("identity", "types", "keys", "is_fit"),
    [
        (ReplicaIdentity.DEFAULT, (INT8, TEXT), (0,), True),
        (ReplicaIdentity.INDEX, (TEXT, UUID), (0, 1), True),
        (ReplicaIdentity.FULL, (INT8, TEXT), (0, 1), False),
        (ReplicaIdentity.DEFAULT, (INT8, TEXT), (), False),
        (ReplicaIdentity.NOTHING, (INT8, TEXT), (), False),
        (ReplicaIdentity.DEFAULT, (NUMERIC, TEXT), (0,), False),
        (ReplicaIdentity.DEFAULT, (INT8, CITEXT), (0, 1), False),
    ],
)
def test_only_keys_that_are_equal_when_their_bytes_are_tell_rows_apart(
    identity: ReplicaIdentity, types: tuple[int, ...], keys: tuple[int, ...], is_fit: bool
) -> None:
    described = relation(*keys, identity=identity, types=types)
    assert has_bytewise_key(described) is is_fit
    without = SplitRelation(SplitTable(range(4), is_settled=True), described)
    assert without.has_key is is_fit
    if not is_fit:
        assert without.place(put_insert(7, [b"1"] * len(types))) is None
        assert without.parts(put_update(7, [b"1"] * len(types), key=[b"2"] * len(types))) is None


# lanes of tables


def test_split_tables_have_lanes_of_their_own_behind_the_shared_ones() -> None:
    other = QualifiedName("app", "Other")
    lanes = LaneMap(8, parse_lanes(["public.hot=4", ' app."Other" = 2 ']))
    assert lanes.lane_count == 14
    assert (lanes.lanes_of(other), lanes.lanes_of(NAME)) == (range(8, 10), range(10, 14))
    for n in range(50):
        name = QualifiedName("public", f"t{n}")
        assert list(lanes.lanes_of(name)) == [lane_of(name, 8)]
    assert LaneMap(8, parse_lanes([' app."Other"=2', "HOT=4"])) == lanes


@pytest.mark.parametrize(
    "words",
    [
        ["hot"],
        ["hot=1"],
        ["hot=65"],
        ["hot=4x"],
        ["a.b.c=4"],
        ["=4"],
        ['"hot=4'],
        ["hot=4", "public.hot=2"],
        ["hot=-2"],
    ],
)
def test_lanes_that_cannot_be_had_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        load_settings({"lanes": tuple(words)})


def test_one_partition_and_several_lanes_contradict_one_another() -> None:
    with pytest.raises(UsageError, match="two --partitions"):
        load_settings({"lanes": ("hot=2",), "partitions": 1})


def test_lanes_come_from_the_environment_one_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given = load_settings({"lanes": ("public.hot=4", "b=2")})
    for variable, value in given.environment().items():
        monkeypatch.setenv(variable, value)
    assert load_settings({}).lane_map == given.lane_map == LaneMap(8, parse_lanes(["b=2", "hot=4"]))


def test_a_meeting_is_read_as_it_was_written() -> None:
    assert decode_meeting(encode_meeting(GATHER, range(8, 12)), 77) == Meeting(range(8, 12), 77, True)
    with pytest.raises(FormatError):
        decode_meeting(encode_meeting(GATHER, range(8, 12)) + b"x", 77)


# refusals


FIT = LaneFacts("r", "p", "d", True, (), (), False)


def test_a_table_with_nothing_but_its_key_is_let_in() -> None:
    assert assess_lanes(NAME, FIT) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "p"}, "partitioned table"),
        ({"kind": "v"}, "no table"),
        ({"persistence": "u"}, "not logged"),
        ({"is_hypertable": True}, "hypertable"),
        ({"has_key": False, "identity": "f"}, "FULL"),
        ({"has_key": False}, "no usable replica identity"),
        ({"other_indexes": ("hot_email",)}, "hot_email"),
        ({"unfit_columns": ("price (numeric)",)}, "price \\(numeric\\)"),
    ],
)
def test_a_table_whose_order_is_more_than_that_of_its_keys_is_refused(change: dict[str, object], said: str) -> None:
    (finding,) = assess_lanes(NAME, replace(FIT, **change))  # type: ignore[arg-type]
    assert finding.level == "error"
    assert finding.hint
    assert re.search(said, finding.what)
