"""How far aggregates are materialized, before and after a refresh that may have been missed."""

from __future__ import annotations

from live_migration.common.relation import QualifiedName
from live_migration.coordinator.aggregate_state import AggregateState

WATERMARKS = "_timescaledb_catalog.continuous_aggs_watermark"
LOG = "_timescaledb_catalog.continuous_aggs_materialization_invalidation_log"
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
