"""By which marks a table's rows may have got new values."""

from __future__ import annotations

import re

import pytest

from live_migration.common.rewriting import ANEW, find_rewrite


def mark(file: int, *columns: str) -> str:
    """Give a mark of columns as `number:written by:type:name`, whose names it encodes."""
    fields = [column.split(":") for column in columns]
    return " ".join([str(file), *(":".join([*some, name.encode().hex()]) for *some, name in fields)])


BEFORE = mark(16, "1:700:23:a", "2:700:23:b c", "3:700:23:ü")


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (BEFORE, ""),
        (mark(17, "1:700:23:a", "2:700:23:b c", "3:700:23:ü"), ""),  # VACUUM FULL, TRUNCATE
        (mark(16, "1:700:23:a", "2:701:23:b c", "3:700:23:ü"), ""),  # SET DEFAULT
        (mark(17, "1:700:23:a", "3:700:23:ü"), ""),  # DROP COLUMN, then VACUUM FULL
        (mark(16, "1:701:23:z", "2:700:23:b c", "3:700:23:ü"), ""),  # RENAME COLUMN
        (mark(16, "1:700:23:a", "2:700:23:b c", "4:701:23:d"), ""),  # DROP COLUMN, ADD COLUMN of another name
        (mark(17, "1:700:23:a", "2:701:20:b c", "3:700:23:ü"), ANEW),  # ALTER TYPE
        (mark(17, "1:700:23:a", "2:700:23:b c", "3:700:23:ü", "4:701:701:d"), ANEW),  # ADD COLUMN
        (mark(16, "1:700:23:a", "2:700:23:b c", "4:701:23:ü"), "has columns .*: ü$"),  # DROP COLUMN, ADD COLUMN
        (mark(16, "1:701:23:b c", "2:701:23:a", "3:700:23:ü"), "has columns .*: b c, a$"),  # exchanged
        (mark(16, "1:701:23:ü", "2:700:23:b c"), "has columns .*: ü$"),  # DROP COLUMN, RENAME COLUMN
        (None, ""),
        ("", ""),
    ],
)
def test_what_may_have_given_rows_new_values(now: str | None, expected: str) -> None:
    found = find_rewrite(BEFORE, now)
    assert re.match(expected, found) if expected.startswith("has") else found == expected
    assert not find_rewrite(None, now)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (mark(16, "1:700:23:a", "2:700:23:b"), ""),
        (mark(17, "1:700:23:a", "2:701:20:b"), ANEW),
        (mark(16, "1:700:23:a", "3:701:23:b"), ""),
    ],
)
def test_of_a_mark_without_names_only_file_and_definitions_tell(now: str, expected: str) -> None:
    assert find_rewrite("16 1:700 2:700", now) == expected
