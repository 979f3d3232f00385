"""Whether a source may go on where the log ends."""

from __future__ import annotations

from typing import Any

import pytest

from live_migration.common.control import LogPosition, ProducerConfig
from live_migration.common.errors import KafkaError, SlotError
from live_migration.common.segment import START, Position
from live_migration.producer.resume import assess_slot, check_timeline, check_wal_end, published_lsn
from live_migration.producer.session import lane_positions
from live_migration.producer.timeline import parse_timeline_history

HISTORY = "1\t0/3000000\tno recovery target specified\n2\t0/5000000\tbefore 2020\n\n"
SLOT: dict[str, Any] = {
    "slot_type": "logical",
    "plugin": "pgoutput",
    "is_here": True,
    "active_pid": None,
    "wal_status": "reserved",
    "confirmed_lsn": 100,
    "reason": "",
}


def test_the_timeline_history_tells_where_each_was_left() -> None:
    assert parse_timeline_history(HISTORY) == {1: 0x3000000, 2: 0x5000000}


def test_a_timeline_that_was_left_above_the_log_is_followed() -> None:
    check_timeline(parse_timeline_history(HISTORY), 3, 2, 0x5000000)


@pytest.mark.parametrize(("recorded", "published"), [(2, 0x5000001), (1, 0x4000000), (3, 0x100), (7, 0x100)])
def test_a_timeline_that_lost_what_the_log_holds_is_refused(recorded: int, published: int) -> None:
    with pytest.raises(SlotError):
        check_timeline(parse_timeline_history(HISTORY), 3, recorded, published)


def test_a_source_whose_wal_ends_before_the_log_is_refused() -> None:
    check_wal_end(100, 100)
    with pytest.raises(SlotError, match="older state"):
        check_wal_end(99, 100)


@pytest.mark.parametrize("recorded", [100, 101])
def test_a_slot_at_or_behind_the_log_goes_on(recorded: int) -> None:
    assess_slot("s", SLOT, recorded)


@pytest.mark.parametrize(
    "change",
    [
        {"confirmed_lsn": 101},
        {"confirmed_lsn": None},
        {"slot_type": "physical"},
        {"plugin": "wal2json"},
        {"is_here": False},
        {"wal_status": "lost"},
        {"reason": "wal_removed"},
    ],
)
def test_a_slot_that_is_not_as_we_left_it_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SlotError):
        assess_slot("s", SLOT | change, 100)


def test_a_slot_that_is_gone_is_refused() -> None:
    with pytest.raises(SlotError, match="does not exist"):
        assess_slot("s", None, 100)


def position(*lanes: tuple[int, int]) -> LogPosition:
    return LogPosition(confirm_lsn=50, lanes=lanes, system_identifier="1", timeline=1, sent_at=0.0)


def test_the_log_reaches_to_its_furthest_lane() -> None:
    config = ProducerConfig(
        migration_id="m",
        topic_id="t",
        slot="s",
        publications=("p",),
        binary=False,
        lane_count=2,
        system_identifier="1",
        timeline=1,
        start_lsn=40,
    )
    assert published_lsn(config, None) == 40
    assert (
        published_lsn(config, position((10, 1), (90, 3))) == 91
    )  # a failover right before the commit record at 90 undid it
    assert published_lsn(config, position((10, 1), (20, 3))) == 50


def test_lane_positions_come_from_the_record_and_must_fit() -> None:
    assert lane_positions(None, 2) == [START, START]
    assert lane_positions(position((10, 1)), 1) == [Position(10, 1)]
    with pytest.raises(KafkaError):
        lane_positions(position((10, 1)), 2)
