"""What the slot may be told."""

from __future__ import annotations

from live_migration.producer.ack_tracker import AckTracker


def test_a_commit_may_be_confirmed_but_is_recorded_only_when_kafka_has_it() -> None:
    acks = AckTracker(100)
    acks.begin()
    acks.commit(200)
    assert (acks.confirmable_lsn, acks.recorded_lsn) == (200, 100)
    acks.record(200)
    assert acks.recorded_lsn == 200


def test_a_keepalive_counts_between_transactions_only() -> None:
    acks = AckTracker(100)
    acks.begin()
    acks.keepalive(500)
    assert acks.confirmable_lsn == 100
    acks.commit(200)
    assert acks.confirmable_lsn == 200
    acks.keepalive(500)
    assert acks.confirmable_lsn == 500


def test_nothing_goes_back() -> None:
    acks = AckTracker(100)
    acks.keepalive(50)
    acks.commit(60)
    acks.record(70)
    assert (acks.received_lsn, acks.confirmable_lsn, acks.recorded_lsn) == (100, 100, 100)
