"""Runs of changes of whole rows: the same end as folding by values, or left to that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_migration.common.relation import Column, QualifiedName, Relation, ReplicaIdentity
from live_migration.consumer.folding import NotFoldable, fold
from live_migration.consumer.plain_changes import plain_changes
from live_migration.consumer.row_encoding import UNCHANGED, Message, Value, binary_row, text_row
from live_migration.consumer.target_tables import KeyColumn, TargetTable
from tests.support.messages import put_delete, put_insert, put_tuple, put_update

OID = 9


def make_table(keys: tuple[int, ...] = (0,), *, identity: str = "") -> TargetTable:
    columns = tuple(Column(f"c{i}", type_oid, -1, i in keys) for i, type_oid in enumerate((23, 25, 25)))
    on_target = tuple(SimpleNamespace(name=c.name, type="text", generated="", identity="") for c in columns)
    on_target[2].identity = identity
    key = tuple(KeyColumn(i, f"c{i}", "=", True) for i in keys)
    name = QualifiedName("public", "t")
    relation = Relation(OID, name, ReplicaIdentity("d"), columns)
    return TargetTable(OID, name, relation, cast(Any, on_target), key, False, False, False, True)


def update(row: list[Value], *, binary: bool) -> bytes:
    return put_update(OID, row, binary=binary)


rows = st.tuples(
    st.sampled_from([b"0001", b"0002", b"0003", b"tttt"]),
    st.one_of(st.none(), st.sampled_from([b"", b"t", b"n", b"un", b"\t\\", b"plain"])),
    st.one_of(st.none(), st.sampled_from([b"", b"x", b"tn"])),
)


kinds = st.sampled_from("UUID")


def change(kind: str, row: list[Value], keys: tuple[int, ...], *, binary: bool) -> bytes:
    if kind == "U":
        return update(row, binary=binary)
    if kind == "I":
        return put_insert(OID, row, binary=binary)
    return (
        b"D"
        + OID.to_bytes(4, "big")
        + b"K"
        + put_tuple([value if i in keys else None for i, value in enumerate(row)], binary=binary)
    )


def joined(found: object) -> bytes:
    return b"".join(cast(list[bytes], found))


@settings(deadline=None, max_examples=500)
@given(st.lists(st.tuples(kinds, rows), min_size=1, max_size=30), st.booleans(), st.sampled_from([(0,), (0, 1)]))
def test_the_end_is_that_of_folding_by_values(
    changes: list[tuple[str, tuple[bytes | None, ...]]], binary: bool, keys: tuple[int, ...]
) -> None:
    table = make_table(keys)
    messages = [change(kind, list(row), keys, binary=binary) for kind, row in changes]
    found = plain_changes(table, cast(list[Message], messages), binary=binary)
    if any(row[i] is None for _, row in changes for i in keys):
        assert found is None
        return
    try:
        net = fold(messages, list(keys))
    except NotFoldable:
        assert found is None
        return
    updated = []
    for present, updates in net.updates.items():
        for key, values in updates:
            row = dict(zip((*keys, *present), (*key, *values), strict=True))
            updated.append([row[i] for i in range(3)])
    assert found is not None
    encode = binary_row if binary else text_row
    assert joined(found.deletes) == joined([encode(key) for key in net.deletes])
    assert (found.update_count, found.insert_count) == (len(updated), len(net.inserts))
    assert joined(found.updates) == joined([encode(row) for row in updated])
    assert joined(found.inserts) == joined([encode(row) for row in net.inserts])


WHOLE: list[Value] = [b"0001", b"x", b"y"]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("row", [[b"0001", UNCHANGED, b"y"], [b"0001", b"xun", UNCHANGED], [UNCHANGED, b"x", None]])
def test_a_value_that_the_stream_does_not_carry_is_left_to_folding(row: list[Value], binary: bool) -> None:
    messages = [update(WHOLE, binary=binary), update(row, binary=binary)]
    assert plain_changes(make_table(), cast(list[Message], messages), binary=binary) is None


@pytest.mark.parametrize(
    "other",
    [
        put_insert(OID, WHOLE),  # twice there
        put_update(OID, [None, b"x", b"y"]),
        put_delete(OID, key=[None, None, None]),
        put_update(OID, WHOLE, key=[b"0002", None, None]),
        put_update(OID, WHOLE, old=WHOLE),
        memoryview(update(WHOLE, binary=False)),
    ],
)
def test_what_needs_care_is_left_to_folding(other: Message) -> None:
    assert plain_changes(make_table(), [put_update(OID, WHOLE), other], binary=False) is None


def test_tables_whose_rows_are_not_staged_as_they_come_are_left_to_folding() -> None:
    messages = [update(WHOLE, binary=False)]
    for table in (make_table(()), make_table((1,)), make_table(identity="a")):
        assert plain_changes(table, cast(list[Message], messages), binary=False) is None
