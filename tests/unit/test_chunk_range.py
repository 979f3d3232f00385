"""Conditions of chunks, compared whatever their columns are called."""

from __future__ import annotations

import pytest

from live_migration.common.chunk_range import columns_of, find_renames, is_same_range, with_names

TIME = "((ts >= '2026-01-02 00:00:00+00'::timestamp with time zone) AND (ts < '2026-01-03 00:00:00+00'::timestamp with time zone))"
LATER = TIME.replace("2026-01-03", "2026-01-04")
HASH = "((_timescaledb_functions.get_partition_hash(kind) >= 0) AND (_timescaledb_functions.get_partition_hash(kind) < 1073741823))"
BOTH = f"{TIME} and {HASH}"
WITH_NULL = f"{TIME} and (kind is null or {HASH})"


def test_columns_are_told_from_functions_types_and_words() -> None:
    assert columns_of(TIME) == ["ts"]
    assert columns_of(WITH_NULL) == ["ts", "kind"]
    assert columns_of('(_timescaledb_functions.get_partition_for_key(("a AND b")::text) < 5)') == ['"a AND b"']
    assert columns_of("((at >= '2026-01-02'::date) AND (größe(at) < 'it''s (at) '::character varying(3)))") == ["at"]
    assert columns_of("(at >= '2026-01-01 00:00:00'::timestamp(3) without time zone)") == ["at"]
    assert columns_of("true") == columns_of("false") == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TIME, TIME.replace("ts ", "happened ")),
        (TIME, TIME.replace("ts ", '"At what ""time"""' + " ")),
        (BOTH, WITH_NULL),
        (BOTH, WITH_NULL.replace("kind", "sort").replace("ts ", "kind ")),
        (f"{HASH} and {TIME}", f"(kind is null or {HASH}) and {TIME}"),
        (None, None),
    ],
)
def test_a_range_is_the_same_whatever_its_columns_are_called(one: str | None, other: str | None) -> None:
    assert is_same_range(one, other)
    assert is_same_range(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TIME, LATER),
        (TIME, LATER.replace("ts ", "happened ")),
        (BOTH, TIME),
        (BOTH, WITH_NULL.replace("1073741823", "1073741824")),
        (BOTH, BOTH.replace("(kind)", "(ts)")),
        (TIME, None),
        (TIME, "true"),
        (None, TIME),
    ],
)
def test_another_range_is_another(one: str | None, other: str | None) -> None:
    assert not is_same_range(one, other)


def test_what_was_renamed_is_found_and_named_anew() -> None:
    now = WITH_NULL.replace("ts ", "happened ").replace("kind", "ts")
    renames = find_renames(BOTH, now)
    assert renames == {"ts": "happened", "kind": "ts"}
    assert with_names(LATER, renames) == LATER.replace("ts ", "happened ")
    assert with_names(HASH, renames) == HASH.replace("kind", "ts")
    assert find_renames(TIME, LATER.replace("ts ", "happened ")) == {}
