"""What of an aggregate is refreshed where its watermark may not be written: what it reads, and nothing between."""

from __future__ import annotations

import pytest

from live_migration.coordinator.aggregate_refresh import Range, join_ranges, windows_below


def test_chunks_beside_one_another_are_one_run() -> None:
    assert join_ranges([(20, 30), (0, 10), (30, 40), (20, 30), (50, 60)]) == [(0, 10), (20, 40), (50, 60)]
    assert join_ranges([]) == []


@pytest.mark.parametrize(
    ("watermark", "expected"),
    [
        (35, [(0, 10), (20, 35)]),
        (20, [(0, 20)]),
        (45, [(0, 10), (20, 45)]),
        (60, [(0, 10), (20, 40), (50, 60)]),
        (0, []),
    ],
)
def test_runs_are_refreshed_up_to_the_watermark(watermark: int, expected: list[Range]) -> None:
    assert list(windows_below(watermark, [(0, 10), (20, 40), (50, 60)])) == expected
