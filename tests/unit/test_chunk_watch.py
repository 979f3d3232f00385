"""Which chunks were missed: made unpublished, or compressed into a table that nobody watched."""

from __future__ import annotations

from dataclasses import replace

from live_migration.common.catalog import Part, TableInfo
from live_migration.common.relation import QualifiedName, ReplicaIdentity
from live_migration.coordinator.chunk_watch import Known, _known, find_grown, find_missed, find_moved, find_unwatched

KEYED, KEYLESS = QualifiedName("public", "keyed"), QualifiedName("public", "keyless")
KNOWN = Known({1: (KEYED, True), 2: (KEYLESS, False)}, frozenset({11}), frozenset({21}), {11: "true"})


def table(oid: int, part: Part, root: int | None, compressed: int | None = None) -> TableInfo:
    name = QualifiedName("inner", f"t{oid}")
    return TableInfo(oid, name, "p", ReplicaIdentity.DEFAULT, 5, (), 0, 0, 0, part, root, "true", compressed)


def test_a_new_chunk_must_be_where_its_hypertable_is() -> None:
    tables = [table(oid, "chunk", root) for oid, root in ((11, 1), (12, 1), (13, 1), (14, 2), (15, 2), (16, 9))]
    missed = find_missed(KNOWN, tables, frozenset({11, 12}), frozenset({13, 14}))
    # 13 is published for inserts alone, though its hypertable has an identity; 16 belongs to nobody of ours
    assert [(m.chunk.oid, m.root, m.is_new) for m in missed] == [(13, KEYED, True), (15, KEYLESS, True)]


def test_a_chunk_that_is_known_but_not_published_is_missed_all_the_same() -> None:
    """Whoever marked it may have ended, or have been refused, before it was published."""
    tables = [table(11, "chunk", 1)]
    assert [(m.chunk.oid, m.is_new) for m in find_missed(KNOWN, tables, frozenset(), frozenset())] == [(11, False)]
    assert not find_missed(
        KNOWN, tables, frozenset(), frozenset({11})
    )  # a chunk of the plan is where its own identity allows


def test_what_was_compressed_unwatched_is_copied_anew() -> None:
    tables = [
        table(11, "chunk", 1, 22), table(12, "chunk", 1, 21), table(13, "chunk", 1, 23), table(14, "chunk", 2),
        table(21, "compressed", 1), table(22, "compressed", 1), table(23, "compressed", 1),
    ]  # fmt: skip
    found = find_unwatched(KNOWN, tables, frozenset({23}), {tables[3].name})
    assert [(m.chunk.oid, m.is_new) for m in found] == [(11, False), (14, True)]


def test_a_chunk_that_others_were_merged_into_is_copied_anew() -> None:
    known = Known({1: (KEYED, True)}, chunks=frozenset({11, 12}), ranges={11: "true", 12: "t < 5"})
    found = find_grown(known, [table(11, "chunk", 1), table(12, "chunk", 1), table(13, "chunk", 1)])
    assert [(m.chunk.oid, m.is_new) for m in found] == [(12, False)]


def test_a_chunk_that_its_lane_has_but_marked_is_in_no_copy() -> None:
    """All before the mark must be applied first; what its range was before is not known."""
    known = Known({1: (KEYED, True)}, chunks=frozenset({11}))
    (found,) = find_missed(known, [table(11, "chunk", 1)], frozenset(), frozenset())
    assert found.is_new
    assert not find_missed(known, [table(11, "chunk", 1)], frozenset(), frozenset({11}))
    assert not find_grown(known, [table(11, "chunk", 1)])


def test_a_chunk_that_lies_in_another_file_is_copied_anew() -> None:
    """Once: until it is copied, and in the file where that copy found it. One that no copy has lies where it was made."""
    known = Known(
        {1: (KEYED, True)},
        chunks=frozenset({11, 12, 13, 15}),
        ranges={11: "true", 12: "true", 13: "true"},
        files={11: "11", 12: "90", 13: "13"},
        to_be_copied=frozenset({13}),
    )
    files = {11: "91", 12: "90", 13: "93", 14: "14", 15: "95", 16: "96"}
    tables = [replace(table(oid, "chunk", 1), file_mark=f"{file} 1:700") for oid, file in files.items()]
    assert [(m.chunk.oid, m.is_new) for m in find_moved(known, tables)] == [(11, False), (15, True), (16, True)]


def test_a_chunk_that_its_lane_met_is_known_by_its_copy_alone() -> None:
    """Else it would be in another file than when it was made at every look. Nobody has looked at it, so it must be published."""
    row = {
        "oid": 11, "schema_name": "inner", "table_name": "t11", "kind": "chunk", "publication": "all", "compressed_oid": 22,
        "range": "true", "file": "91", "is_to_be_copied": False, "is_met": True,
    }  # fmt: skip
    root = row | {
        "oid": 1,
        "schema_name": "public",
        "table_name": "keyed",
        "kind": "hypertable",
        "file": "",
        "is_met": False,
    }
    known = _known([root, row])
    there, moved = [replace(table(11, "chunk", 1), file_mark=f"{file} 1:700") for file in (91, 92)]
    assert find_moved(known, [there]) == []
    assert [m.chunk.oid for m in find_moved(known, [moved])] == [11]
    assert find_moved(_known([root, row | {"is_to_be_copied": True}]), [moved]) == []
    assert [m.is_new for m in find_missed(known, [there], frozenset(), frozenset())] == [True]
    assert not known.compressed


def test_a_chunk_whose_column_is_called_otherwise_or_may_be_null_by_now_holds_the_same_range() -> None:
    before = "(at < '2026-01-02'::date) and (get_partition_hash(kind) < 5)"
    now = "(day < '2026-01-02'::date) and (sort is null or (get_partition_hash(sort) < 5))"
    grown = now.replace("02", "03")
    known = Known({1: (KEYED, True)}, chunks=frozenset({11, 12}), ranges={11: before, 12: before})
    tables = [replace(table(11, "chunk", 1), range=now), replace(table(12, "chunk", 1), range=grown)]
    assert [m.chunk.oid for m in find_grown(known, tables)] == [12]
