"""What is said before the start of hypertables that become plain tables, and that the state keeps it."""

from __future__ import annotations

from live_migration.common.relation import QualifiedName
from live_migration.consumer.plain_chunks import is_told_without
from live_migration.coordinator.flat_entries import FlatEntries
from live_migration.coordinator.flat_findings import assess_flat
from live_migration.coordinator.hypertable_definitions import (
    ContinuousAggregate,
    Definitions,
    Dimension,
    Hypertable,
    Job,
)
from live_migration.coordinator.hypertable_entries import EntriesOfTimescale
from live_migration.coordinator.made_definitions import Made

METRICS, HOURLY = QualifiedName("public", "metrics"), QualifiedName("public", "hourly")
HIDDEN = QualifiedName("_timescaledb_internal", "_materialized_hypertable_2")
DEFINITIONS = Definitions(
    "2.29.2",
    "public",
    (Hypertable(METRICS, (Dimension("time", "timestamp with time zone", 86_400_000_000),)),),
    (ContinuousAggregate(HOURLY, "select 1", METRICS, True, "hour", 1, materialization=HIDDEN),),
    (Job(QualifiedName("_timescaledb_functions", "policy_retention"), "P1D", relation=METRICS, id=1000),),
)
NOTHING = FlatEntries(EntriesOfTimescale(frozenset(), frozenset()))


def test_a_database_without_hypertables_has_nothing_to_say() -> None:
    assert assess_flat(Definitions("2.29.2", "public"), NOTHING, 0) == []


def test_all_that_is_left_out_is_named_and_what_cannot_be_made_is_refused() -> None:
    entries = FlatEntries(NOTHING.entries, left_out=("view public.latest",), refused=("table column public.gate.at",))
    found = assess_flat(DEFINITIONS, entries, 5_000_000)
    assert [each.level for each in found] == ["error", *["warning"] * 5]
    told = "\n".join(each.what for each in found)
    for name in (
        "public.gate.at",
        "public.metrics",
        "public.hourly",
        "view public.latest",
        "policy_retention",
        "take about",
    ):
        assert name in told


def test_the_state_keeps_what_is_left_out() -> None:
    entries = EntriesOfTimescale(frozenset(), frozenset(), frozenset({(1259, 7)}))
    made = Made(DEFINITIONS, entries, left_out=frozenset({9}), is_flat=True)
    again = Made.decode(made.encode())
    assert again == made
    assert again.absent == {HIDDEN}
    assert Made(DEFINITIONS, entries).absent == frozenset()


def test_a_hash_partitions_range_is_told_by_timescaledb_alone() -> None:
    assert is_told_without(
        "((\"time\" >= '2026-01-01 00:00:00+00'::timestamp with time zone) AND (at < '2026-01-02'::date))"
    )
    assert not is_told_without("(_timescaledb_functions.get_partition_hash(sensor) < 715827882)")
