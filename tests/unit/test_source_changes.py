"""What is compared of definitions, and what is left to others."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from live_migration.common.errors import LiveMigrationError, TargetError
from live_migration.coordinator import source_changes
from live_migration.coordinator.definitions import Definition, decode, encode
from live_migration.coordinator.observer import Reporter
from live_migration.coordinator.run import Run
from live_migration.coordinator.source_changes import Change, compare_definitions, lacking, warn_of_lacking
from tests.e2e.migration import RecordingObserver

INDEX = Definition("index", "s", "t", "i", 7, 1259, 70, "on t (v)", "CREATE INDEX i ON s.t (v)", "DROP INDEX s.i")
COLUMN = Definition("column", "s", "t", "v", 7, 1249, 0, "", "", "")
FUNCTION = Definition(
    "function", "s", "", "f()", 0, 1255, 9, "1", "CREATE OR REPLACE FUNCTION s.f() …", "DROP ROUTINE s.f()"
)
TYPE = Definition("type", "s", "", "e", 0, 1247, 8, "CREATE TYPE s.e", "CREATE TYPE s.e", "DROP TYPE s.e")


def altered(each: Definition) -> Definition:
    return dataclasses.replace(each, definition=f"{each.definition} other", made_by=f"{each.made_by} other")


def test_what_is_new_gone_or_altered_is_found_with_its_statements() -> None:
    before = decode(encode([INDEX, COLUMN, FUNCTION, TYPE]))
    assert compare_definitions(before, [INDEX, COLUMN, FUNCTION, TYPE]) == []
    new = dataclasses.replace(INDEX, name="j")
    found = compare_definitions(before, [altered(INDEX), new, COLUMN, altered(TYPE)])
    assert [(each.label, each.statements) for each in found] == [
        ("index i of s.t was altered", ["DROP INDEX s.i", "CREATE INDEX i ON s.t (v) other"]),
        ("index j of s.t is new", ["CREATE INDEX i ON s.t (v)"]),
        ("type s.e was altered", ["-- type s.e was altered with ALTER; it is now: CREATE TYPE s.e other"]),
        ("function s.f() is gone", ["DROP ROUTINE s.f()"]),
    ]
    (replaced,) = compare_definitions([FUNCTION], [altered(FUNCTION)])
    assert replaced.statements == ["CREATE OR REPLACE FUNCTION s.f() … other"]


def test_new_and_dropped_tables_are_others_business() -> None:
    elsewhere = dataclasses.replace(INDEX, relation="u", table=8)
    assert compare_definitions([INDEX, COLUMN], [INDEX, COLUMN, elsewhere]) == []
    assert compare_definitions([INDEX, COLUMN, elsewhere], [INDEX, COLUMN]) == []
    # A column that is gone is a matter of the tables' shape.
    assert compare_definitions([INDEX, COLUMN], [INDEX]) == []


def test_what_the_target_shows_already_is_lacking_no_more() -> None:
    changes = compare_definitions([INDEX, COLUMN, FUNCTION], [altered(INDEX), COLUMN])
    assert lacking(changes, [INDEX, FUNCTION]) == changes
    assert [each.label for each in lacking(changes, [altered(INDEX), FUNCTION])] == ["function s.f() is gone"]
    assert lacking(changes, [altered(INDEX)]) == []


@asynccontextmanager
async def _session(_: str) -> AsyncIterator[None]:
    yield


async def test_what_is_named_at_the_very_end_ends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The target is in charge by then, and foreign keys, jobs and statistics are still to come: neither its refusal nor a full disk is in their way."""
    observer, file = RecordingObserver(), tmp_path / "file"
    file.touch()
    settings = SimpleNamespace(dir=file / "data")
    run = cast(
        Run, SimpleNamespace(settings=settings, target=None, source_session=_session, reporter=Reporter(observer))
    )
    answers: list[list[Change] | LiveMigrationError] = [TargetError("permission denied"), [Change(None, INDEX)]]

    async def find(*_: object, **__: object) -> Sequence[Change]:
        answer = answers.pop(0)
        if isinstance(answer, LiveMigrationError):
            raise answer
        return answer

    monkeypatch.setattr(source_changes, "find_lacking", find)
    await warn_of_lacking(run)
    assert observer.notes == ["what was changed on the source since the plan could not be read once more at the end"]
    await warn_of_lacking(run)
    (warning,) = observer.warnings
    assert "index i of s.t is new" in warning
    assert "could not be written" in warning
