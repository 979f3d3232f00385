"""By which marks a table's rows may have got new values."""

from __future__ import annotations

import re

import pytest

from live_migration.common.rewriting import ANEW, find_rewrite, remember


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
        (mark(16, "1:700:23:a", "2:701:25:b c", "3:700:23:ü"), ""),  # varchar to text, say: the lane stops
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


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (1114, 1184, True),
        (1184, 1114, True),
        (20000, 20001, True),  # a domain to another
        (20000, 1700, False),  # which stops the lane
        (1184, 1184, False),
    ],
)
def test_a_type_that_takes_the_place_of_another_may_be_in_doubt(before: int, now: int, expected: bool) -> None:
    found = find_rewrite(mark(16, f"1:700:{before}:a"), mark(16, f"1:701:{now}:z"))
    assert bool(found) is expected
    assert not found or found.endswith(": z")
    assert not find_rewrite("16 1:700", mark(16, f"1:701:{now}:z"))


def test_a_name_that_came_by_a_rename_is_known_when_it_comes_again() -> None:
    renamed, added = mark(16, "1:700:23:id", "2:701:23:z"), mark(16, "1:700:23:id", "3:702:23:z")
    before = mark(16, "1:700:23:id", "2:700:23:a")
    assert not find_rewrite(before, added)
    known = remember(before, renamed)
    assert find_rewrite(known, added).endswith(": z")
    assert not find_rewrite(known, renamed)
    assert not find_rewrite(known, before)
    assert remember(known, renamed) == known
    assert find_rewrite(remember("16 1:700 2:700", renamed), added).endswith(": z")
    assert find_rewrite(known, mark(17, "1:700:23:id", "2:703:23:z")) == ANEW
