"""Which chunks may hold the range of one that was dropped."""

from __future__ import annotations

from live_migration.common.catalog import Part, TableInfo
from live_migration.common.relation import QualifiedName, ReplicaIdentity
from live_migration.coordinator.dropped_chunks import (
    NotedRange,
    PlannedChunk,
    changed_ranges,
    pair_of,
    pairs_to_compare,
)


def table(oid: int, part: Part, root: int | None) -> TableInfo:
    name = QualifiedName("inner", f"t{oid}")
    return TableInfo(oid, name, "p", ReplicaIdentity.DEFAULT, 5, (), 0, 0, 0, part, root, "t < 5")


GONE = PlannedChunk(11, 1, "t < 5", has_copy=True)
UNKNOWN = PlannedChunk(12, 1, None, has_copy=False)
PASSED_OVER = PlannedChunk(13, 1, "false", has_copy=False)
PRESENT = PlannedChunk(14, 1, "t < 5", has_copy=True)
MET = PlannedChunk(15, 1, "t < 5", has_copy=False)
TABLES = [table(14, "chunk", 1), table(15, "chunk", 1), table(16, "chunk", 1), table(17, "chunk", 2), table(1, "hypertable", 1)]  # fmt: skip


def test_a_chunk_that_is_gone_is_compared_with_those_of_its_hypertable_that_no_copy_has() -> None:
    found = pairs_to_compare([GONE, UNKNOWN, PASSED_OVER, PRESENT, MET], TABLES, ())
    assert [(gone.oid, chunk.oid) for gone, chunk in found] == [(11, 15), (12, 15), (11, 16), (12, 16)]


def test_what_shares_no_row_is_compared_once_until_a_range_is_another() -> None:
    excluded = {pair_of(gone, chunk) for gone, chunk in pairs_to_compare([GONE, PRESENT, MET], TABLES, ())}
    assert pairs_to_compare([GONE, PRESENT, MET], TABLES, excluded) == []
    other = PlannedChunk(11, 1, "t < 6", has_copy=True)
    assert len(pairs_to_compare([other, PRESENT, MET], TABLES, excluded)) == 2


def test_ranges_are_noted_with_what_their_columns_are_called_by_now() -> None:
    noted = [
        NotedRange(11, 1, "(t < 5)", None),
        NotedRange(12, 1, "(t < 9)", None),
        NotedRange(13, 1, None, "(t < 7)"),
        NotedRange(14, 1, None, "(t < 8)"),
        NotedRange(15, 1, None, None),
        NotedRange(16, 1, "(t < 4)", None),
        NotedRange(21, 2, "(t < 5)", None),
    ]
    now = {11: "(u < 5)", 14: "(u < 8)", 15: "(u < 3)", 16: "(u < 40)"}
    changed = dict(changed_ranges(noted, now))
    assert changed == {
        (11, "(t < 5)", None): ("(u < 5)", None),
        (12, "(t < 9)", None): ("(u < 9)", None),  # gone, as the next is
        (13, None, "(t < 7)"): (None, "(u < 7)"),
        (14, None, "(t < 8)"): (None, "(u < 8)"),
        (15, None, None): (None, "(u < 3)"),
    }
    assert changed_ranges([NotedRange(oid, 1, *new) for (oid, *_), new in changed.items()], now) == []
