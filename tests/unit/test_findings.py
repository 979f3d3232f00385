from __future__ import annotations

from dataclasses import replace

import pytest

from live_migration.common.catalog import ColumnInfo, TableInfo
from live_migration.common.errors import LiveMigrationError
from live_migration.common.relation import QualifiedName, ReplicaIdentity
from live_migration.coordinator.findings import (
    Extension,
    Finding,
    ServerFacts,
    assess_brokers,
    assess_conflicts,
    assess_extensions,
    assess_leftovers,
    assess_pair,
    assess_server,
    name_list,
)
from live_migration.coordinator.preflight import require_clean
from live_migration.coordinator.source_findings import (
    PreparedTransaction,
    RoleFacts,
    SourceFacts,
    assess_large_objects,
    assess_prepared,
    assess_role,
    assess_short_names,
    assess_source,
    assess_tables,
)

SERVER = ServerFacts(180_001, "7", "noon", "d", "UTF8", is_standby=False, is_read_only=False)
SOURCE = SourceFacts("logical", 0, 10, 0, 10, -1, 60_000, "0", 1 << 30, tables=100, locks=10_000)
ROLE = RoleFacts("app", False, True, True, (), (), ())


def test_locks_for_all_tables_at_once() -> None:
    assert assess_source(replace(SOURCE, tables=5_000), "UTF8", 5.0) == []
    (finding,) = assess_source(replace(SOURCE, tables=5_001), "UTF8", 5.0)
    assert finding.level == "warning"
    assert "5,001 tables" in finding.what
    assert "10,000 locks" in finding.what
    (finding,) = assess_source(replace(SOURCE, tables=10_001), "UTF8", 5.0)
    assert finding.level == "error"
    assert "max_locks_per_transaction on the source" in finding.hint


def levels(found: list[Finding]) -> list[str]:
    return [finding.level for finding in found]


def test_good_servers_have_no_finding() -> None:
    assert assess_server("source", SERVER) == []
    assert assess_source(SOURCE, "UTF8", 5.0) == []
    assert assess_role(ROLE, "d") == []
    assert assess_pair(SERVER, replace(SERVER, system_identifier="8")) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 130_010}, "runs PostgreSQL 13"),
        ({"is_standby": True}, "is a standby"),
        ({"is_read_only": True}, "read-only"),
    ],
)
def test_server_that_cannot_be_used(change: dict[str, bool], said: str) -> None:
    (finding,) = assess_server("target", replace(SERVER, **change))
    assert finding.level == "error"
    assert said in finding.what


def test_version_that_nobody_tried_is_a_warning() -> None:
    assert levels(assess_server("target", replace(SERVER, version=190_000))) == ["warning"]


@pytest.mark.parametrize(
    ("version", "is_mended"), [(160_008, False), (160_009, True), (150_012, False), (180_000, True)]
)
def test_a_source_that_leaves_out_changes_of_tables_published_meanwhile_is_a_warning(
    version: int, is_mended: bool
) -> None:
    found = assess_server("source", replace(SERVER, version=version))
    assert levels(found) == ([] if is_mended else ["warning"])
    assert assess_server("target", replace(SERVER, version=version)) == []


@pytest.mark.parametrize("wal_level", ["replica", "minimal"])
def test_wal_level_must_be_logical(wal_level: str) -> None:
    (finding,) = assess_source(replace(SOURCE, wal_level=wal_level), "UTF8", 5.0)
    assert (finding.level, wal_level in finding.what) == ("error", True)


def test_last_slot_and_sender_are_enough_and_none_is_not() -> None:
    assert assess_source(replace(SOURCE, slots=9, senders=9), "UTF8", 5.0) == []
    assert levels(assess_source(replace(SOURCE, slots=10, senders=10), "UTF8", 5.0)) == ["error", "error"]


@pytest.mark.parametrize(
    ("change", "is_warned"),
    [
        ({"max_slot_wal_keep_bytes": 4 << 30}, False),
        ({"max_slot_wal_keep_bytes": (4 << 30) - 1}, True),
        ({"max_slot_wal_keep_bytes": 5 << 30, "database_bytes": 6 << 30}, True),
        ({"wal_sender_timeout_ms": 0}, False),
        ({"wal_sender_timeout_ms": 19_999}, True),
        ({"wal_sender_timeout_ms": 20_000}, False),
        ({"idle_slot_timeout": "1d"}, True),
        ({"idle_slot_timeout": ""}, False),
    ],
)
def test_limits_of_a_slot(change: dict[str, int], is_warned: bool) -> None:
    assert levels(assess_source(replace(SOURCE, **change), "UTF8", 5.0)) == ["warning"] * is_warned


def test_superuser_lacks_nothing() -> None:
    poor = RoleFacts("app", True, False, False, ("t",), ("t",), ("t",))
    assert assess_role(poor, "d") == []
    assert levels(assess_role(replace(poor, is_superuser=False), "d")) == ["error"] * 5


