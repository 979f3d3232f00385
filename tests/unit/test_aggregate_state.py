"""How far aggregates are materialized, before and after a refresh that may have been missed."""

from __future__ import annotations

from live_migration.common.relation import QualifiedName
from live_migration.coordinator.aggregate_state import AggregateState, as_invalidations

WATERMARKS = "_timescaledb_catalog.continuous_aggs_watermark"
LOG = "_timescaledb_catalog.continuous_aggs_materialization_invalidation_log"
RANGES = "_timescaledb_catalog.continuous_aggs_materialization_ranges"
HOURLY, NEW = QualifiedName("public", "hourly"), QualifiedName("public", "new")


def test_what_was_out_of_date_before_a_refresh_stays_so() -> None:
    before = AggregateState({WATERMARKS: [(HOURLY, (100,))], LOG: [(HOURLY, (10, 20)), (HOURLY, (100, 999))]})
    now = AggregateState(
        {WATERMARKS: [(HOURLY, (200,)), (NEW, (7,))], LOG: [(HOURLY, (200, 999)), (HOURLY, (100, 999))]}
    )
    since = now.since(AggregateState.decode(before.encode()))
    assert since.watermarks == {HOURLY: 100, NEW: 7}
    assert sorted(since.rows[LOG]) == [(HOURLY, (10, 20)), (HOURLY, (100, 999)), (HOURLY, (200, 999))]


def test_nothing_changes_without_a_refresh() -> None:
    state = AggregateState({WATERMARKS: [(HOURLY, (100,))], LOG: [(HOURLY, (10, 20))]})
    assert state.since(state) == state


def test_what_a_refresh_left_to_be_materialized_is_out_of_date() -> None:
    """A range ends before its second value, an invalidation with it; infinite is infinite in both."""
    endless = 2**63 - 1
    rows = {
        LOG: [(HOURLY, (10, 19))],
        RANGES: [(HOURLY, (20, 30)), (NEW, (-endless - 1, endless))],
    }
    found = as_invalidations(rows)
    assert found == {LOG: [(HOURLY, (10, 19)), (HOURLY, (20, 29)), (NEW, (-endless - 1, endless))], RANGES: []}
    assert as_invalidations({LOG: rows[LOG], RANGES: []}) == {LOG: rows[LOG], RANGES: []}
