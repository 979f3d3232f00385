"""Which chunks may hold the range of one that was dropped."""

from __future__ import annotations

from live_migration.common.catalog import Part, TableInfo
from live_migration.common.relation import QualifiedName, ReplicaIdentity
from live_migration.coordinator.dropped_chunks import PlannedChunk, pair_of, pairs_to_compare


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