def table(
    name: str, identity: ReplicaIdentity, index: int | None, *, generated: str = "", persistence: str = "p"
) -> TableInfo:
    column = ColumnInfo("a", "integer", 23, generated, "", False)
    return TableInfo(1, QualifiedName("s", name), persistence, identity, index, (column,), 100, 1)


def test_tables_that_cannot_be_followed_are_named() -> None:
    tables = [
        table("keyed", ReplicaIdentity.DEFAULT, 5),
        table("full", ReplicaIdentity.FULL, None),
        table("bare", ReplicaIdentity.DEFAULT, None),
        table("computed", ReplicaIdentity.FULL, None, generated="s"),
        table("volatile", ReplicaIdentity.DEFAULT, None, persistence="u"),
    ]
    bare, computed, volatile = assess_tables(tables, replica_identity_full=False)
    assert bare.what.endswith("are followed: s.bare")
    assert computed.what.endswith("s.computed")
    assert volatile.what.endswith("s.volatile")
    assert "without an identity: s.bare" in assess_tables(tables, replica_identity_full=True)[0].what


def test_names_that_grow_in_another_encoding_are_named() -> None:
    columns = [ColumnInfo(kind[0], kind, 1, "", "", False) for kind in ("name", '"char"[]', "text", "char(3)")]
    columns.append(ColumnInfo("d", "public.d", 1, "", "", False, base_type="name"))
    tables = [replace(table("t", ReplicaIdentity.DEFAULT, 5), columns=tuple(columns))]
    (finding,) = assess_short_names(tables, "LATIN1", "UTF8")
    assert finding.what.endswith('cut on the target: s.t.n, s.t.", s.t.d')
    assert assess_short_names(tables, "UTF8", "UTF8") == assess_short_names(tables, "LATIN1", "LATIN1") == []
    assert assess_short_names([table("t", ReplicaIdentity.DEFAULT, 5)], "LATIN1", "UTF8") == []


def test_large_objects_and_prepared_transactions_are_announced() -> None:
    assert assess_large_objects(0, 8192) == []
    assert "3 large objects (8.0 KiB)" in assess_large_objects(3, 8192)[0].what
    assert assess_prepared([]) == []
    assert "gid1 (prepared 1 minute 5.000 seconds ago)" in assess_prepared([PreparedTransaction("gid1", 65.2)])[0].what


def test_clone_of_a_server_is_another_database() -> None:
    assert assess_pair(SERVER, SERVER)[0].what == "source and target are the same database"
    assert assess_pair(SERVER, replace(SERVER, started_at="later")) == []
    assert assess_pair(SERVER, replace(SERVER, database="e")) == []


def test_older_target_and_narrower_encoding() -> None:
    other = replace(SERVER, system_identifier="8")
    assert levels(assess_pair(SERVER, replace(other, version=170_007))) == ["error"]
    assert levels(assess_pair(SERVER, replace(other, encoding="LATIN1"))) == ["warning"]
    assert assess_pair(replace(SERVER, encoding="LATIN1"), other) == []


def test_extension_that_is_used_must_be_there() -> None:
    extensions = [Extension("a", "1", True), Extension("b", "1", False), Extension("c", "1", True)]
    used, unused = assess_extensions(extensions, frozenset({"c"}))
    assert (used.level, unused.level) == ("error", "warning")
    assert used.what.endswith(": a")
    assert unused.what.endswith(": b")


def test_leftovers_of_our_name() -> None:
    assert assess_leftovers("n", slot_exists=False, active_pid=None, publications=[]) == []
    (active,) = assess_leftovers("n", slot_exists=True, active_pid=7, publications=[])
    assert "in use by pid 7" in active.what
    assert len(assess_leftovers("n", slot_exists=True, active_pid=None, publications=["n", "n_insert"])) == 2


def test_brokers() -> None:
    assert assess_brokers(3, 0) == []
    assert levels(assess_brokers(2, 0)) == ["warning"]
    assert levels(assess_brokers(3, 1)) == ["warning"]
    assert levels(assess_brokers(2, 3)) == ["error"]


def test_long_lists_are_cut() -> None:
    assert name_list(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert "12 objects" in assess_conflicts([str(n) for n in range(12)])[0].what


def test_all_errors_are_raised_at_once_and_warnings_pass() -> None:
    require_clean([Finding("warning", "w")])
    with pytest.raises(LiveMigrationError) as one:
        require_clean([Finding("error", "only", "do this"), Finding("warning", "w")])
    assert (one.value.message, one.value.hint) == ("only", "do this")
    with pytest.raises(LiveMigrationError) as both:
        require_clean([Finding("error", "first", "do this"), Finding("warning", "w"), Finding("error", "second")])
    assert "2 things" in both.value.message
    assert "first" in both.value.message
    assert "do this" in both.value.message
    assert "second" in both.value.message
