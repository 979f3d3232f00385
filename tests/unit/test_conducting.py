"""The conductor's pure parts: phases, planning, drift, what is said, errors that are told apart."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from live_migration.common.catalog import ColumnInfo, TableInfo
from live_migration.common.errors import ConnectionLost, Fenced, LiveMigrationError, TargetError
from live_migration.common.lanes import LaneMap, lane_of
from live_migration.common.relation import QualifiedName, ReplicaIdentity
from live_migration.coordinator import planning
from live_migration.coordinator.beside import beside, most_telling
from live_migration.coordinator.client_programs import password_file, split_password
from live_migration.coordinator.drift import compare
from live_migration.coordinator.foreign_keys import ForeignKey
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.phases import FOLLOWERS, Phase, is_transition_allowed
from live_migration.producer.slot import OpenTransaction, describe_transactions

FULL, DEFAULT, NOTHING = ReplicaIdentity.FULL, ReplicaIdentity.DEFAULT, ReplicaIdentity.NOTHING


def put_table(
    identity: ReplicaIdentity, index: int | None, *, generated: str = "", persistence: str = "p", name: str = "t"
) -> TableInfo:
    columns = (
        ColumnInfo("id", "integer", 23, "", "", True),
        ColumnInfo("g", "integer", 23, generated, "", False),
    )
    return TableInfo(1, QualifiedName("app", name), persistence, identity, index, columns, 8192, 10)


@pytest.mark.parametrize(
    ("table", "version", "expected"),
    [
        (put_table(DEFAULT, 7), 180000, True),
        (put_table(DEFAULT, None), 180000, False),
        (put_table(NOTHING, None), 140000, False),
        (put_table(FULL, None), 180000, True),
        (put_table(FULL, None, generated="s"), 180000, False),
        (put_table(FULL, None, generated="v"), 180000, False),
        (put_table(FULL, None, generated="s"), 170000, True),
        (put_table(DEFAULT, 7, generated="s"), 180000, True),
    ],
)
def test_identity_is_what_lets_update_and_delete_through(table: TableInfo, version: int, expected: bool) -> None:
    assert planning.has_identity(table, version) is expected


def test_unlogged_tables_go_into_no_publication() -> None:
    members = planning.assign([put_table(DEFAULT, 7, persistence="u"), put_table(DEFAULT, None)], 180000)
    assert (len(members.all), len(members.insert), len(members.unlogged)) == (0, 1, 1)


def test_a_table_row_has_a_value_for_each_column() -> None:
    values = planning.table_row(put_table(DEFAULT, 7), LaneMap(8), "all", {}, planning.Moment("1:1:", 5, 1, "1/2"))
    row = dict(zip(planning.TABLE_COLUMNS, values, strict=True))
    assert (row["kind"], row["state"], row["snapshot"], row["root_name"]) == ("table", "planned", None, None)
    assert row["lane"] == lane_of(QualifiedName("app", "t"), 8)
    assert row["binary_copy"] is True


def test_phases_go_on_and_back_only_from_cutover_and_to_copy_again() -> None:
    assert FOLLOWERS.keys() == set(Phase)
    order = list(Phase)
    for at, phase in enumerate(order):
        for other in order:
            is_next = order.index(other) == at + 1
            is_back = (phase, other) == (Phase.CUTOVER, Phase.REPLAY)
            is_recopy = other is Phase.PREPARE and phase is not Phase.DONE
            is_recopy |= other is Phase.COPY and phase in (Phase.REPLAY, Phase.CUTOVER)
            assert is_transition_allowed(phase, other) is (is_next or is_back or is_recopy or phase is other)


def test_a_relation_is_its_oid() -> None:
    a, b, c = (QualifiedName("s", name) for name in "abc")
    drift = compare({1: a, 2: b}, {2: c, 3: a})
    assert (drift.created, drift.renamed, drift.dropped) == (("s.a",), ("s.b to s.c",), ("s.a",))
    assert compare({1: a}, {1: a}).lines == []


@pytest.mark.parametrize(
    ("uri", "address", "password"),
    [
        ("postgresql://u:p%40%3A@h:1/d", "postgresql://u@h:1/d", "p@:"),
        ("postgresql://u@h/d?sslmode=require&password=x%26y", "postgresql://u@h/d?sslmode=require", "x&y"),
        ("postgresql://u@h1:1,h2:2/d", "postgresql://u@h1:1,h2:2/d", None),
        ("postgresql:///d?host=/tmp", "postgresql:///d?host=/tmp", None),
    ],
)
def test_a_password_is_taken_out_of_the_uri(uri: str, address: str, password: str | None) -> None:
    assert split_password(uri) == (address, password)


def test_a_password_file_is_ours_alone_and_goes_away() -> None:
    with password_file(r"a:b\c") as path:
        assert path.read_text() == "*:*:*:*:a\\:b\\\\c\n"
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not Path(path).exists()


@pytest.mark.parametrize(
    ("statement", "is_partitioned", "is_valid", "version", "expected"),
    [
        ("ALTER … REFERENCES b(id);", False, True, 140000, "ALTER … REFERENCES b(id) NOT VALID"),
        ("ALTER … REFERENCES b(id);", True, True, 170000, "ALTER … REFERENCES b(id)"),
        ("ALTER … REFERENCES b(id);", True, True, 180000, "ALTER … REFERENCES b(id) NOT VALID"),
        ("ALTER … REFERENCES b(id) NOT VALID;", False, False, 180000, "ALTER … REFERENCES b(id) NOT VALID"),
    ],
)
def test_foreign_keys_are_added_without_a_look_at_the_rows(
    statement: str, is_partitioned: bool, is_valid: bool, version: int, expected: str
) -> None:
    key = ForeignKey(1, QualifiedName("s", "t"), 'k"', statement, is_partitioned, is_valid)
    assert key.add_statement(version) == expected
    assert key.validate_statement == 'alter table "s"."t" validate constraint "k"""'


def test_open_transactions_are_named_by_pid_or_gid() -> None:
    text = describe_transactions(
        [
            OpenTransaction(7, None, "gid'1", "", "bob", "shop", "prepared", 70.4),
            OpenTransaction(8, 42, None, "psql", "", "", "idle in transaction", None),
        ]
    )
    assert text == (
        'prepared transaction "gid\'1" (user bob, database shop, 70 s old, prepared); pid 42 (psql, idle in transaction)'
    )


class Told:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def phase_changed(self, phase: Phase) -> None: ...

    def note(self, message: str) -> None: ...

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def test_a_warning_is_repeated_only_when_it_changes() -> None:
    told = Told()
    reporter = Reporter(told)
    for message in ("a", "a", "b", "", "", "b"):
        reporter.warn_on_change("x", message)
    assert told.warnings == ["a", "b", "b"]


def test_the_failure_that_explains_the_others_is_told() -> None:
    fenced, stopped, lost = Fenced("f"), TargetError("t"), ConnectionLost("c")
    assert most_telling(ExceptionGroup("g", [lost, ExceptionGroup("h", [stopped, lost])])) is stopped
    assert most_telling(ExceptionGroup("g", [lost, stopped, fenced])) is fenced
    assert most_telling(ExceptionGroup("g", [lost])) is lost


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def test_watchers_end_with_the_work() -> None:
    await beside(asyncio.sleep(0), [_for_ever()])


async def test_a_watcher_that_fails_ends_the_work() -> None:
    async def fail() -> None:
        raise LiveMigrationError("watcher")

    with pytest.raises(LiveMigrationError, match="watcher"):
        await beside(_for_ever(), [fail(), _for_ever()])
