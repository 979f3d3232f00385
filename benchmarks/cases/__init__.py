"""One file a case; `CASES` names them in the order in which they run."""

from __future__ import annotations

from benchmarks.cases import (
    backlog_binary,
    backlog_debezium,
    backlog_text,
    cost_per_row,
    deletes,
    full_without_key,
    kafka_to_target,
    lanes_by_key,
    latency,
    many_tables,
    slot_to_kafka,
    small_transactions,
    snapshot_mixed,
    snapshot_one_table,
    snapshot_pgcopydb,
    tpcb,
    two_consumers,
    updates,
    wide_text,
)
from benchmarks.cases.case import Case

CASES: dict[str, Case] = {
    each.CASE.name: each.CASE
    for each in (
        snapshot_mixed,
        snapshot_pgcopydb,
        snapshot_one_table,
        backlog_binary,
        kafka_to_target,
        slot_to_kafka,
        backlog_text,
        backlog_debezium,
        updates,
        deletes,
        small_transactions,
        tpcb,
        wide_text,
        full_without_key,
        latency,
        cost_per_row,
        many_tables,
        two_consumers,
        lanes_by_key,
    )
}
