from __future__ import annotations

from dataclasses import replace

import pytest

from live_migration.common.relation import QualifiedName
from live_migration.coordinator.dump_script import PG_CLASS, Entry
from live_migration.coordinator.hypertable_entries import EntriesOfTimescale, part_entries, without_only


def _entry(oid: int, type: str = "VIEW", schema: str = "public", statements: str = "") -> Entry:
    return Entry(PG_CLASS if oid else 0, oid, "x", type, schema, statements)


def test_entries_part_in_three_and_keep_their_order() -> None:
    keys = EntriesOfTimescale(frozenset({(PG_CLASS, 1)}), frozenset({(PG_CLASS, 2)}))
    entries = [
        _entry(2),
        _entry(1),
        _entry(3, "TABLE"),
        _entry(0, "COMMENT"),
        _entry(0, "COMMENT", "_timescaledb_internal"),
        _entry(0, "ENCODING", "-"),
        _entry(4),
    ]
    before, after = part_entries(entries, keys)
    assert [(each.oid, each.type) for each in before] == [(3, "TABLE"), (0, "ENCODING"), (4, "VIEW")]
    assert [(each.oid, each.type) for each in after] == [(2, "VIEW"), (0, "COMMENT")]


def test_what_is_left_out_goes_with_the_comments_on_it() -> None:
    keys = EntriesOfTimescale(frozenset(), frozenset(), frozenset({(PG_CLASS, 1)}))
    entries = [
        replace(_entry(1), number=10, needs=(3,)),
        replace(_entry(0, "COMMENT"), number=11, needs=(10,)),
        replace(_entry(2), number=12, needs=(10,)),
        replace(_entry(0, "COMMENT"), number=13, needs=(12,)),
    ]
    before, after = part_entries(entries, keys)
    assert [each.number for each in (*before, *after)] == [12, 13]


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        ("ALTER TABLE ONLY s.t\n    ADD CONSTRAINT", "ALTER TABLE s.t\n    ADD CONSTRAINT"),
        ('ALTER TABLE ONLY "S s"."t""." ADD', 'ALTER TABLE "S s"."t""." ADD'),
        ("CREATE INDEX;\n\nALTER TABLE ONLY s.t CLUSTER ON i;", "CREATE INDEX;\n\nALTER TABLE s.t CLUSTER ON i;"),
        ("ALTER TABLE ONLY s.t2 ADD", "ALTER TABLE ONLY s.t2 ADD"),
        ("select 'ALTER TABLE ONLY s.t '", "select 'ALTER TABLE ONLY s.t '"),
    ],
)
def test_only_is_taken_away_for_hypertables(statements: str, expected: str) -> None:
    entry = _entry(1, "CONSTRAINT", statements=statements)
    names = {QualifiedName("s", "t"), QualifiedName("S s", 't".')}
    assert without_only(entry, names).statements == expected
