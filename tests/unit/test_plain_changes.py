"""Runs of updates of whole rows: the same end as folding by values, or left to that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.common.relation import Column, QualifiedName, Relation, ReplicaIdentity
from live_migration.consumer.folding import fold
from live_migration.consumer.plain_updates import plain_updates
from live_migration.consumer.row_encoding import UNCHANGED, Message, Value, binary_row, text_row
from live_migration.consumer.target_tables import KeyColumn, TargetTable
from tests.support.messages import put_delete, put_insert, put_tuple, put_update

OID = 9


def make_table(keys: tuple[int, ...] = (0,), *, kept: tuple[int, ...] | None = None, identity: str = "") -> TargetTable:
    columns = tuple(Column(f"c{i}", type_oid, -1, i in keys) for i, type_oid in enumerate((23, 25, 25)))
    on_target = tuple(SimpleNamespace(name=c.name, type="text", generated="", identity="") for c in columns)
    on_target[2].identity = identity
    key = tuple(KeyColumn(i, f"c{i}", "=", True) for i in keys)
    name = QualifiedName("public", "t")
    relation = Relation(OID, name, ReplicaIdentity("d"), columns)
    return TargetTable(OID, name, relation, cast(Any, on_target), kept, key, False, False, False, True)


def update(row: list[Value], *, binary: bool) -> bytes:
    return b"U" + OID.to_bytes(4, "big") + b"N" + put_tuple(row, binary=binary)


rows = st.tuples(
    st.sampled_from([b"0001", b"0002", b"0003", b"tttt"]),
    st.one_of(st.none(), st.sampled_from([b"", b"t", b"n", b"un", b"\t\\", b"plain"])),
    st.one_of(st.none(), st.sampled_from([b"", b"x", b"tn"])),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(rows, min_size=1, max_size=30), st.booleans(), st.sampled_from([(0,), (0, 1)]))
def test_the_end_is_that_of_folding_by_values(
    changes: list[tuple[bytes | None, ...]], binary: bool, keys: tuple[int, ...]
) -> None:
    table = make_table(keys)
    messages = [update(list(row), binary=binary) for row in changes]
    found = plain_updates(table, cast(list[Message], messages), binary=binary)
    if any(row[i] is None for row in changes for i in keys):
        assert found is None
        return
    expected = []
    for present, updates in fold(messages, list(keys)).updates.items():
        for key, values in updates:
            row = dict(zip((*keys, *present), (*key, *values), strict=True))
            expected.append([row[i] for i in range(3)])
    assert found is not None
    assert found[0] == len(expected)
    encode = binary_row if binary else text_row
    assert b"".join(cast(list[bytes], found[1])) == b"".join(cast(list[bytes], [encode(row) for row in expected]))


WHOLE: list[Value] = [b"0001", b"x", b"y"]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("row", [[b"0001", UNCHANGED, b"y"], [b"0001", b"xun", UNCHANGED], [UNCHANGED, b"x", None]])
def test_a_value_that_the_stream_does_not_carry_is_left_to_folding(row: list[Value], binary: bool) -> None:
    messages = [update(WHOLE, binary=binary), update(row, binary=binary)]
    assert plain_updates(make_table(), cast(list[Message], messages), binary=binary) is None


@pytest.mark.parametrize(
    "other",
    [
        put_insert(OID, WHOLE),
        put_delete(OID, key=[b"0001", None, None]),
        put_update(OID, WHOLE, key=[b"0002", None, None]),
        put_update(OID, WHOLE, old=WHOLE),
        memoryview(update(WHOLE, binary=False)),
    ],
)
def test_other_changes_are_left_to_folding(other: Message) -> None:
    assert plain_updates(make_table(), [update(WHOLE, binary=False), other], binary=False) is None


def test_tables_whose_rows_are_not_staged_as_they_come_are_left_to_folding() -> None:
    messages = [update(WHOLE, binary=False)]
    for table in (make_table(()), make_table((1,)), make_table(kept=(0, 1)), make_table(identity="a")):
        assert plain_updates(table, cast(list[Message], messages), binary=False) is None
