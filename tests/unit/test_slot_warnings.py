"""What is warned of while the slot keeps WAL, each once."""

from __future__ import annotations

from dataclasses import replace

from live_migration.coordinator.losses import slot_loss
from live_migration.coordinator.slot_warnings import Ladder, SlotWarnings
from live_migration.producer.slot import SlotState

MIB = 1 << 20
GIB = 1 << 30
FINE = SlotState("pgoutput", "shop", None, 100, 0, "reserved", None)


def kept(size: int, left: int | None = None, status: str = "reserved") -> SlotState:
    return replace(FINE, retained_bytes=size, safe_wal_bytes=left, wal_status=status)


def test_a_slot_that_keeps_little_is_not_spoken_of() -> None:
    assert SlotWarnings("s", 0).look(kept(10 * MIB)) == []
    assert SlotWarnings("s", 100 * MIB).look(kept(49 * MIB, 51 * MIB)) == []


def test_each_doubling_is_told_once() -> None:
    warnings = SlotWarnings("s", 0)
    assert warnings.look(kept(7 * GIB)) == []
    assert len(warnings.look(kept(9 * GIB))) == 1
    assert warnings.look(kept(15 * GIB)) == []
    (warning,) = warnings.look(kept(17 * GIB))
    assert "16.0 GiB" in warning


def test_each_step_towards_max_slot_wal_keep_size_is_told_once_with_what_to_do() -> None:
    warnings = SlotWarnings("s", 0)
    told = [warnings.look(kept(used * MIB, (100 - used) * MIB)) for used in range(101)]
    assert [used for used, each in enumerate(told) if each] == [50, 80, 95]
    assert "50 %" in told[50][0]
    assert "max_slot_wal_keep_size" in told[80][0]
    assert "live-migration status" in told[95][0]


def test_a_slot_far_above_its_bound_is_at_the_last_step() -> None:
    (warning,) = SlotWarnings("s", 0).look(kept(120 * MIB, -20 * MIB))
    assert "95 %" in warning


def test_our_own_bound_is_warned_of_before_it_is_reached() -> None:
    warnings = SlotWarnings("s", 100 * MIB)
    told = [warnings.look(kept(used * MIB)) for used in range(101)]
    assert [used for used, each in enumerate(told) if each] == [50, 80, 95]
    assert "--max-slot-lag" in told[50][0]


def test_a_slot_that_hovers_at_a_step_is_told_once_and_again_after_it_fell() -> None:
    ladder = Ladder((50, 80), 10)
    assert [ladder.climb(value) for value in (51, 49, 52, 45, 55)] == [50, None, None, None, None]
    assert ladder.climb(39) is None
    assert ladder.climb(90) == 80


def test_wal_status_is_told_when_it_gets_worse() -> None:
    warnings = SlotWarnings("s", 0)
    statuses = ["reserved", "extended", "reserved", "extended", "unreserved", "extended", "unreserved", "reserved"]
    told = [warnings.look(kept(MIB, None, status)) for status in statuses]
    assert [len(each) for each in told] == [0, 1, 0, 0, 1, 0, 0, 0]
    assert "unreserved" in told[4][0]


def test_a_lost_slot_says_how_it_was_lost() -> None:
    assert slot_loss("s", FINE) is None
    assert "does not exist" in str(slot_loss("s", None))
    assert "removed WAL" in str(slot_loss("s", replace(FINE, wal_status="lost")))
    assert "idle_timeout" in str(slot_loss("s", replace(FINE, reason="idle_timeout")))
