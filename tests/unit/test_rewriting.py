"""By which marks a table counts as written anew."""

from __future__ import annotations

import pytest

from live_migration.common.rewriting import is_rewritten


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("16 1:700 2:700", False),  # nothing
        ("17 1:700 2:700", False),  # VACUUM FULL, TRUNCATE
        ("16 1:700 2:701", False),  # SET DEFAULT
        ("17 1:700", False),  # DROP COLUMN, then VACUUM FULL
        ("17 1:700 2:701", True),  # ALTER TYPE
        ("17 1:700 2:700 3:701", True),  # ADD COLUMN
        (None, False),
        ("", False),
    ],
)
def test_rows_may_have_new_values_where_file_and_columns_are_new(now: str | None, expected: bool) -> None:
    assert is_rewritten("16 1:700 2:700", now) is expected
    assert not is_rewritten(None, now)
