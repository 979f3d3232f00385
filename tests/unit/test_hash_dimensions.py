"""What is judged of hypertables that are cut by a hash, without a server."""

from __future__ import annotations

import pytest

from live_migration.common.hashing import Hashed
from live_migration.common.relation import QualifiedName
from live_migration.coordinator.findings import Finding
from live_migration.coordinator.hash_dimensions import HashDimension, assess_hash_dimensions

OF_VALUE = QualifiedName("_timescaledb_functions", "get_partition_hash")
OF_TEXT = QualifiedName("_timescaledb_functions", "get_partition_for_key")
OWN = QualifiedName("public", "get_partition_hash")
INT = Hashed(frozenset({"int4"}), has_others=False, has_oids=False)
TEXT = Hashed(frozenset({"text"}), has_others=False, has_oids=False)
ENUM = Hashed(frozenset(), has_others=False, has_oids=True)
PAIR = Hashed(frozenset({"int4"}), has_others=False, has_oids=True)
CITEXT = Hashed(frozenset(), has_others=True, has_oids=False)


def found(hashed: Hashed, function: QualifiedName = OF_VALUE, target: str = "UTF8") -> list[Finding]:
    return assess_hash_dimensions([HashDimension(QualifiedName("public", "m"), "c", function, hashed)], "UTF8", target)


@pytest.mark.parametrize(
    ("hashed", "function", "target"),
    [(INT, OF_VALUE, "UTF8"), (TEXT, OF_VALUE, "UTF8"), (ENUM, OF_TEXT, "UTF8"), (INT, OF_VALUE, "LATIN1"), (INT, OF_TEXT, "LATIN1")],
)  # fmt: skip
def test_what_hashes_to_the_same_is_no_finding(hashed: Hashed, function: QualifiedName, target: str) -> None:
    assert found(hashed, function, target) == []


@pytest.mark.parametrize("hashed", [ENUM, PAIR])
def test_a_hash_with_an_oid_in_it_is_refused(hashed: Hashed) -> None:
    (finding,) = found(hashed)
    assert (finding.level, "public.m (c)" in finding.what, "get_partition_for_key" in finding.hint) == (
        "error",
        True,
        True,
    )


@pytest.mark.parametrize(("hashed", "function"), [(TEXT, OF_VALUE), (TEXT, OF_TEXT), (ENUM, OF_TEXT)])
def test_a_hash_of_text_is_refused_under_another_encoding(hashed: Hashed, function: QualifiedName) -> None:
    (finding,) = found(hashed, function, "LATIN1")
    assert (finding.level, "LATIN1, not UTF8" in finding.what) == ("error", True)


@pytest.mark.parametrize(("hashed", "function"), [(CITEXT, OF_VALUE), (INT, OWN), (ENUM, OWN)])
def test_what_nobody_can_tell_is_warned_of(hashed: Hashed, function: QualifiedName) -> None:
    (finding,) = found(hashed, function)
    assert finding.level == "warning"
