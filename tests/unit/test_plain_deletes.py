"""Runs of deletes: the same rows of COPY as folding by values gives, or left to that."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.common.relation import Column, QualifiedName, Relation, ReplicaIdentity
from live_migration.consumer.folding import fold
from live_migration.consumer.plain_deletes import plain_deletes
from live_migration.consumer.row_encoding import Message, Value, binary_row, text_row
from live_migration.consumer.target_tables import KeyColumn, TargetTable
from tests.support.messages import put_insert, put_tuple
from tests.unit.test_row_blocks import span_of

OID = 9
INT8, TEXT = 20, 25


def make_table(types: tuple[int, ...], keys: tuple[int, ...]) -> TargetTable:
    columns = tuple(Column(f"c{i}", type_oid, -1, i in keys) for i, type_oid in enumerate(types))
    name = QualifiedName("public", "t")
    relation = Relation(OID, name, ReplicaIdentity("d"), columns)
    key = tuple(KeyColumn(i, f"c{i}", "=", True) for i in keys)
    return TargetTable(OID, name, relation, (), key, False, False, False, True)


def delete(row: list[Value], *, kind: bytes = b"K", binary: bool = True) -> Message:
    return b"D" + OID.to_bytes(4, "big") + kind + put_tuple(row, binary=binary)


def joined(rows: object) -> bytes:
    return b"".join(cast(list[bytes], rows))


numbers = st.binary(min_size=8, max_size=8)
texts = st.binary(min_size=0, max_size=9)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(numbers, texts, numbers), min_size=1, max_size=40, unique_by=lambda row: row),
    st.sampled_from([(0,), (2,), (2, 0), (1,), (0, 1)]),
    st.sampled_from([b"K", b"O"]),
    st.booleans(),
)
def test_the_rows_are_those_of_folding(
    rows: list[tuple[bytes, bytes, bytes]], keys: tuple[int, ...], kind: bytes, binary: bool
) -> None:
    table = make_table((INT8, TEXT, INT8), keys)
    unique = {tuple(row[i] for i in keys): row for row in rows}.values()
    shown = [[value if kind == b"O" or i in keys else None for i, value in enumerate(row)] for row in unique]
    messages = [delete(list(row), kind=kind, binary=binary) for row in shown]
    encode = binary_row if binary else text_row
    expected = joined(map(encode, fold(messages, list(keys)).deletes))
    found = plain_deletes(table, [messages], binary=binary)
    assert found is not None
    assert joined(found) == expected


def test_many_alike_are_put_together_in_blocks() -> None:
    table = make_table((INT8, TEXT), (0,))
    messages = [delete([number.to_bytes(8, "big"), None]) for number in range(100_000)]
    for pieces in (
        [messages],
        [span_of(messages[:20_000]), messages[20_000:30_000], span_of(messages[30_000:60_000]), messages[60_000:]],
    ):
        found = plain_deletes(table, pieces, binary=True)
        assert found is not None
        assert len(found) < 12
        assert joined(found) == joined(binary_row([number.to_bytes(8, "big")]) for number in range(100_000))


def test_one_that_differs_in_what_is_no_value_is_not_taken_for_alike() -> None:
    """Old tuples of one length, one with a NULL where the others have a value, or with other columns."""
    table = make_table((INT8, TEXT), (0,))
    alike = [delete([number.to_bytes(8, "big"), b"12345"], kind=b"O") for number in range(20)]
    other = b"D" + OID.to_bytes(4, "big") + b"O" + (2).to_bytes(2, "big") + b"b" + (9).to_bytes(4, "big") + bytes(9)
    other += b"b" + (4).to_bytes(4, "big") + b"1234"
    assert len(other) == len(alike[0])
    found = plain_deletes(table, [[*alike, other]], binary=True)
    assert found is not None
    assert joined(found) == joined([*(binary_row([n.to_bytes(8, "big")]) for n in range(20)), binary_row([bytes(9)])])


@pytest.mark.parametrize("keys", [(0,), (1,)])
def test_a_key_that_is_null_in_all_of_them_is_left_to_folding(keys: tuple[int, ...]) -> None:
    messages = [delete([bytes(8) if keys == (1,) else None, None]) for _ in range(100)]
    for pieces in ([messages], [span_of(messages)]):
        assert plain_deletes(make_table((INT8, TEXT), keys), pieces, binary=True) is None


def test_updates_that_look_like_deletes_are_left_alone() -> None:
    messages = [b"U" + cast(bytes, delete([number.to_bytes(8, "big"), None]))[1:] for number in range(100)]
    deletes = [delete([number.to_bytes(8, "big"), None]) for number in range(100, 200)]
    for pieces in (
        [messages],
        [span_of(messages)],
        [[*deletes, *messages]],
        [span_of(cast(list[bytes], deletes)), span_of(messages)],
    ):
        assert plain_deletes(make_table((INT8, TEXT), (0,)), pieces, binary=True) is None


@pytest.mark.parametrize(
    "messages",
    [
        [put_insert(OID, [bytes(8), b"x"])],
        [delete([bytes(8), None]), put_insert(OID, [bytes(8), b"x"])],
        [delete([None, b"x"])],
        [memoryview(cast(bytes, delete([bytes(8), None])))],
    ],
)
def test_what_has_to_be_folded_is_left_alone(messages: list[Message]) -> None:
    assert plain_deletes(make_table((INT8, TEXT), (0,)), [messages], binary=True) is None


def test_a_table_without_key_is_left_alone() -> None:
    assert plain_deletes(make_table((INT8,), ()), [[delete([bytes(8)], kind=b"O")]], binary=True) is None
