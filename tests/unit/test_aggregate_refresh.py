"""Which bucket of an aggregate is refreshed where its watermark may not be written."""

from __future__ import annotations

from live_migration.coordinator.aggregate_refresh import bucket_within


def test_a_window_holds_one_whole_bucket_of_whatever_length() -> None:
    kind = "timestamp with time zone"
    assert bucket_within("1 mon", kind) == (
        "(b + '1 mon'::interval * 0.9)",
        f"(b + '1 mon'::interval * 1.5)::{kind}",
    )
    assert bucket_within("10", "integer") == ("b + '10'::bigint", "b + '10'::bigint")
